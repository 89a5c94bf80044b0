"""Laws of runs as processes: one at a time, orders obeyed, ends told truly, all of it in files that any process can read.

Where only the process matters the training is a light stand-in (TRAINING below) in real processes under real signals; its
learning_rate is its seconds a step, its seed chooses how it ends. One test trains a real LoRA.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rewardiv import jobs, supervisor
from rewardiv.cli import build_parser
from rewardiv.cli_training import train_config
from rewardiv.config import TrainConfig
from rewardiv.errors import UserError
from rewardiv.jobs import Job, read_job
from rewardiv.registry import LORA_FILE, ROOT
from rewardiv.runs import append_text, cap_log, try_lock

TRAINING = """\
import json, os, sys, time
from collections.abc import Iterator
from pathlib import Path

from rewardiv import supervisor
from rewardiv.config import TrainConfig
from rewardiv.errors import UserError
from rewardiv.records import Event, StepRecord

supervisor.HEARTBEAT_S = 0.1
assert "torch" not in sys.modules and sys.stdin.read() == ""
config = TrainConfig.from_dict(json.loads(sys.argv[1]))
folder = Path(config.output_dir)


def note(text: str) -> None:
    with (folder.parent / "notes.txt").open("a") as file:
        file.write(f"{folder.name} {text}\\n")


def records_of(orders) -> Iterator[object]:
    note("begins")
    last = folder / "last.txt"
    done = int(last.read_text()) if config.resume_from_checkpoint and last.exists() else 0
    (folder / "config.json").write_text(json.dumps({"settings": config.to_dict()}))
    for step in range(done + 1, config.max_train_steps + 1):
        while (asked := orders()).pause and not asked.stop:
            time.sleep(0.02)
        if asked.stop:
            note("ends")
            yield Event(step - 1, "stopped", f"stopped after step {step - 1}")
            return
        for what in ("save", "probe"):
            if getattr(asked, what):
                note(what)
        time.sleep(config.learning_rate)
        if config.seed == 1:
            raise UserError("the disk is full; make room")
        if config.seed == 2:
            raise ZeroDivisionError("a bug")
        if config.seed == 3:
            print("about to die", flush=True)
            os.kill(os.getpid(), 9)
        last.write_text(str(step))
        yield StepRecord(step, step / 10, 0.0, {}, -step / 10, 0.0, 0.0, 0.0, 1.0, 1e-3, 0.01 * step)
    note("ends")


for _ in supervisor.supervise(config, records_of):
    pass
"""
QUICK, SLOW = 0.01, 0.1


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    """A folder for runs; whatever still lives in it at the end is killed."""
    folder = tmp_path / "runs"
    folder.mkdir()
    yield folder
    for job in jobs.list_jobs(folder):
        if job.alive and job.pid not in (None, os.getpid()):
            os.kill(job.pid, signal.SIGKILL)


@pytest.fixture
def light(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrainConfig]:
    """light(name, **settings): settings of a run whose process is the stand-in."""
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    monkeypatch.setattr(jobs, "train_command", lambda config: ["python", str(script), json.dumps(config.to_dict())])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def settings(name: str, **changes: object) -> TrainConfig:
        standing = {"rewards": ("colorfulness",), "learning_rate": SLOW, "max_train_steps": 600}
        return TrainConfig(str(runs / name), **standing | changes)

    return settings


def wait_for(folder: Path | str, what: str | Callable[[Job], bool], timeout_s: float = 600.0) -> Job:
    """The job once it is in a state, or as wanted; patient, because tests share machines."""
    deadline = time.monotonic() + timeout_s
    while True:
        job = read_job(folder)
        if job.state == what if isinstance(what, str) else what(job):
            return job
        ended_otherwise = isinstance(what, str) and not job.alive
        assert time.monotonic() < deadline and not ended_otherwise, (what, job, (job.folder / "log.txt").read_text())
        time.sleep(0.02)


def notes(runs: Path) -> list[str]:
    return (runs / "notes.txt").read_text().splitlines()


def seen_by_another_process(folder: Path) -> dict:
    """The run as a server that was started only now sees it."""
    done = subprocess.run([sys.executable, "-m", "rewardiv", "runs", "--runs-dir", folder.parent, "--json"],
                          capture_output=True, text=True, check=True, cwd=ROOT)
    return next(job for job in json.loads(done.stdout) if job["folder"] == str(folder))


def write_state(folder: Path, **changes: object) -> None:
    """A folder of a running run, in another one's place."""
    folder.mkdir(exist_ok=True)
    values = {"state": "running", "host": jobs.platform.node(), "heartbeat": time.time(), "created": 1.0} | changes
    (folder / "state.json").write_text(json.dumps(values))


