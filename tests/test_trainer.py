"""A run: resuming equals never having stopped wherever it was killed, bad steps are undone, refusals come first."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_disk import small_disk
from test_crew import LAUNCHER, free_port, in_crew
from torch import Tensor

import rewardiv.learner as learner_module
import rewardiv.trainer as trainer_module
from rewardiv.config import TrainConfig
from rewardiv.crew import Crew
from rewardiv.draft import accumulate, draw_batches, new_trainee
from rewardiv.errors import UserError
from rewardiv.jobs import train_command
from rewardiv.learner import Learner, find_trouble, gradients, new_learner, take_step
from rewardiv.mixing import load_mix
from rewardiv.models import load_model
from rewardiv.records import Event, StepRecord, list_checkpoints
from rewardiv.runs import Orders
from rewardiv.trainer import Record, estimate, train
from rewardiv.verdicts import Onset, ProbeRecord

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["a cat face", "a red cat", "face"]
WEIGHTS = "pytorch_lora_weights.safetensors"
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["rewardiv.trainer", "open_clip"])
Change = tuple[str, str]  # an audit event and a pattern that its path matches


@pytest.fixture
def config(tiny_model_dir: Path, tmp_path: Path) -> TrainConfig:
    """A run of 6 short steps on the tiny model."""
    prompts_file = tmp_path / "prompts.txt"
    prompts_file.write_text("\n".join(PROMPTS) + "\n")
    return TrainConfig(
        output_dir=str(tmp_path / "run"), model=str(tiny_model_dir), rewards=("colorfulness",), probe_every=0,
        prompts_file=str(prompts_file), max_train_steps=6, train_batch_size=2, num_inference_steps=2, rank=2,
        learning_rate=0.01, lr_warmup_steps=5, checkpointing_steps=2,
    )


@pytest.fixture
def rich(config: TrainConfig, tiny_clip_dir: Path) -> TrainConfig:
    """With everything that has a state: dropout, two rewards, averaged weights, probes."""
    return replace(config, rewards=("colorfulness", f"{tiny_clip_dir}=0.5"), lora_dropout=0.2, ema_decay=0.9, probe_every=3,
                   num_probe_prompts=2, num_probe_seeds=2)


def lines(folder: str | Path, name: str) -> list[dict]:
    """A run's records without the times."""
    path = Path(folder) / name
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{key: value for key, value in record.items() if key != "elapsed_s"} for record in records]


def steps_of(records: list[Record]) -> list[int]:
    return [record.step for record in records if isinstance(record, StepRecord)]


def kinds_of(records: list[Record]) -> list[str]:
    return [record.kind for record in records if isinstance(record, Event)]


