"""The Compare tab: one prompt, several samplers, the same seeds, live images and numbers. Layout and thin handlers."""

from __future__ import annotations

import html
import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from rewardiv.config import SCHEDULERS, format_seeds
from rewardiv.errors import UserError
from rewardiv.hub import gib_text
from rewardiv.registry import known
from rewardiv.ui.form import KINDS, Form
from rewardiv.ui.gamma_editor import gamma_editor
from rewardiv.ui.history import history_html, history_strip
from rewardiv.ui.live import GRID_EVERY_S, PLOTS_EVERY_S, LiveRun, status_html
from rewardiv.ui.session import Session, View
from rewardiv.ui.study_maker import connect_maker, study_maker, study_opener

if TYPE_CHECKING:  # torch stays out of the page's start
    from rewardiv.generate import Engine, Result

log = logging.getLogger(__name__)

OpenEngine = Callable[[], "Engine"]
Updates = dict[Any, Any]

EXAMPLES = ("a cat face", "a rocket", "three lemons", "a ghost and a balloon", "a frog face on a blue background")
PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}
ENGINE_QUEUE = {"concurrency_id": "engine", "concurrency_limit": 1}


@dataclass(frozen=True)
class Screen:
    """The right side's parts and the buttons: all that a run changes."""

    status: gr.HTML
    grid: gr.HTML
    plots: gr.HTML
    table: gr.HTML
    command: gr.Code
    bundle: gr.DownloadButton
    history: gr.HTML
    seeds: gr.Textbox
    generate: gr.Button
    stop: gr.Button

    def parts(self) -> list[gr.components.Component]:
        """Everything, as the outputs of a run."""
        return [getattr(self, name) for name in self.__dataclass_fields__]

    def shown(self, view: View) -> Updates:
        """What puts `view` on the screen."""
        return {
            self.status: view.status, self.grid: view.grid, self.plots: view.plots, self.table: view.table,
            self.command: gr.update(value=view.command, visible=bool(view.command)),
            self.bundle: gr.update(value=view.bundle, visible=view.bundle is not None),
        }

    def idle(self) -> Updates:
        """Buttons while nothing runs."""
        return {self.generate: gr.update(visible=True), self.stop: gr.update(visible=False)}

    def busy(self) -> Updates:
        """Buttons while a run is waiting or going on."""
        return {self.generate: gr.update(visible=False), self.stop: gr.update(visible=True, interactive=True, value="Stop")}


@dataclass(frozen=True)
class CompareFields:
    """Fields that other tabs may fill; `fields` are all of them, in the order of Form."""

    lora: gr.Dropdown
    model: gr.Dropdown
    reward: gr.Dropdown
    fields: tuple[gr.components.Component, ...]


def build_compare(open_engine: OpenEngine, prepared: View, studies_dir: Path, *, demo: bool = False) -> CompareFields:
    """Lay the tab out inside an open gr.Blocks and connect it.

    Args:
        open_engine: Returns the engine; may take long at the first call, and is called in a run only.
        prepared: Shown before the first click.
        studies_dir: Where studies that are made of results go.
        demo: Visitors may make none.
    """
    session = gr.State(Session([] if prepared.config is None else [prepared]), delete_callback=Session.close)
    with gr.Row(elem_classes="rd-page"):
        with gr.Column(scale=0, min_width=320, elem_classes="rd-left"):
            fields, generate, stop, upload = _form(Form() if prepared.config is None else Form.of(prepared.config))
        with gr.Column(scale=1, min_width=320, elem_classes="rd-right"):
            status, grid, plots, table, bundle, command, history, maker = _results(prepared, studies_dir, demo)
    screen = Screen(status, grid, plots, table, command, bundle, history, fields[Form.names().index("seeds")], generate, stop)
    connect_maker(maker, session, _connect(open_engine, screen, session, fields, upload))
    by_name = dict(zip(Form.names(), fields, strict=True))
    return CompareFields(by_name["lora"], by_name["model"], by_name["reward"], tuple(fields))


def _form(form: Form) -> tuple[list[gr.components.Component], gr.Button, gr.Button, gr.UploadButton]:
    """The left side: fields in the order of Form, then the buttons."""
    prompt = gr.Textbox(form.prompt, label="Prompt", lines=1, max_lines=1, elem_id="rd-prompt", placeholder=EXAMPLES[0])
    gr.HTML(_examples_html(), apply_default_css=False)
    generate = gr.Button("Generate", variant="primary", elem_id="rd-generate")
    stop = gr.Button("Stop", variant="stop", visible=False, elem_id="rd-stop")
    gr.HTML('<p class="rd-note rd-hint">Ctrl + Enter generates, Esc stops</p>', apply_default_css=False)
    lora = gr.Dropdown(
        _lora_choices(), value=form.lora, label="LoRA, with the reward it was trained on", allow_custom_value=True,
        elem_id="rd-lora",
    )
    methods = gr.CheckboxGroup(list(KINDS), value=list(form.methods), label="Methods to compare", elem_id="rd-methods")
    gamma = gamma_editor(form.gamma, elem_id="rd-gamma")
    with gr.Accordion("Seeds, steps, guidance", open=False):
        run_fields = _run_fields(form)
    with gr.Accordion("More settings", open=False):
        more_fields = _more_fields(form)
    upload = gr.UploadButton("Load settings from an image", file_types=[".png"], size="sm", elem_id="rd-load")
    return [prompt, lora, methods, gamma, *run_fields, *more_fields], generate, stop, upload


