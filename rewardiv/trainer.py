"""A training run: checked before it begins, stepped, probed, rolled back, stopped in time, resumed as if never stopped.

A run is a function of its settings: batches, noise and dropout derive from (seed, step), and a checkpoint holds all the
rest. So whatever is done again after a kill or a rollback comes out as it would have without. The run folder is
design.md §7's; records of steps, probes and events go to `metrics.jsonl`, `probes.jsonl` and `events.jsonl`.
"""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rewardiv import lora
from rewardiv.checkpoints import State, find_checkpoint, forget_after, load_state, save_checkpoint, save_state
from rewardiv.config import TrainConfig
from rewardiv.crew import Crew, join_crew
from rewardiv.draft import ADAPTER
from rewardiv.errors import UserError
from rewardiv.export import prompt_grid
from rewardiv.learner import Learner, new_learner, take_step
from rewardiv.probes import Probe, new_probe
from rewardiv.publish import write_card
from rewardiv.records import (
    CONFIG_NAME,
    EVENTS_NAME,
    GRID_NAME,
    JOB_NAMES,
    METRICS_NAME,
    PROBES_NAME,
    Event,
    StepRecord,
    list_checkpoints,
    probe_dir,
)
from rewardiv.registry import prompts_path
from rewardiv.runs import Orders, append_jsonl, check_new_dir, clear_leftovers, cut_jsonl, new_dir, write_atomic, write_json
from rewardiv.trackers import check_tracker, open_tracker, probe_numbers, step_numbers
from rewardiv.verdicts import ProbeRecord, collapse_onset

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

LOG = logging.getLogger(__name__)
DEFAULT_PROMPTS = "emoji"
FREE_ON_RESUME = {  # settings that a resumed run may change
    "output_dir", "device", "max_train_steps", "learning_rate", "lr_warmup_steps", "max_grad_norm", "max_rollbacks",
    "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "probe_every", "diversity_floor", "report_to",
}
POLL_S = 0.2
GIB = 2**30

Record = StepRecord | ProbeRecord | Event
Receive = Callable[[], Orders]


@dataclass(frozen=True)
class Estimate:
    """What a run would take on this machine: seconds of a step, of a probe and of all; peak memory of this process."""

    step_s: float
    probe_s: float
    total_s: float
    peak_gib: float


@dataclass(frozen=True)
class Start:
    """Where a run begins: its prompts and the state of the checkpoint that it goes on from, if any."""

    prompts: list[str]
    resumed: bool
    state: State | None


@dataclass
class Run:
    """A learner with its folder, between two steps.

    Attributes:
        probe: None in all processes but the leading one, and where there are no probes; so is the tracker.
        probed: All probes so far.
    """

    config: TrainConfig
    learner: Learner
    probe: Probe | None = None
    tracker: GeneralTracker | None = None
    probed: list[ProbeRecord] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def crew(self) -> Crew:
        return self.learner.crew

    @property
    def step(self) -> int:
        """Finished steps."""
        return self.learner.step


def train(config: TrainConfig, *, orders: Receive = Orders) -> Iterator[Record]:
    """Train as `config` says, in the run folder config.output_dir; everything is checked before this returns.

    Under a launcher of several processes all of them call this and get the same records; the leading one alone asks for
    orders, draws probes and touches the run folder.

    Args:
        config: The run's settings.
        orders: Asked between two steps.

    Yields:
        Records of steps, probes and events, when they and a checkpoint that is due are on disk.

    Raises:
        UserError: At once for anything missing, unknown or at odds with the run to be resumed; later if the disk refuses or
            steps keep failing after max_rollbacks. The last checkpoint is then whole.
    """
    crew = join_crew(config.device)
    rewards, held_out = crew.lead(lambda: (config.rewards, config.probe_rewards))  # votes may come in between two processes
    config = replace(config, rewards=rewards, probe_rewards=held_out)
    start = crew.lead(lambda: check_start(config))
    made: list[Run] = []
    crew.together(lambda: made.append(new_run(config, crew, start)))
    run = made[0]
    run.probed = crew.lead(lambda: open_folder(run, start))
    return run_steps(run, start, orders)


def estimate(config: TrainConfig) -> Estimate:
    """Measure a run on this machine by a step (after one to warm up) and a probe; writes nothing.

    Raises:
        UserError: For what `train` refuses at once, but for the output folder; or if the steps fail.
    """
    check_tracker(config.report_to)
    prompts = read_prompts(prompts_path(config.prompts_file or DEFAULT_PROMPTS))
    on_gpu = config.device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(config.device)
    run = new_run(config, Crew(config.device), Start(prompts, False, None))
    step_s, probe_s = 0.0, 0.0
    for _ in range(2):
        started = time.monotonic()
        if isinstance(trouble := take_step(run.learner), str):
            raise UserError(f"a step of this run fails: {trouble}")
        step_s = time.monotonic() - started
    if run.probe is not None:
        probe_s = run.probe.measure(0)[0].elapsed_s
    num_probes = 2 + math.ceil(config.max_train_steps / config.probe_every) if config.probe_every else 0  # with the base's
    peak = torch.cuda.max_memory_allocated(config.device) if on_gpu else peak_bytes()
    return Estimate(step_s, probe_s, step_s * config.max_train_steps + probe_s * num_probes, peak / GIB)


