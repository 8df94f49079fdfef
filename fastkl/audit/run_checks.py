"""What a run folder's files show about its KL: each check names a cause that fits, or what is in order.

In: a RunRecord (config.yaml, metrics.jsonl, samples.jsonl). Out of each check: a Finding (a cause fits), a Clear (in
order, with the numbers that say so), or None where the files lack what would show it. A run folder holds sums per
completion and means per step, no log-probs per token; those checks are in rollout_checks.py. Standard library only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from fastkl.audit.alarm import Moments, mean_and_error
from fastkl.audit.findings import BANNED_END, DROPOUT, HALF_SCORED, PADDING, STALE, TRUNCATED_SAMPLING, Clear, Finding
from fastkl.audit.json_lines import is_number
from fastkl.audit.thresholds import CLEAR_GAP, FRESH, NOISE, PADDED, SIGMAS, WEIGHTS_CUT, WINDOW_STEPS
from fastkl.sampling.params import truncating


@dataclass(slots=True)
class StepTotals:
    """What one step's lines of samples.jsonl add up to. A sample is scored if it has a reward and a KL."""

    kl: Moments = field(default_factory=Moments)  # of the scored ones
    moved: bool = False  # whether one of them has a KL other than 0
    tokens: float = 0  # of the scored ones
    nats: float = 0.0  # their summed -log-probs
    abs_kl: float = 0.0  # summed
    max_abs_kl: float = 0.0
    cut_rewarded: int = 0  # cut by the length, with a reward
    cut_without_kl: int = 0  # those of them without a KL
    cut_zero_kl: int = 0  # those with a KL of 0


@dataclass(slots=True)
class SampleTotals:
    """samples.jsonl in one pass: memory grows with the steps, not with the samples."""

    steps: dict[int, StepTotals] = field(default_factory=dict)
    num_samples: int = 0
    num_cut: int = 0
    has_reasons: bool = False  # whether finish_reason is logged
    has_lengths: bool = True  # whether every scored sample has num_tokens and lm_cross_entropy
    stops: Counter[float] = field(default_factory=Counter)  # completions that ended by themselves, by their tokens

    @classmethod
    def of(cls, rows: Iterable[dict[str, Any]]) -> SampleTotals:
        """The totals of these lines."""
        totals = cls()
        for row in rows:
            totals.add(row)
        return totals

    def add(self, row: dict[str, Any]) -> None:
        """Takes in one line."""
        step = self.steps.setdefault(row["step"], StepTotals())
        reason, reward, kl, tokens = (row.get(key) for key in ("finish_reason", "reward", "kl", "num_tokens"))
        self.num_samples += 1
        self.has_reasons |= "finish_reason" in row
        if reason == "stop" and is_number(tokens):
            self.stops[tokens] += 1
        if reason == "length":
            self.num_cut += 1
            step.cut_rewarded += is_number(reward)
            step.cut_without_kl += is_number(reward) and not is_number(kl)
            step.cut_zero_kl += is_number(reward) and is_number(kl) and kl == 0.0
        if is_number(reward) and is_number(kl):
            self._add_scored(step, kl, tokens, row.get("lm_cross_entropy"))

    def _add_scored(self, step: StepTotals, kl: float, tokens: Any, cross_entropy: Any) -> None:
        step.kl.add(kl)
        step.moved |= kl != 0.0
        step.abs_kl, step.max_abs_kl = step.abs_kl + abs(kl), max(step.max_abs_kl, abs(kl))
        step.tokens += tokens if is_number(tokens) else 1
        if is_number(tokens) and is_number(cross_entropy):
            step.nats += tokens * cross_entropy
        else:
            self.has_lengths = False

    def scored(self) -> dict[int, StepTotals]:
        """The steps that have scored samples."""
        return {number: step for number, step in self.steps.items() if step.kl.count}


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What the checks look at; whatever the run did not log is missing from the dicts."""

    config: dict[str, Any]
    metrics: list[dict[str, Any]]  # one per step, in order
    samples: SampleTotals

    def series(self, key: str) -> list[float]:
        """The metric's numbers, in order; steps without one are left out."""
        return [m[key] for m in self.metrics if is_number(m.get(key))]

    def settings(self) -> list[str]:
        """Those that keep ids from being drawn at any token, as "name value"."""
        values = [(name, self.config[name]) for name in truncating(self.config)]
        return [f"{name} {value:g}" if is_number(value) else name for name, value in values]


Verdict = Finding | Clear | None


def estimate_and_exact(run: RunRecord) -> Verdict:
    """The estimate's mean is the exact KL on the support, whatever the policy: the differences have mean zero."""
    rows = [m for m in run.metrics if is_number(m.get("kl/mean")) and is_number(m.get("kl/support"))]
    if len(rows) < WINDOW_STEPS:
        return None
    mean, error = mean_and_error([m["kl/mean"] - m["kl/support"] for m in rows])
    text = f"over {len(rows)} steps the estimate (kl/mean) differs from the exact KL (kl/support) by"
    text += f" {mean:.2g} ± {error:.2g} nats per completion on average"
    # few steps: Student's t, at the probability that SIGMAS have under a normal distribution
    limit = SIGMAS * (1 + 8 / len(rows))
    if abs(mean) <= max(limit * error, NOISE):
        return Clear("estimate against exact KL", text)
    return Finding(
        "the tokens were not drawn from the scored distribution", "shown", f"{text}, which chance does not explain",
        "see which of the other causes fits; without one, compare the generator's log-probs with the trainer's",
    )  # fmt: skip


