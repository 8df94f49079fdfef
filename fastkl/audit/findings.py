"""What a check can say: a cause fits, or something is in order. And the causes that rollouts and run folders share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """A cause that fits: "shown" by the numbers, or "possible" where the record lacks what would show it."""

    cause: str
    certainty: str
    evidence: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Clear:
    """Something that was looked at and is in order."""

    what: str
    evidence: str


@dataclass(frozen=True, slots=True)
class Cause:
    """A known cause of negative KL estimates, and what to do about it."""

    name: str
    remedy: str

    def fits(self, evidence: str, *, shown: bool = True) -> Finding:
        """The finding that it fits; shown False: that it is possible."""
        return Finding(self.name, "shown" if shown else "possible", evidence, self.remedy)


PADDING = Cause(
    "padding is scored",
    "mask every position after the first end-of-sequence token (which is scored itself), or pack without padding",
)


HALF_SCORED = Cause(
    "truncated rows are half scored",
    "keep their full KL, or take them out of reward, baseline and loss together (fastkl: --truncated)",
)


TRUNCATED_SAMPLING = Cause(
    "truncated sampling is not accounted for",
    "score policy and reference on the ids that could be drawn (fastkl does), or sample without truncation",
)


RECORDED_EARLY = Cause(
    "log-probs were recorded before truncation",
    "record those of the distribution that was drawn from (vLLM: logprobs_mode processed_logprobs), and score policy "
    "and reference on the same ids",
)


BANNED_END = Cause(
    "a banned end-of-sequence is not accounted for",
    "score the first min_tokens tokens with the stop ids left out, for policy and reference (fastkl does)",
)


DROPOUT = Cause(
    "dropout is on",
    "switch dropout off in policy and reference, in training mode too; resume a run with the reference that it was "
    "started with",
)


STALE = Cause(
    "the engine samples from stale weights",
    "push the weights after every update and compare log-probs; tied heads and prefix caches are usual traps",
)
