"""Records as matplotlib figures, and figures as SVG that a web page can hold; the only user of matplotlib.

Figures are made directly, never through pyplot, so they may be drawn in any thread and belong to nobody but the caller.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, cycle, pairwise

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator

from rewardiv.methods import parse_method
from rewardiv.registry import shown_reward

COLOURS = {  # told apart in every common kind of colour blindness, readable on white and on black
    "base": "#7f8ba3",
    "finetuned": "#e4572e",
    "lora": "#e0a100",
    "aig": "#2f7de1",
    "anneal-lora": "#9b5de5",
    "blend": "#12a594",
}
SPARE_COLOURS = ("#d6409f", "#5b8c00", "#00a2c7", "#a18072", "#5f5fd6", "#c2410c")
RUN_COLOURS = ("#2f7de1", "#e4572e", "#12a594", "#9b5de5", "#e0a100", "#d6409f", "#5b8c00", "#00a2c7")
INK = "#010203"  # text and axes; a page replaces it by its own text colour
MAX_LABEL = 30
MAX_POINTS = 200  # of a line; more steps are averaged in groups
EMA_STEPS = 6  # of the smoothed line: its memory, in points drawn
WIDTH, AXES_BOTTOM, AXES_HEIGHT = 4.5, 0.426, 1.73  # inches
FRONTIER_COLUMNS = 4  # of a legend that names LoRAs too
BEST = "best trade-off"
ROW_POINTS = 12.0  # of a legend
TITLE_STYLE = {"fontsize": 10, "color": INK, "loc": "left", "fontweight": "bold"}
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
TITLES = {  # of training_figures, in the order in which a page shows them
    "reward": "mean reward", "diversity": "variance kept, share of the base's", "spectral": "spectral distance to the base",
    "held_out": "reward gains, in the base's s.d.", "effective_rank": "effective rank within prompts",
    "pairwise_distance": "distance of images within prompts", "regularisers": "regularisers",
    "grad_norm": "gradient norm before clipping", "learning_rate": "learning rate",
}

Record = Mapping[str, object]
Points = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Curve:
    """One method's number along the denoising.

    Attributes:
        label: The method's name in the legend.
        colour: "#rrggbb".
        steps: Denoising steps, 1 to N, rising.
        values: The number at each of `steps`.
        interval: (low, high) around the last value, drawn as an error bar; None where it isn't known.
    """

    label: str
    colour: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class TrainingRun:
    """One finetuning run to be drawn.

    Attributes:
        label: The run's name in the legends.
        colour: "#rrggbb", such as one of RUN_COLOURS.
        steps: Step records as in metrics.jsonl; of two with the same step the later counts, and so for `probes`.
        probes: Probe records as in probes.jsonl.
        onset: The step at which it begins to collapse.
        best: The step of the probe with the best trade-off.
        floor: Share of the variance below which it stops; 0 is none.
    """

    label: str
    colour: str
    steps: Sequence[Record]
    probes: Sequence[Record] = ()
    onset: int | None = None
    best: int | None = None
    floor: float = 0.0


@dataclass(frozen=True)
class FrontierMark:
    """A point of a frontier.

    Attributes:
        family: A method's kind, which decides the colour.
        lora: Its label, which decides the marker; "" for the base model.
        label: Written beside the point.
        diversity: To the right is more.
        reward: Upwards is more.
        diversity_interval: (low, high), drawn as a bar; None where it isn't known. So is reward_interval.
        dominated: Drawn pale.
    """

    family: str
    lora: str
    label: str
    diversity: float
    reward: float
    diversity_interval: tuple[float, float] | None = None
    reward_interval: tuple[float, float] | None = None
    dominated: bool = False


def method_colours(methods: Sequence[str]) -> dict[str, str]:
    """One colour for each of `methods`, as "#rrggbb": its kind's own, or a spare one where that is taken.

    Raises:
        UserError: If a method cannot be read.
    """
    colours: dict[str, str] = {}
    spare = 0
    for text in methods:
        colour = COLOURS[parse_method(text).kind]
        if colour in colours.values():
            colour = SPARE_COLOURS[spare % len(SPARE_COLOURS)]
            spare += 1
        colours[text] = colour
    return colours


def reward_figure(curves: Sequence[Curve], *, num_steps: int, reward: str) -> Figure:
    """Mean reward of each method's images against the denoising step."""
    figure, axes = _axes(num_steps, f"mean {reward} reward")
    _draw(axes, curves, num_steps)
    return figure


