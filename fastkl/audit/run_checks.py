"""What a run folder's files show about its KL: each check names a cause that fits, or what is in order.

In: a RunRecord (config.yaml, metrics.jsonl, samples.jsonl). Out of each check: a Finding (a cause fits), a Clear (in
order, with the numbers that say so), or None where the files lack what would show it. A run folder holds sums per
completion and means per step, no log-probs per token; those checks are in rollout_checks.py. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

from fastkl.audit.alarm import mean_and_error
from fastkl.audit.findings import BANNED_END, DROPOUT, HALF_SCORED, PADDING, STALE, TRUNCATED_SAMPLING, Clear, Finding
from fastkl.audit.thresholds import CLEAR_GAP, FRESH, NOISE, PADDED, SIGMAS, WEIGHTS_CUT, WINDOW_STEPS
from fastkl.sampling.params import truncating


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What the checks look at; whatever the run did not log is missing from the dicts, or None."""

    config: dict[str, Any]
    metrics: list[dict[str, Any]]  # one per step, in order
    samples: list[dict[str, Any]]  # one per completion

    def series(self, key: str) -> list[float]:
        """The metric's numbers, in order; steps without one are left out."""
        return [m[key] for m in self.metrics if _is_number(m.get(key))]

    def scored(self) -> list[dict[str, Any]]:
        """The samples that took part: they have a reward and a KL."""
        return [s for s in self.samples if _is_number(s.get("reward")) and _is_number(s.get("kl"))]

    def settings(self) -> list[str]:
        """Those that keep ids from being drawn at any token, as "name value"."""
        values = [(name, self.config[name]) for name in truncating(self.config)]
        return [f"{name} {value:g}" if _is_number(value) else name for name, value in values]


Verdict = Finding | Clear | None


def estimate_and_exact(run: RunRecord) -> Verdict:
    """The estimate's mean is the exact KL on the support, whatever the policy: the differences have mean zero."""
    rows = [m for m in run.metrics if _is_number(m.get("kl/mean")) and _is_number(m.get("kl/support"))]
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
    moved = [(a, b) for a, b in pairs if _is_number(a) and _is_number(b) and abs(b) > NOISE]
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
    if not _is_number(banned) or not banned:
        return None
    early = sum(s.get("finish_reason") == "stop" and s.get("num_tokens", math.inf) <= banned for s in run.samples)
    if early:
        return BANNED_END.fits(
            f"{early} completions ended within the {banned:g} tokens in which min_tokens bans the end: the generator "
            "did not ban what the scorer leaves out"
        )
    return Clear("banned end of the text", f"no completion ended within the {banned:g} tokens that min_tokens asks for")


def scored_positions(run: RunRecord) -> Verdict:
    """A step's summed log-prob over its mean per token: how many positions were scored, padding included."""
    tokens: dict[int, int] = {}
    nats: dict[int, float] = {}
    for s in run.scored():
        if not (_is_number(s.get("num_tokens")) and _is_number(s.get("lm_cross_entropy"))):
            return None
        tokens[s["step"]] = tokens.get(s["step"], 0) + s["num_tokens"]
        nats[s["step"]] = nats.get(s["step"], 0.0) + s["num_tokens"] * s["lm_cross_entropy"]
    mean = {m["step"]: m["lm_cross_entropy"] for m in run.metrics if _is_number(m.get("lm_cross_entropy"))}
    shared = [step for step in tokens if mean.get(step)]
    if not shared:
        return None
    extra = sum(round(nats[step] / mean[step] - tokens[step]) for step in shared)
    total = sum(tokens[step] for step in shared)
    if abs(extra) > PADDED * total:
        return PADDING.fits(
            f"the completions have {total:,} tokens, but the means per token are over {total + extra:,} positions"
        )
    return Clear("padding", f"the scored positions are the completions' {total:,} tokens and no others")


def truncated_rows(run: RunRecord) -> Verdict:
    """Completions that were cut must have their whole KL, or must have left their group."""
    cut = [s for s in run.samples if s.get("finish_reason") == "length"]
    if not run.samples or not any("finish_reason" in s for s in run.samples):
        return None
    skipped = {m["step"] for m in run.metrics if m.get("groups/skipped")}  # their groups were not scored at all
    rewarded = [s for s in cut if _is_number(s.get("reward")) and s.get("step") not in skipped]
    moved = {s["step"] for s in run.scored() if s["kl"] != 0.0}  # steps in which the policy had left the reference
    silent = [s for s in rewarded if not _is_number(s.get("kl")) or (s["kl"] == 0.0 and s["step"] in moved)]
    if silent:
        return HALF_SCORED.fits(f"{len(silent)} of {len(cut)} completions that were cut have a reward but no KL")
    share = len(cut) / len(run.samples)
    how = "they left their groups" if cut and not rewarded else "they are scored whole"
    return Clear("truncated rows", f"{share:.0%} of the completions were cut" + (f"; {how}" if cut else ""))


def first_step(run: RunRecord) -> Verdict:
    """In step 1 policy and reference are one model."""
    ratios = [abs(s["kl"]) for s in run.scored() if s.get("step") == 1]
    if not ratios:
        return None
    tokens = sum(s.get("num_tokens", 1) for s in run.scored() if s.get("step") == 1)
    text = f"in step 1 their log-probs of a completion differ by up to {max(ratios):.2g} nats"
    if math.fsum(ratios) / max(1, tokens) > NOISE:
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
    return Finding(
        "engine and trainer differ", "shown" if max(gaps) > CLEAR_GAP else "possible", f"{text}, from the first step",
        "bfloat16 explains up to 0.1 nats (--importance token corrects for it); more means that they replay different "
        "settings or models",
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


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
