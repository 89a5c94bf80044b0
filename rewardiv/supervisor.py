"""The side of the process that trains: it claims its run's folder, waits for its turn, obeys orders and says how it is.

One run a device at a time: the oldest in the queue takes its turn; the lock of a file beside the run folders, which ends
with its holder, keeps two from ever running at once.
"""

from __future__ import annotations

import math
import os
import platform
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from rewardiv.config import TrainConfig
from rewardiv.errors import UserError
from rewardiv.jobs import (
    LOG,
    STATE,
    Job,
    check_folder,
    check_settings,
    clear_orders,
    is_run,
    list_jobs,
    queued_job,
    read_control,
    read_job,
    stored_job,
    train_command,
    write_state,
)
from rewardiv.runs import Orders, append_text, cap_log, locked, new_dir, try_lock

HEARTBEAT_S = 2.0
POLL_S = 0.3
WRITE_EVERY_S = 0.2
LOG_EVERY_S = 1.0
PATIENCE_S = 1.0  # in which a second SIGINT is the first one, passed on by a launcher of several processes
MAX_LOG_BYTES = 4 * 2**20

RecordsOf = Callable[[Callable[[], Orders]], Iterator[Any]]
Tell = Callable[[str], None]


def silent(_text: str) -> None:
    """Tell nobody."""


def supervise(config: TrainConfig, records_of: RecordsOf, *, tell: Tell = silent) -> Iterator[Any]:
    """Run a training in this process as a job: claim its folder, wait for its turn, then pass its records on.

    SIGINT, SIGTERM and SIGHUP count as orders to stop; another SIGINT later interrupts at once. The end is in `state.json`:
    done, stopped or failed. Records are told apart by what they have: a step its `reward_mean`, an event its `kind`.

    Args:
        config: Of the run.
        records_of: Begins the training, given what to ask for orders between two steps.
        tell: Says what the run waits for.

    Raises:
        UserError: If the folder holds something else, or another process trains in it; and what the training raises.
    """
    run = _Run(_claim(config))
    with run.signals(), run.heartbeat():
        try:
            turn = run.wait_for_turn(tell)
            if turn is None:
                run.end("stopped", "stopped before it began")
                return
            with turn:
                for record in records_of(run.orders):
                    run.take(record)
                    yield record
                run.end(*run.outcome())
        except (KeyboardInterrupt, GeneratorExit):
            run.end("stopped", f"interrupted after step {run.job.step}; a restart goes on from its last checkpoint")
            raise
        except UserError as error:
            run.say(f"error: {error}")
            run.end("failed", str(error))
            raise
        except BaseException as error:
            run.say(traceback.format_exc())
            run.end("failed", f"unexpected error: {type(error).__name__}: {error}")
            raise


def follow(config: TrainConfig) -> None:
    """Wait until the first process of a launch of several, which supervises the run, has its turn."""
    begun = psutil.Process().create_time()
    folder = Path(config.output_dir).absolute()
    while True:
        job = stored_job(folder) if is_run(folder) else None
        if job and job.heartbeat > begun and job.state != "queued":
            return
        time.sleep(POLL_S)


