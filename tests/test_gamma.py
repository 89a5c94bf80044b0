"""Laws of the gamma schedules: ends, monotony, the authors' numbers, round trips, and what is refused."""

from __future__ import annotations

import itertools
import math

import pytest

from rewardiv.errors import UserError
from rewardiv.gamma import DOMAINS, SHAPES, Clock, Gamma, parse_gamma

SCHEDULES = [
    "linear",
    "power:0.5",
    "power:2",
    "power:8",
    "power:1000",
    "step:0.3",
    "step:1",
    "sigmoid:10:0.5",
    "sigmoid:0.01:0",
    "sigmoid:1000:1",
    "cosine",
    "knots:0=1,1=0",
    "knots:0=1,0.3=0.9,1=0",
    "knots:0=1,0.2=1,0.21=0.05,0.6=0.05,1=0",
]
FINE = [k / 2000 for k in range(2001)]


def test_every_shape_is_tried_here() -> None:
    assert {text.partition(":")[0] for text in SCHEDULES} == set(SHAPES)


def full_clock(n: int) -> Clock:
    progress = [i / max(n - 1, 1) for i in range(n)]
    return Clock.of_steps(n, t=[0.96 - 0.95 * s for s in progress], logsnr=[-5 + 12 * s * s for s in progress])


@pytest.mark.parametrize("text", SCHEDULES)
def test_every_schedule_falls_from_exactly_one_to_exactly_zero(text: str) -> None:
    gamma = parse_gamma(text)
    values = [gamma(1 - s) for s in FINE]
    assert values[0] == 1 and values[-1] == 0
    assert all(0 <= value <= 1 for value in values)
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))


@pytest.mark.parametrize("text", SCHEDULES)
@pytest.mark.parametrize("domain", DOMAINS)
def test_text_round_trips(text: str, domain: str) -> None:
    gamma = parse_gamma(f"{text}@{domain}")
    assert str(gamma) == (text if domain == "exact" else f"{text}@{domain}")
    assert parse_gamma(str(gamma)) == gamma


@pytest.mark.parametrize("text", SCHEDULES)
def test_tau_is_clamped(text: str) -> None:
    gamma = parse_gamma(text)
    assert gamma(1 + 1e-12) == gamma(1) == 1
    assert gamma(-1e-12) == gamma(0) == 0


@pytest.mark.parametrize("n", range(2, 60))
def test_exact_domain_reaches_both_ends_for_every_number_of_steps(n: int) -> None:
    clock = full_clock(n)
    for domain in ("exact", "logsnr"):
        gamma = Gamma("power", (2,), domain)
        assert gamma.at(clock, 0) == 1 and gamma.at(clock, n - 1) == 0


def test_larger_power_stays_with_the_base_model_longer() -> None:
    values = [parse_gamma(f"power:{p}")(0.5) for p in (0.5, 1, 2, 4, 8)]
    assert values == sorted(values)
    assert values[1:] == [0.5, 0.75, 0.9375, 1 - 0.5**8]
    assert parse_gamma("power:1")(0.3) == pytest.approx(parse_gamma("linear")(0.3))


@pytest.mark.parametrize(("power", "last"), [(1, 0.960), (2, 0.922), (4, 0.849), (8, 0.721)])
def test_last_finetuned_weight_of_the_authors_25_steps(power: int, last: float) -> None:
    clock = Clock.of_steps(25)
    finetuned = [1 - parse_gamma(f"power:{power}@nemo").at(clock, i) for i in range(25)]
    assert round(finetuned[-1], 3) == last
    assert finetuned == pytest.approx([(i / 25) ** power for i in range(25)])


@pytest.mark.parametrize("fraction", ["0", "0.1", "0.3", "0.6", "0.7", "1"])
def test_step_switches_where_the_authors_code_does(fraction: str) -> None:
    gamma = parse_gamma(f"step_{fraction}@nemo")
    for n in range(1, 101):
        clock = Clock.of_steps(n)
        assert [1 - gamma.at(clock, i) for i in range(n)] == [float(i / n >= float(fraction)) for i in range(n)]