def spectral_figure(curves: Sequence[Curve], *, num_steps: int, null: tuple[float, float] | None = None) -> Figure:
    """Spectral distance to the base model's images against the step; `null` is drawn as the band of chance."""
    figure, axes = _axes(num_steps, "spectral distance")
    if null is not None:
        axes.axhspan(*null, color=INK, alpha=0.10, linewidth=0, label="chance alone", gid="null-band")
    _draw(axes, curves, num_steps)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(_distance)
    return figure


def _distance(value: float, _position: int) -> str:
    """A spectral distance at a tick, as 200k: a common factor over the axis would lie on the legend."""
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"


def frontier_figure(marks: Sequence[FrontierMark], *, reward: str, diversity: str) -> Figure:
    """Reward against diversity: a marker a point, bars where intervals are known, the front as a line of steps.

    Args:
        marks: A family's points of one LoRA are joined in this order.
        reward: Name of the reward.
        diversity: What the number on the x axis is.
    """
    shapes = dict(zip(dict.fromkeys(mark.lora for mark in marks if mark.lora), cycle("osD^vPX*<>hp"), strict=False))
    handles = [Line2D([], [], color=COLOURS[family], marker="o", markersize=5, linewidth=1, label=family)
               for family in dict.fromkeys(mark.family for mark in marks)]
    if len(shapes) > 1:
        handles += [Line2D([], [], color=INK, marker=shape, markersize=5, linestyle="", label=lora)
                    for lora, shape in shapes.items()]
    handles.append(Line2D([], [], color=INK, linewidth=1, alpha=0.5, label="front"))
    columns = FRONTIER_COLUMNS if len(shapes) > 1 else len(handles)
    above = ROW_POINTS * (math.ceil(len(handles) / columns) - 1)  # points, of the legend's rows after the first one
    height = 1.05 * WIDTH + above / 72
    figure = Figure(figsize=(1.35 * WIDTH, height))
    axes = figure.add_axes((0.125, 0.52 / height, 0.855, 3.5 / height))
    for family, lora in dict.fromkeys((mark.family, mark.lora) for mark in marks):
        own = [mark for mark in marks if (mark.family, mark.lora) == (family, lora)]
        axes.plot([mark.diversity for mark in own], [mark.reward for mark in own], color=COLOURS[family], linewidth=1,
                  alpha=0.45)
        for mark in own:
            _frontier_mark(axes, mark, shapes.get(lora, "o"))
    axes.margins(x=0.08, y=0.06)
    _frontier_labels(axes, marks)
    front = sorted((mark.diversity, mark.reward) for mark in marks if not mark.dominated)
    axes.plot(*zip(*front, strict=True), drawstyle="steps-pre", color=INK, linewidth=1, alpha=0.5, gid="front", zorder=1)
    _dress(axes, f"mean {_name(reward)}", diversity, pad=20 + above)
    _legend(axes, handles, columns, 0.0)
    return figure


def _frontier_mark(axes: Axes, mark: FrontierMark, shape: str) -> None:
    alpha, colour = 0.3 if mark.dominated else 1.0, COLOURS[mark.family]
    for interval, line in ((mark.reward_interval, axes.vlines), (mark.diversity_interval, axes.hlines)):
        if interval:
            line(mark.diversity if line == axes.vlines else mark.reward, *interval, color=colour, linewidth=1.2,
                 alpha=0.5 * alpha)
    axes.plot([mark.diversity], [mark.reward], shape, color=colour, markersize=7, alpha=alpha, zorder=3)


