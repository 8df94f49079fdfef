"""The causes of a negative KL estimate: each looks at rollouts and says what it sees, and what to do about it.

In: RolloutTotals, what the rollouts of a file (fields as in doctor.py) add up to in one pass. Out of each cause: a
Finding, or None where it does not fit. Nearly all of them look at one number per token, the gap sampler - trainer: what
the generator recorded minus what the trainer computed for the same token. It is never negative where ids were kept from
being drawn (it is -log of the mass of the ids that were left), and of both signs where the weights or the precision
differ. Standard library only.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastkl.audit.alarm import Moments, below_zero
from fastkl.audit.findings import (
    BANNED_END,
    DROPOUT,
    HALF_SCORED,
    PADDING,
    RECORDED_EARLY,
    STALE,
    TRUNCATED_SAMPLING,
    Cause,
    Finding,
)
from fastkl.audit.thresholds import BOTH_SIGNS, CLEAR_GAP, FRESH, NOISE, ONE_SIGN, QUIET, SIGMAS, STALE_GAP
from fastkl.sampling.params import truncating


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion with its log-probs."""

    logprobs: list[float]
    ref_logprobs: list[float]
    sampler_logprobs: list[float] | None = None
    mask: list[int] | None = None
    token_ids: list[int] | None = None
    sampled_token_ids: list[int] | None = None
    finish_reason: str | None = None
    step: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # of the lines above it, and its own

    def scored(self) -> list[int]:
        """The positions that the KL counts."""
        return [t for t in range(len(self.logprobs)) if self.mask is None or self.mask[t]]

    def k1(self) -> float:
        """The completion's KL estimate, nats."""
        return math.fsum(self.logprobs[t] - self.ref_logprobs[t] for t in self.scored())

    def gaps(self) -> list[tuple[int, float]]:
        """(position, sampler - trainer) of the scored tokens that the generator recorded."""
        if self.sampler_logprobs is None:
            return []
        known = min(len(self.sampler_logprobs), len(self.logprobs))
        return [(t, self.sampler_logprobs[t] - self.logprobs[t]) for t in self.scored() if t < known]


NUM_BINS = 32
"""Bins of a gap's size, two for each factor of two from NOISE on; the last one holds all that is larger."""


def size_bin(gap: float) -> int:
    """The bin of a gap's size: 0 below NOISE."""
    return 0 if abs(gap) <= NOISE else min(NUM_BINS - 1, 1 + int(2 * math.log2(abs(gap) / NOISE)))


@dataclass(slots=True)
class Gaps:
    """What gaps add up to."""

    total: Moments = field(default_factory=Moments)
    absolute: float = 0.0  # summed sizes
    higher: int = 0  # above NOISE
    lower: int = 0  # below -NOISE
    sizes: array[int] = field(default_factory=lambda: array("q", bytes(8 * NUM_BINS)))  # how many in each bin

    def add(self, gap: float) -> None:
        """Takes in one gap."""
        self.total.add(gap)
        self.absolute += abs(gap)
        self.higher += gap > NOISE
        self.lower += gap < -NOISE
        self.sizes[size_bin(gap)] += 1

    def __add__(self, other: Gaps) -> Gaps:
        return Gaps(
            self.total + other.total,
            self.absolute + other.absolute,
            self.higher + other.higher,
            self.lower + other.lower,
            array("q", map(int.__add__, self.sizes, other.sizes)),
        )

    @property
    def count(self) -> int:
        """How many."""
        return self.total.count

    @property
    def mean(self) -> float:
        """Their mean."""
        return self.total.mean

    @property
    def spread(self) -> float:
        """Their mean size."""
        return self.absolute / max(1, self.count)

    def beyond(self, size: float) -> int:
        """How many are larger than `size`, to the next border of a bin."""
        return sum(self.sizes[size_bin(size) + 1 :])

    def one_sided(self) -> bool:
        """Whether the sampler's log-probs are higher at some tokens and (but for rounding) lower at none."""
        return self.count > 0 and self.higher > ONE_SIGN[0] * self.count and self.lower < ONE_SIGN[1] * self.count