def test_the_command_holds_what_differs_from_the_defaults_and_reads_back() -> None:
    plain = TrainConfig("runs/a")
    assert jobs.train_command(plain) == ["python", "-m", "rewardiv", "train", "--output-dir", "runs/a", "--device", "cpu"]
    for config in (
        plain, replace(plain, rewards=("vivid=0.5", "clip"), probe_rewards=("calm", "colorfulness"), kl_weight=0.1),
        replace(plain, gradient_checkpointing=True, lora_alpha=4.0, checkpoints_total_limit=3, learning_rate=1e-5),
        replace(plain, output_dir="-odd", model="a b; c", prompts_file="-p.txt", report_to="tensorboard"),
    ):
        assert train_config(build_parser().parse_args(jobs.train_command(config)[3:])) == config


def test_a_run_is_a_process_of_its_own_until_it_is_done(light: Callable[..., TrainConfig], runs: Path) -> None:
    begun = time.time()
    started = jobs.start(light("a", learning_rate=QUICK, max_train_steps=5))
    assert started.state == "queued" and os.getsid(started.pid) == started.pid != os.getsid(0)
    job = wait_for(runs / "a", "done")
    assert (job.step, job.num_steps, job.reward, job.elapsed_s, job.remaining_s) == (5, 5, 0.5, 0.05, None)
    assert begun <= job.created == job.queued <= job.heartbeat <= time.time()
    assert TrainConfig.from_dict(job.settings) == light("a", learning_rate=QUICK, max_train_steps=5)
    assert "step 5/5: reward 0.5" in (runs / "a" / "log.txt").read_text()
    with pytest.raises(UserError, match="is done"):
        jobs.restart(runs / "a")
    for what in jobs.ORDERS:
        with pytest.raises(UserError, match=f"a is done; it can't {what}"):
            jobs.order(runs / "a", what)


def test_it_stops_when_it_is_told_and_a_restart_goes_on(light: Callable[..., TrainConfig], runs: Path) -> None:
    jobs.start(light("a"))
    wait_for(runs / "a", lambda job: job.step >= 3 and job.remaining_s is not None)
    with pytest.raises(UserError, match="running"):
        jobs.restart(runs / "a")
    with pytest.raises(UserError, match="stop it before"):
        jobs.delete(runs / "a")
    jobs.order(runs / "a", "stop")
    job = wait_for(runs / "a", "stopped")
    assert job.message == f"stopped after step {job.step}"
    again = jobs.restart(runs / "a")
    assert (again.step, again.created) == (job.step, job.created) and again.queued > job.queued
    assert again.settings["resume_from_checkpoint"] == "latest"
    assert wait_for(runs / "a", lambda now: now.step > job.step).reward > job.reward
    assert f"step {job.step + 1}/" in (runs / "a" / "log.txt").read_text()


def test_pause_and_resume_save_and_probe(light: Callable[..., TrainConfig], runs: Path) -> None:
    jobs.start(light("a", learning_rate=0.02))
    wait_for(runs / "a", lambda job: job.step > 0)
    jobs.order(runs / "a", "pause")
    paused = wait_for(runs / "a", "paused")
    for what in ("save", "probe", "save"):
        jobs.order(runs / "a", what)
        time.sleep(0.1)
    time.sleep(0.3)
    later = read_job(runs / "a")
    assert later.state == "paused" and later.step == paused.step and later.heartbeat > paused.heartbeat
    jobs.order(runs / "a", "resume")
    wait_for(runs / "a", lambda job: job.state == "running" and job.step > later.step)
    for count in (1, 2):
        jobs.order(runs / "a", "save")
        wait_for(runs / "a", lambda _, count=count: notes(runs).count("a save") >= count)
    jobs.order(runs / "a", "pause")
    wait_for(runs / "a", "paused")
    jobs.order(runs / "a", "stop")  # also while it is paused
    wait_for(runs / "a", "stopped")
    assert notes(runs).count("a save") == 2


