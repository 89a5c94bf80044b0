"""The Training tab: a form that starts runs, and a look at every run's folder. Layout and thin handlers.

Nothing about a run is kept here: the page reads run folders, and the browser remembers which run is open, so a reload,
another tab or a new server show the same.
"""

from __future__ import annotations

import functools
import html
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from rewardiv import jobs
from rewardiv.config import TrainConfig
from rewardiv.errors import UserError
from rewardiv.ui.train_apply import apply_method
from rewardiv.ui.train_fields import Fields, folded_fields, preset_field, preset_note, visible_fields
from rewardiv.ui.train_form import Values, config_of, free_name, preset_values, values_of
from rewardiv.ui.train_list import span_text
from rewardiv.ui.train_probe import CHOSEN_STEP
from rewardiv.ui.train_screen import (
    BUTTONS,
    FAST_S,
    NOTHING,
    SLOW_S,
    Apply,
    Dialogs,
    Memory,
    Site,
    TrainScreen,
    Updates,
    Watch,
    build_screen,
    look,
)

if TYPE_CHECKING:  # torch stays out of the page's start
    from rewardiv.generate import Engine
    from rewardiv.ui.compare import CompareFields

Given = dict[Any, Any]  # a handler's inputs by component
PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}
LIGHT = {"queue": False, **PRIVATE}
LOOKS = {"concurrency_limit": None, **PRIVATE}  # what may say something in a corner: Gradio drops that of unqueued events
SAY_DEMO = "Training is switched off on this host: the runs shown are prepared. The command below trains at home."


@dataclass(frozen=True)
class TrainForm:
    """The left side."""

    preset: gr.Dropdown
    source: gr.HTML
    fields: Fields
    say: gr.HTML
    command: gr.Code
    start: gr.Button
    estimate: gr.Button

    def inputs(self) -> set[Any]:
        """The fields, as a handler's inputs."""
        return set(self.fields.values())

    def values(self, given: Given) -> Values:
        """The fields' values by name."""
        return {name: given[component] for name, component in self.fields.items()}


@dataclass(frozen=True)
class TrainingTab:
    """The whole tab, and what ties it to the page."""

    open_engine: Callable[[], Engine]
    site: Site
    form: TrainForm
    screen: TrainScreen
    dialogs: Dialogs
    apply: Apply
    memory: gr.BrowserState
    watch: gr.State

    def parts(self) -> list[Any]:
        """What a look may change."""
        return [*self.screen.parts(), self.memory]

    def remembered(self, given: Given) -> Memory:
        """What the browser remembers; whatever a browser may send instead is nothing."""
        memory = given[self.memory]
        return NOTHING | memory if isinstance(memory, dict) else dict(NOTHING)

    def look(self, given: Given, **changes: object) -> Updates:
        """What changed on disk, with other `changes` of what the browser remembers."""
        memory = self.remembered(given) | changes
        return look(self.site, self.screen, memory, given[self.watch]) | ({self.memory: memory} if changes else {})

    def config(self, given: Given) -> TrainConfig:
        """The form's settings."""
        return config_of(self.form.values(given), self.site.new_runs_dir)


@dataclass(frozen=True)
class Ties:
    """What has to be on the page before its tabs are, because a tab is only built when it is first seen."""

    memory: gr.BrowserState
    watch: gr.State
    fast: gr.Timer
    slow: gr.Timer


def build_ties() -> Ties:
    """Make them, inside an open gr.Blocks and outside of its tabs."""
    memory = gr.BrowserState(NOTHING, storage_key="rewardiv-training", secret="rewardiv")
    return Ties(memory, gr.State(Watch()), gr.Timer(FAST_S, active=False), gr.Timer(SLOW_S))