def _frontier_labels(axes: Axes, marks: Sequence[FrontierMark]) -> None:
    """Each point's label beside it where there is room, those of the front first; one that has none is left out."""
    size, taken = 7.5, []
    axes.autoscale_view()  # otherwise the axes still have the limits of an empty figure
    scale = 72 / axes.figure.dpi  # pixels to points
    for mark in marks:
        x, y = axes.transData.transform((mark.diversity, mark.reward)) * scale
        taken.append((x - 4, y - 4, x + 4, y + 4))
    right = axes.get_window_extent().x1 * scale
    for mark in sorted(marks, key=lambda mark: mark.dominated):
        text = _short(mark.label)
        x, y = axes.transData.transform((mark.diversity, mark.reward)) * scale
        width = 0.58 * size * len(text)
        for left, bottom in ((6, 4), (6, -11), (-6 - width, 4), (-6 - width, -11), (-width / 2, 9), (-width / 2, -16)):
            box = (x + left, y + bottom, x + left + width, y + bottom + size)
            if box[2] < right and not any(_overlap(box, other) for other in taken):
                axes.annotate(text, (mark.diversity, mark.reward), xytext=(left, bottom), textcoords="offset points",
                              fontsize=size, color=INK, alpha=0.4 if mark.dominated else 0.9, zorder=4)
                taken.append(box)
                break


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@dataclass(frozen=True)
class SearchMark:
    """What a searcher has found, as search_figure and gamma_figure draw it.

    Attributes:
        label: Its name in the legend.
        colour: "#rrggbb".
        curve: (progress, base model's weight) along the denoising; none for a method without a gamma.
        searched: (diversity, reward) on the prompts that were searched on; None where it wasn't searched for.
        tested: The same on unseen ones.
        diversity_interval: (low, high) around the tested one, drawn as a bar; None where it isn't known. So is reward_interval.
    """

    label: str
    colour: str
    curve: Sequence[tuple[float, float]]
    searched: tuple[float, float] | None
    tested: tuple[float, float]
    diversity_interval: tuple[float, float] | None = None
    reward_interval: tuple[float, float] | None = None


def gamma_figure(marks: Sequence[SearchMark]) -> Figure:
    """The base model's weight along the denoising, a line a schedule."""
    figure, axes = _search_axes("base model's weight γ", "progress: 0 noise, 1 image", [_entry(mark) for mark in marks])
    for mark, dash in zip(marks, cycle(DASHES), strict=False):
        axes.plot(*zip(*mark.curve, strict=True), color=mark.colour, linewidth=2, linestyle=dash)
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.02, 1.02)
    return figure


def search_figure(
    marks: Sequence[SearchMark], trials: Mapping[str, Sequence[tuple[float, float]]], *, keep: float, reward: str,
) -> Figure:
    """Reward against diversity: every trial as a small dot, what was found as a ring, and where it lies on unseen prompts.

    Args:
        marks: A filled mark each, with a thin line from its ring.
        trials: (diversity, reward) of all that was looked at, by colour.
        keep: The target, a dashed line.
        reward: Name of the reward.
    """
    handles = [_entry(mark, marker="o", linestyle="") for mark in marks]
    handles += [Line2D([], [], color=INK, marker=".", markersize=4, linestyle="", alpha=0.4, label="looked at"),
                Line2D([], [], color=INK, marker="o", markersize=6, fillstyle="none", linestyle="", label="found"),
                Line2D([], [], color=INK, linewidth=1, linestyle=DASHES[1], alpha=0.6, label="target")]
    figure, axes = _search_axes(f"mean {_name(reward)}", "diversity, share of the base's", handles)
    axes.axvline(keep, color=INK, linewidth=1, linestyle=DASHES[1], alpha=0.6, gid="target")
    for colour, points in trials.items():
        axes.plot(*zip(*points, strict=True), ".", color=colour, markersize=4, alpha=0.4)
    for mark in marks:
        if mark.searched:
            axes.plot(*zip(mark.searched, mark.tested, strict=True), color=mark.colour, linewidth=0.8, alpha=0.5)
            axes.plot(*mark.searched, "o", color=mark.colour, markersize=7, fillstyle="none", zorder=3)
        x, y = mark.tested
        if mark.diversity_interval:
            axes.hlines(y, *mark.diversity_interval, color=mark.colour, linewidth=1.2, alpha=0.4)
        if mark.reward_interval:
            axes.vlines(x, *mark.reward_interval, color=mark.colour, linewidth=1.2, alpha=0.4)
        axes.plot(x, y, "o", color=mark.colour, markersize=7, zorder=3)
    axes.margins(x=0.06, y=0.06)
    return figure


