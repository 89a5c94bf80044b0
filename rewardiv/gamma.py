"""Gamma schedules: the base model's weight along the denoising, parsed from text, checked and evaluated.

tau = t/T is 1 at pure noise and 0 at the image; progress = 1 - tau. gamma(tau) is the weight of the BASE model: it
starts at 1 and ends at 0 and never rises on the way. Keeping it high for longer means more diversity and less reward.

Source: Jena et al., arXiv:2409.06493, whose power law is gamma = 1 - (1 - t/T)^p with p = 2.
Differs: the authors' code writes the finetuned model's weight, (i/N)^p, and never reaches 1; the domain "nemo" does the
same, the default domain "exact" reaches both ends.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rewardiv import extensions
from rewardiv.errors import UserError, nearest

DOMAINS = ("exact", "nemo", "t", "logsnr")
MAX_KNOTS = 32
MIN_KNOT_GAP = 1e-6  # in progress
MAX_LOGSNR = 20.0  # a scheduler with no signal at all in its first step says -inf
EDGE = 1e-9  # a step schedule's edge, wider than the rounding of 1 - (1 - i/N)
CHECKED_POINTS = 256  # of a curve that somebody added
ROUNDING = 1e-6  # that such a curve may miss its ends by, or rise by

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII)
NEMO_NAME = re.compile(r"(power|step)_(.+)")


class Parameter(NamedTuple):
    """One number of a shape, with the closed range that it must lie in."""

    name: str
    low: float
    high: float


SHAPES: dict[str, tuple[Parameter, ...]] = {
    "linear": (),
    "power": (Parameter("P", 1e-3, 1e3),),
    "step": (Parameter("F", 0.0, 1.0),),
    "sigmoid": (Parameter("K", 1e-2, 1e3), Parameter("C", 0.0, 1.0)),
    "cosine": (),
    "knots": (),  # progress=gamma pairs, checked by themselves
}


@dataclass(frozen=True)
class Clock:
    """tau of every denoising step in each domain; `t` and `logsnr` are empty where the scheduler's were not given.

    exact: 1 - i/(N-1), reaches both ends. nemo: 1 - i/N, the authors', never reaches 0. t: the scheduler's t/T.
    logsnr: the log signal-to-noise ratio, rescaled to 1 at the first step and 0 at the last.
    calls: how often each step calls the network; empty where that is once everywhere.
    """

    exact: tuple[float, ...]
    nemo: tuple[float, ...]
    t: tuple[float, ...] = ()
    logsnr: tuple[float, ...] = ()
    calls: tuple[int, ...] = ()

    @staticmethod
    def of_steps(n: int, t: Sequence[float] | None = None, logsnr: Sequence[float] | None = None) -> Clock:
        """The clock of `n` steps; a single step is tau = 1 (the base model) in every domain but `t`.

        Args:
            n: Number of denoising steps, at least 1.
            t: The scheduler's t/T of each step, in [0, 1].
            logsnr: The raw log signal-to-noise ratio of each step; values beyond +-20 count as +-20.

        Raises:
            UserError: If `n` is below 1.
            ValueError: If `t` or `logsnr` has another length than `n` or holds a nan.
        """
        if n < 1:
            raise UserError(f"the number of steps is {n}; it must be at least 1")
        for name, given in (("t", t), ("logsnr", logsnr)):
            if given is not None and (len(given) != n or any(math.isnan(value) for value in given)):
                raise ValueError(f"{name} must hold {n} numbers, one a step, got {list(given)}")
        return Clock(
            exact=tuple(1 - i / max(n - 1, 1) for i in range(n)),
            nemo=tuple(1 - i / n for i in range(n)),
            t=tuple(float(value) for value in t) if t is not None else (),
            logsnr=_rescaled(logsnr) if logsnr is not None else (),
        )

    def __len__(self) -> int:
        return len(self.exact)


@dataclass(frozen=True)
class Gamma:
    """A gamma schedule: a shape, its numbers and the domain in which a step's tau is measured.

    Every schedule starts at gamma(1) = 1, ends at gamma(0) = 0 and never rises as tau falls. The one exception is
    step:0, which is 0 everywhere (the finetuned model alone); step:1@nemo is 1 at every step (the base model alone).

    Attributes:
        shape: One of SHAPES, or one that somebody added (see rewardiv.extensions).
        params: The shape's numbers; for knots the pairs (progress, gamma) in one row, sorted by progress.
        domain: One of DOMAINS.
        curve: The function (progress, *params) -> gamma of a shape that was added; None for the project's own.

    Raises:
        UserError: If a name is unknown, a number is out of range, or knots or a curve that was added leave [0, 1], rise
            or miss an end.
    """

    shape: str
    params: tuple[float, ...] = ()
    domain: str = "exact"
    curve: Callable[..., float] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        added = {} if self.shape in SHAPES else extensions.load().gammas
        if self.shape not in SHAPES and self.shape not in added:
            raise UserError(f"unknown gamma shape '{self.shape}'{nearest(self.shape, [*SHAPES, *added])}")
        if self.domain not in DOMAINS:
            raise UserError(f"unknown gamma domain '{self.domain}'{nearest(self.domain, DOMAINS)}")
        params = tuple(float(value) + 0.0 for value in self.params)  # -0.0 becomes 0.0
        if self.shape == "knots":
            params = _checked_knots(params)
        else:
            _check_params(self.shape, params)
        object.__setattr__(self, "params", params)
        if self.shape in added:
            object.__setattr__(self, "curve", added[self.shape].function())
            self._check_curve()

    def __str__(self) -> str:
        """The text that parses back to this schedule; the default domain is not written."""
        if self.shape == "knots":
            text = "knots:" + ",".join(f"{number_text(x)}={number_text(y)}" for x, y in self.knots)
        else:
            text = ":".join((self.shape, *map(number_text, self.params)))
        return text if self.domain == "exact" else f"{text}@{self.domain}"

    @property
    def knots(self) -> tuple[tuple[float, float], ...]:
        """The pairs (progress, gamma) of a knots schedule; empty for every other shape."""
        return tuple(zip(self.params[::2], self.params[1::2], strict=True)) if self.shape == "knots" else ()

    def __call__(self, tau: float) -> float:
        """The base model's weight in [0, 1] at noise level `tau` (1 noise, 0 image; clamped to [0, 1])."""
        progress = 1 - min(1.0, max(0.0, tau))
        match self.shape:
            case "linear":
                return 1 - progress
            case "power":
                return 1 - progress ** self.params[0]
            case "step":
                return 0.0 if progress >= self.params[0] - EDGE else 1.0
            case "sigmoid":
                return _sigmoid(progress, *self.params)
            case "cosine":
                return (1 + math.cos(math.pi * progress)) / 2
            case "knots":
                return _monotone_cubic(progress, self.params[::2], self.params[1::2])
            case _:
                return self._added(progress)

    def at(self, clock: Clock, i: int) -> float:
        """The base model's weight at step `i` of `clock`, with tau measured in this schedule's domain."""
        taus: tuple[float, ...] = getattr(clock, self.domain)
        if not taus:
            raise UserError(f"gamma '{self}' needs the scheduler's {self.domain}, which is not known here; use @exact")
        return self(taus[i])

    def _added(self, progress: float) -> float:
        """The added curve at `progress`, exactly 1 and 0 at the ends, which it was checked to meet."""
        if progress in (0, 1):
            return 1.0 - progress
        return min(1.0, max(0.0, float(self.curve(progress, *self.params))))

    def _check_curve(self) -> None:
        """Refuse an added curve that fails, leaves [0, 1], rises or misses an end, with the offending point."""
        before = 1.0
        for k in range(CHECKED_POINTS + 1):
            progress = k / CHECKED_POINTS
            try:
                value = float(self.curve(progress, *self.params))
            except Exception as error:  # somebody else's code, which may raise anything
                raise UserError(f"gamma '{self}' fails at progress {progress:g}: {type(error).__name__}: {error}") from error
            here = f"at progress {progress:g} gamma '{self}' is {value:g}"
            if not -ROUNDING <= value <= 1 + ROUNDING:
                raise UserError(f"{here}; it must lie in 0 to 1")
            if value > before + ROUNDING:
                raise UserError(f"{here}, after {before:g}; it may only fall")
            if progress in (0, 1) and abs(value - (1 - progress)) > ROUNDING:
                raise UserError(f"{here}; it must be {1 - progress:g} there")
            before = value