def test_a_killed_process_is_lost_and_any_process_says_so(light: Callable[..., TrainConfig], runs: Path) -> None:
    jobs.start(light("a", seed=3))
    job = wait_for(runs / "a", "lost")
    assert job.message == "the process ended unexpectedly; last log line: about to die"
    assert seen_by_another_process(runs / "a")["message"] == job.message
    with pytest.raises(UserError, match="lost"):
        jobs.order(runs / "a", "stop")
    write_state(runs / "a", **{**json.loads((runs / "a" / "state.json").read_text()),
                               "settings": light("a", seed=0).to_dict()})
    jobs.restart(runs / "a")
    wait_for(runs / "a", lambda now: now.step >= 2)
    seen = seen_by_another_process(runs / "a")
    assert seen["state"] == "running" and seen["step"] >= 2


def test_another_process_with_the_same_id_and_a_zombie_are_not_taken_for_the_run(runs: Path) -> None:
    me = jobs.psutil.Process()
    write_state(runs / "mine", pid=me.pid, process_started=me.create_time())
    write_state(runs / "reused", pid=me.pid, process_started=me.create_time() - 60)
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.DEVNULL)
    write_state(runs / "zombie", pid=child.pid, process_started=jobs.psutil.Process(child.pid).create_time())
    wait_for(runs / "zombie", "lost")
    child.wait()
    write_state(runs / "elsewhere", pid=1, process_started=0.0, host="another")
    write_state(runs / "silent", pid=1, process_started=0.0, host="another", heartbeat=time.time() - 100)
    write_state(runs / "unborn", state="queued", heartbeat=time.time() - 100)
    states = {job.name: job.state for job in jobs.list_jobs(runs)}
    assert states == {"mine": "running", "reused": "lost", "zombie": "lost", "elsewhere": "running", "silent": "lost",
                      "unborn": "lost"}


def test_a_mistake_is_told_and_a_bug_leaves_its_traceback(light: Callable[..., TrainConfig], runs: Path) -> None:
    jobs.start(light("mistake", seed=1))
    jobs.start(light("bug", seed=2))
    assert wait_for(runs / "mistake", "failed").message == "the disk is full; make room"
    assert wait_for(runs / "bug", "failed").message == "unexpected error: ZeroDivisionError: a bug"
    log = (runs / "bug" / "log.txt").read_text()
    assert "Traceback" in log and "ZeroDivisionError: a bug" in log


def test_one_run_at_a_time_the_oldest_first(light: Callable[..., TrainConfig], runs: Path) -> None:
    jobs.start(light("a", max_train_steps=15))
    wait_for(runs / "a", "running")
    for name in ("stopped", "killed", "z", "b"):  # neither the dead nor the alphabet count
        jobs.start(light(name, learning_rate=QUICK, max_train_steps=30))
    assert wait_for(runs / "b", lambda job: "waiting" in job.message).message == "waiting for a and 3 more"
    assert wait_for(runs / "stopped", lambda job: bool(job.message)).message == "waiting for a"
    with pytest.raises(UserError, match="waits in the queue"):
        jobs.order(runs / "b", "pause")
    jobs.order(runs / "stopped", "stop")
    os.kill(read_job(runs / "killed").pid, signal.SIGKILL)
    assert wait_for(runs / "stopped", "stopped").message == "stopped before it began"
    assert read_job(runs / "a").state == "running" and read_job(runs / "killed").state == "lost"
    wait_for(runs / "b", "done")
    assert notes(runs) == [f"{name} {what}" for name in ("a", "z", "b") for what in ("begins", "ends")]


def test_devices_have_queues_of_their_own(light: Callable[..., TrainConfig], runs: Path) -> None:
    for name, device in (("a", "cpu"), ("b", "cuda"), ("c", "cuda:0"), ("d", "cuda:1")):
        jobs.start(light(name, device=device))
        wait_for(runs / name, lambda job: job.state == "running" or bool(job.message))
    assert [read_job(runs / name).state for name in "abcd"] == ["running", "running", "queued", "running"]