def _entry(mark: SearchMark, **style: object) -> Line2D:
    return Line2D([], [], color=mark.colour, label=mark.label, **({"linewidth": 2} | style))


def _search_axes(title: str, xlabel: str, handles: Sequence[Line2D]) -> tuple[Figure, Axes]:
    """A figure with room for a legend above its axes."""
    columns, rows = _layout(handles)
    above = ROW_POINTS * rows  # points
    height = 3.6 + above / 72
    figure = Figure(figsize=(1.35 * WIDTH, height))
    axes = figure.add_axes((0.125, 0.52 / height, 0.855, 2.75 / height))
    _dress(axes, title, xlabel, pad=8 + above)
    _legend(axes, handles, columns, 0.0)
    return figure, axes


def training_figures(runs: Sequence[TrainingRun]) -> dict[str, Figure]:
    """The course of one or several runs, by TITLES' keys; all have the same size and step axis, so they read side by side.

    "reward", "diversity", "grad_norm" and "learning_rate" are always there, if only to say that nothing has come yet; the
    others where there is something to draw: no "regularisers" while they are all off, say. A run is a colour, a reward
    or a regulariser a dash pattern. Rewards of different names have different scales, so where more than one is trained
    on, "reward" shows each against its first probe in that probe's standard deviations within prompts, as "held_out"
    does for all rewards.
    """
    last = max((int(record["step"]) for run in runs for record in (*run.steps, *run.probes)), default=1)
    drawn = {}
    for name, title in TITLES.items():
        canvas = _Canvas(*_axes(last, _reward_title(runs) if name == "reward" else title, "training step", first=0), runs)
        if COURSES[name](canvas):
            drawn[name] = canvas
        elif name in ALWAYS:
            canvas.say("no probes yet" if name == "diversity" else "no steps yet")
            drawn[name] = canvas
    num_rows = max(_layout(canvas.legend)[1] for canvas in drawn.values())
    for canvas in drawn.values():
        canvas.finish(num_rows)
    return {name: canvas.figure for name, canvas in drawn.items()}