def parse_gamma(text: str) -> Gamma:
    """A schedule from its text: a shape with its numbers, then `@domain` where it isn't the default.

    linear, power:P, step:F, sigmoid:K:C, cosine, knots:0=1,0.3=0.9,1=0, with @exact (default), @nemo, @t or @logsnr.
    A shape that somebody added is written like these: its name, then its numbers.
    NeMo's power_2.0 and step_0.6 name the shape only: add @nemo for NeMo's steps as well.

    Raises:
        UserError: If the text cannot be read, or the schedule leaves [0, 1], rises or misses an end.
    """
    body, at, domain = text.strip().lower().partition("@")
    if nemo := NEMO_NAME.fullmatch(body):
        body = f"{nemo[1]}:{nemo[2]}"
    shape, colon, rest = body.partition(":")
    if shape == "knots":
        params = [number for pair in rest.split(",") for number in _knot(pair, text)]
    else:
        is_known = shape in SHAPES or shape in extensions.load().gammas
        params = [parse_number(piece, text) for piece in rest.split(":")] if colon and is_known else []
    return Gamma(shape, tuple(params), domain if at else "exact")


def parse_number(piece: str, text: str) -> float:
    """A finite number from `piece`; `text` is the whole that it was found in, for the message of the UserError."""
    if not NUMBER.fullmatch(piece.strip().lower()) or not math.isfinite(float(piece)):
        raise UserError(f"'{piece}' in '{text}' is not a finite number")
    return float(piece)