def _run_fields(form: Form) -> list[gr.components.Component]:
    hint = "how closely the prompt is followed; 1 is off"
    return [
        gr.Textbox(form.seeds, label="Seeds", info="one image a seed and method, such as 0-7,12", elem_id="rd-seeds"),
        gr.Checkbox(form.random_seeds, label="New random seeds at each run, as many as above"),
        gr.Slider(1, 100, form.num_inference_steps, step=1, label="Denoising steps"),
        gr.Slider(1, 15, form.guidance_scale, step=0.5, label="Guidance", info=hint),
    ]


def _more_fields(form: Form) -> list[gr.components.Component]:
    usage = "such as aig:step:0.6 anneal-lora:cosine lora:1.3"
    return [
        gr.Dropdown(list(known().models), value=form.model, label="Base model", allow_custom_value=True),
        gr.Textbox(form.negative_prompt, label="Negative prompt", info="what to lead away from"),
        gr.Slider(0, 2, form.lora_scale, step=0.05, label="LoRA scaled down to", info="0 is base, 1 is finetuned"),
        gr.Slider(0, 1, form.blend, step=0.05, label="Base model's share in the constant blend"),
        gr.Textbox(form.extra_methods, label="More methods, as typed", info=usage, elem_id="rd-extra"),
        gr.Dropdown(_scheduler_choices(), value=form.scheduler, label="Scheduler"),
        gr.Dropdown(_reward_choices(), value=form.reward, label="Reward that scores the images", allow_custom_value=True),
        *_size_fields(form),
        gr.Slider(0, 1, form.guidance_rescale, step=0.05, label="Guidance rescale", info="against overexposure; 0 is off"),
    ]


def _size_fields(form: Form) -> list[gr.components.Component]:
    with gr.Row():
        return [gr.Number(getattr(form, side), label=f"{side.capitalize()}, px", info="0: the model's own", precision=0, step=8,
                          min_width=100) for side in ("height", "width")]


def _results(prepared: View, studies_dir: Path, demo: bool) -> tuple[Any, ...]:
    """The right side, showing the prepared result."""
    status = gr.HTML(prepared.status, apply_default_css=False, elem_id="rd-status")
    grid = gr.HTML(prepared.grid, apply_default_css=False, elem_id="rd-grid")
    plots = gr.HTML(prepared.plots, apply_default_css=False, elem_id="rd-plots")
    table = gr.HTML(prepared.table, apply_default_css=False, elem_id="rd-table")
    with gr.Row(elem_id="rd-after"):
        bundle = gr.DownloadButton("Download images, scores and settings", visible=False, size="sm", elem_id="rd-bundle")
        opener = study_opener(demo=demo)
    maker = study_maker(opener, studies_dir)
    command = gr.Code(
        prepared.command, language="shell", label="The same from the command line", interactive=False,
        wrap_lines=True, lines=1, show_line_numbers=False, visible=bool(prepared.command), elem_id="rd-command",
    )
    history = history_strip(elem_id="rd-history")
    return status, grid, plots, table, bundle, command, history, maker


def _connect(
    open_engine: OpenEngine, screen: Screen, session: gr.State, fields: list[gr.components.Component], upload: gr.UploadButton
) -> gr.events.Dependency:
    """Events: click or Enter → busy → run → idle; stop, history and load settings beside them. Gives the run's."""

    def begin() -> Updates:
        return screen.busy() | {screen.status: status_html("Waiting for the engine…", 0, "running")}

    def run(values: Updates) -> Iterator[Updates]:
        yield from run_compare(open_engine, screen, values[session], Form(*(values[field] for field in fields)))

    def stop(current: Session) -> Updates:
        current.stop = True
        return {screen.stop: gr.update(value="Stopping…", interactive=False)}

    def show(current: Session, event: gr.EventData) -> Updates:
        index = event._data.get("index")
        if not isinstance(index, int) or not 0 <= index < len(current.views):
            raise gr.Error("This run isn't kept any more.", print_exception=False)
        return screen.shown(current.views[index])

    buttons = [screen.generate, screen.stop]
    started = gr.on([screen.generate.click, fields[0].submit], begin, None, [screen.status, *buttons], queue=False, **PRIVATE)
    ended = started.then(run, {session, *fields}, screen.parts(), **ENGINE_QUEUE, **PRIVATE)
    ended.then(screen.idle, None, buttons, queue=False, **PRIVATE)
    screen.stop.click(stop, session, screen.stop, queue=False, **PRIVATE)
    screen.history.show(show, session, screen.parts(), queue=False, **PRIVATE)
    upload.upload(load_settings, upload, fields, queue=False, **PRIVATE)
    gr.api(api_generate(open_engine), api_name="generate", **ENGINE_QUEUE)
    return ended