def test_step_gives_the_two_constant_schedules() -> None:
    clock = Clock.of_steps(20)
    assert {parse_gamma("step:0").at(clock, i) for i in range(20)} == {0}
    assert {parse_gamma("step:1@nemo").at(clock, i) for i in range(20)} == {1}


@pytest.mark.parametrize(
    ("nemo", "ours"),
    [("power_2.0", "power:2"), ("power_2", "power:2"), ("step_0.6", "step:0.6"), ("power_2.0@nemo", "power:2@nemo")],
)
def test_nemo_names_are_understood(nemo: str, ours: str) -> None:
    assert parse_gamma(nemo) == parse_gamma(ours)
    assert str(parse_gamma(nemo)) == ours


def test_text_is_read_without_regard_to_case_and_order_of_knots() -> None:
    assert parse_gamma(" Power:2.0@EXACT ") == parse_gamma("power:2")
    assert parse_gamma("knots:1=0,0.3=0.9,0=1") == parse_gamma("knots:0=1,0.3=0.9,1=0")
    assert str(parse_gamma("step:-0")) == "step:0"


def test_closed_forms_at_half_way() -> None:
    assert parse_gamma("cosine")(0.5) == pytest.approx(0.5)
    assert parse_gamma("cosine")(0.75) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert parse_gamma("sigmoid:12:0.5")(0.5) == pytest.approx(0.5)
    steep = parse_gamma("sigmoid:1000:0.3")
    assert steep(0.75) == 1 and steep(0.65) == pytest.approx(0, abs=1e-12)
    logistic = [1 / (1 + math.exp(-8 * (0.4 - s))) for s in (0, 0.7, 1)]
    expected = (logistic[1] - logistic[2]) / (logistic[0] - logistic[2])
    assert parse_gamma("sigmoid:8:0.4")(0.3) == pytest.approx(expected)


def test_knots_are_met_and_two_knots_make_a_line() -> None:
    gamma = parse_gamma("knots:0=1,0.1=0.95,0.3=0.9,0.8=0.2,1=0")
    for progress, value in gamma.knots:
        assert gamma(1 - progress) == pytest.approx(value, abs=1e-9)
    line = parse_gamma("knots:0=1,1=0")
    assert all(line(1 - s) == pytest.approx(1 - s, abs=1e-12) for s in FINE)


def test_knots_on_a_parabola_follow_it() -> None:
    """PCHIP is third-order accurate between knots of smooth monotone data, and second-order near the ends."""
    knots = ",".join(f"{k / 16}={1 - (k / 16) ** 2}" for k in range(17))
    gamma = parse_gamma(f"knots:{knots}")
    assert max(abs(gamma(1 - s) - (1 - s * s)) for s in FINE) < 5e-4


def test_knots_curve_has_a_continuous_slope() -> None:
    gamma = parse_gamma("knots:0=1,0.25=0.8,0.5=0.7,1=0")
    h = 1e-5
    for knot in (0.25, 0.5):
        before = (gamma(1 - knot) - gamma(1 - knot + h)) / h
        after = (gamma(1 - knot - h) - gamma(1 - knot)) / h
        assert before == pytest.approx(after, abs=1e-3) and before < -0.1


def test_knots_slope_is_the_weighted_harmonic_mean_of_its_neighbours() -> None:
    """Widths 0.2 and 0.8, secants -2.5 and -0.625: 3 / (1.8 / -2.5 + 1.2 / -0.625)."""
    gamma, h = parse_gamma("knots:0=1,0.2=0.5,1=0"), 1e-6
    assert (gamma(0.8 - h) - gamma(0.8 + h)) / (2 * h) == pytest.approx(3 / (1.8 / -2.5 + 1.2 / -0.625), rel=1e-4)


def test_clock_domains() -> None:
    clock = Clock.of_steps(5, t=[0.9, 0.7, 0.5, 0.3, 0.1], logsnr=[-6, -3, 0, 3, 6])
    assert len(clock) == 5
    assert clock.exact == (1, 0.75, 0.5, 0.25, 0)
    assert clock.nemo == pytest.approx((1, 0.8, 0.6, 0.4, 0.2))
    assert clock.t == (0.9, 0.7, 0.5, 0.3, 0.1)
    assert clock.logsnr == (1, 0.75, 0.5, 0.25, 0)