class _Run:
    """The side of the training process: its state, which only it writes, its orders and its heartbeat."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.guard = threading.RLock()
        self.ended = threading.Event()
        self.signalled_at: float | None = None
        self.obeyed = {"save": 0, "probe": 0}
        self.last_event: Any = None
        self.first_step: tuple[int, float] | None = None  # of this process, and when it was finished
        self.written_at = self.logged_at = -math.inf
        self.write_failed = False

    def update(self, *, now: bool = True, **changes: object) -> None:
        """Change the state, and write it: at once, or unless it was written just before."""
        with self.guard:
            self.job = replace(self.job, heartbeat=time.time(), **changes)
            if now or time.monotonic() - self.written_at > WRITE_EVERY_S:
                self.written_at = time.monotonic()
                self._attempt(lambda: write_state(self.job))

    def say(self, text: str) -> None:
        """Append to the run's log."""
        self._attempt(lambda: append_text(self.job.folder / LOG, f"{time.strftime('%H:%M:%S')} {text}\n"))

    def _attempt(self, write: Callable[[], object]) -> None:
        """Write; a disk that refuses is told once and doesn't end a training that may itself have nothing to write."""
        try:
            write()
        except UserError as error:
            if not self.write_failed:
                print(f"warning: {error}", file=sys.stderr)
            self.write_failed = True

    def wait_for_turn(self, tell: Tell) -> BinaryIO | None:
        """The device's lock once nobody is ahead in the queue; None where a stop was ordered before."""
        path = self.job.folder.parent / f".rewardiv-{self.job.device.replace(':', '-')}.lock"
        while not self._stop_ordered():
            ahead = _ahead_of(self.job)
            if not ahead and (turn := try_lock(path)):
                self.say(f"started: {shlex.join(train_command(TrainConfig.from_dict(self.job.settings)))}")
                self.update(state="starting", message="")
                return turn
            more = f" and {len(ahead) - 1} more" if len(ahead) > 1 else ""
            message = f"waiting for {ahead[0].name if ahead else 'another process'}{more}"
            if message != self.job.message:
                tell(message)
                self.update(message=message)
            time.sleep(POLL_S)
        return None

    def orders(self) -> Orders:
        """What is asked of the training now."""
        control = read_control(self.job.folder)
        stop, pause = self._stop_ordered(), bool(control["pause"])
        asked = {what: control[what] > done for what, done in self.obeyed.items()}
        self.obeyed = {what: control[what] for what in self.obeyed}
        state = "stopping" if stop else "paused" if pause else "running"
        if state != self.job.state:
            self.first_step = None  # a pause says nothing about the speed
            self.update(state=state, remaining_s=None)
        return Orders(stop=stop, pause=pause, **asked)

    def _stop_ordered(self) -> bool:
        return self.signalled_at is not None or bool(read_control(self.job.folder)["stop"])

    def take(self, record: Any) -> None:
        """Keep what a record says."""
        if hasattr(record, "reward_mean"):
            self._take_step(record)
        elif hasattr(record, "kind"):
            self.last_event = record
            self.say(f"step {record.step}: {record.kind}: {record.text}")
        else:
            found = ", ".join(f"{name} {value:.4g}" for name, value in (record.rewards | record.held_out).items())
            self.say(f"step {record.step}: probe: {found}, SCD {record.scd:.4g}")

    def _take_step(self, record: Any) -> None:
        step, num_steps, clock = record.step, self.job.num_steps, time.monotonic()
        self.first_step = self.first_step or (step, clock)
        done, spent = step - self.first_step[0], clock - self.first_step[1]
        reward = record.reward_mean if math.isfinite(record.reward_mean) else None
        state = {"state": "running"} if self.job.state == "starting" else {}
        self.update(now=bool(state), step=step, reward=reward, elapsed_s=record.elapsed_s,
                    remaining_s=spent / done * (num_steps - step) if done > 0 else None, **state)
        if clock - self.logged_at > LOG_EVERY_S or step == num_steps:
            self.logged_at = clock
            self.say(f"step {step}/{num_steps}: reward {record.reward_mean:.4g}, loss {record.loss:.4g}")

    def outcome(self) -> tuple[str, str]:
        """State and message of a training that ended by itself."""
        kind = getattr(self.last_event, "kind", "")
        if kind == "stopped":
            return "stopped", self.last_event.text
        return "done", self.last_event.text if kind == "early-stop" else ""

    def end(self, state: str, message: str) -> None:
        """The last word about the run."""
        with self.guard:
            self.ended.set()
            self.say(f"{state}{': ' if message else ''}{message}")
            self.update(state=state, message=message, remaining_s=None)

    @contextmanager
    def heartbeat(self) -> Iterator[None]:
        """Say every HEARTBEAT_S that the run lives, from a thread: a step may take longer."""
        thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.ended.set()
            thread.join()

    def _beat(self) -> None:
        while not self.ended.wait(HEARTBEAT_S):
            stopping = self.job.state in ("starting", "running", "paused") and self._stop_ordered()
            with self.guard:
                if not self.ended.is_set():
                    self.update(**({"state": "stopping"} if stopping else {}))
            self._attempt(lambda: cap_log(self.job.folder / LOG, MAX_LOG_BYTES))

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Take the signals that ask a process to end as orders to stop, where this is the main thread."""
        wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        is_main = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in wanted if is_main}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._signalled)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _signalled(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if self.signalled_at is None:
            self.signalled_at = now
        elif number == signal.SIGINT and now - self.signalled_at > PATIENCE_S:
            raise KeyboardInterrupt


def _claim(config: TrainConfig) -> Job:
    """Make this process the one that writes the run's state: as the process that was started for it, or on its own."""
    folder = Path(config.output_dir).absolute()
    if not folder.exists():
        check_settings(config)
        new_dir(folder)
    with locked(folder):  # waits for who just starts this process
        known = stored_job(folder) if (folder / STATE).exists() else None
        if known is None or known.state != "queued" or known.pid != os.getpid():
            if known and read_job(folder).alive:
                raise UserError(f"process {known.pid} trains in {folder} already; stop that run or choose another folder")
            check_settings(config)
            check_folder(folder, config)
            clear_orders(folder)
            known = queued_job(folder, config)
        me = psutil.Process()
        job = replace(known, pid=me.pid, process_started=me.create_time(), host=platform.node(), heartbeat=time.time(),
                      num_processes=int(os.environ.get("WORLD_SIZE", "1")))
        write_state(job)
    return job


def _ahead_of(job: Job) -> list[Job]:
    """The runs beside it that come before it on its device, the running one first."""
    others = [other for other in list_jobs(job.folder.parent)
              if other.folder != job.folder and other.alive and other.device == job.device]
    ahead = [other for other in others if other.state != "queued"
             or (other.queued, other.folder.name) < (job.queued, job.folder.name)]
    return sorted(ahead, key=lambda other: (other.state == "queued", other.queued))
