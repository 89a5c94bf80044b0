"""The Training tab's right side: its parts, and what a look at the run folders changes of them."""

from __future__ import annotations

import html
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from rewardiv.errors import UserError
from rewardiv.jobs import LIVING, Job, list_jobs
from rewardiv.registry import ROOT
from rewardiv.ui.train_list import list_html, runs_list, state_html
from rewardiv.ui.train_plots import Verdict, plots_html, plots_stamp, verdict_html, verdict_of
from rewardiv.ui.train_probe import probe_viewer, viewer_value
from rewardiv.ui.train_run import RunData, log_end, read_run

log = logging.getLogger(__name__)

Updates = dict[Any, Any]
Memory = dict[str, Any]  # of the browser, so that it outlives reloads and the server: run, overlay, tab

FAST_S, SLOW_S = 1.5, 6.0  # looks while something runs, and while nothing does
PLOTS_SHARE = 0.1  # of the time may go into drawing plots
MAX_OVERLAY = 6
DEFAULT_METHOD = "aig:power:2"
NOTHING: Memory = {"run": None, "overlay": [], "tab": "compare"}
BUTTONS = {  # by the states in which they make sense
    "pause": ("running",), "resume": ("paused",), "save": ("running", "paused"), "probe": ("running", "paused"),
    "stop": ("queued", "starting", "running", "paused"), "restart": ("stopped", "failed", "lost"),
}
LABELS = {
    "pause": "Pause", "resume": "Resume", "save": "Save now", "probe": "Probe now", "stop": "Stop",
    "restart": "Restart from last checkpoint", "reuse": "Use its settings", "rename": "Rename", "delete": "Delete",
}
ALWAYS = ("reuse", "rename", "delete")  # there from the start


@dataclass
class Watch:
    """What one open page has been sent, so that only what changed is sent again."""

    sent: dict[str, object] = field(default_factory=dict)
    next_plots: float = float("-inf")  # on the monotonic clock

    def is_new(self, part: str, value: object) -> bool:
        """Whether `part` was sent another value last, or none; counts as sent now."""
        if part in self.sent and self.sent[part] == value:
            return False
        self.sent[part] = value
        return True


@dataclass(frozen=True)
class TrainScreen:
    """Everything on the right side that changes."""

    runs: gr.HTML
    panel: gr.Column
    state: gr.HTML
    verdict: gr.HTML
    plots: gr.HTML
    more_plots: gr.HTML
    viewer: gr.HTML
    log: gr.HTML
    buttons: dict[str, gr.Button]
    fast: gr.Timer

    def parts(self) -> list[Any]:
        """All of them, as the outputs of a look."""
        own = [self.runs, self.panel, self.state, self.verdict, self.plots, self.more_plots, self.viewer, self.log, self.fast]
        return [*own, *self.buttons.values()]


@dataclass(frozen=True)
class Dialogs:
    """The rows that ask before a run is renamed or deleted."""

    rename: gr.Row
    name: gr.Textbox
    save: gr.Button
    leave: gr.Button
    delete: gr.Row
    question: gr.HTML
    confirm: gr.Button
    keep: gr.Button


@dataclass(frozen=True)
class Apply:
    """Where a method is tried on a checkpoint; `step` is filled by the browser with what the slider stands on."""

    method: gr.Textbox
    prompt: gr.Textbox
    seeds: gr.Slider
    step: gr.Number
    draw: gr.Button
    result: gr.HTML


@dataclass(frozen=True)
class Site:
    """Where the runs are, and whether they may only be looked at."""

    runs_dir: Path
    demo: bool
    device: str = "cpu"

    def jobs(self) -> list[Job]:
        """The runs, newest first; prepared ones, which came together, by name."""
        jobs = list_jobs(self.runs_dir)
        return sorted(jobs, key=lambda job: job.name) if self.demo else jobs

    @property
    def new_runs_dir(self) -> Path:
        """Where a run of the form's settings would go."""
        return ROOT / "runs" if self.demo else self.runs_dir

    def chosen(self, memory: Memory, jobs: Sequence[Job] | None = None) -> Job | None:
        """The run to show: the one asked for, else the one that runs, else the first; None where there is none."""
        jobs = self.jobs() if jobs is None else jobs
        by_name = {job.folder.name: job for job in jobs}
        if memory.get("run") in by_name:
            return by_name[memory["run"]]
        return next((job for job in jobs if job.state in LIVING and job.state != "queued"), next(iter(jobs), None))

    def open_run(self, memory: Memory) -> RunData | None:
        """The run that is shown, read anew."""
        job = self.chosen(memory)
        return None if job is None else read_run(job)


def build_screen(demo: bool, fast: gr.Timer) -> tuple[TrainScreen, Dialogs, Apply]:
    """Lay the right side out inside an open column."""
    runs = runs_list(elem_id="rd-runs")
    with gr.Column(visible=False, elem_id="rd-run") as panel:
        state = gr.HTML(apply_default_css=False, elem_id="rd-run-state")
        with gr.Row(elem_classes="rd-buttons"):
            buttons = {
                name: gr.Button(label, size="sm", min_width=60, visible=name in ALWAYS, elem_id=f"rd-run-{name}",
                                variant="stop" if name == "stop" else "secondary")
                for name, label in LABELS.items() if not demo or name == "reuse"
            }
        dialogs = _dialogs()
        verdict = gr.HTML(apply_default_css=False, elem_id="rd-verdict")
        plots = gr.HTML(apply_default_css=False, elem_id="rd-train-plots")
        with gr.Accordion("More curves: gradient norm, learning rate, regularisers, other diversity", open=False):
            more_plots = gr.HTML(apply_default_css=False, elem_id="rd-more-plots")
        viewer = probe_viewer(elem_id="rd-probe")
        with gr.Accordion("Try a sampling method on the checkpoint that the slider stands on", open=False, elem_id="rd-try"):
            apply = _apply()
        with gr.Accordion("Log", open=False, elem_id="rd-log-box"):
            log_end_html = gr.HTML(apply_default_css=False, elem_id="rd-log")
    return TrainScreen(runs, panel, state, verdict, plots, more_plots, viewer, log_end_html, buttons, fast), dialogs, apply