@dataclass(slots=True)
class RolloutTotals:
    """All rollouts of a file in one pass: memory grows with the steps and the longest completion, not with the rows."""

    by_step: dict[int, Moments] = field(default_factory=dict)  # k1 of the completions
    num_scored: int = 0  # completions with a scored token
    after_end: int = 0  # scored tokens behind the end of the text
    after_end_nats: float = 0.0  # what they add to the estimates
    cut: int = 0  # completions that were cut
    cut_silent: int = 0  # those with a k1 of exactly 0
    whole_silent: int = 0  # the others with one
    at: list[Gaps] = field(default_factory=list)  # the gaps by their position in the completion
    first_gaps: Gaps = field(default_factory=Gaps)  # of step 1
    first_ratios: Moments = field(default_factory=Moments)  # |policy - reference| of step 1, per token
    changed_ids: int = 0  # completions that were scored with other ids than were drawn
    other_lengths: int = 0  # completions of which more or fewer log-probs were recorded than scored
    truncating: dict[str, None] = field(default_factory=dict)  # settings that keep ids from being drawn at any token
    bans_end: bool = False  # whether min_tokens was set
    cut_gaps: Gaps = field(default_factory=Gaps)  # of the rows with a truncating setting
    cut_k1: Moments = field(default_factory=Moments)  # their k1
    cut_shares: Moments = field(default_factory=Moments)  # 1 / p(y) over the number of ids that could be drawn
    cut_unlimited: bool = False  # whether the settings of one leave that number open

    @classmethod
    def of(cls, rows: Iterable[Rollout]) -> RolloutTotals:
        """The totals of these rollouts."""
        totals = cls()
        for row in rows:
            totals.add(row)
        return totals

    def add(self, row: Rollout) -> None:
        """Takes in one completion."""
        scored, k1, gaps = row.scored(), row.k1(), row.gaps()
        self.by_step.setdefault(row.step or 0, Moments()).add(k1)
        self.num_scored += bool(scored)
        if row.finish_reason == "length":
            self.cut, self.cut_silent = self.cut + 1, self.cut_silent + (k1 == 0.0)
        else:
            self.whole_silent += k1 == 0.0
        for t, gap in gaps:
            self.at.extend(Gaps() for _ in range(t + 1 - len(self.at)))
            self.at[t].add(gap)
        if row.step is not None and row.step <= 1:  # policy and reference are one model
            for t in scored:
                self.first_ratios.add(abs(row.logprobs[t] - row.ref_logprobs[t]))
            for _, gap in gaps:
                self.first_gaps.add(gap)
        ids, drawn, recorded = row.token_ids, row.sampled_token_ids, row.sampler_logprobs
        self.changed_ids += bool(ids and drawn) and drawn != (ids or [])[: len(drawn or [])]
        self.other_lengths += recorded is not None and len(recorded) != len(row.logprobs)
        self.bans_end |= bool(row.settings.get("min_tokens"))
        self._add_after_end(row, scored)
        if names := truncating(row.settings):
            self.truncating |= dict.fromkeys(names)
            self._add_truncated(row, k1, gaps)

    def _add_after_end(self, row: Rollout, scored: Sequence[int]) -> None:
        ends = row.settings.get("eos_token_ids", ())
        end = next((t for t, y in enumerate(row.token_ids or ()) if y in ends), len(row.logprobs))
        for t in (t for t in scored if t > end):
            self.after_end, self.after_end_nats = (
                self.after_end + 1, self.after_end_nats + row.logprobs[t] - row.ref_logprobs[t],
            )  # fmt: skip

    def _add_truncated(self, row: Rollout, k1: float, gaps: Sequence[tuple[int, float]]) -> None:
        if not gaps:
            return
        ids = _most_ids(row.settings)
        self.cut_k1.add(k1)
        self.cut_unlimited |= not ids
        for t, gap in gaps:
            self.cut_gaps.add(gap)
            if ids:
                self.cut_shares.add(math.exp(min(300.0, -row.logprobs[t] - gap)) / ids)

    @property
    def num_completions(self) -> int:
        """How many."""
        return sum(moments.count for moments in self.by_step.values())

    def gaps(self, start: int = 0, end: int | None = None) -> Gaps:
        """Those at the positions from `start` on, before `end`."""
        return sum(self.at[start:end], Gaps())


