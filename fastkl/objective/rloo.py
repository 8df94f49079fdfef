"""RLOO: from scores and rewards to one loss whose gradient is that of the KL-penalised objective.

Notation, for the K samples y_1..y_K of one prompt x, policy pi, reference q, task reward r, beta = kl_coef:

    KL_i  = sum_t KL_it                                        by default k1: log pi(y_it) - log q(y_it)
    R_i   = r_i - beta * KL_i                                  the penalised ("composite") reward, a constant
    A_i   = R_i - mean_{j != i} R_j                            leave-one-out advantage; the KL is inside the baseline
    loss  = -(1 / normalizer) * sum_i A_i * sum_t log pi(y_it)   linear in the log-probs: `token_coefficients`

With y sampled from pi and normalizer = number of samples, -grad(loss) is an unbiased estimate of grad E[r - beta *
KL(pi, q)]: the pathwise term that k1 omits has mean zero (Kool, van Hoof and Welling 2019, "Buy 4 REINFORCE samples,
get a baseline for free!"; Ahmadian et al. 2024, "Back to basics"). Other estimators, and the KL in the loss instead of
the reward: kl_estimators.py. Other advantages: advantages.py. With the mean over t the penalty is treated as a reward
like any other: where the length T is random, E[grad log pi(y) / T] need not vanish, and this term is left out. The
caller passes the normalizer, so that the losses of micro-batches add up to the loss of the whole batch.

The KL of token t depends on the tokens up to t only, so it may be credited to them alone: with credit "caused", token
s has the advantage A_i + beta * (KL of the tokens that s did not cause), the same in expectation, with less noise.

The loss is linear in the scores, with factors that need a whole group's scores (the KL in the reward, the mean of the
others). So the operator calls `BatchObjective` as soon as a run of whole groups is scored, takes the factors, and has
the gradient while the logits are still in its buffer: no logit is computed twice.

An entropy bonus takes c * sum_t H_t off the loss, H_t = -sum_v pi(v) log pi(v) over all ids, with the texts before each
token held fixed (Williams and Peng 1991; Mnih et al. 2016). What the sums over tokens are divided by: loss_levels.py.

Left out on purpose: any KL term added after the baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fastkl.kernels.types import TokenCoefficients, TokenScores
from fastkl.objective.advantages import Advantage
from fastkl.objective.importance import engine_kl_sum, importance_weights, logprob_gaps, weighted_k1
from fastkl.objective.kl_estimators import (
    Penalty,
    off_support_kl,
    sampled_logprobs,
    sampled_ref_logprobs,
    support_kl,
)
from fastkl.objective.loss_levels import LOSS_LEVELS
from fastkl.objective.ratios import Ratios, clipped_ratios
from fastkl.objective.reuse import Reuse
from fastkl.objective.sequences import per_token, sequence_sums
from fastkl.sampling.params import Sampling
from fastkl.types import SAMPLE_SUMS, Breakdown, PackedBatch, RolloutBatch


@dataclass(frozen=True, slots=True)
class Objective:
    """What a step optimises, and the distribution that its completions were drawn from."""

    penalty: Penalty
    advantage: Advantage
    sampling: Sampling
    importance: str = "none"  # "none", "token" or "sequence"
    importance_cap: float = 2.0
    entropy_coef: float = 0.0  # c, reward per nat
    loss_level: str = "sum"  # an entry of LOSS_LEVELS
    reuse: Reuse = Reuse()

    def at(self, coef: float) -> Objective:
        """The same with the current coefficient."""
        return replace(self, penalty=replace(self.penalty, coef=coef))

    def normalizer(self, batch: RolloutBatch, groups: Sequence[int]) -> float:
        """What the loss of an update on these groups is divided by."""
        valid = batch.valid[groups]
        tokens = torch.tensor([[len(c.token_ids) for c in batch.completions[g]] for g in groups])
        num_tokens = float(tokens.masked_fill(~valid, 0).sum()) if len(groups) else 0.0
        return LOSS_LEVELS[self.loss_level].normalizer(float(valid.sum()), num_tokens, self.sampling.max_new_tokens)


@dataclass(frozen=True, slots=True)
class Penalized:
    """The KL of whole prompt groups, and their rewards after it. Constants."""

    kl_tokens: torch.Tensor  # f32 [N]; each token's share in its sequence's KL, nats
    kl: torch.Tensor  # f32 [G * K]; KL_i before beta
    rewards: torch.Tensor  # f32 [G, K]; R_i = r_i - beta * KL_i, or r_i where the KL is in the loss


def penalize(scores: TokenScores, rewards: torch.Tensor, cu_seqlens: torch.Tensor, penalty: Penalty) -> Penalized:
    """scores [N], constants; rewards f32 [G, K]; cu_seqlens i32 [G * K + 1], an empty sequence has KL 0."""
    kl_tokens = _reduced(penalty.found.value(scores), cu_seqlens, penalty)
    kl = sequence_sums(kl_tokens, cu_seqlens)
    if penalty.placement == "loss" or not penalty.coef:  # what costs nothing may be infinite
        return Penalized(kl_tokens, kl, rewards.to(kl.dtype))
    return Penalized(kl_tokens, kl, rewards - penalty.coef * kl.view_as(rewards))


def token_advantages(
    penalized: Penalized, advantages: torch.Tensor, cu_seqlens: torch.Tensor, penalty: Penalty
) -> torch.Tensor:
    """Each token's advantage, f32 [N]: its completion's, and with credit "caused" the KL that it has no part in.

    advantages f32 [G, K] of whole prompt groups, and what `penalize` computed from their scores.
    """
    of_tokens = per_token(advantages.flatten(), cu_seqlens)
    if penalty.credit == "completion" or not penalty.coef:
        return of_tokens
    sampled = penalty.found.sampled
    return of_tokens + penalty.coef * not_caused(penalized.kl_tokens, cu_seqlens, sampled=sampled)


def token_coefficients(
    scores: TokenScores,
    advantages: torch.Tensor,
    cu_seqlens: torch.Tensor,
    penalty: Penalty,
    *,
    normalizer: float,
    weights: torch.Tensor | None = None,
    entropy_coef: float = 0.0,
    ratios: Ratios | None = None,
) -> TokenCoefficients:
    """The factor of every score in the loss: the gradient of sum over tokens of factor * score is the update's.

    scores [N], constants, of whole prompt groups; advantages f32 [N], of the tokens; cu_seqlens i32 [G * K + 1] (a
    sequence that is not valid has no tokens); normalizer: the number of valid samples in the whole step, not in this
    micro-batch; weights f32 [N] or None: what each token's part is multiplied with (importance.py, loss_levels.py);
    ratios: those to the policy that sampled, where it is another one (ratios.py).
    """
    estimator = penalty.found
    factor = -advantages if ratios is None else -advantages * ratios.policy
    slope = _reduced(torch.full_like(factor, penalty.coef), cu_seqlens, penalty)
    if penalty.placement == "loss" and estimator.slope is not None:
        drawn = estimator.slope(scores) if ratios is None else estimator.slope(scores) * ratios.token
        factor = factor + slope * drawn
    scale = 1.0 / normalizer if weights is None else weights / normalizer
    pathwise = {} if estimator.pathwise is None else estimator.pathwise(scores)
    logprobs = "policy_logprobs" if scores.policy_logprobs_support is None else "policy_logprobs_support"
    exact = {name: slope * scale * share for name, share in pathwise.items()}
    if entropy_coef:
        exact["entropy"] = torch.full_like(factor, -entropy_coef) * scale
    return TokenCoefficients(**{logprobs: factor * scale, **exact})


def _reduced(kl_tokens: torch.Tensor, cu_seqlens: torch.Tensor, penalty: Penalty) -> torch.Tensor:
    """Each token's share in its sequence's KL, f32 [N]."""
    if penalty.reduction == "sum":
        return kl_tokens
    return kl_tokens / per_token(cu_seqlens.diff().to(kl_tokens.dtype), cu_seqlens)


def averaged(weights: torch.Tensor | None, cu_seqlens: torch.Tensor, loss_level: str) -> torch.Tensor | None:
    """The tokens' weights f32 [N], each over the length of its completion where the loss is averaged so. None: one."""
    if not LOSS_LEVELS[loss_level].by_length:
        return weights
    shares = per_token(1.0 / cu_seqlens.diff().clamp(min=1).float(), cu_seqlens)
    return shares if weights is None else weights * shares