def peak_bytes() -> int:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def check_start(config: TrainConfig) -> Start:
    """Everything that can be refused before a model is loaded; reads the prompts and the checkpoint, writes nothing.

    Raises:
        UserError: Saying what is missing, damaged or in the way.
    """
    check_tracker(config.report_to)
    resumed = bool(config.resume_from_checkpoint) and (Path(config.output_dir) / CONFIG_NAME).exists()
    prompts = check_resumed(config) if resumed else read_prompts(prompts_path(config.prompts_file or DEFAULT_PROMPTS))
    checkpoint = find_checkpoint(config.output_dir, config.resume_from_checkpoint) if config.resume_from_checkpoint else None
    if not resumed:
        check_new_dir(config.output_dir, besides=JOB_NAMES)
    return Start(prompts, resumed, load_state(checkpoint) if checkpoint else None)


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file, one a line; empty lines are left out.

    Raises:
        UserError: If the file is missing, not text, or holds no prompt.
    """
    try:
        prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts file {path}: {error}") from error
    if not prompts:
        raise UserError(f"the prompts file {path} holds no prompt; write one a line")
    return prompts


def check_resumed(config: TrainConfig) -> list[str]:
    """The prompts of the run to be resumed, whose settings must be the same but for FREE_ON_RESUME.

    Raises:
        UserError: Naming each setting that differs.
    """
    path = Path(config.output_dir) / CONFIG_NAME
    try:
        saved = json.loads(path.read_text())
        earlier, prompts = TrainConfig.from_dict(saved["settings"]).to_dict(), list(saved["prompts"])
    except (json.JSONDecodeError, KeyError, TypeError, UserError) as error:
        raise UserError(f"{path} is damaged ({error}); choose another output folder") from error
    differing = [f"{name} {earlier[name]!r} (now {value!r})" for name, value in config.to_dict().items()
                 if name not in FREE_ON_RESUME and earlier[name] != value]
    if differing:
        raise UserError(f"the run in {path.parent} was started with {', '.join(differing)}; resume it with the same "
                        "settings or choose another output folder")
    return prompts


def new_run(config: TrainConfig, crew: Crew, start: Start) -> Run:
    """Load what a run needs, in each process: rewards, the model with its adapter, the probe.

    Raises:
        UserError: If something is missing or damaged, a LoRA target matches nothing, or the checkpoint is of another model.
    """
    learner = new_learner(config, crew, start.prompts)
    model = learner.trainee.model
    if start.state is not None:
        learner.restore(start.state)
    if not crew.is_leader:
        return Run(config, learner)
    for prompt in start.prompts:
        if cut := model.check_prompt(prompt).cut:
            LOG.warning("the prompt '%s' is longer than the text encoder; cut: '%s'", prompt, cut)
    return Run(config, learner, probe_of(learner) if config.probe_every else None)


def probe_of(learner: Learner) -> Probe:
    """The run's probe, which shares the model and the rewards with training."""
    return new_probe(learner.trainee.model, learner.config, learner.prompts, rewards=learner.mix.rewards)


def open_folder(run: Run, start: Start) -> list[ProbeRecord]:
    """Make the run folder ready to be written to: new, or as it was at the checkpoint; gives the probes so far."""
    folder = run.folder
    if not start.resumed:
        new_dir(folder, besides=JOB_NAMES)
    write_json(folder / CONFIG_NAME, {"settings": run.config.to_dict(), "prompts": run.learner.prompts})
    clear_leftovers(folder / "checkpoints")
    probed = forget_after(folder, run.step if start.state is not None else -1)
    cut_jsonl(folder / EVENTS_NAME, lambda record: True)  # a torn last line
    run.tracker = open_tracker(run.config)
    return [ProbeRecord.from_dict(record) for record in probed]


def run_steps(run: Run, start: Start, receive: Receive) -> Iterator[Record]:
    """All steps that are left, with what belongs between them; see `train`."""
    try:
        if start.resumed:
            yield note(run, "resumed", f"went on from step {run.step}")
        if start.state is None:
            yield from settled(run)
        while run.step < run.config.max_train_steps:
            if (yield from obey(run, receive)):
                return
            if is_too_uniform(run):
                yield stop_early(run)
                break
            yield from advance(run)
        run.crew.lead(lambda: finish(run))
    finally:
        if run.tracker is not None:
            run.tracker.finish()


def obey(run: Run, receive: Receive) -> Iterator[Record]:
    """Follow the orders of now; pauses for as long as they say. Returns whether to stop."""
    while True:
        orders = run.crew.lead(receive)
        if orders.probe:
            yield from take_probe(run)
        if orders.save or orders.stop:
            save(run)
        if orders.save:
            yield note(run, "saved", f"checkpoint step-{run.step} was saved")
        if orders.stop:
            yield note(run, "stopped", f"stopped after step {run.step}, with a checkpoint to resume from")
            return True
        if not orders.pause:
            return False
        time.sleep(POLL_S)


