"""What a study is: its settings, sets, pairs and checks, as study.json holds them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rewardiv.config import MAX_SEED, Settings
from rewardiv.errors import UserError, nearest

FORMAT = 1
FILE_NAME = "study.json"
QUESTIONS = {
    "diversity": "Which set of pictures is more varied?",
    "quality": "Which set of pictures looks better?",
    "fit": "Which set of pictures fits the description better?",
}
ANSWERS = ("left", "right", "same")
CONSENT = """\
You will see pairs of picture sets made by computer programs and say which set you prefer. It takes about ten minutes; you can
stop at any time. We keep your answers, how long each took, the size of your window and the version of this page, under a random
number. We don't ask for your name or keep your network address, only a keyed hash of it that changes every day and serves
against double votes. The answers may be published. You will get a code: with it you can withdraw later, and your answers are
then left out of every result and every later publication. By going on you say that you are 18 or older and agree to this."""
RANGES: dict[str, tuple[float, float]] = {  # whole numbers where the lower end is one
    "grid_side": (2, 3), "num_ballots": (3, 200), "check_every": (3, 50), "checks_per_question": (2, 50), "max_px": (16, 2048),
    "seed": (0, MAX_SEED), "min_view_s": (0.0, 30.0), "min_check_pass": (0.0, 1.0), "min_median_s": (0.0, 60.0),
    "max_same_answer": (0.5, 1.0), "min_votes_same_answer": (5, 200), "rater_votes_per_minute": (1, 600),
    "address_votes_per_minute": (1, 10**5), "address_raters_per_day": (1, 10**5),
}


@dataclass(frozen=True)
class StudyConfig(Settings):
    """Settings of a study; all that decides what is counted is fixed here, before the first vote.

    Attributes:
        questions: Of QUESTIONS; a rater answers them in blocks, in an order of chance.
        grid_side: 2 or 3: a set is a grid of 2 x 2 or 3 x 3 images.
        num_ballots: That count, a rater; practice, checks and the repeat come on top.
        check_every: One attention check in about so many ballots.
        checks_per_question: How many are made to choose from.
        max_px: Larger images are shrunk to this longer side.
        seed: Of the checks' making.
        min_view_s: An answer that comes sooner after the ballot was handed out is refused.
        consent: What a rater agrees to; its hash is kept with them.
        min_check_pass: Raters who pass a smaller share of their checks are excluded.
        min_median_s: So are those whose median answer takes less than this.
        max_same_answer: So are those who give one answer more often than this share, of min_votes_same_answer or more.
        rater_votes_per_minute: More are refused, as are more of an address (address_votes_per_minute), and more new raters
            of an address on a day (address_raters_per_day).

    Raises:
        UserError: If a setting is out of range or unknown.
    """

    title: str = "Which pictures do you prefer?"
    questions: tuple[str, ...] = tuple(QUESTIONS)
    grid_side: int = 2
    num_ballots: int = 18
    check_every: int = 10
    checks_per_question: int = 4
    max_px: int = 512
    seed: int = 0
    min_view_s: float = 1.5
    consent: str = CONSENT
    min_check_pass: float = 0.7
    min_median_s: float = 2.0
    max_same_answer: float = 0.95
    min_votes_same_answer: int = 10
    rater_votes_per_minute: int = 30
    address_votes_per_minute: int = 300
    address_raters_per_day: int = 50

    def __post_init__(self) -> None:
        object.__setattr__(self, "questions", tuple(self.questions))
        for name in self.questions:
            if name not in QUESTIONS:
                raise UserError(f"unknown question '{name}'{nearest(str(name), QUESTIONS)}")
        if not self.questions or len(set(self.questions)) < len(self.questions):
            raise UserError("a study asks at least one question, and each once")
        for name, (low, high) in RANGES.items():
            value, whole = getattr(self, name), isinstance(low, int)
            number = isinstance(value, int) or isinstance(value, float) and math.isfinite(value) and not whole
            if not number or isinstance(value, bool) or not low <= value <= high:
                raise UserError(f"{name} is {value!r}; it must be a {'whole ' * whole}number from {low} to {high}")
        if not self.consent.strip():
            raise UserError("the consent text is empty; say what raters agree to")

    @property
    def consent_hash(self) -> str:
        """SHA-256 of the consent text."""
        return hashlib.sha256(self.consent.encode()).hexdigest()

    @property
    def set_size(self) -> int:
        """Images in a set."""
        return self.grid_side**2


@dataclass(frozen=True)
class ImageSet:
    """A grid of one method's images of one prompt.

    Attributes:
        id: For the server alone.
        image: SHA-256 of the grid's PNG, its public name.
        cells: SHA-256 of each single image's PNG, in the order of seeds.
        metrics: What was measured of these images or of their method and prompt, by name.
    """

    id: str
    method: str
    prompt: str
    seeds: tuple[int, ...]
    image: str
    cells: tuple[str, ...]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Pair:
    """Two sets of one prompt and the same seeds: ids of the sets a and b."""

    id: str
    a: str
    b: str


@dataclass(frozen=True)
class Check:
    """Two pictures whose right answer is known: the one named `good`."""

    id: str
    question: str
    prompt: str
    good: str
    bad: str


@dataclass(frozen=True)
class Study:
    """A study as it was built; nothing in it changes afterwards.

    Attributes:
        origin: What its images were made with.
        checks: Those of each question; the first of a question is for practice.
    """

    config: StudyConfig
    origin: Mapping[str, Any]
    sets: tuple[ImageSet, ...]
    pairs: tuple[Pair, ...]
    checks: tuple[Check, ...]

    def to_dict(self) -> dict[str, Any]:
        """As study.json holds it."""
        lists = {name: [asdict(one) for one in getattr(self, name)] for name in ("sets", "pairs", "checks")}
        return json.loads(json.dumps({"format": FORMAT, "config": self.config.to_dict(), "origin": dict(self.origin), **lists}))

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Study:
        """From `to_dict`'s form.

        Raises:
            UserError: If it is of another version, or damaged.
        """
        if found.get("format") != FORMAT:
            raise UserError(f"the study has format {found.get('format')!r} and this version reads {FORMAT}; build it again, or "
                            "use the version that built it")
        try:
            sets = tuple(ImageSet(**one | {name: tuple(one[name]) for name in ("seeds", "cells")}) for one in found["sets"])
            return cls(StudyConfig.from_dict(found["config"]), found["origin"], sets,
                       tuple(Pair(**one) for one in found["pairs"]), tuple(Check(**one) for one in found["checks"]))
        except (KeyError, TypeError) as error:
            raise UserError(f"the study is damaged: {error}; build it again") from error

    @cached_property
    def id(self) -> str:
        """A digest of all that it is: votes are kept under it."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:32]

    @cached_property
    def set_by_id(self) -> dict[str, ImageSet]:
        """The sets by their ids."""
        return {one.id: one for one in self.sets}

    @cached_property
    def pair_by_id(self) -> dict[str, Pair]:
        """The pairs by their ids."""
        return {one.id: one for one in self.pairs}

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """What is compared, in the order it was given."""
        return tuple(dict.fromkeys(one.method for one in self.sets))

    @cached_property
    def images(self) -> frozenset[str]:
        """The public names of all pictures that a ballot may show."""
        shown = {self.set_by_id[name].image for pair in self.pairs for name in (pair.a, pair.b)}
        return frozenset(shown | {name for check in self.checks for name in (check.good, check.bad)})

    def checks_of(self, question: str) -> tuple[Check, ...]:
        """The checks of a question, the practice first."""
        return tuple(check for check in self.checks if check.question == question)


def read_study(folder: str | Path) -> Study:
    """The study that a folder holds.

    Raises:
        UserError: If there is none, or it is damaged.
    """
    path = Path(folder) / FILE_NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no study that can be read ({error}); build one with: python -m rewardiv study "
                        "build") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is no study; build one with: python -m rewardiv study build")
    return Study.from_dict(found)
