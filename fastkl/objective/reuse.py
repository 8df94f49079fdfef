"""Several updates per rollout: how a policy that has moved on is trained on completions that an earlier one has drawn.

A rollout of pi_0 is cut into M minibatches of whole groups, and passed over `epochs` times: M * epochs updates. From
the second on, the policy pi that is updated is not the one that sampled. Two corrections are offered; with
rho_t = pi(y_t) / pi_0(y_t):

    importance sequence   each completion counts prod_t rho_t times, at most `importance_cap`. KL and advantages are
                          those of pi. The gradient is that of the objective at pi, up to the cap
    clip LOW HIGH         PPO's surrogate (Schulman et al. 2017): sum_t min(rho_t A, clip(rho_t, 1 - LOW, 1 + HIGH) A).
                          The level "sequence" has exp(mean_t log rho_t) in the place of rho_t (GSPO, Zheng et al.
                          2025). Advantages, and a KL in the reward, are those of pi_0, computed once

What the expected gradient of an update is, over what pi_0 draws (tests/objective/test_reuse.py has every row):

    correction            KL            M > 1, one epoch                     several epochs
    none, or token        any           biased: refused                      refused
    importance sequence   any           that of the objective at pi          biased, since pi was fitted to the same
                                                                             completions: refused
    importance sequence   any, top_k    biased, since pi may draw what pi_0 could not: refused
    importance sequence   reward, with an advantage over the whole step: the KL would be pi_0's: refused
    clip                  reward        the surrogate: exact at pi = pi_0    the same
    clip                  loss          the surrogate, and the gradient of   the same, for texts that pi is fitted to
                                        KL(pi, q) at the texts of pi_0

With clip, an exact KL in the loss is that of pi at each text whoever wrote it, and needs no correction; k2 and k3 are
weighted by rho_t, uncut, for they depend on the token that was drawn (ratios.py). Without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastkl.errors import UserError

if TYPE_CHECKING:
    from fastkl.objective.advantages import Advantage
    from fastkl.objective.kl_estimators import Penalty
    from fastkl.sampling.params import Sampling


@dataclass(frozen=True, slots=True)
class Reuse:
    """How often a rollout is trained on, and what corrects for it."""

    updates: int = 1  # M, minibatches of whole groups
    epochs: int = 1
    clip: tuple[float, ...] = ()  # LOW, HIGH; () does not clip
    level: str = "token"  # of the clipped ratio: "token" or "sequence"
    old: str = "trainer"  # whose log-probs the ratio is to: "trainer" (the first forward) or "engine"

    @property
    def repeats(self) -> bool:
        """Whether there is more than one update."""
        return self.updates * self.epochs > 1


def check_reuse(
    reuse: Reuse, penalty: Penalty, advantage: Advantage, importance: str, sampling: Sampling, num_prompts: int
) -> None:
    """Raises UserError for what is biased, or does not go together."""
    if reuse.clip and (len(reuse.clip) != 2 or not 0 < reuse.clip[0] <= 1 or not reuse.clip[1] > 0):
        given = " ".join(f"{x:g}" for x in reuse.clip)
        raise UserError(
            f"clip: {given} is no range; give LOW, above 0 and at most 1, and HIGH, above 0, as in 0.2 0.2."
        )
    if reuse.clip and not reuse.repeats:
        raise UserError(
            "clip: with one update per rollout the policy is the one that sampled, and no ratio leaves 1; give "
            "--updates-per-rollout 2 or more, or leave clip out."
        )
    if reuse.old == "engine" and not reuse.clip:
        raise UserError("old_logprobs: engine is what --clip compares with, and there is no clip; leave it at trainer.")
    if reuse.old == "engine" and importance != "none":
        raise UserError(
            f"importance: {importance} corrects for the engine's log-probs, which the clipped ratio is to already; use "
            "none, or --old-logprobs trainer."
        )
    if not reuse.repeats:
        return
    if reuse.updates > num_prompts:
        raise UserError(
            f"updates_per_rollout: {reuse.updates} minibatches of whole groups need as many prompts, and "
            f"prompts_per_step is {num_prompts}; lower the one or raise the other."
        )
    if not reuse.clip:
        _check_importance(reuse, penalty, advantage, importance, sampling)


def _check_importance(
    reuse: Reuse, penalty: Penalty, advantage: Advantage, importance: str, sampling: Sampling
) -> None:
    """The same where importance weights are all that corrects."""
    if reuse.epochs > 1:
        raise UserError(
            f"epochs: {reuse.epochs} trains again on completions that the policy was fitted to, which no importance "
            "weight makes unbiased; give --clip LOW HIGH, such as 0.2 0.2."
        )
    if importance != "sequence":
        raise UserError(
            f"updates_per_rollout: after the first of {reuse.updates} updates the policy is not the one that sampled, "
            f"and importance {importance} leaves its gradient biased; give --clip LOW HIGH, or --importance sequence."
        )
    if name := sampling.follows_logits:
        raise UserError(
            f"{name}: keeps other ids after an update than those that the completions were drawn from, so that no "
            "importance weight is unbiased; give --clip LOW HIGH, or leave it off."
        )
    if advantage.whole_step and penalty.placement == "reward" and penalty.coef:
        raise UserError(
            "kl_placement: an advantage over the whole step takes the KL of the policy before the updates, which does "
            "not hold back the one after them; use --kl-placement loss, or --clip LOW HIGH."
        )