def test_nobody_begins_while_the_device_is_locked_whatever_the_files_say(light: Callable[..., TrainConfig], runs: Path) -> None:
    lock = try_lock(runs / ".rewardiv-cpu.lock")
    assert lock is not None and try_lock(runs / ".rewardiv-cpu.lock") is None
    jobs.start(light("a"))
    assert wait_for(runs / "a", lambda job: bool(job.message)).message == "waiting for another process"
    lock.close()
    wait_for(runs / "a", "running")
    assert try_lock(runs / ".rewardiv-cpu.lock") is None
    os.kill(read_job(runs / "a").pid, signal.SIGKILL)
    wait_for(runs / "a", "lost")
    jobs.start(light("b"))
    wait_for(runs / "b", "running")  # it has ended with its holder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_orders_to_stop(number: int, light: Callable[..., TrainConfig], runs: Path) -> None:
    job = jobs.start(light("a"))
    wait_for(runs / "a", lambda now: now.step > 0)
    os.kill(job.pid, number)
    assert wait_for(runs / "a", "stopped").message.startswith("stopped after step")


def test_it_lives_through_a_long_step(light: Callable[..., TrainConfig], runs: Path) -> None:
    jobs.start(light("a", learning_rate=1.0))
    begun = wait_for(runs / "a", "running")
    assert wait_for(runs / "a", lambda job: job.heartbeat > begun.heartbeat + 0.3).step == begun.step == 0
    jobs.order(runs / "a", "stop")
    assert wait_for(runs / "a", "stopping").step == 0  # said before the step ends


def test_a_folder_has_one_run_and_strangers_are_left_alone(light: Callable[..., TrainConfig], runs: Path) -> None:
    config = light("a")
    jobs.start(config)
    wait_for(runs / "a", "running")
    with pytest.raises(UserError, match="exists already"):
        jobs.start(config)
    with pytest.raises(UserError, match="trains in"):
        next(supervisor.supervise(replace(config, resume_from_checkpoint="latest"), lambda orders: iter(())))
    (runs / "mine").mkdir()
    (runs / "mine" / "photo.png").write_text("mine")
    for begin in (jobs.start, lambda config: next(supervisor.supervise(config, lambda orders: iter(())))):
        with pytest.raises(UserError, match="exists already"):
            begin(light("mine"))
        with pytest.raises(UserError, match="'colorfulness'"):
            begin(replace(light("b"), rewards=("colorfull",)))
    assert [path.name for path in (runs / "mine").iterdir()] == ["photo.png"] and not (runs / "b").exists()


def test_other_processes_of_a_launch_wait_for_the_first_ones_turn(runs: Path) -> None:
    config = TrainConfig(str(runs / "a"))
    others = threading.Thread(target=supervisor.follow, args=[config], daemon=True)
    others.start()
    write_state(runs / "a", state="running", heartbeat=1.0)  # of an earlier launch
    others.join(1.0)
    write_state(runs / "a", state="queued")
    others.join(1.0)
    assert others.is_alive()
    write_state(runs / "a", state="starting", num_processes=2)
    others.join()
    write_state(runs / "a", state="stopped", num_processes=2, settings=config.to_dict())
    with pytest.raises(UserError, match="2 processes"):
        jobs.restart(runs / "a")  # alone it would be another run


def test_an_estimate_is_measured_by_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, runs: Path) -> None:
    with pytest.raises(UserError, match="failed: unknown model 'emojy'"):
        jobs.estimate(TrainConfig(str(runs / "a"), model="emojy"))
    script = "import json, sys; print(json.dumps({'step_s': sys.argv[1:]}))"
    monkeypatch.setattr(jobs, "train_command", lambda config: ["python", "-c", script])
    assert jobs.estimate(TrainConfig(str(runs / "a"))) == {"step_s": ["--estimate", "--json"]}


