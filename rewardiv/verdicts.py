"""What a run's probes measured, and two verdicts over them: where it begins to collapse, which probe trades best. No torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

SIGMAS = 2.5  # standard errors of a difference that chance is granted
MIN_PROBES = 3


@dataclass(frozen=True)
class ProbeRecord:
    """What one probe measured, over P prompts and S seeds that stay the same throughout a run.

    Attributes:
        step: Finished training steps.
        rewards: Means of the rewards trained on, on their official scales.
        held_out: Means of rewards not trained on.
        standard_errors: Of every mean in `rewards` and `held_out`: over seeds, the prompts being fixed.
        gain: Rise of the rewards trained on over the base model's, as the mean by their weights, each in units of the
            base's standard deviation within prompts; 0 for the base.
        scd: Spectral distance of the spreads within prompts to the base's, see metrics.within_report.
        scd_null: The 95 % band of `scd` if only the seeds differed.
        trace_ratio: Variance within prompts relative to the base's; nan where that has none.
        effective_rank: Directions in which images of a prompt spread.
        effective_rank_base: The base's.
        pairwise_distance: Mean distance between the features of two images of a prompt.
        num_images: P * S.
        elapsed_s: Time of this probe, without that of the base model's images, which are drawn once.
        trace_null: The 95 % band of `trace_ratio` if only the seeds differed; None where it wasn't measured.
    """

    step: int
    rewards: dict[str, float]
    held_out: dict[str, float]
    standard_errors: dict[str, float]
    gain: float
    scd: float
    scd_null: tuple[float, float]
    trace_ratio: float
    effective_rank: float
    effective_rank_base: float
    pairwise_distance: float
    num_images: int
    elapsed_s: float
    trace_null: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON can hold it; nan becomes None."""
        return asdict(self) | {
            "scd_null": list(self.scd_null), "trace_null": self.trace_null and list(self.trace_null),
            "trace_ratio": None if math.isnan(self.trace_ratio) else self.trace_ratio,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ProbeRecord:
        """The record from `to_dict`'s form."""
        ratio = math.nan if values["trace_ratio"] is None else values["trace_ratio"]
        nulls = {name: tuple(values[name]) for name in ("scd_null", "trace_null") if values.get(name)}
        return cls(**{**values, **nulls, "trace_ratio": ratio})


@dataclass(frozen=True)
class Onset:
    """Where a run begins to collapse, and the sentence that says why."""

    step: int
    reason: str


@dataclass(frozen=True)
class Choice:
    """The probe with the best trade-off, and the sentence that says why.

    gain_share is its share (0 to 1) of the run's largest gain, variance_kept its share of the base's variance, 1 at most.
    """

    step: int
    gain_share: float
    variance_kept: float
    reason: str


def collapse_onset(records: Sequence[ProbeRecord]) -> Onset | None:
    """The first probe that shows a sign of collapse which the next one shows as well; None without such a pair.

    Signs are:
    - diversity: less variance than the base (`trace_ratio` below 1), and `trace_ratio` below or `scd` above its band of
      chance. With 4 prompts of 4 built-in images the first tells a loss of about 45 % of the variance from chance, the
      second of about 65 %; with 8 seeds about 30 and 50 %;
    - held-out reward: more than 2.5 standard errors (of the difference) below the best level that it has held so far, while
      the gain of the rewards trained on is higher than it was then and one of them has risen by more than 2.5 standard
      errors. A level is held if two probes in a row reach it; the first probe's counts at once.

    Why two probes: a 95 % band is left by chance now and then, and the best of many noisy values is too high. With 50 probes
    and a held-out reward that only scatters by its standard error, 2 % of runs alarm falsely. A sign must be the same one
    at both (the same held-out reward); the onset is dated at the first, so one at the last probe is not said yet. Where a
    step was measured twice (after a rollback), the later record counts.
    """
    ordered = _in_order(records)
    signs = [_diversity_sign(record) | _turn_signs(ordered[: i + 1]) for i, record in enumerate(ordered)]
    return _confirmed(ordered, signs)


def best_tradeoff(records: Sequence[ProbeRecord], steps: Collection[int] | None = None) -> Choice | None:
    """The probe that keeps most of both: the largest (share of the run's gain) + (share of the base's variance kept).

    That is the knee of the curve gain share against variance kept: the point farthest above the chord from the base (no
    gain, all variance) to all gain at no variance. No parameter is to be set.
    Differs from Satopää et al., "Finding a 'Kneedle' in a haystack" (ICDCSW 2011): the chord ends where all variance is
    gone and not at the run's last probe. Scaled to the run's own range, a run that loses 1 % of its variance would
    be told to give up half of its reward for half a percent.

    A held-out reward's turn (see collapse_onset) bounds the choice: from there on the gain is partly hacked, so only
    earlier probes count, or the first with a gain where there is no earlier one. Diversity that left its band does not:
    its loss is on the scale already, and with many images chance is left at a small loss.

    Args:
        records: All probes of the run.
        steps: Only these can be chosen, such as those with a checkpoint; None is all.

    Returns:
        None with fewer than 3 probes, where no reward rose by more than 2.5 standard errors, or none of `steps` gained.
    """
    ordered = _in_order(records)
    if len(ordered) < MIN_PROBES or any(math.isnan(record.trace_ratio) for record in ordered):
        return None
    top = max(ordered, key=lambda record: record.gain)
    candidates = [record for record in ordered if record.gain > 0 and (steps is None or record.step in steps)]
    if top.gain <= 0 or not _risen(ordered[0], top) or not candidates:
        return None
    turn = _confirmed(ordered, [_turn_signs(ordered[: i + 1]) for i in range(len(ordered))])
    earlier = [record for record in candidates if turn is not None and record.step < turn.step]

    def shares(record: ProbeRecord) -> tuple[float, float]:
        return record.gain / top.gain, min(record.trace_ratio, 1.0)

    if turn is None or earlier:
        chosen = max(earlier or candidates, key=lambda record: sum(shares(record)))
    else:
        chosen = candidates[0]
    gain, kept = shares(chosen)
    changes = ", ".join(f"{name} {_pair(ordered[0].rewards[name], value)}" for name, value in chosen.rewards.items())
    reason = f"keeps {kept:.0%} of the base's variance and {gain:.0%} of this run's reward gain ({changes})".replace("%", " %")
    if turn is not None and not earlier:
        past = f"; a held-out reward turns at step {turn.step}, and of all that gained this is the least far past it"
        return Choice(chosen.step, gain, kept, reason + past)
    reason += "; the largest sum of both" if gain + kept > 1 else "; the largest sum of both, yet it loses more than it gains"
    if earlier:
        reason += f" before step {turn.step}, where a held-out reward turns"
    return Choice(chosen.step, gain, kept, reason)


def _in_order(records: Sequence[ProbeRecord]) -> list[ProbeRecord]:
    """By step; of records of the same step the last."""
    return [record for _, record in sorted({record.step: record for record in records}.items())]


def _confirmed(records: Sequence[ProbeRecord], signs: Sequence[Mapping[str, str]]) -> Onset | None:
    """The first sign that the next probe shows too."""
    for (record, found), (after, again) in itertools.pairwise(zip(records, signs, strict=True)):
        for kind, sentence in found.items():
            if kind in again:
                return Onset(record.step, f"{sentence}; step {after.step} shows it too")
    return None


def _diversity_sign(record: ProbeRecord) -> dict[str, str]:
    low, high = (record.trace_null or (0.0, 0.0))[0], record.scd_null[1]
    if not (record.trace_ratio < low or record.trace_ratio < 1 and record.scd > high):
        return {}
    chance = f" (chance alone leaves {low:.0%})" if record.trace_null else ""
    return {"diversity": f"diversity fell below what chance explains: {record.trace_ratio:.0%} of the base's variance is left"
                         f"{chance}, spectral distance {record.scd:.3g} (chance alone reaches {high:.3g})".replace("%", " %")}


def _turn_signs(records: Sequence[ProbeRecord]) -> dict[str, str]:
    """A sentence for each held-out reward that has turned by the last of the records, while those trained on rose."""
    last, signs = records[-1], {}
    for name, value in last.held_out.items():
        history = [record for record in records if name in record.held_out]
        held = [history[0], *(min(pair, key=lambda record: record.held_out[name]) for pair in itertools.pairwise(history))]
        best = max(held, key=lambda record: record.held_out[name])
        fall = best.held_out[name] - value
        if fall <= SIGMAS * math.hypot(best.standard_errors[name], last.standard_errors[name]):
            continue
        if last.gain > best.gain and (risen := _risen(best, last)):
            rises = ", ".join(f"{reward} rose {_pair(best.rewards[reward], last.rewards[reward])}" for reward in risen)
            signs[name] = (f"the held-out reward {name} turned: {_pair(best.held_out[name], value)} since step {best.step}, "
                           f"while {rises}")
    return signs


def _risen(before: ProbeRecord, after: ProbeRecord) -> list[str]:
    """Rewards trained on that have risen by more than chance."""
    return [name for name, value in after.rewards.items() if value - before.rewards[name]
            > SIGMAS * math.hypot(before.standard_errors[name], after.standard_errors[name])]


def _pair(before: float, after: float) -> str:
    """Two numbers with as many decimals as their difference needs."""
    decimals = min(6, max(0, 1 - math.floor(math.log10(abs(after - before) or 1))))
    return f"from {before:.{decimals}f} to {after:.{decimals}f}"