@dataclass
class _Canvas:
    """One figure of training_figures while it is drawn; `best` collects where each run's chosen probe lies."""

    figure: Figure
    axes: Axes
    runs: Sequence[TrainingRun]
    handles: list[Line2D | Patch] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.runs) > 1:
            self.handles += [Line2D([], [], color=run.colour, linewidth=2.4, label=run.label) for run in self.runs]

    @property
    def lone_colour(self) -> str:
        """The colour of legend entries that aren't about one of several runs."""
        return self.runs[0].colour if len(self.runs) == 1 else INK

    @property
    def legend(self) -> list[Line2D | Patch]:
        """All entries, that of the best trade-off last."""
        return sorted(self.handles, key=lambda handle: handle.get_label() == BEST)

    def entry(self, label: str, **style: object) -> None:
        """A legend entry, once however many runs have it."""
        self.entry_of(Line2D([], [], **{"color": self.lone_colour, "linewidth": 2} | style, label=label))

    def entry_of(self, handle: Line2D | Patch) -> None:
        """A legend entry that is drawn like `handle`, once."""
        if handle.get_label() not in [known.get_label() for known in self.handles]:
            self.handles.append(handle)

    def probed(self, run: TrainingRun, points: Points, **style: object) -> bool:
        """A line through a run's probes, with its best one marked; False where there is none."""
        xs, ys = points
        self.axes.plot(xs, ys, **{"color": run.colour, "linewidth": 2, "marker": "o", "markersize": 3.5} | style)
        self.star(run, points)
        return bool(xs)

    def star(self, run: TrainingRun, points: Points) -> None:
        """Mark the best trade-off, if it is among the points."""
        chosen = dict(zip(*points, strict=True)).get(run.best)
        if chosen is not None and math.isfinite(chosen):
            style = {"marker": "*", "markersize": 13, "markeredgecolor": INK, "markeredgewidth": 0.8, "linestyle": ""}
            self.axes.plot([run.best], [chosen], color=run.colour, zorder=5, gid="best", **style)
            self.entry(BEST, **style | {"markersize": 9})

    def bands(self, key: str) -> None:
        """The runs' bands of chance; a single probe's goes from side to side."""
        for run in self.runs:
            measured = [record for record in run.probes if record.get(key)]
            steps, low = _points(measured, lambda record: record[key][0])
            high = _points(measured, lambda record: record[key][1])[1]
            if len(steps) == 1:
                steps, low, high = list(self.axes.get_xlim()), low * 2, high * 2
            shade = INK if len(self.runs) == 1 else run.colour
            if steps:
                self.axes.fill_between(steps, low, high, color=shade, alpha=0.12, linewidth=0, gid="null-band")
                self.entry_of(Patch(color=INK, alpha=0.12, linewidth=0, label="chance alone"))

    def say(self, note: str) -> None:
        """A few words in place of what isn't there yet."""
        self.axes.text(0.5, 0.5, note, transform=self.axes.transAxes, ha="center", color=INK, alpha=0.55, fontsize=9)
        self.axes.set_yticks([])

    def finish(self, num_rows: int) -> None:
        """Mark the onsets, and put the legend above the axes, in a figure with room for `num_rows` of it."""
        above = 2.0  # points between axes and legend
        if any(run.onset is not None for run in self.runs):
            self._mark_onsets()
            above += ROW_POINTS
        pad = above + ROW_POINTS * num_rows + 4
        height = AXES_BOTTOM + AXES_HEIGHT + (pad + 16) / 72
        self.figure.set_size_inches(WIDTH, height)
        self.axes.set_position((0.125, AXES_BOTTOM / height, 0.855, AXES_HEIGHT / height))
        self.axes.set_title(self.axes.get_title("left"), **TITLE_STYLE, pad=pad)
        _legend(self.axes, self.legend, _layout(self.legend)[0], above / 72 / AXES_HEIGHT)

    def _mark_onsets(self) -> None:
        """A vertical line at each run's onset, labelled above the axes (at the first only, where there are several)."""
        places = [run for run in self.runs if run.onset is not None]
        for run in places:
            self.axes.axvline(run.onset, color=run.colour, linewidth=1.3, linestyle=DASHES[1], alpha=0.9, gid="onset")
        first = min(places, key=lambda run: run.onset)
        right = self.axes.get_xlim()[1]
        side = "left" if first.onset < 0.2 * right else "right" if first.onset > 0.8 * right else "center"
        self.axes.annotate("collapse onset", (first.onset, 1), xycoords=("data", "axes fraction"), xytext=(0, 2),
                           textcoords="offset points", ha=side, va="bottom", fontsize=8,
                           color=INK if len(places) > 1 else first.colour)