def same(first: object, second: object) -> bool:
    """Equality bit for bit, of a checkpoint's state."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first if key != "elapsed_s")
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second) if isinstance(first, Tensor) else first == second


def assert_same_run(first: str | Path, second: str | Path) -> None:
    """Two finished run folders hold the same: weights, optimiser and all other state, metrics, probes and their pictures."""
    first, second = Path(first), Path(second)
    for name in ("metrics.jsonl", "probes.jsonl"):
        assert lines(first, name) == lines(second, name)
    ours, theirs = list_checkpoints(first), list_checkpoints(second)
    assert list(ours) == list(theirs)
    for place, other in [*zip(ours.values(), theirs.values(), strict=True), (first, second)]:
        assert same(load_file(place / WEIGHTS), load_file(other / WEIGHTS))
    last = max(ours)
    assert same(*(torch.load(found[last] / "state.pt", weights_only=True) for found in (ours, theirs)))
    grids = sorted(path.relative_to(first) for path in first.glob("probes/*/grid.png"))
    assert grids == sorted(path.relative_to(second) for path in second.glob("probes/*/grid.png"))
    assert all((first / grid).read_bytes() == (second / grid).read_bytes() for grid in grids)


def poison(step: int) -> None:
    """From now on, in this process: the step after `step` fails at the full rate."""
    def failing(learner: Learner) -> list:
        parts, bad = gradients(learner), (learner.step, learner.rate_factor) == (step, 1)
        return [replace(part, loss=float("nan")) if bad else part for part in parts]

    learner_module.gradients = failing


def run_in_process(settings: dict, poisoned: int | None, killed_at: Change | None, log: str | None) -> None:
    """Train in a process of its own, which dies of SIGKILL just before the first change to its folder that matches."""
    torch.set_num_threads(1)
    folder = settings["output_dir"]
    changes: list[Change] = []

    def watch(event: str, args: tuple) -> None:
        if event not in ("open", "os.rename", "os.mkdir") or not str(args[0]).startswith(folder):
            return
        if event == "open" and not (args[1] and set(args[1]) & set("wax+")):
            return
        changes.append((event, str(args[0]).removeprefix(folder)))
        if killed_at and event == killed_at[0] and re.search(killed_at[1], str(args[0])):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    if poisoned is not None:
        poison(poisoned)
    for _ in train(TrainConfig.from_dict(settings)):
        pass
    if log:
        Path(log).write_text(json.dumps(changes))


def outcome(config: TrainConfig, *, poisoned: int | None = None, killed_at: Change | None = None, after_s: float | None = None,
            log: str | None = None) -> int:
    """Train in another process, killed by itself at a change, or from here after a time; its exit code."""
    process = CONTEXT.Process(target=run_in_process, args=(config.to_dict(), poisoned, killed_at, log))
    process.start()
    if after_s is not None:
        time.sleep(after_s)
        process.kill()
    process.join()
    return process.exitcode


def test_killed_at_any_moment_and_resumed_a_run_is_the_one_that_never_stopped(rich: TrainConfig, tmp_path: Path) -> None:
    """kill -9 before a checkpoint exists, while one is written, before it appears, between records, and at random."""
    log = tmp_path / "changes.json"
    started = time.monotonic()
    assert outcome(rich, log=str(log)) == 0
    took = time.monotonic() - started
    killed = replace(rich, output_dir=str(tmp_path / "killed"), resume_from_checkpoint="latest")
    moments = [
        ("open", r"step-0/.partial-\d+-grid"), ("open", r"step-0/.partial-\d+-state"), ("open", r"metrics.jsonl"),
        ("open", r"step-2/.partial-\d+-pytorch_lora"), ("os.rename", r"checkpoints/.partial-\d+-step-2$"),
        ("open", r"probes.jsonl"), ("os.rename", r"step-4/.partial-\d+-state"), ("open", r"README"),
    ]
    changes = json.loads(log.read_text())
    for event, path in moments:
        assert any(event == seen and re.search(path, place) for seen, place in changes), path  # they do happen
        assert outcome(killed, killed_at=(event, path)) == -signal.SIGKILL, path
    assert outcome(killed) == 0
    assert_same_run(rich.output_dir, killed.output_dir)
    assert [line["kind"] for line in lines(killed.output_dir, "events.jsonl")].count("resumed") >= 5

    other = replace(killed, output_dir=str(tmp_path / "other"))
    for share in random.Random(0).choices((0.5, 0.6, 0.7, 0.8, 0.9), k=2):
        assert outcome(other, after_s=share * took) in (-signal.SIGKILL, 0)
    assert outcome(other) == 0
    assert_same_run(rich.output_dir, other.output_dir)


def test_a_rollback_then_a_kill_then_a_resume_is_still_the_same_run(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, rewards=("colorfulness",), lora_dropout=0.2)
    assert outcome(config, poisoned=3) == 0
    killed = replace(config, output_dir=str(tmp_path / "killed"), resume_from_checkpoint="latest")
    for moment in [("open", "events.jsonl"), ("open", r"checkpoints/step-2/.partial-\d+-state"),
                   ("open", r"partial-\d+-metrics"), ("open", r"step-4/.partial-\d+-state")]:
        assert outcome(killed, poisoned=3, killed_at=moment) == -signal.SIGKILL, moment
    assert outcome(killed, poisoned=3) == 0
    assert_same_run(config.output_dir, killed.output_dir)
    assert [line["learning_rate"] for line in lines(config.output_dir, "metrics.jsonl")] == pytest.approx(
        [0.01 * n / 6 * (1 if n < 3 else 0.5) for n in range(1, 7)])


def test_resuming_redoes_what_the_checkpoint_does_not_know(config: TrainConfig, tmp_path: Path) -> None:
    """Also from an earlier checkpoint, and after the folder was left in the middle of a step."""
    whole = list(train(config))
    stopped = replace(config, output_dir=str(tmp_path / "stopped"))
    records = train(stopped)
    part = list(islice(records, 5))  # the last checkpoint is that of step 4
    records.close()
    (tmp_path / "stopped" / "checkpoints" / ".partial-1-step-6").mkdir()  # what a kill leaves
    with (tmp_path / "stopped" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')
    rest = list(train(replace(stopped, resume_from_checkpoint="latest")))
    assert steps_of(part) == [1, 2, 3, 4, 5] and steps_of(rest) == [5, 6] and steps_of(whole) == [1, 2, 3, 4, 5, 6]
    assert rest[0] == Event(4, "resumed", "went on from step 4")
    assert_same_run(config.output_dir, stopped.output_dir)
    assert not list((tmp_path / "stopped" / "checkpoints").glob(".*"))
    assert steps_of(list(train(replace(stopped, resume_from_checkpoint="step-2")))) == [3, 4, 5, 6]
    assert_same_run(config.output_dir, stopped.output_dir)
    assert [line["step"] for line in lines(stopped.output_dir, "events.jsonl")] == [4, 2]


def test_checkpoints_are_whole_and_the_oldest_are_removed(config: TrainConfig) -> None:
    list(train(replace(config, checkpoints_total_limit=2)))
    checkpoints = list_checkpoints(config.output_dir)
    assert list(checkpoints) == [4, 6]
    for folder in checkpoints.values():
        assert {path.name for path in folder.iterdir()} == {WEIGHTS, "state.pt"}
    assert same(load_file(checkpoints[6] / WEIGHTS), load_file(Path(config.output_dir) / WEIGHTS))
    assert (Path(config.output_dir) / "README.md").is_file()


def test_a_checkpoint_holds_the_untouched_adapter_at_step_0(config: TrainConfig) -> None:
    next(train(config))
    weights = load_file(list_checkpoints(config.output_dir)[0] / WEIGHTS)
    assert all(bool(value.any()) == ("lora_A" in key) for key, value in weights.items())


def test_probes_change_nothing_and_are_the_base_model_at_step_0(rich: TrainConfig, tmp_path: Path) -> None:
    with_probes = replace(rich, output_dir=str(tmp_path / "probed"), probe_every=2, max_train_steps=3)
    probed, plain = list(train(with_probes)), list(train(replace(rich, probe_every=0, max_train_steps=3)))
    assert lines(with_probes.output_dir, "metrics.jsonl") == lines(rich.output_dir, "metrics.jsonl")
    assert steps_of(probed) == steps_of(plain) == [1, 2, 3]
    probes = [record for record in probed if isinstance(record, ProbeRecord)]
    assert [probe.step for probe in probes] == [0, 2, 3] and (probes[0].trace_ratio, probes[0].scd) == (1, 0)
    assert probes[1].scd > 0
    for step in (0, 2, 3):
        with Image.open(Path(with_probes.output_dir) / "probes" / f"step-{step}" / "grid.png") as picture:
            assert picture.width > 2 * 96 and picture.height > 2 * 96
    assert lines(with_probes.output_dir, "probes.jsonl")[1]["step"] == 2


def test_averaged_weights_are_what_is_saved_and_probed(config: TrainConfig) -> None:
    """The average of the definition, computed from the learning weights that the checkpoints keep."""
    config = replace(config, ema_decay=0.3, max_train_steps=3, checkpointing_steps=1)
    list(train(config))
    checkpoints = list_checkpoints(config.output_dir)
    states = {step: torch.load(path / "state.pt", weights_only=True) for step, path in checkpoints.items()}
    expected = states[0]["parameters"]
    for step, decay in ((1, 2 / 11), (2, 3 / 12), (3, 0.3)):
        pairs = zip(expected, states[step]["parameters"], strict=True)
        expected = [decay * kept + (1 - decay) * weight for kept, weight in pairs]
        for kept, value in zip(states[step]["average"], expected, strict=True):
            torch.testing.assert_close(kept, value)
    learner = new_learner(config, Crew("cpu"), PROMPTS)
    learner.restore(states[3])
    saved = load_file(Path(config.output_dir) / WEIGHTS)
    with learner.averaged():
        inside = [weight.detach().clone() for weight in learner.trainee.parameters]
    assert sorted(value.sum().item() for value in saved.values()) == sorted(value.sum().item() for value in inside)
    assert same(inside, states[3]["average"])
    assert all(map(torch.equal, learner.trainee.parameters, states[3]["parameters"]))  # put back


def test_a_bad_step_leads_back_to_the_last_checkpoint_at_half_the_rate(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(learner_module, "gradients", gradients)  # so that what poison() puts there is taken away again
    poison(3)
    records = list(train(config))
    assert steps_of(records) == [1, 2, 3, 3, 4, 5, 6]
    [event] = [record for record in records if isinstance(record, Event)]
    assert (event.step, event.kind) == (3, "rollback")
    assert event.text == "step 4: the loss is not a finite number; back to step 2, with the learning rate 0.005"
    assert lines(config.output_dir, "events.jsonl") == [{"step": 3, "kind": "rollback", "text": event.text}]
    assert [line["step"] for line in lines(config.output_dir, "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    state = torch.load(list_checkpoints(config.output_dir)[6] / "state.pt", weights_only=True)
    assert (state["rate_factor"], state["rollbacks"]) == (0.5, 1)


def test_after_a_rollback_another_batch_is_drawn_so_that_a_bad_one_is_passed(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Right after a checkpoint the weights are those of the step that failed: the same batch would fail again at any rate."""
    bad = list(draw_batches(PROMPTS, config, 2))

    def explode_on_it(learner: Learner) -> list:
        parts = gradients(learner)
        if list(draw_batches(PROMPTS, config, learner.step, attempt=learner.rollbacks)) == bad:
            learner.trainee.parameters[0].grad *= float("inf")
        return parts

    monkeypatch.setattr(learner_module, "gradients", explode_on_it)
    records = list(train(config))
    assert steps_of(records) == [1, 2, 3, 4, 5, 6] and kinds_of(records) == ["rollback"]


