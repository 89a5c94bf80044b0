"""Training runs as detached processes: start, queue, watch, order, re-attach. Screens only read; the run itself writes.

A run folder holds, for this, `state.json` (written by the run's own process as soon as that lives), `control.json` (orders
and the shown name, written by screens) and `log.txt`. A process is known by its id and its start time, so that another one
with the same id isn't taken for it. `rewardiv.supervisor` is the side of the process.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import psutil

from rewardiv import hub
from rewardiv.config import TrainConfig
from rewardiv.errors import UserError, nearest
from rewardiv.records import CONFIG_NAME, JOB_NAMES
from rewardiv.registry import LORA_FILE, PROMPTS, ROOT, VOTES, find_model, find_reward, prompts_path
from rewardiv.runs import check_new_dir, locked, new_dir, open_log, remove_dir, write_json

STATE, CONTROL, LOG = JOB_NAMES
LIVING = ("queued", "starting", "running", "paused", "stopping")
ENDED = ("stopped", "failed", "done", "lost")
ORDERS = ("stop", "pause", "resume", "save", "probe")
NO_ORDERS = {"stop": False, "pause": False, "save": 0, "probe": 0}  # save and probe count how often they were asked for
FLAGS = {"rewards": "--reward", "probe_rewards": "--probe-reward"}  # given once for each
SILENT_S = 60.0  # without heartbeat: a run of another machine, or one that never began, is lost
ESTIMATE_S = 1200.0
MAX_NAME = 80


@dataclass(frozen=True)
class Job:
    """A training run as screens see it; all but folder and name is `state.json`.

    Attributes:
        folder: The run's folder.
        name: What it is called on screens.
        state: One of LIVING or ENDED.
        message: What to say about the state: what it waits for, why it failed.
        step: Finished steps, of num_steps.
        reward: Mean reward of the last step; None before the first.
        elapsed_s: Time spent on training.
        remaining_s: Estimate from the steps so far; None where there is none.
        settings: TrainConfig.to_dict().
        pid: Of the process; None until it is started.
        process_started: When that process was started, in seconds since 1970 as all times here.
        host: Its machine.
        num_processes: Of the launch that it belongs to.
        created: When the run was started first.
        queued: When it entered the queue last.
        heartbeat: When its process last said that it lives.
    """

    folder: Path
    name: str
    state: str
    message: str = ""
    step: int = 0
    num_steps: int = 0
    reward: float | None = None
    elapsed_s: float = 0.0
    remaining_s: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    pid: int | None = None
    process_started: float | None = None
    host: str = ""
    num_processes: int = 1
    created: float = 0.0
    queued: float = 0.0
    heartbeat: float = 0.0

    @property
    def alive(self) -> bool:
        """Whether it waits, runs or is about to."""
        return self.state in LIVING

    @property
    def device(self) -> str:
        """What it trains on, for the queue."""
        name = str(self.settings.get("device", "cpu"))
        return "cuda:0" if name == "cuda" else name

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self) | {"folder": str(self.folder)}


def default_runs_dir() -> Path:
    """Where runs lie: $REWARDIV_RUNS_DIR, or runs/ in the project's folder."""
    return Path(os.environ.get("REWARDIV_RUNS_DIR") or ROOT / "runs")


def flag_of(name: str) -> str:
    """The option of `python -m rewardiv train` for a field of TrainConfig."""
    return FLAGS.get(name, f"--{name.replace('_', '-')}")


def train_command(config: TrainConfig) -> list[str]:
    """The command that trains as `config` says: its folder, its device, and what differs from the defaults."""
    words = ["python", "-m", "rewardiv", "train"]
    for one in fields(TrainConfig):
        value = getattr(config, one.name)
        if value == one.default and one.name != "device":
            continue
        flag = flag_of(one.name)
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
            continue
        for text in map(str, value if isinstance(value, tuple) else (value,)):
            words += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return words


def start(config: TrainConfig) -> Job:
    """Start a run of its own, which outlives this process; relative paths count from the project's folder.

    Raises:
        UserError: If the model, a reward or the prompts file isn't there, votes can't be learned from, or the folder holds
            something else.
    """
    folder = ROOT / config.output_dir
    check_settings(config)
    check_folder(folder, config)
    return _launch(folder, pinned(config))


def pinned(config: TrainConfig) -> TrainConfig:
    """The same settings with rewards that don't change while a run lasts: votes as they are now, fitted and kept in a file.

    Raises:
        UserError: If there are too few votes, or they can't be read.
    """
    if not any(name.startswith(VOTES) for name in (*config.reward_weights, *config.probe_rewards)):
        return config
    from rewardiv.mixing import pin

    return pin(config)


