"""The causes of a negative KL estimate: each looks at rollouts and says what it sees, and what to do about it.

In: Rollouts (fields as in doctor.py). Out of each cause: a Finding, or None where it does not fit. Nearly all of them
look at one number per token, sampler - trainer: what the generator recorded minus what the trainer computed for the
same token. It is never negative where ids were kept from being drawn (it is -log of the mass of the ids that were
left), and of both signs where the weights or the precision differ. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastkl.audit.alarm import is_negative, mean_and_error
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


@dataclass(frozen=True, slots=True)
class Rollouts:
    """What the causes look at."""

    rows: list[Rollout]

    def settings(self) -> list[dict[str, Any]]:
        """All that occur."""
        return list({id(row.settings): row.settings for row in self.rows}.values())

    def truncating(self) -> list[str]:
        """The settings that keep ids from being drawn at any token of some completion."""
        return list(dict.fromkeys(name for settings in self.settings() for name in truncating(settings)))

    def gaps(self) -> list[tuple[int, float]]:
        """(position, sampler - trainer) of every token."""
        return [pair for row in self.rows for pair in row.gaps()]

    def first_step(self) -> list[Rollout]:
        """The completions of step 1, where policy and reference are one model; none if the record begins later."""
        return [row for row in self.rows if row.step is not None and row.step <= 1]


def padding_scored(rollouts: Rollouts) -> Finding | None:
    """Positions after the end of the text count."""
    after, nats = 0, 0.0
    for row in rollouts.rows:
        ends = row.settings.get("eos_token_ids", ())
        end = next((t for t, y in enumerate(row.token_ids or ()) if y in ends), None)
        for t in row.scored():
            if end is not None and t > end:
                after, nats = after + 1, nats + row.logprobs[t] - row.ref_logprobs[t]
    if not after:
        return None
    return PADDING.fits(
        f"{after} scored positions come after an end-of-sequence token; they add {nats:.4g} nats to the estimates"
    )


def truncated_rows_half_scored(rollouts: Rollouts) -> Finding | None:
    """Cut completions have no KL, but their reward stays in the group."""
    cut = [row for row in rollouts.rows if row.finish_reason == "length"]
    whole = [row for row in rollouts.rows if row.finish_reason != "length"]
    silent = [row for row in cut if row.k1() == 0.0]
    if not cut or len(silent) < len(cut) or sum(row.k1() == 0.0 for row in whole) > 0.5 * len(whole):
        return None
    return HALF_SCORED.fits(
        f"all {len(cut)} completions that were cut have a KL of exactly 0, the {len(whole)} others do not"
    )


def truncated_sampling(rollouts: Rollouts) -> Finding | None:
    """Drawn from a part of the vocabulary, scored over all of it: the sampler's log-probs are higher, never lower."""
    names = rollouts.truncating()
    gaps = rollouts.gaps()
    if not gaps:
        return _possible(TRUNCATED_SAMPLING, names)
    start = _ban_end(gaps)
    late = [gap for t, gap in gaps if t >= start]
    if not _one_sided(late):
        return None
    share = sum(gap > NOISE for gap in late) / len(late)
    return TRUNCATED_SAMPLING.fits(
        f"at {share:.0%} of the tokens the sampler's log-prob is higher than the trainer's, nowhere lower, by "
        f"{math.fsum(late) / len(late):.3g} nats on average: the mass of the ids that could not be drawn"
        + (f" (settings: {', '.join(names)})" if names else "")
    )


def banned_end(rollouts: Rollouts) -> Finding | None:
    """min_tokens bans the end of the text in the first tokens, and the scorer ignores that."""
    gaps = rollouts.gaps()
    if not gaps:
        return _possible(BANNED_END, ["min_tokens"] * any(s.get("min_tokens") for s in rollouts.settings()))
    end = _ban_end(gaps)
    if not end:
        return None
    early = [gap for t, gap in gaps if t < end]
    return BANNED_END.fits(
        f"in the first {end} tokens the sampler's log-prob is higher than the trainer's by "
        f"{math.fsum(early) / len(early):.3g} nats on average, never lower, and the difference ends there"
    )


def recorded_before_truncation(rollouts: Rollouts) -> Finding | None:
    """Sampler and trainer agree although ids were kept from being drawn: then neither has left them out, or both have.

    If y is drawn from k ids with the chances p, the mean of 1 / p(y) is k. Log-probs from before the truncation, whose
    chances on the k ids add up to m < 1, give k / m: more than there can be.
    """
    rows = [row for row in rollouts.rows if truncating(row.settings) and row.gaps()]
    gaps = [gap for row in rows for _, gap in row.gaps()]
    if not gaps or _one_sided(gaps) or math.fsum(map(abs, gaps)) > STALE_GAP * len(gaps):
        return None
    limits = [(row, _most_ids(row.settings)) for row in rows]
    shares = [math.exp(min(700.0, -row.logprobs[t] - gap)) / k for row, k in limits if k for t, gap in row.gaps()]
    mean, error = mean_and_error(shares)
    names = ", ".join(rollouts.truncating())
    text = f"tokens were drawn with {names}, yet sampler and trainer agree"
    if mean - 1 > SIGMAS * error:
        return RECORDED_EARLY.fits(f"{text} on log-probs that need {mean:.3g} times as many ids as could be drawn")
    if is_negative([row.k1() for row in rows]):
        return RECORDED_EARLY.fits(f"{text}, and the estimate is negative: both are of the whole vocabulary")
    if all(k for _, k in limits):
        return None
    return RECORDED_EARLY.fits(f"{text}: both are of the ids that could be drawn, or both of all", shown=False)