def test_one_step_is_the_base_model() -> None:
    clock = Clock.of_steps(1, t=[0.99], logsnr=[-5.0])
    for domain in ("exact", "nemo", "logsnr"):
        assert parse_gamma(f"power:2@{domain}").at(clock, 0) == 1
    assert parse_gamma("power:2@t").at(clock, 0) == pytest.approx(1 - 0.01**2)


def test_a_first_step_without_signal_has_a_finite_log_snr() -> None:
    clock = Clock.of_steps(3, logsnr=[-math.inf, 0, 20])
    assert clock.logsnr == (1, 0.5, 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("powr:2", "did you mean 'power'"),
        ("power:2@nmo", "did you mean 'nemo'"),
        ("power:2@", "unknown gamma domain ''"),
        ("", "unknown gamma shape ''"),
        ("power", "'power' is written power:P; numbers given: 0"),
        ("power:1:2", "numbers given: 2"),
        ("linear:1", "'linear' is written linear; numbers given: 1"),
        ("sigmoid:10", "written sigmoid:K:C; numbers given: 1"),
        ("power:nan", "'nan' in 'power:nan' is not a finite number"),
        ("power:inf", "not a finite number"),
        ("power:1e999", "not a finite number"),
        ("power:1_0", "not a finite number"),
        ("power:", "not a finite number"),
        ("power_x", "not a finite number"),
        ("power:0", "P = 0 in gamma power:P is outside"),
        ("power:-2", "P = -2"),
        ("step:1.2", "F = 1.2 in gamma step:F is outside 0 to 1"),
        ("step:-0.1", "F = -0.1"),
        ("sigmoid:0:0.5", "K = 0"),
        ("sigmoid:10:1.5", "C = 1.5"),
        ("knots:0=1,0.5=0.3,0.7=0.6,1=0", "rises at the knot 0.7=0.6, after 0.5=0.3"),
        ("knots:0=1,0.5=1.2,1=0", "leaves [0, 1] at the knot 0.5=1.2"),
        ("knots:0=1,0.5=-0.2,1=0", "leaves [0, 1] at the knot 0.5=-0.2"),
        ("knots:0=1,1.5=0.2,1=0", "1.5=0.2"),
        ("knots:0=0.9,1=0", "the first gamma knot is 0=0.9; it must be 0=1"),
        ("knots:0=1,0.9=0", "the last gamma knot is 0.9=0; it must be 1=0"),
        ("knots:0=1,0.5=0.6,0.5=0.4,1=0", "two gamma knots lie at progress 0.5"),
        ("knots:0=1", "2 to 32"),
        ("knots", "is not a knot"),
        ("knots:0=1,0.5,1=0", "'0.5' in"),
        ("knots:0=1,a=0.5,1=0", "'a' in"),
    ],
)
def test_a_bad_schedule_is_refused_in_words(text: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        parse_gamma(text)
    assert said in str(error.value)


def test_what_is_built_without_text_is_checked_as_well() -> None:
    with pytest.raises(UserError, match="rises"):
        Gamma("knots", (0, 1, 0.5, 0.2, 0.6, 0.4, 1, 0))
    with pytest.raises(UserError, match="P = nan"):
        Gamma("power", (math.nan,))
    with pytest.raises(UserError, match="did you mean 'logsnr'"):
        Gamma("linear", (), "logsr")


def test_clocks_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="number of steps is 0"):
        Clock.of_steps(0)
    with pytest.raises(ValueError, match="t must hold 3 numbers"):
        Clock.of_steps(3, t=[0.9, 0.1])
    with pytest.raises(ValueError, match="logsnr must hold"):
        Clock.of_steps(2, logsnr=[math.nan, 1])
    with pytest.raises(ValueError, match="logsnr must rise"):
        Clock.of_steps(2, logsnr=[1, 1])
    with pytest.raises(UserError, match="needs the scheduler's logsnr"):
        parse_gamma("linear@logsnr").at(Clock.of_steps(4), 0)
