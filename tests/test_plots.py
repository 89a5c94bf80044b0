"""Plots: every record is drawn, in its method's colour, and the SVG can stand in a page beside another."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from rewardiv.plots import (
    COLOURS,
    INK,
    MAX_POINTS,
    RUN_COLOURS,
    TITLES,
    Curve,
    TrainingRun,
    figure_svg,
    method_colours,
    reward_figure,
    spectral_figure,
    training_figures,
)

BASE = Curve("Base", COLOURS["base"], (1, 2, 3), (0.1, 0.2, 0.3))
AIG = Curve("AIG power 2", COLOURS["aig"], (1, 2, 3), (0.1, 0.4, 0.9), interval=(0.7, 1.1))


def drawn_lines(figure) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines if line.get_label()[0] != "_"}


def test_every_curve_is_drawn_with_its_values_and_colour():
    figure = reward_figure([BASE, AIG], num_steps=3, reward="vivid")
    assert drawn_lines(figure) == {"Base": [0.1, 0.2, 0.3], "AIG power 2": [0.1, 0.4, 0.9]}
    assert [line.get_color() for line in figure.axes[0].lines[::2]] == [COLOURS["base"], COLOURS["aig"]]


def test_an_interval_becomes_an_error_bar_of_that_height():
    (bar,) = reward_figure([AIG], num_steps=3, reward="vivid").axes[0].collections
    assert bar.get_segments()[0][:, 1].tolist() == [0.7, 1.1]


def test_the_null_band_spans_exactly_the_band_and_is_absent_without_one():
    band = next(p for p in spectral_figure([BASE], num_steps=3, null=(0.5, 2.5)).axes[0].patches if p.get_gid())
    assert (band.get_y(), band.get_y() + band.get_height()) == (0.5, 2.5)
    assert not [p for p in spectral_figure([BASE], num_steps=3).axes[0].patches if p.get_gid()]


def test_a_figure_of_nothing_yet_can_be_drawn():
    assert "<svg" in figure_svg(spectral_figure([], num_steps=1), "nothing yet")


def test_methods_have_different_colours_and_a_kind_keeps_its_own():
    colours = method_colours(["base", "finetuned", "lora:0.5", "lora:0.7", "aig:power:2", "aig:linear", "aig:cosine"])
    assert len(set(colours.values())) == 7
    assert colours["base"] == COLOURS["base"] and colours["aig:power:2"] == COLOURS["aig"]


@pytest.mark.parametrize("figure", [reward_figure([AIG], num_steps=3, reward="x"), spectral_figure([], num_steps=9)])
def test_svg_is_well_formed_scales_with_the_page_and_styles_nothing_else(figure):
    svg = figure_svg(figure, 'a "quoted" <description>')
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == 'a "quoted" <description>'
    assert root.get("width") is None and root.get("viewBox")
    assert "<style" not in svg and "xlink:href" not in svg and "currentColor" in svg


def test_every_reference_inside_an_svg_is_defined_in_it():
    svg = figure_svg(spectral_figure([BASE, AIG], num_steps=3, null=(0, 1)), "distance")
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))
    assert used and used <= set(re.findall(r'id="([^"]+)"', svg))


def step(number: int, reward: float, **numbers: float) -> dict:
    return {"step": number, "reward_mean": reward, "rewards": {"vivid": reward}, "kl": 0.0, "path_kl": 0.0,
            "lora_norm": 0.0, "grad_norm": 1.0, "learning_rate": 1e-3} | numbers


def probe(number: int, reward: float, trace: float | None = 1.0, clip: float = 0.3) -> dict:
    return {"step": number, "rewards": {"vivid": reward}, "held_out": {"clip": clip}, "gain": reward - 1,
            "standard_errors": {"vivid": 0.25, "clip": 0.05}, "scd": 4.0, "scd_null": [0.5, 2.5], "trace_ratio": trace,
            "trace_null": [0.6, 1.6], "effective_rank": 5.0, "effective_rank_base": 6.0, "pairwise_distance": 2.0,
            "num_images": 16}


STEPS = [step(i, 1 + i / 10) for i in range(1, 31)]
PROBES = [probe(0, 1.0), probe(10, 2.0, 0.8, 0.4), probe(20, 3.0, 0.5, 0.2), probe(30, 4.0, 0.2, 0.1)]
RUN = TrainingRun("first", RUN_COLOURS[0], STEPS, PROBES, onset=20, best=10, floor=0.4)
OTHER = TrainingRun("second", RUN_COLOURS[1], STEPS[:20], PROBES[:2])


def marks(figure, gid: str) -> list:
    return [artist for artist in (*figure.axes[0].lines, *figure.axes[0].collections) if artist.get_gid() == gid]


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def lines_of(figure, colour: str) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines if line.get_color() == colour]


def test_figures_of_a_run_share_their_size_and_step_axis_and_show_the_onset():
    figures = training_figures([RUN])
    assert list(figures) == [name for name in TITLES if name != "regularisers"], "those are off"
    assert len({(figure.axes[0].get_xlim(), *figure.get_size_inches()) for figure in figures.values()}) == 1
    for figure in figures.values():
        (line,) = marks(figure, "onset")
        assert list(line.get_xdata()) == [20, 20]
        assert "collapse onset" in [text.get_text() for text in figure.axes[0].texts]


def test_the_best_probe_is_marked_where_it_lies():
    figures = training_figures([RUN])
    for name, value in (("reward", 2.0), ("diversity", 0.8), ("spectral", 4.0)):
        (star,) = marks(figures[name], "best")
        assert (star.get_xdata()[0], star.get_ydata()[0]) == (10, value) and "best trade-off" in legend(figures[name])
    assert not marks(training_figures([OTHER])["reward"], "best")


def test_rewards_are_drawn_raw_smoothed_and_probed_with_two_standard_errors():
    figure = training_figures([RUN])["reward"]
    raw, smooth, probes, *_ = lines_of(figure, RUN.colour)
    assert raw == ([record["step"] for record in STEPS], [record["reward_mean"] for record in STEPS])
    assert smooth[0] == raw[0] and smooth[1][0] == pytest.approx(raw[1][0])
    assert max(map(abs, (a - b for a, b in zip(smooth[1], raw[1], strict=True)))) < 0.5
    assert probes == ([0, 10, 20, 30], [1, 2, 3, 4])
    (bars,) = figure.axes[0].collections
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[m - 0.5, m + 0.5] for m in (1, 2, 3, 4)]


def test_diversity_has_its_floor_and_the_distance_its_band():
    figures = training_figures([RUN])
    assert [line.get_ydata()[0] for line in marks(figures["diversity"], "floor")] == [0.4]
    assert ([0, 10, 20, 30], [1, 0.8, 0.5, 0.2]) in lines_of(figures["diversity"], RUN.colour)
    for name, edges in (("spectral", {0.5, 2.5}), ("diversity", {0.6, 1.6})):
        (band,) = marks(figures[name], "null-band")
        assert set(band.get_paths()[0].vertices[:, 1]) == edges
    assert figures["diversity"].axes[0].get_ylim()[1] < 1.2, "a wide band doesn't squeeze the curve"


def test_held_out_rewards_are_in_deviations_of_the_first_probe():
    """The clip means 0.3, 0.4, 0.2, 0.1 with a deviation of 0.05 * sqrt(16)."""
    lines = lines_of(training_figures([RUN])["held_out"], RUN.colour)
    assert ([0, 10, 20, 30], [0, 1, 2, 3]) in lines
    assert any(ys == pytest.approx([0, 0.5, -0.5, -1]) for _, ys in lines)


def test_runs_are_overlaid_in_their_colours_and_named():
    figures = training_figures([RUN, OTHER])
    for name, figure in figures.items():
        assert {RUN.colour, OTHER.colour} <= {line.get_color() for line in figure.axes[0].lines}, name
        assert legend(figure)[:2] == ["first", "second"]


@pytest.mark.parametrize("key", ["kl", "path_kl", "lora_norm"])
def test_a_regulariser_is_drawn_where_it_is_on(key: str):
    on = TrainingRun("on", RUN_COLOURS[1], [step(i, 1.0, **{key: i / 5}) for i in (1, 2, 3)])
    figures = training_figures([RUN, on])
    assert lines_of(figures["regularisers"], on.colour) == [([], []), ([1, 2, 3], [0.2, 0.4, 0.6])][1:]
    assert "regularisers" not in training_figures([RUN])


def test_several_rewards_are_brought_to_one_scale():
    both = [record | {"rewards": {"vivid": record["rewards"]["vivid"], "clip": 0.3}} for record in STEPS]
    probes = [record | {"rewards": record["rewards"] | record["held_out"], "held_out": {}} for record in PROBES]
    figures = training_figures([TrainingRun("mix", RUN_COLOURS[0], both, probes)])
    assert {"vivid", "clip"} <= set(legend(figures["reward"])) and "s.d." in figures["reward"].axes[0].get_title("left")
    drawn = [ys for _, ys in lines_of(figures["reward"], RUN_COLOURS[0])]
    assert [0, 1, 2, 3] in drawn and any(ys == pytest.approx([0, 0.5, -0.5, -1]) for ys in drawn)
    assert "held_out" not in figures


@pytest.mark.parametrize("run", [
    pytest.param(TrainingRun("new", RUN_COLOURS[0], []), id="nothing"),
    pytest.param(TrainingRun("new", RUN_COLOURS[0], STEPS[:1]), id="one step"),
    pytest.param(TrainingRun("new", RUN_COLOURS[0], [], PROBES[:1], best=0), id="one probe"),
    pytest.param(TrainingRun("x", RUN_COLOURS[0], [step(1, math.nan, grad_norm=math.inf)], [probe(0, 1.0, None)]), id="nan"),
    pytest.param(TrainingRun("x" * 90, RUN_COLOURS[0], STEPS, PROBES, onset=0), id="long name"),
])
def test_whatever_is_missing_can_be_drawn(run: TrainingRun):
    for runs in ([run], [run, RUN], [run, run, RUN]):
        figures = training_figures(runs)
        assert {"reward", "diversity", "grad_norm", "learning_rate"} <= figures.keys()
        for name, figure in figures.items():
            ElementTree.fromstring(figure_svg(figure, name))
    assert "no steps yet" in [text.get_text() for text in training_figures([])["reward"].axes[0].texts]


@pytest.mark.parametrize("figure", [
    pytest.param(spectral_figure([Curve("Finetuned", COLOURS["finetuned"], (1, 2), (0.0, 1e6))], num_steps=2), id="denoising"),
    pytest.param(training_figures([TrainingRun("far", RUN_COLOURS[0], STEPS, [
        record | {"scd": 1e5 * record["step"] / 3} for record in PROBES])])["spectral"], id="training"),
])
def test_large_distances_have_no_factor_over_the_axis_where_the_legend_is(figure):
    figure.canvas.draw()
    axis = figure.axes[0].yaxis
    assert axis.get_offset_text().get_text() == ""
    assert {"0", "1000k"} <= {label.get_text() for label in axis.get_ticklabels()}


def test_a_step_done_again_after_a_rollback_is_drawn_once():
    run = TrainingRun("x", RUN_COLOURS[0], [step(1, 1.0), step(2, 9.0), step(3, math.nan), step(2, 2.0)])
    assert lines_of(training_figures([run])["reward"], run.colour)[0] == ([1, 2], [1, 2])


def test_long_runs_are_averaged_in_groups_and_legends_stay_inside():
    long = [TrainingRun(f"2026-11-23 run {k}", RUN_COLOURS[k], [step(i, float(i)) for i in range(1, 5001)], PROBES, 20, 10)
            for k in range(6)]
    figures = training_figures(long)
    steps, values = lines_of(figures["reward"], RUN_COLOURS[0])[0]
    assert len(steps) <= MAX_POINTS and steps == values and sum(steps) / len(steps) == pytest.approx(2500.5, rel=0.01)
    for figure in figures.values():
        figure.draw_without_rendering()
        box = figure.axes[0].get_legend().get_window_extent()
        title = figure.axes[0]._left_title.get_window_extent()
        assert box.x1 <= figure.bbox.x1 and box.y1 <= title.y0 + 4 and title.y1 <= figure.bbox.y1


def test_text_and_axes_follow_the_page():
    svg = figure_svg(training_figures([RUN])["diversity"], "diversity")
    assert INK not in svg and "currentColor" in svg
