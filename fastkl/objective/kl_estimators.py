"""The KL penalty: how it is estimated per token, where it enters the update, and which pairs of the two are refused.

Notation, at one token of a completion drawn from the policy pi (on the support S that the sampler allowed; q is the
reference on the same S), with k = log pi(y) - log q(y):

    k1 = k        k2 = k^2 / 2        k3 = exp(-k) - 1 + k        exact = sum_v pi(v) (log pi(v) - log q(v))

(Schulman 2020, "Approximating KL divergence"). `exact` is summed over S, `exact_full` over the whole vocabulary: it
also sees mass that drifts off S. So does `k1_full`, of which only the part on S is sampled (see `full_k1`). In the
reward, beta times the completion's sum is taken from its reward; in the loss, it is added to the loss and
differentiated. What that does to the expected gradient decides what is allowed:

    k1     reward: the gradient of the sequence KL (the missing pathwise term has mean zero)
    k1_full        reward: the same of the KL over all ids; the pathwise term of what is not sampled is added
    k2     loss:   the token-level gradient of KL(pi, q)
    k3     loss:   the token-level gradient of KL(q, pi), the other direction: GRPO's form
    exact  reward: the gradient of the sequence KL; needs the pathwise term beta * sum_t grad KL_t, which is added
    exact  loss:   the token-level gradient of KL(pi, q)

Another divergence from the reference is an entry of DIRECTIONS (`Penalty.direction`). k1 to k3 estimate the reverse KL;
the others are sums over all ids alone, and go into the loss, with the token-level gradient of

    forward    KL(q, pi) = sum_v q(v) (log q(v) - log pi(v))         covers all that the reference writes
    jsd        1/2 KL(pi, m) + 1/2 KL(q, m), m = (pi + q) / 2        between the two, at most log 2

"Token-level" holds the texts before each token fixed: it ignores that today's token leads to tomorrow's KL.

Another estimator is an entry of ESTIMATORS, or a function in a file of your own (`user_estimator`). torch is imported
for type checking only, so that a refusal comes at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

from fastkl.errors import UserError
from fastkl.objective.loss_levels import LOSS_LEVELS
from fastkl.plugins import find_function

if TYPE_CHECKING:
    from torch import Tensor

    from fastkl.kernels.types import TokenScores
    from fastkl.objective.advantages import Advantage

PLACEMENTS = ("reward", "loss")

DIRECTIONS = {"reverse": "kl", "forward": "forward_kl", "jsd": "jsd"}
"""The divergence from the reference that an exact penalty charges -> its name in TokenScores."""


@dataclass(frozen=True, slots=True)
class KlEstimator:
    """One way of estimating the KL at a token.

    value: scores -> f32 [N], nats. slope: d value / d log pi(y), f32 [N], which multiplies the log-prob where the
    estimate is in the loss. pathwise: what has to be differentiated as well, in either placement: scores -> the factor
    f32 [N] of each of the operator's exact KLs, by its name in TokenScores. sampled: whether the value depends on the
    drawn id, or is settled before the draw. over_all: whether mass off the support is charged. refused: placement ->
    why its expected gradient is that of no KL.
    """

    value: Callable[[TokenScores], Tensor]
    slope: Callable[[TokenScores], Tensor] | None = None
    pathwise: Callable[[TokenScores], dict[str, Tensor]] | None = None
    sampled: bool = True
    over_all: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    remedy: str = ""


def sampled_logprobs(scores: TokenScores) -> Tensor:
    """log pi(y) under the distribution that was sampled from, f32 [N]: on the support where there is one."""
    on_support = scores.policy_logprobs_support
    return scores.policy_logprobs if on_support is None else on_support


def sampled_ref_logprobs(scores: TokenScores) -> Tensor | None:
    """log q(y) on the same ids, f32 [N]; None without a reference."""
    on_support = scores.ref_logprobs_support
    return scores.ref_logprobs if on_support is None else on_support


def support_kl(scores: TokenScores) -> Tensor:
    """The exact KL on the support, f32 [N]: over all ids where there is no support."""
    return full_kl(scores) if scores.kl_support is None else scores.kl_support


def off_support_kl(scores: TokenScores) -> Tensor:
    """What the exact KL over all ids has beyond the part of the support S, f32 [N]; zero where there is no support.

    By the chain rule KL(pi, q) = pi(S) KL(pi_S, q_S) + the rest, which is never negative: how far apart pi(S) and q(S)
    are, and the two distributions on the ids outside of S. A sampled estimate sees none of it, since no draw shows it.
    """
    if scores.kl_support is None:
        return full_kl(scores).new_zeros(len(scores.policy_logprobs))
    return full_kl(scores) - support_mass(scores) * scores.kl_support


def support_mass(scores: TokenScores) -> Tensor:
    """pi(S), f32 [N]: its logarithm is what the sampled id's log-prob gains by being renormalised on S."""
    assert scores.policy_logprobs_support is not None, "without a support it is one"
    return (scores.policy_logprobs - scores.policy_logprobs_support).exp()


