"""Downloads that go on behind a page: one at a time, each seen by every visitor, stopped on demand."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, replace

from rewardiv import hub
from rewardiv.errors import UserError
from rewardiv.registry import Entry

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Download:
    """How a download goes.

    Attributes:
        state: waiting, running, stopping, done, stopped or failed.
        done, total: Bytes; 0 until they are known.
        message: Why it failed.
    """

    state: str
    done: int = 0
    total: int = 0
    message: str = ""

    @property
    def is_going(self) -> bool:
        """Whether it may still bring something."""
        return self.state in ("waiting", "running", "stopping")


class Downloads:
    """The downloads of a process, by entry; safe to use from threads."""

    def __init__(self) -> None:
        self._turn = threading.Lock()  # held by the one that runs
        self._lock = threading.Lock()
        self._known: dict[str, Download] = {}
        self._stops: dict[str, threading.Event] = {}

    def start(self, entry: Entry, *, half: bool = False) -> None:
        """Fetch what is missing of an entry, after those that were started before; one that is under way goes on.

        Args:
            entry: With all of its sources.
            half: 16-bit weights where there are any.
        """
        with self._lock:
            if (known := self._known.get(_key(entry))) and known.is_going:
                return
            self._known[_key(entry)] = Download("waiting")
            stop = self._stops[_key(entry)] = threading.Event()
        threading.Thread(target=self._run, args=(entry, half, stop), name="download", daemon=True).start()

    def stop(self, entry: Entry) -> None:
        """Stop an entry's download; what has arrived is kept."""
        with self._lock:
            if (known := self._known.get(_key(entry))) and known.is_going:
                self._stops[_key(entry)].set()
                self._known[_key(entry)] = replace(known, state="stopping")

    def of(self, entry: Entry) -> Download | None:
        """The entry's last download since the process started."""
        return self._known.get(_key(entry))

    def forget(self, entry: Entry) -> None:
        """Say nothing more of an entry's download that has ended."""
        with self._lock:
            if (known := self._known.get(_key(entry))) and not known.is_going:
                del self._known[_key(entry)]

    def any_going(self) -> bool:
        """Whether any may still bring something."""
        with self._lock:
            return any(download.is_going for download in self._known.values())

    def _run(self, entry: Entry, half: bool, stop: threading.Event) -> None:
        def tell(done: int, total: int) -> None:
            self._set(entry, "stopping" if stop.is_set() else "running", done=done, total=total)

        try:
            with self._turn:
                if stop.is_set():
                    raise hub.Cancelled(entry.name)
                self._set(entry, "running")
                hub.fetch(entry, half=half, progress=tell, cancel=stop.is_set)
            self._set(entry, "done")
        except hub.Cancelled:
            self._set(entry, "stopped")
        except UserError as error:
            self._set(entry, "failed", message=str(error))
        except Exception:
            log.exception("the download of %s failed", entry.name)
            self._set(entry, "failed", message="unexpected error; the log has the details")

    def _set(self, entry: Entry, state: str, **changes: object) -> None:
        with self._lock:
            self._known[_key(entry)] = replace(self._known[_key(entry)], state=state, **changes)


def _key(entry: Entry) -> str:
    return f"{entry.kind} {entry.name}"