def number_text(value: float) -> str:
    """The shortest text that reads back as the same number: 2 and not 2.0."""
    return repr(value).removesuffix(".0")


def _knot(pair: str, text: str) -> tuple[float, float]:
    progress, equals, value = pair.partition("=")
    if not equals:
        raise UserError(f"'{pair}' in '{text}' is not a knot; write progress=gamma pairs like knots:0=1,0.3=0.9,1=0")
    return parse_number(progress, text), parse_number(value, text)


def _check_params(shape: str, params: tuple[float, ...]) -> None:
    known = SHAPES[shape] if shape in SHAPES else _added_parameters(shape)
    usage = ":".join((shape, *(parameter.name for parameter in known)))
    if len(params) != len(known):
        raise UserError(f"gamma shape '{shape}' is written {usage}; numbers given: {len(params)}")
    for parameter, value in zip(known, params, strict=True):
        if not parameter.low <= value <= parameter.high:
            span = f"{parameter.low:g} to {parameter.high:g}"
            raise UserError(f"{parameter.name} = {value:g} in gamma {usage} is outside {span}")


def _added_parameters(shape: str) -> tuple[Parameter, ...]:
    ranges = extensions.load().gammas[shape].values.get("parameters", {})
    return tuple(Parameter(name, *map(float, span)) for name, span in ranges.items())