def run_compare(open_engine: OpenEngine, screen: Screen, session: Session, form: Form) -> Iterator[Updates]:
    """A run as updates of the screen. A mistake is said and leaves the images that are shown in place."""
    try:
        yield from _run(open_engine, screen, session, form)
    except UserError as error:
        gr.Warning(html.escape(str(error)), title="Please change something")
        yield {screen.status: status_html(str(error), 0, "failed")}
    except Exception:
        log.exception("a run failed: %s", form)
        gr.Warning("Something unexpected went wrong; the log has the details.", title="Unexpected error")
        yield {screen.status: status_html("Unexpected error; the log has the details.", 0, "failed")}
    finally:
        session.stop = False


def _run(open_engine: OpenEngine, screen: Screen, session: Session, form: Form) -> Iterator[Updates]:
    config = form.config()
    yield {screen.status: status_html("Loading the model; only the first run waits for it…", 0, "running")}
    engine = open_engine()
    from rewardiv.export import command_line
    from rewardiv.generate import Progress, generate, memory_plan, partial_result

    live = LiveRun(config, command_line(config))
    result: Result | None = None
    with closing(generate(engine, config)) as records:
        yield {screen.command: gr.update(value=live.command, visible=True), screen.seeds: format_seeds(config.seeds)}
        if plan := memory_plan(engine, config):
            takes = f"Starting; the run takes about {gib_text(plan.peak)}, and {gib_text(plan.free)} are free…"
            yield {screen.status: status_html(takes, 0, "running")}
        for record in records:
            if not isinstance(record, Progress):
                result = record
                live.finish(record)
                break
            live.add(record)
            yield _live_updates(screen, live)
            if session.stop:
                break
    if result is None and live.last is not None:
        result = partial_result(config, live.last)
    bundle = _bundle(session, result)
    view = live.view(bundle=bundle, stopped=not result.finished)
    session.keep(view)
    yield screen.shown(view) | {screen.history: history_html(session.views)}


def _live_updates(screen: Screen, live: LiveRun) -> Updates:
    """What has changed on the screen and is due."""
    updates: Updates = {screen.status: live.status()}
    if live.due("grid", GRID_EVERY_S):
        updates |= {screen.grid: live.grid(), screen.table: live.table()}
    if live.due("plots", PLOTS_EVERY_S):
        updates[screen.plots] = live.plots()
    return updates


def _bundle(session: Session, result: Result) -> str:
    """The download: every image with its settings inside, scores and the command line, as one zip."""
    from rewardiv.export import bundle_zip

    path = session.new_path("rewardiv.zip")
    bundle_zip(result, path)
    return str(path)


def load_settings(path: str) -> list[object]:
    """Values for the form from an image that rewardiv saved."""
    from rewardiv.export import read_settings

    try:
        return Form.of(read_settings(path)).values()
    except UserError as error:
        raise gr.Error(html.escape(str(error)), title="Cannot read settings", print_exception=False) from error


def api_generate(open_engine: OpenEngine) -> Callable[..., dict[str, Any]]:
    """The endpoint for scripts: the run as plain values."""

    def generate(
        prompt: str,
        lora: str = "vivid",
        methods: str = "base finetuned lora:0.5 aig:power:2",
        seeds: str = "0-7",
        num_inference_steps: int = 20,
        guidance_scale: float = 3.0,
        model: str = "emoji",
        reward: str = "",
    ) -> dict[str, Any]:
        """Draw a prompt with several methods, separated by spaces, at the same seeds; returns what report.json holds."""
        from rewardiv.export import report
        from rewardiv.generate import generate as records

        form = Form(
            prompt, lora, (), seeds=seeds, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
            model=model, extra_methods=methods, reward=reward,
        )
        try:
            config = form.config()
            *_, result = records(open_engine(), config)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return report(result)

    return generate


def _examples_html() -> str:
    names = map(html.escape, EXAMPLES)
    chips = "".join(f'<button type="button" data-example="{name}">{name}</button>' for name in names)
    return f'<div class="rd-chips rd-examples" role="group" aria-label="Example prompts"><span>Try</span>{chips}</div>'


def _lora_choices() -> list[tuple[str, str]]:
    return [(f"{e.name} (reward: {e.reward})" if e.reward else e.name, e.name) for e in known().loras.values()]


def _scheduler_choices() -> list[tuple[str, str]]:
    return [("the model's own" if name == "model" else name, name) for name in SCHEDULERS]


def _reward_choices() -> list[tuple[str, str]]:
    return [("the one that the LoRA was trained on", ""), *((f"{e.name}: {e.about}", e.name) for e in known().rewards.values())]