def build_training(
    open_engine: Callable[[], Engine], site: Site, ties: Ties, compare: CompareFields, tabs: gr.Tabs
) -> TrainingTab:
    """Lay the tab out inside an open gr.Tab and connect it; `connect_page` does the rest once the page's tabs are there."""
    with gr.Row(elem_classes="rd-page"):
        with gr.Column(scale=0, min_width=320, elem_classes="rd-left"):
            form = _form(site)
        with gr.Column(scale=1, min_width=320, elem_classes="rd-right"):
            screen, dialogs, apply = build_screen(site.demo, ties.fast)
    tab = TrainingTab(open_engine, site, form, screen, dialogs, apply, ties.memory, ties.watch)
    _connect_form(tab)
    _connect_runs(tab)
    _connect_dialogs(tab)
    _connect_probes(tab, compare, tabs)
    for timer in (ties.fast, ties.slow):
        timer.tick(functools.partial(_tick, tab), {tab.memory, tab.watch}, tab.parts(), **LOOKS)
    return tab


def connect_page(tab: TrainingTab, demo: gr.Blocks, tabs: gr.Tabs, pages: dict[str, gr.Tab]) -> None:
    """What happens when the page opens, and when its tabs change."""

    def opened(given: Given, request: gr.Request) -> Updates:
        asked = {key: value for key, value in dict(request.query_params).items() if key in ("tab", "run")}
        memory = tab.remembered(given) | asked
        name = free_name(tab.site.new_runs_dir, "vivid")
        begin: Updates = {tab.form.fields["name"]: name, tab.memory: memory}
        if memory["tab"] != "training":
            return begin
        return begin | {tabs: gr.Tabs(selected="training")} | tab.look(given, **memory)

    def turned(to: str, given: Given) -> Updates:
        by_itself = given[tab.watch].is_new("tabs", "reported") and to == next(iter(pages))
        if by_itself:  # as every page does while it opens, before or after `opened`: no reason to forget the remembered tab
            return {tab.screen.state: gr.skip()}
        return tab.look(given, tab=to) if to == "training" else {tab.memory: tab.remembered(given) | {"tab": to}}

    inputs = {tab.memory, tab.watch}
    demo.load(opened, inputs, [*tab.parts(), tabs, tab.form.fields["name"]], **LIGHT)
    for name, page in pages.items():
        page.select(functools.partial(turned, name), inputs, tab.parts(), **LIGHT)


def _form(site: Site) -> TrainForm:
    """The left side: what most runs change, the buttons, the rest in accordions, the command."""
    preset = preset_field()
    source = gr.HTML(_source_html(preset.value), apply_default_css=False)
    start_from = TrainConfig(output_dir="vivid-1", device=site.device)
    values = values_of(start_from) | preset_values(preset.value)
    fields = visible_fields(values)
    with gr.Row(elem_classes="rd-pair", visible=not site.demo):
        estimate = gr.Button("Estimate", elem_id="rd-estimate", min_width=100)
        start = gr.Button("Start training", variant="primary", elem_id="rd-start", min_width=140)
    say = gr.HTML(say_html(SAY_DEMO) if site.demo else "", apply_default_css=False, elem_id="rd-say")
    fields |= folded_fields(values)
    command = gr.Code(
        shlex.join(jobs.train_command(config_of(values, site.new_runs_dir))), language="shell", interactive=False,
        label="To run at home" if site.demo else "The same from the command line",
        wrap_lines=True, lines=1, show_line_numbers=False, elem_id="rd-train-command",
    )
    return TrainForm(preset, source, fields, say, command, start, estimate)


def _connect_form(tab: TrainingTab) -> None:
    """Preset → fields → command; estimate; start."""
    form = tab.form

    def preset(name: str) -> Updates:
        return {form.source: _source_html(name)} | {form.fields[field]: value for field, value in preset_values(name).items()}

    def preview(given: Given) -> Updates:
        several = len(given[form.fields["rewards"]] or ()) > 1
        shown: Updates = {form.fields["weights"]: gr.update(visible=several)}
        try:
            command = shlex.join(jobs.train_command(tab.config(given)))
        except UserError as error:
            return shown | {form.say: say_html(str(error), wrong=True)}
        return shown | {form.say: say_html(SAY_DEMO) if tab.site.demo else "", form.command: command}

    form.preset.input(preset, form.preset, [form.source, *form.fields.values()], **LIGHT)
    gr.on(
        [field.change for field in form.fields.values()], preview, form.inputs(),
        [form.say, form.command, form.fields["weights"]], trigger_mode="always_last", **LIGHT,
    )
    if tab.site.demo:
        return
    form.estimate.click(functools.partial(_estimate, tab), form.inputs(), [form.say, form.estimate], **PRIVATE)
    form.start.click(
        functools.partial(_start, tab), {*form.inputs(), tab.memory, tab.watch},
        [*tab.parts(), form.say, form.fields["name"]], **LOOKS,
    )