def not_caused(kl_tokens: torch.Tensor, cu_seqlens: torch.Tensor, *, sampled: bool) -> torch.Tensor:
    """The KL in each token's sequence that the token had no part in: f32 [N] -> f32 [N].

    The exact KL_t is settled before token t is drawn, so token s has no part in KL_1..KL_s; the sampled k_t is settled
    by token t, so it has none in k_1..k_(s-1).
    """
    up_to_here = kl_tokens.double().cumsum(0)  # float64: the difference of two long sums
    before_sequence = torch.cat([up_to_here.new_zeros(1), up_to_here])[cu_seqlens[:-1].long()]
    settled = up_to_here - per_token(before_sequence, cu_seqlens)
    return (settled - kl_tokens if sampled else settled).to(kl_tokens.dtype)


class BatchObjective:
    """The objective over one micro-batch. The operator calls it with runs of whole groups, in order; it keeps what it
    computed, so that what is reported is what was optimised.
    """

    def __init__(self, objective: Objective, batch: PackedBatch, normalizer: float) -> None:
        self.objective, self.batch, self.normalizer = objective, batch, normalizer
        self.row_splits: list[int] = batch.completion_cu_seqlens[:: batch.rewards.shape[1]].tolist()
        self._group_at = {row: group for group, row in enumerate(self.row_splits)}
        self.kl = torch.zeros_like(batch.rewards).flatten()  # f32 [G * K]
        self.penalized = torch.zeros_like(batch.rewards)  # f32 [G, K]
        self.num_weights_cut = self.num_clipped = 0

    def penalize(self, rows: slice, scores: TokenScores) -> tuple[Penalized, slice, torch.Tensor]:
        """The KL and the penalised rewards of these rows, which are those of whole groups: with the groups, and their
        cu_seqlens.
        """
        batch, samples_of = self.batch, self.batch.rewards.shape[1]
        groups = slice(self._group_at[rows.start], self._group_at[rows.stop])
        samples = slice(groups.start * samples_of, groups.stop * samples_of)
        cu_seqlens = batch.completion_cu_seqlens[samples.start : samples.stop + 1] - rows.start
        penalized = penalize(scores, batch.rewards[groups], cu_seqlens, self.objective.penalty)
        self.kl[samples], self.penalized[groups] = penalized.kl, penalized.rewards
        return penalized, groups, cu_seqlens

    def __call__(self, rows: slice, scores: TokenScores) -> TokenCoefficients:
        """The factors of the scores of these rows, which are those of whole groups."""
        objective, batch, penalty = self.objective, self.batch, self.objective.penalty
        penalized, groups, cu_seqlens = self.penalize(rows, scores)
        engine_logprobs, level = batch.engine_logprobs[rows], objective.importance
        logprobs = sampled_logprobs(scores)
        old = logprobs if batch.old_logprobs is None else batch.old_logprobs[rows]
        weights = importance_weights(engine_logprobs, old, cu_seqlens, level, objective.importance_cap)
        self.num_weights_cut += weights.num_cut
        if batch.advantages is not None:
            advantages = batch.advantages[rows]
        else:
            of_samples = objective.advantage.function(penalized.rewards, batch.valid[groups])
            advantages = token_advantages(penalized, of_samples, cu_seqlens, penalty)
        ratios = None
        if batch.old_logprobs is not None:
            old = engine_logprobs if objective.reuse.old == "engine" else old
            ratios = clipped_ratios(logprobs, old, advantages, cu_seqlens, objective.reuse)
            self.num_clipped += ratios.num_cut
        return token_coefficients(
            scores,
            advantages,
            cu_seqlens,
            penalty,
            normalizer=self.normalizer,
            weights=averaged(weights.values, cu_seqlens, objective.loss_level),
            entropy_coef=objective.entropy_coef,
            ratios=ratios,
        )

    def breakdown(self, scores: TokenScores, loss: torch.Tensor) -> Breakdown:
        """Sums of the micro-batch's N scores and of what was computed from them, on the CPU."""
        batch, logprobs = self.batch, sampled_logprobs(scores)
        assert scores.entropy is not None
        absent = torch.full_like(logprobs, torch.nan)
        ref_logprobs, *kls = (absent,) * 5
        if scores.kl is not None:
            ref_logprobs = sampled_ref_logprobs(scores)
            weighted = weighted_k1(batch.engine_logprobs, logprobs, ref_logprobs)
            kls = [scores.kl, support_kl(scores), off_support_kl(scores), weighted]
        columns = [
            sequence_sums(column, batch.completion_cu_seqlens)
            for column in (logprobs, ref_logprobs, scores.entropy, *kls)
        ]
        table = torch.stack([*columns, self.kl, self.penalized.flatten()], dim=-1).float().cpu()
        gap_sum, gap_max, num_tokens = logprob_gaps(batch.engine_logprobs, logprobs)
        outside = scores.outside_support
        return Breakdown(
            sums=table.view(*batch.valid.shape, -1).masked_fill(~batch.valid.cpu()[..., None], torch.nan),
            loss=float(loss.detach()),
            num_tokens=num_tokens,
            gap_sum=gap_sum,
            gap_max=gap_max,
            engine_kl_sum=engine_kl_sum(batch.engine_logprobs, logprobs),
            num_weights_cut=self.num_weights_cut,
            num_clipped=self.num_clipped,
            num_outside=0 if outside is None else int(outside.sum()),
        )


def whole_step(shape: Sequence[int], parts: Sequence[tuple[Sequence[int], Breakdown]]) -> Breakdown:
    """The breakdown of a step of [B, K] samples from those of its micro-batches, each with its groups' indices."""
    sums = torch.full((*shape, len(SAMPLE_SUMS)), torch.nan)
    for members, part in parts:
        members = list(members)
        sums[members] = torch.where(part.sums.isnan(), sums[members], part.sums)  # a group may come in parts
    found = [part for _, part in parts]
    return Breakdown(
        sums,
        loss=sum(part.loss for part in found),
        num_tokens=sum(part.num_tokens for part in found),
        gap_sum=sum(part.gap_sum for part in found),
        gap_max=max((part.gap_max for part in found), default=0.0),
        engine_kl_sum=sum(part.engine_kl_sum for part in found),
        num_weights_cut=sum(part.num_weights_cut for part in found),
        num_clipped=sum(part.num_clipped for part in found),
        num_outside=sum(part.num_outside for part in found),
    )