def padding_scored(rollouts: RolloutTotals) -> Finding | None:
    """Positions after the end of the text count."""
    if not rollouts.after_end:
        return None
    return PADDING.fits(
        f"{rollouts.after_end} scored positions come after an end-of-sequence token; they add "
        f"{rollouts.after_end_nats:.4g} nats to the estimates"
    )


def truncated_rows_half_scored(rollouts: RolloutTotals) -> Finding | None:
    """Cut completions have no KL, but their reward stays in the group."""
    cut, whole = rollouts.cut, rollouts.num_completions - rollouts.cut
    if not cut or rollouts.cut_silent < cut or rollouts.whole_silent > 0.5 * whole:
        return None
    return HALF_SCORED.fits(f"all {cut} completions that were cut have a KL of exactly 0, the {whole} others do not")


def truncated_sampling(rollouts: RolloutTotals) -> Finding | None:
    """Drawn from a part of the vocabulary, scored over all of it: the sampler's log-probs are higher, never lower."""
    names = list(rollouts.truncating)
    if not rollouts.at:
        return _possible(TRUNCATED_SAMPLING, names)
    late = rollouts.gaps(_ban_end(rollouts))
    if not late.one_sided():
        return None
    return TRUNCATED_SAMPLING.fits(
        f"at {late.higher / late.count:.0%} of the tokens the sampler's log-prob is higher than the trainer's, nowhere "
        f"lower, by {late.mean:.3g} nats on average: the mass of the ids that could not be drawn"
        + (f" (settings: {', '.join(names)})" if names else "")
    )


def banned_end(rollouts: RolloutTotals) -> Finding | None:
    """min_tokens bans the end of the text in the first tokens, and the scorer ignores that."""
    if not rollouts.at:
        return _possible(BANNED_END, ["min_tokens"] * rollouts.bans_end)
    end = _ban_end(rollouts)
    if not end:
        return None
    return BANNED_END.fits(
        f"in the first {end} tokens the sampler's log-prob is higher than the trainer's by "
        f"{rollouts.gaps(0, end).mean:.3g} nats on average, never lower, and the difference ends there"
    )


def recorded_before_truncation(rollouts: RolloutTotals) -> Finding | None:
    """Sampler and trainer agree although ids were kept from being drawn: then neither has left them out, or both have.

    If y is drawn from k ids with the chances p, the mean of 1 / p(y) is k. Log-probs from before the truncation, whose
    chances on the k ids add up to m < 1, give k / m: more than there can be.
    """
    gaps = rollouts.cut_gaps
    if not gaps.count or gaps.one_sided() or gaps.spread > STALE_GAP:
        return None
    mean, error = rollouts.cut_shares.mean_and_error()
    text = f"tokens were drawn with {', '.join(rollouts.truncating)}, yet sampler and trainer agree"
    if mean - 1 > SIGMAS * error:
        return RECORDED_EARLY.fits(f"{text} on log-probs that need {mean:.3g} times as many ids as could be drawn")
    if below_zero(*rollouts.cut_k1.mean_and_error()):
        return RECORDED_EARLY.fits(f"{text}, and the estimate is negative: both are of the whole vocabulary")
    if not rollouts.cut_unlimited:
        return None
    return RECORDED_EARLY.fits(f"{text}: both are of the ids that could be drawn, or both of all", shown=False)