def _checked_knots(params: tuple[float, ...]) -> tuple[float, ...]:
    """The knots sorted by progress, after checking that they fall from 0=1 to 1=0."""
    if len(params) % 2 or not 4 <= len(params) <= 2 * MAX_KNOTS:
        raise UserError(f"gamma knots are 2 to {MAX_KNOTS} progress=gamma pairs, got {len(params)} numbers")
    knots = sorted(zip(params[::2], params[1::2], strict=True), key=lambda knot: knot[0])
    for x, y in knots:
        if not (0 <= x <= 1 and 0 <= y <= 1):
            raise UserError(f"gamma leaves [0, 1] at the knot {x:g}={y:g}; progress and gamma both lie in 0 to 1")
    for (x0, y0), (x1, y1) in itertools.pairwise(knots):
        if x1 - x0 < MIN_KNOT_GAP:
            raise UserError(f"two gamma knots lie at progress {x1:g} ({y0:g} and {y1:g}); keep one")
        if y1 > y0:
            raise UserError(f"gamma rises at the knot {x1:g}={y1:g}, after {x0:g}={y0:g}; it may only fall")
    for (x, y), end, name in ((knots[0], (0, 1), "first"), (knots[-1], (1, 0), "last")):
        if (x, y) != end:
            raise UserError(f"the {name} gamma knot is {x:g}={y:g}; it must be {end[0]}={end[1]}")
    return tuple(number for knot in knots for number in knot)


def _rescaled(logsnr: Sequence[float]) -> tuple[float, ...]:
    values = [min(MAX_LOGSNR, max(-MAX_LOGSNR, float(value))) for value in logsnr]
    first, last = values[0], values[-1]
    if len(values) == 1:
        return (1.0,)
    if last <= first:
        raise ValueError(f"logsnr must rise from the first step to the last, got {first} and {last}")
    return tuple((last - value) / (last - first) for value in values)


def _sigmoid(progress: float, steepness: float, centre: float) -> float:
    """A falling logistic of progress, rescaled so that it is exactly 1 at progress 0 and 0 at 1."""
    start, here, end = (math.tanh(steepness * (centre - x) / 2) for x in (0.0, progress, 1.0))
    return (here - end) / (start - end)


def _monotone_cubic(x: float, xs: tuple[float, ...], ys: tuple[float, ...]) -> float:
    """The monotone cubic Hermite curve through the knots, at `x` in [xs[0], xs[-1]].

    Source: Fritsch and Carlson, SIAM J. Numer. Anal. 17 (1980), with the slopes of Fritsch and Butland (1984): PCHIP.
    """
    k = next(k for k in range(len(xs) - 1) if x <= xs[k + 1])
    slopes = _pchip_slopes(xs, ys)
    width = xs[k + 1] - xs[k]
    s = (x - xs[k]) / width
    value = (
        (1 + 2 * s) * (1 - s) ** 2 * ys[k]
        + s * s * (3 - 2 * s) * ys[k + 1]
        + width * s * (1 - s) * ((1 - s) * slopes[k] - s * slopes[k + 1])
    )
    return min(max(value, ys[k + 1]), ys[k])  # rounding alone could leave the knots' own range


@functools.lru_cache(maxsize=64)
def _pchip_slopes(xs: tuple[float, ...], ys: tuple[float, ...]) -> tuple[float, ...]:
    widths = [x1 - x0 for x0, x1 in itertools.pairwise(xs)]
    secants = [(y1 - y0) / width for (y0, y1), width in zip(itertools.pairwise(ys), widths, strict=True)]
    if len(secants) == 1:
        return (secants[0], secants[0])

    def inner(k: int) -> float:
        before, after = secants[k - 1], secants[k]
        if before * after <= 0:
            return 0.0
        near, far = 2 * widths[k] + widths[k - 1], widths[k] + 2 * widths[k - 1]
        return (near + far) / (near / before + far / after)

    def end(h0: float, h1: float, s0: float, s1: float) -> float:
        slope = ((2 * h0 + h1) * s0 - h0 * s1) / (h0 + h1)
        return 0.0 if slope * s0 <= 0 else slope

    first = end(widths[0], widths[1], secants[0], secants[1])
    last = end(widths[-1], widths[-2], secants[-1], secants[-2])
    return (first, *(inner(k) for k in range(1, len(secants))), last)
