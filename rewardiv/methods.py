"""A sampling method as a mixture of LoRA scales: terms (lora_scale, weight) at every denoising step.

Source: Jena et al., arXiv:2409.06493: Annealed Importance Guidance (aig), LoRA scaling (lora:A), DRaFT (finetuned).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from rewardiv.errors import UserError, nearest
from rewardiv.gamma import Clock, Gamma, number_text, parse_gamma, parse_number

USAGE = {
    "base": "base",
    "finetuned": "finetuned",
    "lora": "lora:A",
    "aig": "aig:GAMMA",
    "anneal-lora": "anneal-lora:GAMMA",
    "blend": "blend:L",
}
VALUE_RANGES = {"lora": (0.0, 2.0), "blend": (0.0, 1.0)}
GAMMA_KINDS = ("aig", "anneal-lora")
DEFAULT_METHODS = ("base", "finetuned", "lora:0.5", "aig:power:2")
MAX_FILE_NAME = 120


class Term(NamedTuple):
    """One noise prediction of a mixture: the LoRA's scale (0 base, 1 finetuned) and the weight it is mixed with."""

    lora_scale: float
    weight: float


@dataclass(frozen=True)
class Method:
    """A sampling method.

    Attributes:
        kind: base, finetuned, lora, aig, anneal-lora or blend.
        value: lora's constant scale in [0, 2] (0 base, 1 finetuned, above 1 extrapolates), or blend's constant weight
            of the base model in [0, 1]; None for every other kind.
        gamma: The schedule of aig and anneal-lora; None for every other kind.

    Raises:
        UserError: If the kind is unknown, or what it needs is missing, out of range or too much.
    """

    kind: str
    value: float | None = None
    gamma: Gamma | None = None

    def __post_init__(self) -> None:
        if self.kind not in USAGE:
            raise UserError(f"unknown method '{self.kind}'{nearest(self.kind, USAGE)}")
        wants_value, wants_gamma = self.kind in VALUE_RANGES, self.kind in GAMMA_KINDS
        if (self.value is not None) != wants_value or (self.gamma is not None) != wants_gamma:
            raise UserError(f"method '{self.kind}' is written {USAGE[self.kind]}{_example(self.kind)}")
        if self.value is not None:
            low, high = VALUE_RANGES[self.kind]
            if not low <= self.value <= high:
                raise UserError(f"{USAGE[self.kind]} takes a number in {low:g} to {high:g}, got {self.value:g}")
            object.__setattr__(self, "value", float(self.value) + 0.0)  # -0.0 becomes 0.0

    def __str__(self) -> str:
        """The text that parses back to this method."""
        if self.value is not None:
            return f"{self.kind}:{number_text(self.value)}"
        return self.kind if self.gamma is None else f"{self.kind}:{self.gamma}"

    @property
    def label(self) -> str:
        """A short name for a row, an axis or a legend."""
        match self.kind:
            case "lora":
                return f"LoRA × {number_text(self.value)}"
            case "blend":
                return f"Blend, {100 * self.value:.4g} % base"
            case "aig" | "anneal-lora":
                name = "AIG" if self.kind == "aig" else "LoRA annealed,"
                return f"{name} {str(self.gamma).replace(':', ' ').replace('@', ' @')}"
            case _:
                return self.kind.capitalize()

    @property
    def file_name(self) -> str:
        """The canonical text with ":" as "-"; one longer than 120 characters is cut and ends in a digest."""
        name = str(self).replace(":", "-")
        if len(name) <= MAX_FILE_NAME:
            return name
        digest = hashlib.sha256(name.encode()).hexdigest()[:12]
        return f"{name[: MAX_FILE_NAME - 13]}-{digest}"

    @property
    def needs_lora(self) -> bool:
        """False for the base model alone."""
        return self.kind != "base"

    def terms(self, clock: Clock, i: int) -> tuple[Term, ...]:
        """The mixture at step `i` of `clock`, sorted by scale; weights are above 0 and sum to 1, scales differ."""
        match self.kind:
            case "base":
                return (Term(0.0, 1.0),)
            case "finetuned":
                return (Term(1.0, 1.0),)
            case "lora":
                return (Term(self.value, 1.0),)
            case "anneal-lora":
                return (Term(1 - self.gamma.at(clock, i), 1.0),)
            case _:
                base = self.value if self.kind == "blend" else self.gamma.at(clock, i)
                return tuple(term for term in (Term(0.0, base), Term(1.0, 1 - base)) if term.weight)

    def nfe(self, clock: Clock, guidance_scale: float) -> int:
        """Network evaluations that one image needs by itself: one a term and call, two where guidance is on."""
        passes = sum(len(self.terms(clock, i)) * (clock.calls[i] if clock.calls else 1) for i in range(len(clock)))
        return passes if guidance_scale == 1 else 2 * passes


def parse_method(text: str) -> Method:
    """A method from its text: base, finetuned, lora:A, aig:GAMMA, anneal-lora:GAMMA or blend:L.

    Raises:
        UserError: If the name is unknown (with the nearest known one) or its number or gamma cannot be used.
    """
    kind, colon, rest = text.strip().lower().partition(":")
    if kind in GAMMA_KINDS and rest:
        return Method(kind, gamma=parse_gamma(rest))
    if kind in VALUE_RANGES and rest:
        return Method(kind, value=parse_number(rest, text))
    if colon and kind in USAGE:
        raise UserError(f"cannot read method '{text}'; write {USAGE[kind]}{_example(kind)}")
    return Method(kind)


def parse_methods(texts: Iterable[str]) -> tuple[Method, ...]:
    """The methods in the order given.

    Raises:
        UserError: If there is none, one is given twice (power_2.0 and power:2 are the same), or one cannot be read.
    """
    methods = tuple(parse_method(text) for text in texts)
    if not methods:
        raise UserError(f"no method given; name at least one, such as {DEFAULT_METHODS[0]}")
    for k, method in enumerate(methods):
        if method in methods[:k]:
            raise UserError(f"method '{method}' is given twice; name each method once")
    return methods


def _example(kind: str) -> str:
    examples = {"lora": "lora:0.5", "blend": "blend:0.5"} | {name: f"{name}:power:2" for name in GAMMA_KINDS}
    return f", such as {examples[kind]}" if kind in examples else ""
