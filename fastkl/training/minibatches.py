"""A rollout's updates: the minibatches that it is cut into, and one outcome of all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from fastkl.objective.rloo import Objective
from fastkl.scoring.pack import scorable_groups
from fastkl.types import Breakdown, Reused, RolloutBatch, StepOutcome


def minibatches(batch: RolloutBatch, objective: Objective) -> Iterator[RolloutBatch]:
    """The batch `epochs` times, each time cut into `updates` runs of whole groups, as equal as can be and in order.

    In each only the samples of its own groups are valid, so that a group keeps its place. A run without a group that
    has an advantage is left out.
    """
    reuse = objective.reuse
    groups = scorable_groups(batch.valid, objective.advantage.min_samples)
    for _ in range(reuse.epochs):
        for members in torch.tensor_split(torch.tensor(groups, dtype=torch.int64), reuse.updates):
            if len(members):
                mine = torch.zeros(len(batch.valid), 1, dtype=torch.bool)
                mine[members] = True
                yield replace(batch, valid=batch.valid & mine)


def joined(first: Breakdown, outcomes: Sequence[StepOutcome]) -> StepOutcome:
    """One outcome of a rollout's updates. first: the scores under the policy that sampled, before the first update:
    what a step reports of KL, entropy and agreement is of these, and means what it does with a single update.
    """
    tokens = sum(outcome.total.num_tokens for outcome in outcomes)
    last = outcomes[-1].total
    total = replace(
        first,
        loss=sum(outcome.total.loss for outcome in outcomes) / len(outcomes),
        num_weights_cut=round(
            sum(outcome.total.num_weights_cut for outcome in outcomes) * first.num_tokens / max(1, tokens)
        ),
    )
    return StepOutcome(
        total,
        grad_norm=sum(outcome.grad_norm for outcome in outcomes) / len(outcomes),
        applied=all(outcome.applied for outcome in outcomes),
        reused=Reused(
            num_updates=sum(outcome.applied for outcome in outcomes),
            clipped_share=sum(outcome.total.num_clipped for outcome in outcomes) / max(1, tokens),
            drift=last.engine_kl_sum / max(1, last.num_tokens),
        ),
    )
