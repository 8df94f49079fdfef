"""Stale samples: what a step may do with completions that were drawn by the weights before its last update.

With --rollout-ahead the policy pi that is trained is one update away from mu, which has drawn. Two things change.

What is reported. Over what mu draws, the mean of k1 = log pi - log q is KL(mu, q) - KL(mu, pi): in the first stale
step, where mu is q, it is -KL(q, pi), below zero although the scoring is right. With w = pi(y_t) / mu(y_t) the mean of
w k1 is a sum of KL(pi, q) at the texts that mu has drawn, which is never negative. So kl/mean, the samples' KL and the
alarm take w k1 of stale samples (importance.py, `weighted_k1`). The exact KLs need no weight.

What is learnt. The expected update, over what mu draws (tests/objective/test_stale.py, by brute force):

    importance  none      biased: refused. With k1 in the reward and the mean of the others as a baseline its penalty
                          has the gradient of beta / 2 Var_mu(log pi / q), which is no KL's
                sequence  that of the objective at pi, up to the cap on prod_t w_t
                token     each token has its own w_t alone: what came before it, and what follows, count as mu draws
                          them. Biased by what one update moves; far less noisy than a long completion's product
    top_k, top_p, min_p   refused: pi may draw what mu could not, which no weight brings back
    several updates       refused: their ratio is to the policy before the first one, which is not the one that drew

Without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastkl.errors import UserError

if TYPE_CHECKING:
    from fastkl.objective.kl_estimators import Penalty
    from fastkl.objective.reuse import Reuse
    from fastkl.sampling.params import Sampling


def check_stale(penalty: Penalty, importance: str, reuse: Reuse, sampling: Sampling) -> None:
    """Raises UserError for what is biased on samples of an earlier policy."""
    if importance == "none":
        raise UserError(
            f"importance: none takes the completions of an earlier policy (rollout_ahead) for those of this one, and "
            f"{_what_goes_wrong(penalty)}; give --importance sequence, or token."
        )
    if reuse.repeats:
        name, value = ("updates_per_rollout", reuse.updates) if reuse.updates > 1 else ("epochs", reuse.epochs)
        raise UserError(
            f"{name}: {value} updates a rollout further from weights that are an update old already (rollout_ahead); "
            "use 1, or leave rollout_ahead out."
        )
    if name := sampling.follows_logits:
        raise UserError(
            f"{name}: keeps other ids after an update than those that the completions were drawn from, so that no "
            "importance weight is unbiased; leave it off, or leave rollout_ahead out."
        )


def _what_goes_wrong(penalty: Penalty) -> str:
    if penalty.coef and penalty.placement == "reward" and penalty.found.sampled:
        return f"{penalty.estimator} in the reward has the gradient of a variance then, not of the KL"
    return "its gradient is biased"