def restart(folder: str | Path) -> Job:
    """Go on with a run that stopped, failed or was lost, from its latest checkpoint.

    Raises:
        UserError: If it runs, is done, was launched in several processes, or its settings cannot be read.
    """
    job = read_job(folder)
    if job.alive:
        raise UserError(f"{job.name} is {job.state}; there is nothing to restart")
    if job.state == "done":
        raise UserError(f"{job.name} is done; start a new run to train longer")
    if job.num_processes > 1:
        raise UserError(f"{job.name} ran in {job.num_processes} processes; go on with it in as many, by its launcher and "
                        "--resume-from-checkpoint latest")
    config = TrainConfig.from_dict(job.settings)
    begun = (job.folder / CONFIG_NAME).exists()
    return _launch(job.folder, replace(config, output_dir=str(job.folder), resume_from_checkpoint="latest" if begun else ""))


def read_job(folder: str | Path) -> Job:
    """A run as it is now; one that says it lives but whose process is gone is lost.

    Raises:
        UserError: If the folder holds no run.
    """
    folder = Path(folder).absolute()
    job = stored_job(folder)
    if job.alive and not process_lives(job):
        job = stored_job(folder)  # it may have written its last word just before it ended
        if job.alive:
            last = last_log_line(folder)
            said = f"last log line: {last}" if last else "its log is empty"
            return replace(job, state="lost", remaining_s=None, message=f"the process ended unexpectedly; {said}")
    return job


def list_jobs(runs_dir: str | Path) -> list[Job]:
    """The runs below a folder, newest first; folders that hold no run are left out."""
    runs_dir = Path(runs_dir)
    folders = [path for path in runs_dir.iterdir() if is_run(path)] if runs_dir.is_dir() else []
    jobs = []
    for folder in folders:
        try:
            jobs.append(read_job(folder))
        except UserError:
            if folder.exists():  # else it was deleted while we looked
                raise
    return sorted(jobs, key=lambda job: (job.created, job.folder.name), reverse=True)


def order(folder: str | Path, what: str) -> None:
    """Ask a run to stop, pause, resume, save a checkpoint now or probe now; it obeys between two steps.

    Raises:
        UserError: If it has ended, or hasn't begun and is asked for something else than to stop.
    """
    if what not in ORDERS:
        raise ValueError(f"unknown order {what!r}; one of {', '.join(ORDERS)}")
    job = read_job(folder)
    if not job.alive:
        raise UserError(f"{job.name} is {job.state}; it can't {what}")
    if job.state == "queued" and what != "stop":
        raise UserError(f"{job.name} waits in the queue; it can be stopped, or asked to {what} once it runs")
    with locked(job.folder):
        control = read_control(job.folder)
        if what in ("save", "probe"):
            control[what] += 1
        else:
            control["stop" if what == "stop" else "pause"] = what in ("stop", "pause")
        write_json(job.folder / CONTROL, control)


def rename(folder: str | Path, name: str) -> Job:
    """Give a run another name on screens; its folder keeps its own.

    Raises:
        UserError: If the name is empty or too long.
    """
    job, name = read_job(folder), " ".join(name.split())
    if not 1 <= len(name) <= MAX_NAME:
        raise UserError(f"a run's name has 1 to {MAX_NAME} characters, got {len(name)}")
    with locked(job.folder):
        write_json(job.folder / CONTROL, read_control(job.folder) | {"name": name})
    return replace(job, name=name)


def delete(folder: str | Path) -> None:
    """Remove a run's folder with all its checkpoints.

    Raises:
        UserError: If it runs or waits, or the disk refuses.
    """
    job = read_job(folder)
    with locked(job.folder):
        if (job := read_job(folder)).alive:
            raise UserError(f"{job.name} is {job.state}; stop it before you delete it")
        remove_dir(job.folder)


def check_settings(config: TrainConfig) -> None:
    """Look up what the settings name, without loading anything.

    Raises:
        UserError: If the model, a reward or the prompts file isn't there.
    """
    for entry in (find_model(config.model), *map(find_reward, (*config.reward_weights, *config.probe_rewards))):
        if entry.sources:
            hub.local_paths(entry)
    prompts = prompts_path(config.prompts_file)
    if prompts and not (ROOT / prompts).is_file() and not Path(prompts).is_file():
        raise UserError(f"no prompts file {prompts}, and no set of prompts of that name{nearest(prompts, PROMPTS)}")


def last_log_line(folder: str | Path) -> str:
    """The last line of a run's log that isn't empty; "" where there is none."""
    path = Path(folder) / LOG
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**14))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    return next((line[:300] for line in reversed(lines) if line), "")


def estimate(config: TrainConfig) -> dict[str, float]:
    """What `train --estimate` measures on this machine, in a process of its own: step_s, probe_s, total_s, peak_gib.

    Raises:
        UserError: With what that process says, if it fails; or if it takes longer than ESTIMATE_S.
    """
    command = [sys.executable, *train_command(config)[1:], "--estimate", "--json"]
    try:
        done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
                              timeout=ESTIMATE_S)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"two steps and a probe take longer than {ESTIMATE_S / 60:.0f} minutes on this machine") from error
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it says nothing"]
        raise UserError(f"the measurement failed: {said[-1].removeprefix('error: ')}")
    return json.loads(done.stdout)