def advance(run: Run) -> Iterator[Record]:
    """One step with all that is due after it, or the way back to the last checkpoint."""
    outcome = take_step(run.learner)
    if isinstance(outcome, str):
        yield roll_back(run, outcome)
        return
    run.crew.lead(lambda: append_jsonl(run.folder / METRICS_NAME, asdict(outcome)))
    if run.tracker is not None:
        run.tracker.log(step_numbers(outcome), step=outcome.step)
    yield from [outcome, *settled(run)]


def settled(run: Run) -> list[Record]:
    """Do what is due after this step: a probe, and a checkpoint last, so that it vouches for all that went before it."""
    config, step = run.config, run.step
    last = step == config.max_train_steps
    records = take_probe(run) if config.probe_every and (step % config.probe_every == 0 or last) else []
    if step % config.checkpointing_steps == 0 or last:
        save(run)
    return records


def roll_back(run: Run, trouble: str) -> Event:
    """Go back to the last checkpoint, at half the rate from there; what came after it is forgotten, to be done again.

    The checkpoint is told first, so that a resumed run goes on as this one.

    Raises:
        UserError: If that has been done max_rollbacks times.
    """
    learner, step, elapsed_s = run.learner, run.step, run.learner.trainee.elapsed_s
    rate = run.config.learning_rate * learner.rate_factor

    def work() -> tuple[Event, State, list[dict]]:
        last, folder = max(list_checkpoints(run.folder).items())
        if learner.rollbacks >= run.config.max_rollbacks:
            raise UserError(f"step {step + 1}: {trouble}; that went wrong {learner.rollbacks} times before, so the run "
                            f"has ended. Its checkpoint {folder.name} is whole: resume with a learning rate below {rate:.3g}")
        way = f"back to step {last}, with the learning rate {rate / 2:.3g}"
        event = Event(step, "rollback", f"step {step + 1}: {trouble}; {way}")
        append_jsonl(run.folder / EVENTS_NAME, asdict(event))
        state = load_state(folder) | {"rate_factor": learner.rate_factor / 2, "rollbacks": learner.rollbacks + 1}
        save_state(folder, state)
        return event, state, forget_after(run.folder, last)

    event, state, probed = run.crew.lead(work)
    learner.restore(state)
    learner.trainee.elapsed_s = elapsed_s
    run.probed = [ProbeRecord.from_dict(record) for record in probed]
    return event


def take_probe(run: Run) -> list[Record]:
    """Draw and score the probe's grid, unless that is done at this step; with it, the first sign of collapse."""
    if run.probed and run.probed[-1].step == run.step:
        return []

    def work() -> ProbeRecord:
        run.probe = run.probe or probe_of(run.learner)
        with run.learner.timed(), run.learner.averaged():
            record, images = run.probe.measure(run.step)
        picture = prompt_grid(images, run.probe.prompts, run.probe.seeds, f"step {run.step}" if run.step else "base model")
        write_atomic(probe_dir(run.folder, run.step) / GRID_NAME, picture.save)
        append_jsonl(run.folder / PROBES_NAME, record.to_dict())
        return record

    record = run.crew.lead(work)
    known = collapse_onset(run.probed) is not None
    run.probed = [*run.probed, record]
    if run.tracker is not None:
        run.tracker.log(probe_numbers(record.to_dict()), step=record.step)
    onset = collapse_onset(run.probed)
    return [record] if known or onset is None else [record, note(run, "onset", onset.reason, onset.step)]


def is_too_uniform(run: Run) -> bool:
    """Whether the last probe keeps less of the base's variance than diversity_floor."""
    return bool(run.probed) and run.probed[-1].step > 0 and run.probed[-1].trace_ratio < run.config.diversity_floor


def stop_early(run: Run) -> Event:
    """Say why training ends here, with a checkpoint."""
    save(run)
    last = run.probed[-1]
    return note(run, "early-stop", f"the probe at step {last.step} keeps {last.trace_ratio:.0%} of the base model's variance, "
                f"less than the floor of {run.config.diversity_floor:.0%}")


def note(run: Run, kind: str, text: str, step: int | None = None) -> Event:
    """Write an event down, of this step where no other is given."""
    event = Event(run.step if step is None else step, kind, text)
    run.crew.lead(lambda: append_jsonl(run.folder / EVENTS_NAME, asdict(event)))
    return event


def save(run: Run) -> None:
    """Save a checkpoint of this step, unless there is one."""
    def work() -> None:
        with run.learner.timed():
            save_checkpoint(run.folder, run.learner.state(), lambda folder: save_weights(run, folder),
                            run.config.checkpoints_total_limit)

    run.crew.lead(work)


def finish(run: Run) -> None:
    """Write the finished LoRA and its model card."""
    save_weights(run, run.folder)
    write_card(run.folder)


def save_weights(run: Run, folder: Path) -> None:
    """Write the adapter for others: the averaged weights where they are kept."""
    with run.learner.averaged():
        lora.save_adapter(run.learner.trainee.model.unet, ADAPTER, folder)