def _start(tab: TrainingTab, given: Given) -> Updates:
    """Put a run of the form's settings into the queue and open it; a mistake is said and leaves the form as it is."""
    form = tab.form
    try:
        config = tab.config(given)
        job = jobs.start(config)
    except UserError as error:
        return {form.say: say_html(str(error), wrong=True)}
    gr.Info(f"{html.escape(job.name)} is started and goes on without this page.", title="Started", duration=5)
    name = free_name(tab.site.new_runs_dir, next(iter(config.reward_weights)))
    return tab.look(given, run=job.folder.name) | {form.fields["name"]: name, form.say: ""}


def _estimate(tab: TrainingTab, given: Given) -> Iterator[Updates]:
    """Measure the form's settings by one step, in a process of its own."""
    form = tab.form
    try:
        config = tab.config(given)
        yield {
            form.estimate: gr.update(interactive=False, value="Measuring…"),
            form.say: say_html("Measuring one step and one probe on this machine…"),
        }
        found = jobs.estimate(config)
        sentence = (f"{config.max_train_steps} steps take about {span_text(found['total_s'])}: {found['step_s']:.3g} s a step, "
                    f"{found['probe_s']:.3g} s a probe, at most {found['peak_gib']:.2g} GiB of memory.")
        yield {form.say: say_html(sentence)}
    except UserError as error:
        yield {form.say: say_html(str(error), wrong=True)}
    finally:
        yield {form.estimate: gr.update(interactive=True, value="Estimate")}


def _tick(tab: TrainingTab, given: Given) -> Updates:
    """A look while the tab is the one that is seen."""
    return tab.look(given) if tab.remembered(given)["tab"] == "training" else {tab.screen.state: gr.skip()}


def _connect_runs(tab: TrainingTab) -> None:
    """The list, and the orders to the open run."""

    def open_run(given: Given, event: gr.EventData) -> Updates:
        return tab.look(given, run=event._data.get("run"))

    def overlay(given: Given, event: gr.EventData) -> Updates:
        run, on = event._data.get("run"), event._data.get("on")
        others = [name for name in tab.remembered(given)["overlay"] if name != run]
        return tab.look(given, overlay=[*others, run] if on else others)

    def order(what: str, given: Given) -> Updates:
        with _said():
            job = tab.site.chosen(tab.remembered(given))
            if what == "restart":
                jobs.restart(job.folder)
            else:
                jobs.order(job.folder, what)
        return tab.look(given)

    def reuse(given: Given) -> Updates:
        with _said():
            job = tab.site.chosen(tab.remembered(given))
            values = values_of(TrainConfig.from_dict(job.settings))
            new = {"name": free_name(tab.site.new_runs_dir, next(iter(values["rewards"]))), "resume_from_checkpoint": ""}
            return {tab.form.fields[name]: value for name, value in (values | new).items()}
        return {tab.form.fields["name"]: gr.skip()}

    inputs = {tab.memory, tab.watch}
    tab.screen.buttons["reuse"].click(reuse, inputs, list(tab.form.fields.values()), **LOOKS)
    tab.screen.runs.open(open_run, inputs, tab.parts(), **LIGHT)
    tab.screen.runs.overlay(overlay, inputs, tab.parts(), **LIGHT)
    if not tab.site.demo:
        for what in BUTTONS:
            tab.screen.buttons[what].click(functools.partial(order, what), inputs, tab.parts(), **LOOKS)