def _launch(folder: Path, config: TrainConfig) -> Job:
    """Put a run into the queue and start its process."""
    if not folder.exists():
        new_dir(folder)
    with locked(folder):
        if (folder / STATE).exists() and (known := read_job(folder)).alive:
            raise UserError(f"{known.name} is {known.state} already")
        clear_orders(folder)
        job = queued_job(folder, config)
        write_state(job)
        command = [sys.executable, *train_command(config)[1:]]
        with open_log(folder / LOG) as log:
            try:
                child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT,
                                         env=os.environ | {"PYTHONUNBUFFERED": "1"}, start_new_session=True)
            except OSError as error:
                write_state(replace(job, state="failed", message=f"its process cannot be started: {error}"))
                raise UserError(f"cannot start a process: {error}") from error
        job = replace(job, pid=child.pid, process_started=psutil.Process(child.pid).create_time(), host=platform.node())
        write_state(job)  # the child waits for the lock before it writes
    threading.Thread(target=child.wait, name=f"reaper of {child.pid}", daemon=True).start()
    return job


def queued_job(folder: Path, config: TrainConfig) -> Job:
    """The state of a run that enters the queue; what an earlier part of it has reached is kept."""
    earlier = stored_job(folder) if is_run(folder) else Job(folder, read_control(folder)["name"], "queued")
    now = time.time()
    resumed = bool(config.resume_from_checkpoint)
    return Job(
        folder, earlier.name, "queued", num_steps=config.max_train_steps, settings=config.to_dict(),
        step=earlier.step if resumed else 0, reward=earlier.reward if resumed else None,
        elapsed_s=earlier.elapsed_s if resumed else 0.0,
        created=earlier.created or now, queued=now, heartbeat=now,
    )


def check_folder(folder: Path, config: TrainConfig) -> None:
    """Refuse a folder that holds anything but a run to be resumed, or a job that never began."""
    if not (config.resume_from_checkpoint and (folder / CONFIG_NAME).exists()):
        check_new_dir(folder, besides=JOB_NAMES)


class Process(Protocol):
    """What tells a process from all others, and when it last said that it lives."""

    pid: int | None
    process_started: float | None
    host: str
    heartbeat: float


def process_lives(job: Process) -> bool:
    """Whether the process that a state speaks of is there, and is that one."""
    if job.pid is None or job.host != platform.node():
        return time.time() - job.heartbeat < SILENT_S
    try:
        process = psutil.Process(job.pid)
        same = abs(process.create_time() - (job.process_started or 0.0)) < 2.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run: a job's, or one that was trained without."""
    return not folder.name.startswith(".") and (os.path.exists(folder / STATE) or bool(_saved_settings(folder)))


def stored_job(folder: Path) -> Job:
    """What the files of a run say."""
    if not is_run(folder):
        raise UserError(f"{folder} holds no training run")
    name = read_control(folder)["name"]
    if not (folder / STATE).exists():
        settings = _saved_settings(folder)
        state = "done" if (folder / LORA_FILE).exists() else "stopped"
        return Job(folder, name, state, "trained without a job", num_steps=int(settings.get("max_train_steps", 0)),
                   settings=settings, created=(folder / CONFIG_NAME).stat().st_mtime)
    try:
        return _parsed(folder, name, json.loads((folder / STATE).read_text()))
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no training run any more") from error
    except (OSError, ValueError, TypeError) as error:
        return Job(folder, name, "lost", f"its {STATE} is damaged: {error}", settings=_saved_settings(folder))


def _parsed(folder: Path, name: str, values: dict[str, Any]) -> Job:
    """A job of state.json's values.

    Raises:
        ValueError: If a value is of the wrong kind.
        TypeError: If there are other values than a job has.
    """
    job = Job(folder=folder, name=name, **values)
    numbers = (job.step, job.num_steps, job.num_processes, job.elapsed_s, job.created, job.queued, job.heartbeat)
    optional = (job.reward, job.remaining_s, job.pid, job.process_started)
    if job.state not in (*LIVING, *ENDED) or not isinstance(job.settings, dict) or not isinstance(job.message, str):
        raise ValueError(f"state {job.state!r}")
    if not all(isinstance(value, int | float) for value in (*numbers, *(value for value in optional if value is not None))):
        raise ValueError("a number is missing")
    return job


def write_state(job: Job) -> None:
    values = asdict(job)
    del values["folder"], values["name"]
    write_json(job.folder / STATE, values)


def _saved_settings(folder: Path) -> dict[str, Any]:
    """The settings in the trainer's config.json; {} where there are none to read."""
    try:
        settings = json.loads((folder / CONFIG_NAME).read_text())["settings"]
        return settings if isinstance(settings, dict) and "output_dir" in settings else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def read_control(folder: Path) -> dict[str, Any]:
    """Orders and name; a file that isn't there or can't be read orders nothing."""
    try:
        control = json.loads((folder / CONTROL).read_text())
    except (OSError, ValueError):
        control = {}
    return NO_ORDERS | {"name": folder.name} | (control if isinstance(control, dict) else {})


def clear_orders(folder: Path) -> None:
    if (folder / CONTROL).exists():
        write_json(folder / CONTROL, read_control(folder) | NO_ORDERS)
