"""The canary: a few completions that the generator draws right after a push, compared with the weights pushed.

A step's own samples prove that generator and trainer agree, where both have the same weights. With rollouts ahead the
trainer is an update further when it scores them, so these few tell instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fastkl.distributed.world import ALONE, World
from fastkl.evaluation.evaluate import sampling_as
from fastkl.objective.advantages import ADVANTAGES
from fastkl.objective.kl_estimators import NO_REFERENCE, Penalty
from fastkl.objective.rloo import Objective
from fastkl.rollout.dealt import generate
from fastkl.rollout.generator import Generator
from fastkl.rollout.requests import requests_of
from fastkl.scoring.scored_model import ScoredModel
from fastkl.training.first_forward import first_forward
from fastkl.training.stopwatch import Stopwatch
from fastkl.types import Breakdown, Prompt, RolloutBatch

COMPLETIONS, TOKENS = 8, 16
"""How many are drawn, and how long they may be."""

STREAM = -2
"""Less the step, it stands where a request's seed takes the step; no training and no evaluation has these numbers."""


def compare(
    generator: Generator,
    policy: ScoredModel,
    prompts: Sequence[Prompt],
    *,
    seed: int,
    step: int,
    tokens: int,
    world: World = ALONE,
) -> Breakdown:
    """Generator and policy over completions of the first COMPLETIONS of these prompts, which come round again where
    there are fewer: gaps and their KL. tokens: packed ones per forward."""
    chosen = tuple(prompts[b % len(prompts)] for b in range(COMPLETIONS))
    usual = generator.sampling
    longest = min(TOKENS, usual.max_new_tokens)
    sampling = replace(usual, max_new_tokens=longest, min_tokens=min(longest, usual.min_tokens))
    with sampling_as(generator, sampling):
        drawn = generate(generator, requests_of(chosen, 1, seed=seed, step=STREAM - step), world)
    shape = COMPLETIONS, 1
    batch = RolloutBatch(
        chosen, tuple((c,) for c in drawn), torch.zeros(shape), torch.ones(shape, dtype=torch.bool), step
    )
    compared = Objective(Penalty(0.0, NO_REFERENCE), ADVANTAGES["none"], sampling)
    return first_forward(policy, None, batch, compared, tokens, Stopwatch(policy.device), world=world).total