def replayed_support(run: RunRecord) -> Verdict:
    """Where ids are left out, the KL on the rest is not the KL on all; if they are equal, nothing was left out."""
    names = run.settings()
    pairs = [(m.get("kl/support"), m.get("kl/exact")) for m in run.metrics]
    moved = [(a, b) for a, b in pairs if is_number(a) and is_number(b) and abs(b) > NOISE]
    gap = max(run.series("mismatch/mean_abs_logprob"), default=0.0)
    if not names or not moved:
        return None
    if all(a == b for a, b in moved) and gap > NOISE:
        return TRUNCATED_SAMPLING.fits(
            f"tokens were drawn with {', '.join(names)}, yet the KL on the ids that could be drawn (kl/support) equals "
            f"the KL on all (kl/exact) at all {len(moved)} steps, and the log-probs of generator and trainer differ by "
            f"up to {gap:.2g} nats on average"
        )
    return Clear(
        "truncated sampling",
        f"{', '.join(names)}: policy and reference were scored on the ids that could be drawn (kl/support differs from "
        "kl/exact)",
    )


def banned_end(run: RunRecord) -> Verdict:
    """min_tokens bans the end of the text in the first tokens: nothing may end there."""
    banned = run.config.get("min_tokens")
    if not is_number(banned) or not banned:
        return None
    early = sum(count for tokens, count in run.samples.stops.items() if tokens <= banned)
    if early:
        return BANNED_END.fits(
            f"{early} completions ended within the {banned:g} tokens in which min_tokens bans the end: the generator "
            "did not ban what the scorer leaves out"
        )
    return Clear("banned end of the text", f"no completion ended within the {banned:g} tokens that min_tokens asks for")


def scored_positions(run: RunRecord) -> Verdict:
    """A step's summed log-prob over its mean per token: how many positions were scored, padding included."""
    if not run.samples.has_lengths:
        return None
    mean = {m["step"]: m["lm_cross_entropy"] for m in run.metrics if is_number(m.get("lm_cross_entropy"))}
    shared = {number: step for number, step in run.samples.scored().items() if mean.get(number)}
    if not shared:
        return None
    extra = sum(round(step.nats / mean[number] - step.tokens) for number, step in shared.items())
    total = sum(step.tokens for step in shared.values())
    if abs(extra) > PADDED * total:
        return PADDING.fits(
            f"the completions have {total:,} tokens, but the means per token are over {total + extra:,} positions"
        )
    return Clear("padding", f"the scored positions are the completions' {total:,} tokens and no others")


def truncated_rows(run: RunRecord) -> Verdict:
    """Completions that were cut must have their whole KL, or must have left their group."""
    samples = run.samples
    if not samples.has_reasons:
        return None
    skipped = {m["step"] for m in run.metrics if m.get("groups/skipped")}  # their groups were not scored at all
    rewarded = [step for number, step in samples.steps.items() if number not in skipped]
    # a KL of 0 says something in steps in which the policy had left the reference
    silent = sum(step.cut_without_kl + step.cut_zero_kl * step.moved for step in rewarded)
    if silent:
        return HALF_SCORED.fits(f"{silent} of {samples.num_cut} completions that were cut have a reward but no KL")
    share = samples.num_cut / samples.num_samples
    how = "they are scored whole" if any(step.cut_rewarded for step in rewarded) else "they left their groups"
    return Clear("truncated rows", f"{share:.0%} of the completions were cut" + (f"; {how}" if samples.num_cut else ""))


def first_step(run: RunRecord) -> Verdict:
    """In step 1 policy and reference are one model."""
    step = run.samples.scored().get(1)
    if step is None or run.config.get("reference"):  # a teacher is another model
        return None
    text = f"in step 1 their log-probs of a completion differ by up to {step.max_abs_kl:.2g} nats"
    if step.abs_kl / max(1, step.tokens) > NOISE:
        return DROPOUT.fits(f"policy and reference begin as one model, yet {text}", shown=False)
    return Clear("policy and reference begin as one model", text)


def engine_gap(run: RunRecord) -> Verdict:
    """Generator and trainer compute log-probs of the same tokens, which must agree."""
    gaps = run.series("mismatch/mean_abs_logprob")
    if not gaps:
        return None
    text = f"their log-probs of the same tokens differ by up to {max(gaps):.2g} nats on average in a step"
    if max(gaps) <= NOISE:
        return Clear("generator and trainer", text)
    if gaps[0] < FRESH * max(gaps):
        return STALE.fits(f"{text}; in the first step only by {gaps[0]:.2g}", shown=max(gaps) > CLEAR_GAP)
    if max(gaps) <= CLEAR_GAP and run.config.get("dtype") != "float32":
        return Clear("generator and trainer", f"{text}; rounding to bfloat16 explains up to {CLEAR_GAP:g}")
    return Finding(
        "engine and trainer differ", "shown" if max(gaps) > CLEAR_GAP else "possible", f"{text}, from the first step",
        f"bfloat16 explains up to {CLEAR_GAP:g} nats (--importance token corrects for it); more means that they replay "
        "different settings or models",
    )  # fmt: skip


def importance_cut(run: RunRecord) -> Verdict:
    """Importance weights that the cap has cut no longer correct the mean."""
    cut = run.series("mismatch/weights_cut")
    if run.config.get("importance", "none") == "none" or not cut:
        return None
    text = f"up to {max(cut):.2%} of a step's importance weights were cut at the cap"
    if max(cut) > WEIGHTS_CUT:
        remedy = "look for the cause of the mismatch; a higher --importance-cap has less bias and more noise"
        return Finding("the generator is far from the trainer", "possible", text, remedy)
    return Clear("importance weights", text)


CHECKS: tuple[Callable[[RunRecord], Verdict], ...] = (
    *(estimate_and_exact, replayed_support, banned_end, scored_positions, truncated_rows, first_step, engine_gap),
    importance_cut,
)