def test_rollbacks_are_bounded_and_the_last_checkpoint_is_whole(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(learner: Learner) -> list:
        parts = gradients(learner)
        for weight in learner.trainee.parameters:
            weight.grad *= float("inf") if learner.step == 3 else 1
        return parts

    monkeypatch.setattr(learner_module, "gradients", explode)
    with pytest.raises(UserError, match=r"step 4: the gradient is not finite; .* 2 times .* step-2 .* below 0.0025"):
        list(train(replace(config, max_rollbacks=2)))
    assert [line["kind"] for line in lines(config.output_dir, "events.jsonl")] == ["rollback"] * 2
    monkeypatch.undo()
    again = list(train(replace(config, resume_from_checkpoint="latest", max_train_steps=4)))
    assert steps_of(again) == [3, 4] and kinds_of(again) == ["resumed"]
    assert again[1].learning_rate == pytest.approx(0.01 * 3 / 6 / 4)


def test_what_counts_as_exploding() -> None:
    losses, norms = [-10 + 0.1 * (k % 5) for k in range(20)], [1 + 0.2 * (k % 5) for k in range(20)]
    assert find_trouble(-9.0, 100.0, losses, norms) == ""  # unusual, as happens
    assert "norm is 200" in find_trouble(-9.8, 200.0, losses, norms)
    assert "loss is 30" in find_trouble(30.0, 1.0, losses, norms)
    assert find_trouble(-1000.0, 1.0, losses, norms) == ""  # it may fall as fast as it likes
    assert find_trouble(30.0, 200.0, losses[:9], norms[:9]) == ""  # too few to know what is usual
    assert "not finite" in find_trouble(-10.0, float("inf"), [], [])
    assert "not a finite" in find_trouble(float("nan"), 1.0, [], [])
    wild = [*norms, 1e6, 1e7, 1e8]  # a few odd steps do not move what is usual
    assert "norm is 200" in find_trouble(-9.8, 200.0, losses, wild)
    assert find_trouble(5.0, 1.0, [0.0] * 20, [0.0] * 20) == ""  # no scale to judge by


def test_a_step_that_explodes_leaves_all_as_it_was(config: TrainConfig) -> None:
    learner = new_learner(config, Crew("cpu"), PROMPTS)
    assert isinstance(take_step(learner), StepRecord)
    learner.norms, learner.losses = [1e-9] * 10, learner.losses * 10
    before = json.dumps(learner.mix.state_dict()), [weight.detach().clone() for weight in learner.trainee.parameters]
    assert "norm" in take_step(learner)
    assert json.dumps(learner.mix.state_dict()) == before[0] and learner.step == 1 and len(learner.norms) == 10
    assert all(map(torch.equal, learner.trainee.parameters, before[1]))


def test_a_step_after_a_refused_one_is_the_plain_one_with_a_gradient_scaler_too(config: TrainConfig) -> None:
    """fp16's scaler, which works on a CPU as well: it must not think that the refused step's gradients are still there."""
    plain, scaled = (new_learner(config, Crew("cpu"), PROMPTS) for _ in range(2))
    scaled.trainee.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for learner in (plain, scaled):
        take_step(learner)
        usual, learner.norms, learner.losses = learner.norms, [1e-9] * 10, learner.losses * 10
        assert "norm" in take_step(learner)
        learner.norms = usual
        assert isinstance(take_step(learner), StepRecord)
    for ours, theirs in zip(scaled.trainee.parameters, plain.trainee.parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_full_disk_stops_the_run_with_the_last_checkpoint_whole(config: TrainConfig) -> None:
    records = train(config)
    first = next(records)
    size = (list_checkpoints(config.output_dir)[0] / "state.pt").stat().st_size
    with small_disk(2 * size), pytest.raises(UserError, match=r"cannot write .*state.pt: File too large"):
        list(records)
    assert list(list_checkpoints(config.output_dir)) == [0]
    assert not list((Path(config.output_dir) / "checkpoints").glob(".*"))
    again = list(train(replace(config, resume_from_checkpoint="latest", max_train_steps=2)))
    assert steps_of(again) == [1, 2] and again[1].loss == first.loss


@pytest.mark.parametrize(("change", "message"), [
    ({"lora_targets": "to_q,to_nothing"}, "to_nothing"),
    ({"rewards": ("colorfullness",)}, "did you mean 'colorfulness'"),
    ({"model": "emojy"}, "did you mean 'emoji'"),
    ({"prompts_file": "{tmp}/empty.txt"}, "holds no prompt"),
    ({"prompts_file": "{tmp}/nowhere.txt"}, "cannot read the prompts file"),
    ({"output_dir": "{tmp}"}, "exists already"),
    ({"output_dir": "{tmp}/empty.txt/run"}, "cannot make the folder .*empty.txt/run"),
    ({"resume_from_checkpoint": "step-7"}, "no checkpoint 'step-7'"),
    ({"probe_every": 2, "probe_rewards": ("vivit",)}, "did you mean 'vivid'"),
])
def test_refused_before_the_first_step(config: TrainConfig, tmp_path: Path, change: dict, message: str) -> None:
    (tmp_path / "empty.txt").write_text("\n  \n")
    change = {name: value.format(tmp=tmp_path) if isinstance(value, str) else value for name, value in change.items()}
    with pytest.raises(UserError, match=message):
        train(replace(config, **change))
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.txt", "empty.txt"}


def test_files_of_the_job_may_be_there_when_a_run_begins(config: TrainConfig) -> None:
    folder = Path(config.output_dir)
    folder.mkdir()
    for name in ("state.json", "control.json", "log.txt", ".partial-7-config.json"):
        (folder / name).write_text("{}")
    next(train(config))
    assert list(list_checkpoints(folder)) == [0] and (folder / "log.txt").read_text() == "{}"


def test_a_run_is_not_resumed_with_other_settings(config: TrainConfig) -> None:
    next(train(config))
    with pytest.raises(UserError, match="seed 0 .now 5."):
        train(replace(config, seed=5, resume_from_checkpoint="latest"))
    with pytest.raises(UserError, match="exists already"):
        train(config)


def test_a_damaged_checkpoint_is_named(config: TrainConfig) -> None:
    list(islice(train(config), 3))
    state = list_checkpoints(config.output_dir)[2] / "state.pt"
    metrics = lines(config.output_dir, "metrics.jsonl")
    state.write_bytes(state.read_bytes()[:200])
    with pytest.raises(UserError, match="step-2/state.pt is damaged"):
        train(replace(config, resume_from_checkpoint="latest"))
    assert lines(config.output_dir, "metrics.jsonl") == metrics  # nothing was touched
    torch.save({"step": 2, "parameters": [torch.ones(3)]}, state)
    with pytest.raises(UserError, match="step 2 is damaged or of another model"):
        train(replace(config, resume_from_checkpoint="latest"))


def test_orders_are_followed_between_steps(config: TrainConfig) -> None:
    said = iter([Orders(), Orders(save=True), Orders(pause=True, probe=True), Orders(pause=True), Orders(), Orders(stop=True)])
    config = replace(config, num_probe_prompts=2, num_probe_seeds=2)
    records = list(train(config, orders=lambda: next(said)))
    told = [record.kind if isinstance(record, Event) else type(record).__name__ for record in records]
    assert told == ["StepRecord", "saved", "StepRecord", "ProbeRecord", "StepRecord", "stopped"]
    assert list(list_checkpoints(config.output_dir)) == [0, 1, 2, 3]
    assert [line["step"] for line in lines(config.output_dir, "probes.jsonl")] == [2]
    assert not (Path(config.output_dir) / WEIGHTS).exists()
    assert steps_of(list(train(replace(config, resume_from_checkpoint="latest")))) == [4, 5, 6]


def fading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes that seem to lose a tenth of the variance each step."""
    measure = trainer_module.Probe.measure

    def faded(probe: trainer_module.Probe, step: int) -> tuple:
        record, grid = measure(probe, step)
        return replace(record, trace_ratio=1 - step / 10), grid

    monkeypatch.setattr(trainer_module.Probe, "measure", faded)


def test_training_stops_where_diversity_falls_below_the_floor(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    fading(monkeypatch)
    config = replace(config, diversity_floor=0.75, probe_every=1, num_probe_prompts=2, num_probe_seeds=2, checkpointing_steps=9)
    records = list(train(config))
    assert steps_of(records) == [1, 2, 3]
    assert records[-1] == Event(3, "early-stop", "the probe at step 3 keeps 70% of the base model's variance, less than the "
                                                 "floor of 75%")
    folder = Path(config.output_dir)
    assert list(list_checkpoints(folder)) == [0, 3] and (folder / WEIGHTS).is_file()
    again = list(train(replace(config, resume_from_checkpoint="latest")))
    assert steps_of(again) == [] and kinds_of(again) == ["resumed", "early-stop"]
    assert steps_of(list(train(replace(config, resume_from_checkpoint="latest", diversity_floor=0.55)))) == [4, 5]


def test_the_onset_of_collapse_is_said_once(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def onset(records: list[ProbeRecord]) -> Onset | None:
        return Onset(2, "it began") if len(records) >= 4 else None

    monkeypatch.setattr(trainer_module, "collapse_onset", onset)
    config = replace(config, probe_every=1, num_probe_prompts=2, num_probe_seeds=2, max_train_steps=4)
    records = list(train(config))
    assert [record for record in records if isinstance(record, Event)] == [Event(2, "onset", "it began")]
    assert [record.step for record in records[records.index(Event(2, "onset", "it began")) - 2:]][:2] == [3, 3]
    again = list(train(replace(config, max_train_steps=5, resume_from_checkpoint="latest")))
    assert kinds_of(again) == ["resumed"]


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """A stand-in for the package trackio, which is an optional install: what accelerate's class for it is told."""
    told: list = []
    module = ModuleType("trackio")
    module.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec("trackio", None)

    class Told:
        def log(self, values: dict, step: int) -> None:
            told.append((step, values))

        def finish(self) -> None:
            told.append("finished")

        def update(self, values: dict, allow_val_change: bool) -> None:
            told.append(values)

    module.config = Told()
    module.init = lambda project, name: told.append((project, name)) or Told()
    monkeypatch.setitem(sys.modules, "trackio", module)
    yield told


def test_trackers_get_steps_and_probes(config: TrainConfig, trackio: list) -> None:
    config = replace(config, report_to="trackio", max_train_steps=2, probe_every=2, num_probe_prompts=2, num_probe_seeds=2)
    steps = [record for record in train(config) if isinstance(record, StepRecord)]
    assert trackio[0] == ("rewardiv", "run") and trackio[1]["rank"] == 2 and trackio[1]["rewards"] == "['colorfulness']"
    assert [entry[0] for entry in trackio[2:-1]] == [0, 1, 2, 2] and trackio[-1] == "finished"
    assert trackio[2][1]["probe/trace_ratio"] == 1
    assert trackio[3][1]["train/loss"] == steps[0].loss
    assert trackio[3][1]["train/rewards/colorfulness"] == steps[0].reward_mean


def test_a_tracker_that_is_not_installed_is_refused_at_once(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        train(replace(config, report_to="wandb"))
    with pytest.raises(UserError, match="pip install wandb"):
        estimate(replace(config, report_to="wandb"))
    assert not Path(config.output_dir).exists()


def test_an_estimate_writes_nothing(config: TrainConfig) -> None:
    found = estimate(replace(config, probe_every=2, num_probe_prompts=2, num_probe_seeds=2))
    assert found.step_s > 0 and found.probe_s > 0 and 0.1 < found.peak_gib < 64
    assert found.total_s == pytest.approx(6 * found.step_s + 5 * found.probe_s)  # of the base model, at 0, 2, 4 and 6
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize("grad_steps", [1, 2])
def test_memory_does_not_grow_with_the_number_of_steps(config: TrainConfig, grad_steps: int) -> None:
    """What is kept for the gradient depends on K alone."""
    kept = []
    for num_steps in (3, 9):
        settings = replace(config, num_inference_steps=num_steps, grad_steps=grad_steps)
        trainee = new_trainee(load_model(settings.model), settings)
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            accumulate(trainee.model, load_mix(settings, "cpu"), PROMPTS[:2], [1, 2], settings, step=0, part=0)
        kept.append(sum(sizes))
    assert kept[0] == kept[1] > 0


def weights_at(folder: str | Path, step: int) -> tuple[Tensor, Tensor]:
    """A checkpoint's weights and the running mean of their gradients, each as one vector."""
    state = torch.load(list_checkpoints(folder)[step] / "state.pt", weights_only=True)
    weights, means = state["parameters"], [moments["exp_avg"] for moments in state["optimizer"]["state"].values()]
    return torch.cat([value.flatten() for value in weights]), torch.cat([Tensor(), *(value.flatten() for value in means)])


def test_two_processes_make_the_update_of_one_with_twice_the_batch(
    config: TrainConfig, tiny_clip_dir: Path, tmp_path: Path,
) -> None:
    """By the command of the README, under accelerate's launcher, with statistics of rewards over all processes.

    Adam divides a gradient by its own size, so where that is rounding noise (3 weights of 29 000) updates may differ by a
    few percent of the rate; the gradients' running mean is compared beside the weights.
    """
    config = replace(config, rewards=("colorfulness", f"{tiny_clip_dir}=0.5"), max_train_steps=3, checkpointing_steps=1,
                     learning_rate=1e-4, lr_warmup_steps=0)
    alone = replace(config, train_batch_size=4, output_dir=str(tmp_path / "alone"))
    list(train(alone))
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHER} | {"OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", f"--main_process_port={free_port()}"]
    subprocess.run([*launch, *train_command(config)[1:]], check=True, env=env, cwd=ROOT)
    start, _ = weights_at(alone.output_dir, 0)
    for step in (1, 3):
        (together, gradient), (expected, mean) = weights_at(config.output_dir, step), weights_at(alone.output_dir, step)
        torch.testing.assert_close(together, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(gradient, mean, rtol=0, atol=1e-5 * float(mean.abs().max()))
        assert (expected - start).abs().max() > 0.9e-4 * step  # far more than the tolerance
    ours, theirs = lines(config.output_dir, "metrics.jsonl"), lines(alone.output_dir, "metrics.jsonl")
    assert [line["step"] for line in ours] == [1, 2, 3]
    for line, other in zip(ours, theirs, strict=True):
        for name in ("reward_mean", "reward_std", "loss", "grad_norm"):
            assert line[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4)


def train_with_a_broken_member(settings: dict, crew: Crew) -> object:
    def failing(*args: object, **kwargs: object) -> object:
        if crew.rank == 1 and kwargs["step"] == 1:
            raise UserError("this process has lost its reward")
        return accumulate(*args, **kwargs)

    learner_module.accumulate = failing
    done = []
    try:
        for record in train(TrainConfig.from_dict(settings)):
            done.append(record.step)
    except UserError as error:
        return done, str(error)


def test_an_error_in_one_process_ends_both_and_the_leader_alone_writes(config: TrainConfig) -> None:
    assert in_crew(partial(train_with_a_broken_member, config.to_dict())) == [([1], "this process has lost its reward")] * 2
    assert [line["step"] for line in lines(config.output_dir, "metrics.jsonl")] == [1]
    assert list(list_checkpoints(config.output_dir)) == [0]