def _reward_course(canvas: _Canvas) -> bool:
    """Each step's mean thin, smoothed bold, and the probes with 2 standard errors."""
    names = _reward_names(canvas.runs)
    several, some = len(names) > 1, False
    for run in canvas.runs:
        for name, dash in zip(names, cycle(DASHES), strict=False):
            centre, unit = _unit(run, name) if several else (0.0, 1.0)
            raw, means = (_scaled(records, name, centre, unit) for records in (run.steps, run.probes))
            errors = _points(run.probes, lambda record, name=name, unit=unit: 2 * record["standard_errors"][name] / unit)
            canvas.axes.plot(*raw, color=run.colour, linewidth=0.8, alpha=0.3, linestyle=dash)
            canvas.axes.plot(raw[0], _smoothed(raw[1]), color=run.colour, linewidth=2, linestyle=dash)
            canvas.axes.errorbar(*means, yerr=errors[1], color=run.colour, linestyle="", marker="o", markersize=4,
                                 elinewidth=1.4)
            canvas.star(run, means)
            some |= bool(raw[0] or means[0])
            if several:
                canvas.entry(_name(name), linestyle=dash)
    if some and len(canvas.runs) == 1 and not several:
        canvas.entry("each step", linewidth=0.8, alpha=0.5)
        canvas.entry("smoothed")
        canvas.entry("probes ± 2 s.e.", linestyle="", marker="o", markersize=4)
    return some


def _held_out_course(canvas: _Canvas) -> bool:
    """The gain of what is trained on, and every held-out reward in units of the first probe's deviation, dashed."""
    held_out = list(dict.fromkeys(name for run in canvas.runs for record in run.probes for name in record["held_out"]))
    if not held_out:
        return False
    trained = _reward_names(canvas.runs)
    canvas.axes.axhline(0, color=INK, linewidth=0.8, alpha=0.4)
    canvas.entry(_name(trained[0]) if len(trained) == 1 else "trained on", linewidth=1.2)
    for run in canvas.runs:
        gain = _points(run.probes, lambda record: record["gain"])
        canvas.axes.plot(*gain, color=run.colour, linewidth=1.2, marker="o", markersize=3)
        for name, dash in zip(held_out, cycle(DASHES[1:]), strict=False):
            points = _scaled(run.probes, name, *_unit(run, name))
            canvas.axes.plot(*points, color=run.colour, linewidth=2, linestyle=dash, marker="o", markersize=3)
            canvas.entry(f"{_name(name)} (held out)", linestyle=dash)
    return True


def _diversity_course(canvas: _Canvas) -> bool:
    """The share of the base's variance over its band of chance (its upper part is cut off), with the floor if any."""
    some = [canvas.probed(run, _points(run.probes, lambda record: record["trace_ratio"])) for run in canvas.runs]
    if not any(some):
        return False
    top = max(1.08, canvas.axes.get_ylim()[1])
    canvas.bands("trace_null")
    canvas.axes.axhline(1, color=INK, linewidth=0.8, alpha=0.4)
    for run in canvas.runs:
        if run.floor:
            canvas.axes.axhline(run.floor, color=run.colour, linewidth=1, linestyle=DASHES[2], gid="floor")
            canvas.entry("floor", linewidth=1, linestyle=DASHES[2])
    canvas.axes.set_ylim(0, top)
    return True


def _spectral_course(canvas: _Canvas) -> bool:
    """The spectral distance over its band of chance."""
    some = [canvas.probed(run, _points(run.probes, lambda record: record["scd"])) for run in canvas.runs]
    if any(some):
        canvas.bands("scd_null")
        canvas.axes.set_ylim(bottom=0)
        canvas.axes.yaxis.set_major_formatter(_distance)
    return any(some)


def _rank_course(canvas: _Canvas) -> bool:
    """The effective rank beside the base's."""
    some = [canvas.probed(run, _points(run.probes, lambda record: record["effective_rank"])) for run in canvas.runs]
    for run in canvas.runs:
        base = _points(run.probes[-1:], lambda record: record["effective_rank_base"])[1]
        if base:
            canvas.axes.axhline(base[0], color=run.colour, linewidth=1, linestyle=DASHES[2])
            canvas.entry("base", linewidth=1, linestyle=DASHES[2])
    if any(some):
        canvas.axes.set_ylim(bottom=0)
    return any(some)


