"""A run's curves as figures, and in words what its probes say: where it collapses, which checkpoint to take."""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from rewardiv.errors import UserError
from rewardiv.plots import RUN_COLOURS, TrainingRun, figure_svg, training_figures
from rewardiv.records import METRICS_NAME, PROBES_NAME
from rewardiv.runs import read_jsonl
from rewardiv.ui.train_run import RunData, Stamp, rising, stamp
from rewardiv.verdicts import ProbeRecord, best_tradeoff, collapse_onset

MIN_PROBES = 2  # for a verdict
FIRST = ("reward", "diversity", "held_out", "spectral")  # figures that are seen at once
TOLD = {"rollback": "Rolled back", "early-stop": "Stopped early"}  # kinds of event that a person should know of


@dataclass(frozen=True)
class Verdict:
    """Steps that matter, and why; None where there is none, or nothing is known."""

    onset: int | None = None
    onset_reason: str = ""
    best: int | None = None
    best_reason: str = ""


def verdict_of(run: RunData) -> Verdict:
    """What the probes say; records that can't be used say nothing."""
    if len(run.probes) < MIN_PROBES:
        return Verdict()
    return _verdict(run.job.folder / PROBES_NAME, stamp(run.job.folder / PROBES_NAME), tuple(run.checkpoints))


@lru_cache(maxsize=64)
def _verdict(path: Path, state: Stamp, checkpoints: tuple[int, ...]) -> Verdict:
    try:
        records = [ProbeRecord.from_dict(record) for record in rising(read_jsonl(path))]
        onset, best = collapse_onset(records), best_tradeoff(records, checkpoints)
    except (UserError, LookupError, TypeError, ValueError):
        return Verdict()
    return Verdict(
        None if onset is None else onset.step, "" if onset is None else onset.reason,
        None if best is None else best.step, "" if best is None else best.reason,
    )


def verdict_html(run: RunData, verdict: Verdict) -> str:
    """What a person should know before the curves, each with a button to the probe that it speaks of."""
    said = [f'<p><b>{TOLD[kind]}:</b> {html.escape(str(event.get("text", "")))}.</p>'
            for event in run.events if (kind := event.get("kind")) in TOLD]
    if verdict.onset is not None:
        said.append(_said("rd-onset", f"Collapse begins at step {verdict.onset}", verdict.onset_reason, verdict.onset))
    elif run.probes:
        kept = run.probes[-1].get("trace_ratio")
        share = f" The last probe has {100 * kept:.0f} % of the base model's variety." if kept is not None else ""
        said.append(f"<p><b>No collapse seen so far.</b>{share}</p>")
    if verdict.best is not None:
        said.append(_said("rd-best", f"Best trade-off: step {verdict.best}", verdict.best_reason, verdict.best))
    return f'<div class="rd-verdict">{"".join(said)}</div>' if said else ""


def _said(kind: str, head: str, reason: str, step: int) -> str:
    button = f'<button type="button" data-show-step="{step}">Show step {step}</button>'
    return f'<p class="{kind}"><b>{head}:</b> {html.escape(reason)}. {button}</p>'


def plots_stamp(run: RunData, overlay: Sequence[RunData]) -> tuple[object, ...]:
    """Equal while the plots would be: first the runs, then the state of their files."""
    shown = (run, *overlay)
    names = tuple(one.job.folder for one in shown)
    return names, tuple(stamp(one.job.folder / file) for one in shown for file in (METRICS_NAME, PROBES_NAME))


def plots_html(run: RunData, overlay: Sequence[RunData], verdict: Verdict) -> tuple[str, str]:
    """The figures that matter most, reward and diversity side by side first; and the others."""
    runs = [
        TrainingRun(
            one.job.name, colour, one.steps, one.probes, onset=said.onset, best=said.best,
            floor=float(one.job.settings.get("diversity_floor") or 0.0),
        )
        for one, said, colour in zip((run, *overlay), (verdict, *map(verdict_of, overlay)), itertools.cycle(RUN_COLOURS))
    ]
    figures = training_figures(runs)
    drawn = {name: figure_svg(figure, f"{name.replace('_', ' ')} by training step") for name, figure in figures.items()}
    first = [svg for name, svg in drawn.items() if name in FIRST]
    return _row_html(first), _row_html([svg for name, svg in drawn.items() if name not in FIRST])


def _row_html(drawings: Sequence[str]) -> str:
    return f'<div class="rd-plots">{"".join(f"<figure>{svg}</figure>" for svg in drawings)}</div>'
