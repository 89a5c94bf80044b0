"""The one error type that a screen may show as it is, and the hint for an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the person can mend: the message says what was seen and what to do, and is shown as it is."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: "; did you mean 'x'?" or, where nothing is near, the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"