def _dialogs() -> Dialogs:
    """Hidden rows that ask before a run is renamed or deleted."""
    with gr.Row(visible=False, elem_classes="rd-ask", elem_id="rd-rename-row") as rename:
        name = gr.Textbox(label="New name", lines=1, max_lines=1, scale=3, elem_id="rd-new-name")
        save = gr.Button("Rename", size="sm", min_width=80, elem_id="rd-rename-save")
        leave = gr.Button("Leave it", size="sm", min_width=80)
    with gr.Row(visible=False, elem_classes="rd-ask", elem_id="rd-delete-row") as delete:
        question = gr.HTML(apply_default_css=False)
        confirm = gr.Button("Delete for good", variant="stop", size="sm", min_width=120, elem_id="rd-delete-confirm")
        keep = gr.Button("Keep it", size="sm", min_width=80)
    return Dialogs(rename, name, save, leave, delete, question, confirm, keep)


def _apply() -> Apply:
    """Fields and result of a method tried on a checkpoint."""
    with gr.Row(elem_classes="rd-try-row"):
        method = gr.Textbox(DEFAULT_METHOD, label="Method, as the Compare tab's", lines=1, max_lines=1,
                            elem_id="rd-try-method", min_width=150)
        prompt = gr.Textbox("a cat face", label="Prompt", lines=1, max_lines=1, scale=2,
                            elem_id="rd-try-prompt", min_width=150)
        seeds = gr.Slider(2, 8, 4, step=1, label="Images a method", min_width=150)
        draw = gr.Button("Draw", variant="primary", min_width=90, elem_id="rd-try-draw")
    step = gr.Number(-1, visible=False)
    return Apply(method, prompt, seeds, step, draw, gr.HTML(apply_default_css=False, elem_id="rd-try-grid"))


def look(site: Site, screen: TrainScreen, memory: Memory, watch: Watch) -> Updates:
    """What has changed since the page was last told: a few file stamps when nothing has. It never fails."""
    try:
        return _seen(site, screen, memory, watch)
    except (UserError, OSError) as error:
        reason = str(error)
    except Exception:
        reason = "unexpected error; the log has the details"
        if watch.is_new("error", reason):
            log.exception("looking at the runs in %s failed", site.runs_dir)
    message = f'<p class="rd-note rd-damage">The runs cannot be read: {html.escape(reason)}</p>'
    return {screen.runs: message} if watch.is_new("runs", message) else {screen.runs: gr.skip()}


def log_html(folder: Path) -> str:
    """The log's last lines."""
    text = html.escape(log_end(folder)) or "empty"
    return f'<pre class="rd-log" tabindex="0" role="region" aria-label="Log"><code>{text}</code></pre>'


def _seen(site: Site, screen: TrainScreen, memory: Memory, watch: Watch) -> Updates:
    jobs = site.jobs()
    runs = [read_run(job) for job in jobs]
    job = site.chosen(memory, jobs)
    opened = next((run for run in runs if job is not None and run.job.folder == job.folder), None)
    overlay = [run for run in runs if run.job.folder.name in memory.get("overlay", ()) and run is not opened][:MAX_OVERLAY]
    names = {run.job.folder.name for run in overlay}
    values: dict[str, Any] = {
        "runs": list_html(runs, None if job is None else job.folder.name, names, demo=site.demo),
        "panel": opened is not None,
        "state": state_html(opened),
        "fast": any(one.state in LIVING for one in jobs),
    }
    if opened is not None:
        verdict = verdict_of(opened)
        values |= {
            "verdict": verdict_html(opened, verdict), "viewer": viewer_value(opened, verdict.best, verdict.onset),
            "log": log_html(opened.job.folder),
        }
    updates: Updates = {screen.runs: gr.skip()}  # an update that is empty needs one part all the same
    for part, value in values.items():
        if watch.is_new(part, value):
            updates[getattr(screen, part)] = _update(part, value)
    if opened is not None:
        updates |= _plots(screen, watch, opened, overlay, verdict) | _buttons(screen, watch, opened.job)
    return updates


def _update(part: str, value: Any) -> Any:
    if part == "panel":
        return gr.update(visible=value)
    return gr.Timer(active=value) if part == "fast" else value


def _plots(screen: TrainScreen, watch: Watch, run: RunData, overlay: Sequence[RunData], verdict: Verdict) -> Updates:
    """The plots, where files changed; while a run writes all the time, as often as PLOTS_SHARE allows."""
    stamp = plots_stamp(run, overlay)
    known = watch.sent.get("plots")
    same_runs = known is not None and known[0] == stamp[0]
    if known == stamp or (same_runs and run.job.alive and time.monotonic() < watch.next_plots):
        return {}
    begin = time.monotonic()
    first, more = plots_html(run, overlay, verdict)
    watch.sent["plots"], watch.next_plots = stamp, time.monotonic() + (time.monotonic() - begin) / PLOTS_SHARE
    return {screen.plots: first, screen.more_plots: more}


def _buttons(screen: TrainScreen, watch: Watch, job: Job) -> Updates:
    shown = {name: job.state in states for name, states in BUTTONS.items()} | {"delete": not job.alive}
    return {
        screen.buttons[name]: gr.update(visible=visible)
        for name, visible in shown.items() if name in screen.buttons and watch.is_new(f"button {name}", visible)
    }