def _connect_dialogs(tab: TrainingTab) -> None:
    """Rename and delete, each with a row that asks."""
    if tab.site.demo:
        return
    asks, inputs = tab.dialogs, {tab.memory, tab.watch}
    rows = [asks.rename, asks.delete]
    closed = {row: gr.update(visible=False) for row in rows}

    def ask_rename(given: Given) -> Updates:
        job = tab.site.chosen(tab.remembered(given))
        return closed | {asks.rename: gr.update(visible=True), asks.name: job.name}

    def rename(given: Given) -> Updates:
        with _said():
            jobs.rename(tab.site.chosen(tab.remembered(given)).folder, given[asks.name])
        return closed | tab.look(given)

    def ask_delete(given: Given) -> Updates:
        run = tab.site.open_run(tab.remembered(given))
        text = f"Delete {run.job.name} with its {len(run.checkpoints)} checkpoints? This can't be undone."
        return closed | {asks.delete: gr.update(visible=True), asks.question: f"<p>{html.escape(text)}</p>"}

    def delete(given: Given) -> Updates:
        with _said():
            jobs.delete(tab.site.chosen(tab.remembered(given)).folder)
        return closed | tab.look(given, run=None)

    tab.screen.buttons["rename"].click(ask_rename, inputs, [*rows, asks.name], **LIGHT)
    tab.screen.buttons["delete"].click(ask_delete, inputs, [*rows, asks.question], **LIGHT)
    gr.on([asks.save.click, asks.name.submit], rename, {*inputs, asks.name}, [*rows, *tab.parts()], **LOOKS)
    asks.confirm.click(delete, inputs, [*rows, *tab.parts()], **LOOKS)
    gr.on([asks.leave.click, asks.keep.click], lambda: closed, None, rows, **LIGHT)


def _connect_probes(tab: TrainingTab, compare: CompareFields, tabs: gr.Tabs) -> None:
    """A checkpoint as the Compare tab's LoRA, and a method tried on it here."""
    apply = tab.apply

    def send(given: Given, event: gr.EventData) -> Updates:
        run = tab.site.open_run(tab.remembered(given))
        checkpoint = None if run is None else run.checkpoint_for(int(event._data["step"]))
        if checkpoint is None:
            raise gr.Error("This run has no checkpoint yet.", print_exception=False)
        gr.Info(f"The LoRA is {html.escape(run.job.name)}'s checkpoint of step {checkpoint}. Press Generate.")
        settings = run.job.settings
        return {
            tabs: gr.Tabs(selected="compare"), tab.memory: tab.remembered(given) | {"tab": "compare"},
            compare.lora: str(run.checkpoints[checkpoint]), compare.model: settings.get("model", "emoji"),
            compare.reward: str(settings.get("rewards", [""])[0]).partition("=")[0],
        }

    def draw(given: Given) -> Iterator[str]:
        run = tab.site.open_run(tab.remembered(given))
        fields = (given[apply.step], given[apply.method], given[apply.prompt], given[apply.seeds])
        yield from apply_method(tab.open_engine, run, *fields)

    tab.screen.viewer.compare(send, {tab.memory}, [tabs, tab.memory, compare.lora, compare.model, compare.reward], **LOOKS)
    where = gr.on([apply.draw.click, apply.method.submit, apply.prompt.submit], None, None, apply.step, js=CHOSEN_STEP, **LIGHT)
    inputs = {tab.memory, apply.step, apply.method, apply.prompt, apply.seeds}
    where.then(draw, inputs, apply.result, concurrency_id="engine", concurrency_limit=1, **PRIVATE)


@contextmanager
def _said() -> Iterator[None]:
    """A mistake inside is said on the page and goes no further."""
    try:
        yield
    except UserError as error:
        gr.Warning(html.escape(str(error)), title="Not possible")


def say_html(text: str, *, wrong: bool = False) -> str:
    """A sentence below the form's buttons."""
    return f'<p class="rd-say {"rd-wrong" * wrong}" role="status">{html.escape(text)}</p>'


def _source_html(name: str | None) -> str:
    return f'<p class="rd-note">{html.escape(preset_note(name))}</p>'