def test_damaged_and_foreign_folders_do_not_hide_the_others(runs: Path) -> None:
    for name, text in (("half", '{"state": "run'), ("strange", '{"state": "flying"}'), ("more", '{"state": "done", "x": 1}'),
                       ("list", "[]"), ("text", '{"state": "done", "step": "3"}')):
        (runs / name).mkdir()
        (runs / name / "state.json").write_text(text)
    (runs / "notes").mkdir()
    (runs / ".hidden").mkdir()
    (runs / "file.txt").write_text("")
    trained = runs / "by hand"
    trained.mkdir()
    (trained / "config.json").write_text(json.dumps({"settings": TrainConfig(str(trained)).to_dict(), "prompts": []}))
    write_state(runs / "good", state="done", step=3)
    found = {job.name: job for job in jobs.list_jobs(runs)}
    assert {name: job.state for name, job in found.items()} == {
        "half": "lost", "strange": "lost", "more": "lost", "list": "lost", "text": "lost", "by hand": "stopped", "good": "done"}
    assert "state.json is damaged" in found["half"].message and found["by hand"].settings["model"] == "emoji"
    (trained / LORA_FILE).write_text("")
    assert read_job(trained).state == "done"
    with pytest.raises(UserError, match="no training run"):
        jobs.delete(runs / "notes")
    assert jobs.list_jobs(runs / "nowhere") == []


def test_a_name_is_for_screens_and_deleting_removes_the_folder(light: Callable[..., TrainConfig], runs: Path) -> None:
    jobs.start(light("a"))
    wait_for(runs / "a", lambda job: job.step > 0)
    assert jobs.rename(runs / "a", "  my best\nrun ").name == "my best run"
    jobs.order(runs / "a", "stop")
    assert wait_for(runs / "a", "stopped").name == "my best run"
    jobs.restart(runs / "a")  # neither its name nor the old order to stop keeps it from going on
    assert wait_for(runs / "a", "running").name == "my best run"
    jobs.order(runs / "a", "stop")
    wait_for(runs / "a", "stopped")
    for name in (" ", "x" * 100):
        with pytest.raises(UserError, match="name"):
            jobs.rename(runs / "a", name)
    jobs.delete(runs / "a")
    assert jobs.list_jobs(runs) == [] and not [path for path in runs.iterdir() if path.is_dir()]


def test_a_log_keeps_its_end(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    with log.open("ab") as open_all_along:
        open_all_along.write(b"".join(b"line %d\n" % number for number in range(1000)))
        open_all_along.flush()
        cap_log(log, 1000)
        open_all_along.write(b"more\n")
    append_text(log, "end\n")
    lines = log.read_text().splitlines()
    assert lines[0].startswith("[earlier") and lines[-3:] == ["line 999", "more", "end"] and 20 < len(lines) < 50
    before = log.read_bytes()
    cap_log(log, 1000)
    assert log.read_bytes() == before and jobs.last_log_line(tmp_path) == "end"


def test_a_real_run_is_killed_and_stopped_and_comes_out_as_if_never(tiny_model_dir: Path, runs: Path) -> None:
    prompts = runs.parent / "prompts.txt"
    prompts.write_text("a cat\na face\n")
    config = TrainConfig(
        str(runs / "a"), model=str(tiny_model_dir), rewards=("colorfulness",), prompts_file=str(prompts), max_train_steps=10**5,
        train_batch_size=4, num_inference_steps=2, rank=2, probe_every=0, checkpointing_steps=20, lora_dropout=0.1,
    )
    job = jobs.start(config)
    wait_for(runs / "a", lambda job: job.step >= 4)
    os.kill(job.pid, signal.SIGKILL)
    lost = wait_for(runs / "a", "lost")
    assert "last log line: " in lost.message
    jobs.restart(runs / "a")
    wait_for(runs / "a", lambda job: job.state == "running" and job.step > lost.step)
    jobs.order(runs / "a", "stop")
    stopped = wait_for(runs / "a", "stopped")
    assert stopped.step > lost.step and (runs / "a" / "checkpoints" / f"step-{stopped.step}").is_dir()
    shorter = replace(config, max_train_steps=stopped.step + 2)
    jobs.start(replace(shorter, resume_from_checkpoint="latest"))

    from rewardiv.trainer import train

    *_, last = [record for record in train(replace(shorter, output_dir=str(runs / "whole"))) if hasattr(record, "reward_mean")]
    done = wait_for(runs / "a", "done")
    assert done.reward == last.reward_mean and done.step == last.step == stopped.step + 2
    found, wanted = (load_file(runs / name / LORA_FILE) for name in ("a", "whole"))  # their headers' order is left to chance
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