def _most_ids(settings: dict[str, Any]) -> int:
    """How many ids could be drawn at a token, at most; 0 where the settings do not say."""
    limits = [settings.get("top_k") or 0, len(settings.get("allowed_token_ids") or ())]
    return min((limit for limit in limits if limit > 0), default=0)


def dropout(rollouts: RolloutTotals) -> Finding | None:
    """In step 1 policy and reference are the same model: any difference is noise of the computation."""
    if not rollouts.first_ratios.count or rollouts.first_ratios.mean < NOISE:
        return None
    return DROPOUT.fits(
        f"in step 1 policy and reference are the same model, yet their log-probs differ by "
        f"{rollouts.first_ratios.mean:.3g} nats on average"
    )


def reencoded(rollouts: RolloutTotals) -> Finding | None:
    """The text was decoded and then encoded again, which gave other tokens."""
    changed, differ = rollouts.changed_ids, rollouts.other_lengths
    if not changed and not differ:
        return None
    return Finding(
        "completions were re-encoded by the tokenizer", "shown",
        f"{max(changed, differ)} of {rollouts.num_completions} completions are scored with other tokens than were "
        "drawn",
        "hand the generator's token ids to the trainer, never its text",
    )  # fmt: skip


def stale_or_rounded(rollouts: RolloutTotals) -> Finding | None:
    """Both signs of sampler - trainer: other weights, or another precision."""
    gaps, first = rollouts.gaps(), rollouts.first_gaps
    if gaps.spread < NOISE or gaps.lower < BOTH_SIGNS * gaps.count:
        return None
    mean, error = gaps.total.mean_and_error()
    grows = first.count > 0 and first.spread < FRESH * gaps.spread
    if grows or (not first.count and mean > SIGMAS * error and gaps.spread > STALE_GAP):
        begin = f"; in step 1 only {first.spread:.2g}" if grows else ""
        return STALE.fits(
            f"sampler and trainer differ by {gaps.spread:.3g} nats on average, in both directions{begin}; the "
            f"sampler's are higher by {mean:.3g} on average, as those of the model that drew the tokens must be",
            shown=grows,
        )
    return Finding(
        "logits are rounded to bfloat16 on one side", "shown" if gaps.spread < CLEAR_GAP else "possible",
        f"sampler and trainer differ by {gaps.spread:.3g} nats on average, in both directions, from the start",
        "compute the head's logits in float32 in the trainer; use importance weights (fastkl: --importance token)",
    )  # fmt: skip


CAUSES: tuple[Callable[[RolloutTotals], Finding | None], ...] = (
    *(padding_scored, truncated_rows_half_scored, reencoded, banned_end, truncated_sampling, dropout),
    *(recorded_before_truncation, stale_or_rounded),
)


def _possible(cause: Cause, names: Sequence[str]) -> Finding | None:
    if not names:
        return None
    text = f"tokens were drawn with {', '.join(names)}, and no sampler_logprobs were recorded to compare with"
    return cause.fits(text, shown=False)


def _ban_end(rollouts: RolloutTotals) -> int:
    """The first position from which nearly every gap is ten times smaller than the mean before; 0 if there is none."""
    before, after = Gaps(), _sums_to_the_end(rollouts.at)
    for end in range(1, len(rollouts.at)):
        at_end = rollouts.at[end - 1]
        before = before + at_end
        floor = max(NOISE, QUIET[0] * before.mean)
        quiet = after[end].beyond(floor) <= QUIET[1] * after[end].count
        if before.one_sided() and quiet and at_end.total.count and at_end.mean > NOISE:
            return end
    return 0


def _sums_to_the_end(at: Sequence[Gaps]) -> list[Gaps]:
    """For each position, the gaps there and behind it."""
    sums = [Gaps()]
    for gaps in reversed(at):
        sums.append(sums[-1] + gaps)
    return sums[:0:-1]
