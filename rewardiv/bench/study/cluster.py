"""A PostgreSQL server of a measurement's own, on a socket in a temporary folder, that can be killed like a machine's."""

from __future__ import annotations

import os
import pwd
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from rewardiv.errors import UserError

PLACES = "/usr/lib/postgresql"  # Debian's
USERS = ("postgres", "nobody")  # PostgreSQL refuses to be run by root
WAIT_S = 60


class Cluster:
    """A running server; where we are root it is another user's.

    Args:
        place: A folder that holds nothing yet.
        flush: Whether it writes through to the disk, as it does by default; without it survives killed processes alone.

    Raises:
        UserError: If PostgreSQL isn't installed or doesn't start.
    """

    def __init__(self, place: Path, *, flush: bool = True) -> None:
        programs = sorted(Path(PLACES).glob("*/bin/initdb"))
        if not programs:
            raise UserError(f"PostgreSQL isn't installed below {PLACES}; install it (apt install postgresql), or leave it out")
        self.programs, self.place, self.flush = programs[-1].parent, place, flush
        users = {user.pw_name: user for user in pwd.getpwall()}
        user = next((users[name] for name in USERS if name in users), None)
        self.prefix = ["runuser", "-u", user.pw_name, "--"] if os.geteuid() == 0 and user else []
        if self.prefix and user:
            os.chown(place, user.pw_uid, user.pw_gid)
        self._run("initdb", "--pgdata", place / "data", "--username", "study", "--auth", "trust", "--no-sync")
        self.start()

    @property
    def url(self) -> str:
        """Its address for SQLAlchemy."""
        return f"postgresql://study@/postgres?host={self.place}"

    def start(self) -> None:
        """Start it, and wait until it has recovered."""
        fsync = "on" if self.flush else "off"
        self._run("pg_ctl", "start", "--wait", "--pgdata", self.place / "data", "--log", self.place / "log",
                  "--options", f"-c listen_addresses='' -c unix_socket_directories={self.place} -c fsync={fsync}")

    def stop(self) -> None:
        """End it."""
        self._run("pg_ctl", "stop", "--mode", "immediate", "--pgdata", self.place / "data")

    def kill(self) -> None:
        """SIGKILL for all its processes: nothing is written any more."""
        main = psutil.Process(int((self.place / "data" / "postmaster.pid").read_text().split()[0]))
        kill_all([main, *main.children(recursive=True)])

    def _run(self, program: str, *words: object) -> None:
        command = [*self.prefix, str(self.programs / program), *map(str, words)]
        try:
            subprocess.run(command, cwd=self.place, check=True, timeout=WAIT_S,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except (OSError, subprocess.SubprocessError) as error:
            raise UserError(f"PostgreSQL's {program} failed: {error}") from error


def kill_all(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL for each that hasn't ended, as PostgreSQL's do by themselves once their parent is gone; then all have ended."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, WAIT_S)


@contextmanager
def running(*, flush: bool = True) -> Iterator[Cluster]:
    """A server for as long as a `with` lasts."""
    with tempfile.TemporaryDirectory(prefix="pg") as place:
        cluster = Cluster(Path(place), flush=flush)
        try:
            yield cluster
        finally:
            cluster.stop()