def _pairwise_course(canvas: _Canvas) -> bool:
    some = [canvas.probed(run, _points(run.probes, lambda record: record["pairwise_distance"])) for run in canvas.runs]
    if any(some):
        canvas.axes.set_ylim(bottom=0)
    return any(some)


def _regulariser_course(canvas: _Canvas) -> bool:
    """Each regulariser that is on in some run."""
    some = False
    for key, label, dash in zip(("kl", "path_kl", "lora_norm"), ("KL", "path KL", "LoRA norm"), DASHES[:3], strict=True):
        for run in canvas.runs:
            points = _points(run.steps, lambda record, key=key: record.get(key) or 0.0)
            if any(points[1]):
                canvas.axes.plot(*points, color=run.colour, linewidth=1.6, linestyle=dash)
                canvas.entry(label, linestyle=dash, linewidth=1.6)
                some = True
    return some


def _gradient_course(canvas: _Canvas) -> bool:
    some = _step_course(canvas, "grad_norm")
    if some:
        low, high = canvas.axes.dataLim.intervaly
        canvas.axes.set_yscale("log")
        canvas.axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        canvas.axes.yaxis.set_minor_locator(NullLocator())
        canvas.axes.yaxis.set_major_formatter("{x:g}")
    return some


def _rate_course(canvas: _Canvas) -> bool:
    some = _step_course(canvas, "learning_rate")
    if some:
        canvas.axes.set_ylim(bottom=0)
        canvas.axes.yaxis.set_major_formatter("{x:.2g}")
    return some


def _step_course(canvas: _Canvas, key: str) -> bool:
    """A number of every step that is above 0."""
    some = False
    for run in canvas.runs:
        points = _points([record for record in run.steps if (record.get(key) or 0) > 0], lambda record: record[key])
        canvas.axes.plot(*points, color=run.colour, linewidth=1.6, marker="o" if len(points[0]) == 1 else "")
        some |= bool(points[0])
    return some


COURSES: dict[str, Callable[[_Canvas], bool]] = {
    "reward": _reward_course, "diversity": _diversity_course, "spectral": _spectral_course, "held_out": _held_out_course,
    "effective_rank": _rank_course, "pairwise_distance": _pairwise_course, "regularisers": _regulariser_course,
    "grad_norm": _gradient_course, "learning_rate": _rate_course,
}
ALWAYS = ("reward", "diversity", "grad_norm", "learning_rate")


def _reward_title(runs: Sequence[TrainingRun]) -> str:
    names = _reward_names(runs)
    if len(names) > 1:
        return "reward gains, in the first probe's s.d."
    return f"mean {_name(names[0])} reward" if names else TITLES["reward"]


def _reward_names(runs: Sequence[TrainingRun]) -> list[str]:
    """Rewards that some run is trained on."""
    firsts = [record for run in runs for record in (*run.steps[:1], *run.probes[:1])]
    return list(dict.fromkeys(name for record in firsts for name in record["rewards"]))


def _name(reward: str) -> str:
    """A reward's name, or the last part of its folder."""
    return _short(shown_reward(reward).rstrip("/").rsplit("/")[-1])


def _measured(record: Record) -> dict[str, float]:
    return {**record["rewards"], **record.get("held_out", {})}


def _scaled(records: Sequence[Record], name: str, centre: float, unit: float) -> Points:
    """A reward's means as (mean - centre) / unit."""
    return _points(records, lambda record: (_measured(record)[name] - centre) / unit)


def _unit(run: TrainingRun, name: str) -> tuple[float, float]:
    """A reward's mean and standard deviation within prompts at the run's first probe; (0, 1) without one."""
    first = min(run.probes, key=lambda record: record["step"], default=None)
    if first is None or name not in _measured(first):
        return 0.0, 1.0
    return _measured(first)[name], first["standard_errors"][name] * first["num_images"] ** 0.5 or 1.0


