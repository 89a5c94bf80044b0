"""A disk on which no file may grow beyond a size, for as long as a `with` lasts (pytest writes its own report after it)."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def small_disk(max_bytes: int) -> Iterator[None]:
    """Writing beyond `max_bytes` of any file fails with "File too large" inside."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
