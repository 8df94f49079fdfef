"""The KL penalty's settings, and the combinations that are refused because they penalise something else.

Standard library only, so that a refusal comes at once. The estimators themselves, and why: estimators.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastkl.errors import UserError

REFUSED: dict[tuple[str, str], str] = {
    ("k1", "loss"): "its expected gradient is zero: nothing would hold the policy near the reference",
    ("k2", "reward"): "it is biased: its mean is not the KL, and without its pathwise term its gradient is not either",
    ("k3", "reward"): "its mean is the KL but its gradient is not: the pathwise term that is left out is not zero",
}
"""Pairs of (estimator, placement) whose expected gradient is that of no KL. A test shows the bias of each."""


REMEDY = {
    "k1": "put k1 into the reward",
    "k2": "put k2 into the loss",
    "k3": "use k1 or exact, or put k3 into the loss",
}


EXACT = ("exact", "exact_full")


@dataclass(frozen=True, slots=True)
class Penalty:
    """The KL penalty's settings; see the module's text and `check_penalty`."""

    coef: float  # beta
    estimator: str = "k1"  # "k1", "k2", "k3", "exact" or "exact_full"
    placement: str = "reward"  # "reward" or "loss"
    reduction: str = "sum"  # over a completion's tokens: "sum" or "mean"
    credit: str = "completion"  # whom KL_t is charged to: every token of the completion, or only those that "caused" it


def check_penalty(penalty: Penalty) -> None:
    """Raises UserError for a combination whose expected gradient is that of no KL."""
    reason = REFUSED.get((penalty.estimator, penalty.placement))
    if reason:
        raise UserError(
            f"kl_estimator: {penalty.estimator} in the {penalty.placement} is refused, since {reason}; "
            f"{REMEDY[penalty.estimator]} (kl_placement)."
        )
    if penalty.credit == "caused" and penalty.placement == "loss":
        raise UserError("kl_credit: a KL in the loss is not credited to tokens at all; use kl_credit completion.")
    if penalty.credit == "caused" and penalty.reduction == "mean":
        raise UserError(
            "kl_credit: caused is biased with kl_reduction mean (the number of tokens divided by depends on the later "
            "tokens); use kl_reduction sum or kl_credit completion."
        )