def _points(records: Sequence[Record], value: Callable[[Record], float | None]) -> Points:
    """Steps and finite values in order, averaged in groups where there are more than MAX_POINTS."""
    found: dict[int, float] = {}
    for record in records:
        try:
            number = value(record)
        except KeyError:  # a reward that this run doesn't have
            continue
        found.pop(int(record["step"]), None)
        if number is not None and math.isfinite(number):
            found[int(record["step"])] = float(number)
    pairs = sorted(found.items())
    size = math.ceil(len(pairs) / MAX_POINTS) or 1
    groups = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    return tuple([sum(pair[side] for pair in group) / len(group) for group in groups] for side in (0, 1))


def _smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average, corrected for its start so that it begins at the first value."""
    smooth, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = (amount + (new - amount) * 2 / (EMA_STEPS + 1) for amount, new in ((total, value), (weight, 1.0)))
        smooth.append(total / weight)
    return smooth


def figure_svg(figure: Figure, description: str) -> str:
    """The figure as an inline <svg> that takes its width from the page and its text colour from the page's.

    Inline drawings share one document, so the style sheet that matplotlib writes for the whole document is left out.
    """
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", text)
    text = text.replace("xlink:href", "href").replace(INK, "currentColor")
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)


def _axes(last: int, title: str, xlabel: str = "denoising step", *, first: int = 1) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, 2.75))
    axes = figure.add_axes((0.125, 0.155, 0.855, 0.63))
    end = max(last, first + 1)
    axes.set_xlim(first or -0.02 * end, end * 1.03)
    _dress(axes, title, xlabel)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure, axes


def _dress(axes: Axes, title: str, xlabel: str, pad: float = 30) -> None:
    """Title, label, ticks, grid and frame as every figure has them."""
    axes.set_xlabel(xlabel, fontsize=9, color=INK)
    axes.set_title(title, **TITLE_STYLE, pad=pad)
    axes.tick_params(colors=INK, labelsize=8.5, length=3)
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
        spine.set_alpha(0.35)


def _draw(axes: Axes, curves: Iterable[Curve], num_steps: int) -> None:
    """Lines with a dot at the end, error bars side by side, and a legend above the axes."""
    for k, curve in enumerate(curves):
        axes.plot(curve.steps, curve.values, color=curve.colour, linewidth=2, label=_short(curve.label))
        axes.plot(curve.steps[-1:], curve.values[-1:], "o", color=curve.colour, markersize=5)
        if curve.interval is not None:
            x = curve.steps[-1] - 0.012 * num_steps * k  # side by side
            axes.vlines(x, *curve.interval, color=curve.colour, linewidth=2, alpha=0.55)
    handles, _ = axes.get_legend_handles_labels()
    _legend(axes, handles, 3, 0.0)


def _short(label: str) -> str:
    return label if len(label) <= MAX_LABEL else label[: MAX_LABEL - 1] + "…"


def _legend(axes: Axes, handles: Sequence[Line2D | Patch], num_columns: int, above: float) -> None:
    """A legend `above` axes heights over the axes, if there is anything in it."""
    if handles:
        axes.legend(
            handles, [_short(str(handle.get_label())) for handle in handles], loc="lower left",
            bbox_to_anchor=(-0.02, 1.0 + above), ncols=num_columns, frameon=False, fontsize=8, labelcolor=INK,
            handlelength=1.2, columnspacing=1.1, handletextpad=0.5, borderaxespad=0.2, labelspacing=0.3,
        )


def _layout(handles: Sequence[Line2D | Patch]) -> tuple[int, int]:
    """Columns and rows of a legend that fits the width, from its labels' lengths; columns are filled one after another."""
    widths = [0.32 + 0.06 * min(len(str(handle.get_label())), MAX_LABEL) for handle in handles]  # inches
    for num_columns in range(len(widths), 1, -1):
        least, longer = divmod(len(widths), num_columns)  # the first `longer` columns hold one more
        ends = [0, *accumulate(least + (k < longer) for k in range(num_columns))]
        if sum(max(widths[start:end]) for start, end in pairwise(ends)) <= 0.92 * WIDTH:
            return num_columns, math.ceil(len(widths) / num_columns)
    return 1, len(widths)
