"""Laws of the methods as mixtures: ends, weights, cost, names, and what is refused."""

from __future__ import annotations

import re

import pytest

from rewardiv.errors import UserError
from rewardiv.gamma import Clock, parse_gamma
from rewardiv.methods import DEFAULT_METHODS, USAGE, Method, Term, parse_method, parse_methods

CLOCK = Clock.of_steps(20, t=[1 - i / 20 for i in range(20)], logsnr=[i - 10 for i in range(20)])
METHODS = [
    "base",
    "finetuned",
    "lora:0",
    "lora:0.5",
    "lora:1",
    "lora:2",
    "aig:power:2",
    "aig:step:0.6@nemo",
    "aig:knots:0=1,0.3=0.9,1=0@logsnr",
    "anneal-lora:cosine",
    "anneal-lora:sigmoid:10:0.5@t",
    "blend:0",
    "blend:0.3",
    "blend:1",
]
BASE, FINETUNED = (Term(0, 1),), (Term(1, 1),)


def all_terms(text: str) -> list[tuple[Term, ...]]:
    return [parse_method(text).terms(CLOCK, i) for i in range(len(CLOCK))]


@pytest.mark.parametrize("text", METHODS)
def test_a_mixture_is_sorted_positive_and_sums_to_one(text: str) -> None:
    for terms in all_terms(text):
        scales = [term.lora_scale for term in terms]
        assert scales == sorted(set(scales))
        assert all(term.weight > 0 for term in terms)
        assert sum(term.weight for term in terms) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("text", ["base", "lora:0", "blend:1", "aig:step:1@nemo", "anneal-lora:step:1@nemo"])
def test_methods_that_are_the_base_model(text: str) -> None:
    assert set(all_terms(text)) == {BASE}


@pytest.mark.parametrize("text", ["finetuned", "lora:1", "blend:0", "aig:step:0", "anneal-lora:step:0"])
def test_methods_that_are_the_finetuned_model(text: str) -> None:
    assert set(all_terms(text)) == {FINETUNED}


def test_aig_starts_as_base_ends_as_finetuned_and_mixes_between() -> None:
    terms = all_terms("aig:power:2")
    assert terms[0] == BASE and terms[-1] == FINETUNED
    gamma = parse_gamma("power:2").at(CLOCK, 7)
    assert terms[7] == (Term(0, gamma), Term(1, 1 - gamma))


def test_annealed_scale_and_aig_have_the_same_mean_scale() -> None:
    for aig, annealed in zip(all_terms("aig:power:2"), all_terms("anneal-lora:power:2"), strict=True):
        assert len(annealed) == 1
        assert annealed[0].lora_scale == pytest.approx(sum(term.lora_scale * term.weight for term in aig))


def test_blend_is_constant_and_its_number_is_the_base_models() -> None:
    assert set(all_terms("blend:0.25")) == {(Term(0, 0.25), Term(1, 0.75))}


def test_cost_counts_terms_and_guidance_pairs() -> None:
    def nfe(text: str, guidance_scale: float) -> int:
        return parse_method(text).nfe(CLOCK, guidance_scale)

    for text in ("base", "finetuned", "lora:0.5", "anneal-lora:power:2", "blend:0", "aig:step:0.5"):
        assert nfe(text, 1) == 20 and nfe(text, 3) == 40
    assert nfe("blend:0.5", 3) == 80
    assert nfe("aig:power:2", 3) == 2 * (2 * 20 - 2), "both ends take one pass"
    assert nfe("aig:power:2@nemo", 3) == 2 * (2 * 20 - 1), "the authors' steps never reach the image"


@pytest.mark.parametrize("text", METHODS)
def test_text_round_trips_and_names_are_safe(text: str) -> None:
    method = parse_method(text)
    assert str(method) == text
    assert parse_method(str(method)) == method
    assert method.file_name == text.replace(":", "-")
    assert re.fullmatch(r"[a-z0-9.,=@+-]+", method.file_name)
    assert method.label


def test_labels_and_file_names_differ_where_methods_do() -> None:
    methods = parse_methods(METHODS)
    assert len({method.label for method in methods}) == len(methods)
    assert len({method.file_name for method in methods}) == len(methods)
    assert parse_method("lora:0.5").label == "LoRA × 0.5"
    assert parse_method("aig:power:2@nemo").label == "AIG power 2 @nemo"
    assert parse_method("blend:0.3").label == "Blend, 30 % base"


def test_long_file_names_are_cut_and_stay_different() -> None:
    knots = ",".join(f"{k / 30:.15f}={1 - k / 30:.15f}" for k in range(1, 30))
    names = {parse_method(f"aig:knots:0=1,{knots},1=0{domain}").file_name for domain in ("", "@nemo", "@t")}
    assert len(names) == 3 and all(len(name) <= 120 for name in names)


def test_only_the_base_method_needs_no_lora() -> None:
    assert [text for text in METHODS if not parse_method(text).needs_lora] == ["base"]


def test_one_kind_of_spelling_is_canonical() -> None:
    assert str(parse_method(" AIG:power_2.0@exact ")) == "aig:power:2"
    assert str(parse_method("lora:0.50")) == "lora:0.5"
    assert str(parse_method("lora:-0")) == "lora:0"
    assert [str(method) for method in parse_methods(DEFAULT_METHODS)] == list(DEFAULT_METHODS)
    assert {parse_method(text).kind for text in METHODS} == set(USAGE)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fintuned", "unknown method 'fintuned'; did you mean 'finetuned'?"),
        ("", "unknown method ''"),
        ("lara:0.5", "did you mean 'lora'"),
        ("lora", "lora:A, such as lora:0.5"),
        ("lora:", "write lora:A"),
        ("lora:x", "'x' in 'lora:x' is not a finite number"),
        ("lora:nan", "not a finite number"),
        ("lora:2.5", "lora:A takes a number in 0 to 2, got 2.5"),
        ("lora:-0.5", "got -0.5"),
        ("blend:1.5", "blend:L takes a number in 0 to 1, got 1.5"),
        ("base:1", "cannot read method 'base:1'; write base"),
        ("aig", "aig:GAMMA, such as aig:power:2"),
        ("aig:", "write aig:GAMMA"),
        ("aig:powr:2", "did you mean 'power'"),
        ("aig:knots:0=1,0.4=0.2,0.6=0.5,1=0", "rises at the knot 0.6=0.5"),
    ],
)
def test_a_bad_method_is_refused_in_words(text: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        parse_method(text)
    assert said in str(error.value)


def test_lists_of_methods_that_are_refused() -> None:
    with pytest.raises(UserError, match="no method given"):
        parse_methods([])
    with pytest.raises(UserError, match="'aig:power:2' is given twice"):
        parse_methods(["aig:power:2", "base", "aig:power_2.0"])


def test_a_method_built_without_text_is_checked_as_well() -> None:
    with pytest.raises(UserError, match="aig:GAMMA"):
        Method("aig", value=0.5)
    with pytest.raises(UserError, match="is written base"):
        Method("base", gamma=parse_gamma("linear"))
    with pytest.raises(UserError, match="got nan"):
        Method("lora", value=float("nan"))