def full_kl(scores: TokenScores) -> Tensor:
    """The exact KL over all ids, f32 [N]."""
    assert scores.kl is not None, "a KL needs a reference"
    return scores.kl


def log_ratio(scores: TokenScores) -> Tensor:
    """k = log pi(y) - log q(y), f32 [N]."""
    ref_logprobs = sampled_ref_logprobs(scores)
    assert ref_logprobs is not None, "a KL needs a reference"
    return sampled_logprobs(scores) - ref_logprobs


def full_k1(scores: TokenScores) -> Tensor:
    """pi(S) k + KL(pi, q) - pi(S) KL(pi_S, q_S), f32 [N]: by the chain rule, an estimate of the KL over all ids.

    Its first term is sampled, with the mean pi(S) KL(pi_S, q_S); the others are exact. k1 where there is no support.
    """
    if scores.kl_support is None:
        return log_ratio(scores)
    return support_mass(scores) * log_ratio(scores) + off_support_kl(scores)


def full_k1_pathwise(scores: TokenScores) -> dict[str, Tensor]:
    """The gradient that the log-probs of the drawn ids do not carry: grad KL(pi, q) - pi(S) grad KL(pi_S, q_S).

    With m = pi(S), K = KL(pi_S, q_S): the mean of the reward's part is m grad K, and grad KL(pi, q) is what it should
    be. (Term by term: the mean of m k1 depends on m, which gives K grad m, and the exact rest gives grad KL(pi, q)
    - m grad K - K grad m.)
    """
    if scores.kl_support is None:
        return {}
    mass = support_mass(scores)
    return {"kl": mass.new_ones(mass.shape), "kl_support": -mass}


def _exact(name: str, *, over_all: bool) -> KlEstimator:
    """An exact divergence of the operator, and its own gradient: on the support where there is one, or over all ids."""

    def given(scores: TokenScores) -> str:
        return name if over_all or scores.policy_logprobs_support is None else f"{name}_support"

    def value(scores: TokenScores) -> Tensor:
        found = getattr(scores, given(scores))
        assert found is not None, f"{name} needs a reference, and has to be asked for"
        return found

    def pathwise(scores: TokenScores) -> dict[str, Tensor]:
        return {given(scores): scores.policy_logprobs.new_ones(len(scores.policy_logprobs))}

    return KlEstimator(value, pathwise=pathwise, sampled=False, over_all=over_all)


ESTIMATORS: dict[str, KlEstimator] = {
    "k1": KlEstimator(
        log_ratio,
        slope=lambda scores: log_ratio(scores).new_ones(len(scores.policy_logprobs)),
        refused={"loss": "its expected gradient is zero: nothing would hold the policy near the reference"},
        remedy="put k1 into the reward",
    ),
    "k1_full": KlEstimator(
        full_k1,
        pathwise=full_k1_pathwise,
        over_all=True,
        refused={"loss": "the expected gradient of its sampled part is zero there"},
        remedy="put k1_full into the reward, or exact_full into the loss",
    ),
    "k2": KlEstimator(
        lambda scores: 0.5 * log_ratio(scores).square(),
        slope=log_ratio,
        refused={
            "reward": "it is biased: its mean is not the KL, and without its pathwise term its gradient is not either"
        },
        remedy="put k2 into the loss",
    ),
    "k3": KlEstimator(
        lambda scores: (-log_ratio(scores)).expm1() + log_ratio(scores),
        slope=lambda scores: -(-log_ratio(scores)).expm1(),
        refused={
            "reward": "its mean is the KL but its gradient is not: the pathwise term that is left out is not zero"
        },
        remedy="use k1 or exact, or put k3 into the loss",
    ),
    "exact": _exact("kl", over_all=False),
    "exact_full": _exact("kl", over_all=True),
}
"""A test shows the bias of each refused pair, and that every other one has the gradient it claims."""

NO_REFERENCE = "none"
"""The estimator of a run without a reference, which needs no score of one. No choice of --kl-estimator: it is what
--no-reference means."""

_ABSENT = KlEstimator(lambda scores: scores.policy_logprobs.new_zeros(len(scores.policy_logprobs)))


@cache
def find_estimator(name: str, direction: str = "reverse") -> KlEstimator:
    """The entry of ESTIMATORS, or the user's own function behind place:function. UserError where there is none.

    direction: an entry of DIRECTIONS; another one than the reverse KL has the exact estimators alone (check_penalty).
    """
    if name == NO_REFERENCE:
        return _ABSENT
    if direction != "reverse":
        return _exact(DIRECTIONS[direction], over_all=ESTIMATORS[name].over_all)
    return ESTIMATORS[name] if name in ESTIMATORS else user_estimator(name)