def _most_ids(settings: dict[str, Any]) -> int:
    """How many ids could be drawn at a token, at most; 0 where the settings do not say."""
    limits = [settings.get("top_k") or 0, len(settings.get("allowed_token_ids") or ())]
    return min((limit for limit in limits if limit > 0), default=0)


def dropout(rollouts: Rollouts) -> Finding | None:
    """In step 1 policy and reference are the same model: any difference is noise of the computation."""
    ratios = [abs(r.logprobs[t] - r.ref_logprobs[t]) for r in rollouts.first_step() for t in r.scored()]
    if not ratios or math.fsum(ratios) / len(ratios) < NOISE:
        return None
    return DROPOUT.fits(
        f"in step 1 policy and reference are the same model, yet their log-probs differ by "
        f"{math.fsum(ratios) / len(ratios):.3g} nats on average"
    )


def reencoded(rollouts: Rollouts) -> Finding | None:
    """The text was decoded and then encoded again, which gave other tokens."""
    pairs = [(r.sampled_token_ids, r.token_ids) for r in rollouts.rows if r.sampled_token_ids and r.token_ids]
    changed = sum(a != b[: len(a)] for a, b in pairs)
    differ = sum(r.sampler_logprobs is not None and len(r.sampler_logprobs) != len(r.logprobs) for r in rollouts.rows)
    if not changed and not differ:
        return None
    return Finding(
        "completions were re-encoded by the tokenizer", "shown",
        f"{max(changed, differ)} of {len(rollouts.rows)} completions are scored with other tokens than were drawn",
        "hand the generator's token ids to the trainer, never its text",
    )  # fmt: skip


def stale_or_rounded(rollouts: Rollouts) -> Finding | None:
    """Both signs of sampler - trainer: other weights, or another precision."""
    gaps = [gap for _, gap in rollouts.gaps()]
    spread = math.fsum(map(abs, gaps)) / len(gaps) if gaps else 0.0
    lower = sum(gap < -NOISE for gap in gaps)
    if spread < NOISE or lower < BOTH_SIGNS * len(gaps):
        return None
    first = [abs(gap) for row in rollouts.first_step() for _, gap in row.gaps()]
    fresh = math.fsum(first) / len(first) if first else None
    mean, error = mean_and_error(gaps)
    grows = fresh is not None and fresh < FRESH * spread
    if grows or (fresh is None and mean > SIGMAS * error and spread > STALE_GAP):
        begin = f"; in step 1 only {fresh:.2g}" if grows else ""
        return STALE.fits(
            f"sampler and trainer differ by {spread:.3g} nats on average, in both directions{begin}; the sampler's are "
            f"higher by {mean:.3g} on average, as those of the model that drew the tokens must be",
            shown=grows,
        )
    return Finding(
        "logits are rounded to bfloat16 on one side", "shown" if spread < CLEAR_GAP else "possible",
        f"sampler and trainer differ by {spread:.3g} nats on average, in both directions, from the start",
        "compute the head's logits in float32 in the trainer; use importance weights (fastkl: --importance token)",
    )  # fmt: skip


CAUSES: tuple[Callable[[Rollouts], Finding | None], ...] = (
    *(padding_scored, truncated_rows_half_scored, reencoded, banned_end, truncated_sampling, dropout),
    *(recorded_before_truncation, stale_or_rounded),
)


def _possible(cause: Cause, names: Sequence[str]) -> Finding | None:
    if not names:
        return None
    text = f"tokens were drawn with {', '.join(names)}, and no sampler_logprobs were recorded to compare with"
    return cause.fits(text, shown=False)


def _one_sided(gaps: Sequence[float]) -> bool:
    """Whether the sampler's log-probs are higher at some tokens and (but for rounding) lower at none."""
    higher, lower = sum(gap > NOISE for gap in gaps), sum(gap < -NOISE for gap in gaps)
    return bool(gaps) and higher > ONE_SIGN[0] * len(gaps) and lower < ONE_SIGN[1] * len(gaps)


def _ban_end(gaps: Sequence[tuple[int, float]]) -> int:
    """The first position from which nearly every gap is ten times smaller than the mean before; 0 if there is none."""
    last = max((t for t, _ in gaps), default=0)
    by_position: list[list[float]] = [[] for _ in range(last + 1)]
    for t, gap in gaps:
        by_position[t].append(gap)
    for end in range(1, last + 1):
        before = [gap for values in by_position[:end] for gap in values]
        after = [gap for values in by_position[end:] for gap in values]
        at_end = by_position[end - 1]
        floor = max(NOISE, QUIET[0] * math.fsum(before) / max(1, len(before)))
        quiet = sum(abs(gap) > floor for gap in after) <= QUIET[1] * len(after)
        if _one_sided(before) and quiet and math.fsum(at_end) > NOISE * len(at_end):
            return end
    return 0
