"""What is known of a rollout before its first update: the advantages that need the whole step, and what these take.

In: the step's batch. Out: the same with `settled` filled in. An advantage that compares all samples of a step needs
their penalised rewards before the gradient of any of them is taken; so does one that compares the samples of a prompt,
where these do not fit into one micro-batch. Without a KL in the reward these are the rewards;
with one, policy and reference pass over these samples once more, without gradients: loss and gradient are then those of
the whole group, whatever it is cut into. (Engine log-probs in the place of the policy's would spare that forward; the
baseline of a sample may be any function of the others. But they are of bfloat16 on a GPU, and know k1 alone.)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from fastkl.distributed.world import ALONE, World
from fastkl.objective.kl_estimators import Penalty, sampled_logprobs
from fastkl.objective.rloo import BatchObjective, Objective, Penalized, token_advantages, whole_step
from fastkl.scoring.pack import cumulative, pack, scorable_groups, too_large
from fastkl.scoring.scored_model import ScoredModel
from fastkl.training.stopwatch import Stopwatch
from fastkl.types import Breakdown, RolloutBatch, Settled

CPU = torch.device("cpu")

Scored = tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor]
"""Of a micro-batch: log-probs and KL by group, f32 [tokens]; penalised rewards and which are valid, [G, K]."""


@dataclass(frozen=True, slots=True)
class FirstForward:
    """The scores of a rollout under the policy that sampled it. A tensor per prompt, f32 [tokens of its valid samples],
    on the CPU; empty for a prompt without an advantage.
    """

    logprobs: tuple[torch.Tensor, ...]  # [B]
    kl_tokens: tuple[torch.Tensor, ...]  # [B]; as in Penalized
    rewards: torch.Tensor  # f32 [B, K]; penalised
    total: Breakdown  # of the whole step; its loss is zero


def with_advantages(
    policy: ScoredModel,
    reference: ScoredModel | None,
    batch: RolloutBatch,
    objective: Objective,
    micro_batch_tokens: int,
    watch: Stopwatch,
    world: World = ALONE,
) -> RolloutBatch:
    """The batch, with the advantages that need the whole step, and those of groups that do not fit into a micro-batch,
    whose parts cannot compute them; the others are left to the update."""
    if batch.settled.advantages is not None:
        return batch
    groups = scorable_groups(batch.valid, objective.advantage.min_samples)
    if not objective.advantage.whole_step:
        groups = too_large(batch, groups, micro_batch_tokens, once=policy.layout == "shared")
    if not groups:
        return batch
    penalty = objective.penalty
    first = None
    if penalty.placement == "reward" and penalty.coef:
        first = first_forward(policy, reference, batch, objective, micro_batch_tokens, watch, groups, world)
    advantages = step_advantages(batch, objective, first, groups)
    known = tuple(values if b in groups else None for b, values in enumerate(advantages))
    return replace(batch, settled=replace(batch.settled, advantages=known))


def settled_for_updates(batch: RolloutBatch, objective: Objective, first: FirstForward) -> RolloutBatch:
    """The batch, with what all of its several updates have in common (reuse.py)."""
    clips, whole_step_needed = bool(objective.reuse.clip), objective.advantage.whole_step
    return replace(
        batch,
        settled=Settled(
            advantages=step_advantages(batch, objective, first) if clips or whole_step_needed else None,
            old_logprobs=first.logprobs if clips else None,
        ),
    )


def first_forward(
    policy: ScoredModel,
    reference: ScoredModel | None,
    batch: RolloutBatch,
    objective: Objective,
    micro_batch_tokens: int,
    watch: Stopwatch,
    groups: Sequence[int] | None = None,
    world: World = ALONE,
) -> FirstForward:
    """One forward of both models over these groups (None: all that have an advantage), without gradients; where there
    are several processes, each forwards its share."""
    if groups is None:
        groups = scorable_groups(batch.valid, objective.advantage.min_samples)
    logprobs, kl_tokens = [torch.empty(0)] * len(batch.prompts), [torch.empty(0)] * len(batch.prompts)
    rewards = torch.zeros_like(batch.rewards)
    parts: list[tuple[list[int], Scored, Breakdown]] = []
    once, equally = policy.layout == "shared", policy.is_sharded
    with policy.scoring(), reference.scoring() if reference else nullcontext(), watch("score"), torch.no_grad():
        for members, micro in pack(
            batch, groups, micro_batch_tokens, policy.device, once=once, cut=True, world=world, equally=equally
        ):
            ref_hidden = reference.hidden(micro) if reference else None
            outputs = objective.penalty.outputs
            scores = policy(micro, ref_hidden, sampling=objective.sampling, outputs=outputs).scores
            part = BatchObjective(objective, micro, 1.0)
            penalized, *_ = part.penalize(slice(0, part.row_splits[-1]), scores)
            sizes = torch.tensor(part.row_splits).diff().tolist()
            columns = (sampled_logprobs(scores), penalized.kl_tokens)
            sampled, kls = ([of_group.clone() for of_group in x.cpu().split(sizes)] for x in columns)
            scored = (sampled, kls, penalized.rewards.to(rewards), micro.valid.cpu())
            parts += [(members, scored, part.breakdown(scores, torch.zeros(())))] if members else []
        everybodys = world.gathered(parts)
    for members, (sampled, kls, penalised, valid), _ in everybodys:
        for g, of_group, kl_of_group in zip(members, sampled, kls, strict=True):
            logprobs[g], kl_tokens[g] = torch.cat([logprobs[g], of_group]), torch.cat([kl_tokens[g], kl_of_group])
        rewards[members] = torch.where(valid, penalised, rewards[members])
    total = whole_step(batch.valid.shape, [(members, breakdown) for members, _, breakdown in everybodys])
    return FirstForward(tuple(logprobs), tuple(kl_tokens), rewards, total)


def step_advantages(
    batch: RolloutBatch, objective: Objective, first: FirstForward | None, groups: Sequence[int] | None = None
) -> tuple[torch.Tensor, ...]:
    """Each token's advantage, by prompt. first: None where the rewards are not penalised. groups: as in first_forward;
    the others have no tokens."""
    advantage, penalty = objective.advantage, objective.penalty
    if groups is None:
        groups = scorable_groups(batch.valid, advantage.min_samples)
    lengths = torch.tensor([[len(c.token_ids) for c in group] for group in batch.completions])
    valid = torch.zeros_like(batch.valid)
    valid[groups] = batch.valid[groups]
    lengths = lengths.masked_fill(~valid, 0)
    rewards = batch.rewards if first is None else first.rewards
    more = [lengths] if advantage.whole_step else []
    values = advantage.function(rewards, valid, *more)
    return tuple(
        of_group(values[b], lengths[b], torch.empty(0) if first is None else first.kl_tokens[b], penalty)
        for b in range(len(batch.prompts))
    )


def of_group(
    advantages: torch.Tensor, lengths: torch.Tensor, kl_tokens: torch.Tensor, penalty: Penalty
) -> torch.Tensor:
    """The tokens' advantages of one prompt, f32 [n]: advantages f32 [K], lengths i64 [K], kl_tokens f32 [n] or none."""
    penalized = Penalized(kl_tokens, torch.empty(0), torch.empty(0))
    return token_advantages(penalized, advantages, cumulative(lengths.tolist(), CPU), penalty)