def user_estimator(name: str) -> KlEstimator:
    """A function of one's own, TokenScores -> f32 [N] in nats, that says where it is unbiased.

    Its attribute `unbiased_in` lists "reward", "loss" or both. For the loss it also needs `slope`, a function of the
    same form: its derivative by log pi(y).
    """
    function = find_function("kl_estimator", name, ESTIMATORS)
    places = getattr(function, "unbiased_in", None)
    if not isinstance(places, tuple | list) or not places or set(places) - set(PLACEMENTS):
        raise UserError(
            f"kl_estimator: {name} does not say where it is unbiased; set its attribute unbiased_in to ('reward',), "
            "('loss',) or both."
        )
    slope = getattr(function, "slope", None)
    if "loss" in places and not callable(slope):
        raise UserError(
            f"kl_estimator: {name} is to be used in the loss and has no slope; set its attribute slope to a function "
            "of TokenScores, its derivative by the log-prob of the sampled token."
        )
    refused = dict.fromkeys(set(PLACEMENTS) - set(places), "it does not claim to be unbiased there (unbiased_in)")
    return KlEstimator(function, slope, refused=refused, remedy=f"put it into the {places[0]}")


@dataclass(frozen=True, slots=True)
class Penalty:
    """The KL penalty's settings; see the module's text and `check_penalty`."""

    coef: float  # beta
    estimator: str = "k1"  # an entry of ESTIMATORS, place:function, or NO_REFERENCE
    placement: str = "reward"  # "reward" or "loss"
    reduction: str = "sum"  # over a completion's tokens: "sum" or "mean"
    credit: str = "completion"  # which tokens KL_t is charged to: all of the "completion", or those that "caused" it
    direction: str = "reverse"  # an entry of DIRECTIONS

    @property
    def found(self) -> KlEstimator:
        """The estimator of the direction."""
        return find_estimator(self.estimator, self.direction)

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the operator has to be asked for: entropy and reverse KL are reported whatever is charged."""
        return tuple(dict.fromkeys(("entropy", "kl", DIRECTIONS[self.direction])))


def check_penalty(penalty: Penalty, advantage: Advantage | None = None, loss_level: str = "sum") -> None:
    """Raises UserError for a combination whose expected gradient is that of no KL.

    advantage, loss_level: what the penalty is combined with; the default ones leave the gradient as it is.
    """
    check_direction(penalty)
    estimator = penalty.found
    if reason := estimator.refused.get(penalty.placement):
        raise UserError(
            f"kl_estimator: {penalty.estimator} in the {penalty.placement} is refused, since {reason}; "
            f"{estimator.remedy} (kl_placement)."
        )
    if penalty.credit == "caused" and penalty.placement == "loss":
        raise UserError("kl_credit: a KL in the loss is not credited to tokens at all; use kl_credit completion.")
    if penalty.credit == "caused" and penalty.reduction == "mean":
        raise UserError(
            "kl_credit: caused is biased with kl_reduction mean (the number of tokens divided by depends on the later "
            "tokens); use kl_reduction sum or kl_credit completion."
        )
    check_beside(penalty, advantage, loss_level)


def check_direction(penalty: Penalty) -> None:
    """Raises UserError where a direction is charged by what estimates another one."""
    if penalty.direction == "reverse":
        return
    exact = ("exact", "exact_full")
    if penalty.estimator == NO_REFERENCE:
        raise UserError(
            f"kl_direction: {penalty.direction} is measured from a reference, and there is none; use reverse, or keep "
            "the reference."
        )
    if penalty.estimator not in exact or penalty.placement != "loss":
        raise UserError(
            f"kl_direction: {penalty.direction} is a sum over ids whose gradient no draw estimates, so it is charged "
            f"exactly and in the loss, and this is kl_estimator {penalty.estimator} in the {penalty.placement}; give "
            "--kl-estimator exact_full (or exact) --kl-placement loss, or leave both out."
        )


def check_beside(penalty: Penalty, advantage: Advantage | None, loss_level: str) -> None:
    """Raises UserError where the advantage or the loss's average weighs one part of the penalty's gradient only."""
    if not penalty.coef:
        return
    if penalty.placement == "reward" and advantage is not None and not advantage.is_unbiased:
        if penalty.found.pathwise is not None:
            raise UserError(
                f"kl_estimator: {penalty.estimator} in the reward has a part that is differentiated, which an "
                "advantage that scales rewards does not scale; use k1, or --kl-placement loss."
            )
        if penalty.credit == "caused":
            raise UserError(
                "kl_credit: caused gives each token a KL in units of the reward, which this advantage scales; use "
                "--advantage rloo, or kl_credit completion."
            )
    if penalty.credit == "caused" and not LOSS_LEVELS[loss_level].is_unbiased:
        raise UserError(
            f"kl_credit: caused is biased with loss_level {loss_level}, whose weights depend on the later tokens; use "
            "loss_level sum, or kl_credit completion."
        )
    if penalty.placement == "loss" and penalty.reduction == "mean" and loss_level != "sum":
        raise UserError(
            f"kl_reduction: mean divides a completion's KL by its length, and loss_level {loss_level} averages the "
            "loss that it is a part of once more; use kl_reduction sum."
        )
