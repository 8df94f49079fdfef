"""One evaluation: completions of the held-out prompts, their rewards, their KL, and the loss on a text.

In: an `Evaluator` (what is asked, once for a run) and the models of now. Out: an `Evaluation`: eval/* and eval_error/*
of metrics.jsonl, and one record per completion.

Nothing of the training is touched. The requests' seeds are a stream of their own, EVAL_STREAM, the same in every
evaluation: two models answer with the same random numbers, so that their difference is less noisy than either. The
generator has its own sampling back afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fastkl.config.held_out import pass_ks
from fastkl.distributed.world import ALONE, World
from fastkl.evaluation.measures import mean_and_error, pass_at_k
from fastkl.evaluation.text_loss import text_loss
from fastkl.objective.sequences import sequence_sums
from fastkl.report.metrics import METRICS
from fastkl.report.step_metrics import about_prompt, extra_of
from fastkl.rewards.call import Rewards, compute_rewards
from fastkl.rewards.load import RewardFunction
from fastkl.rollout.dealt import generate
from fastkl.rollout.generator import Generator
from fastkl.rollout.requests import grouped, requests_of
from fastkl.sampling.params import Sampling
from fastkl.scoring.pack import pack
from fastkl.scoring.scored_model import ScoredModel
from fastkl.types import Completion, Prompt, RolloutBatch

EVAL_STREAM = -1
"""Stands where a request's seed takes the step; no step of a training has this number."""

Completions = tuple[tuple[Completion, ...], ...]


@dataclass(frozen=True, slots=True)
class Evaluator:
    """What is measured, in every evaluation of a run alike."""

    prompts: tuple[Prompt, ...]  # [P]; none: only the loss on the text
    rewards: tuple[RewardFunction, ...]
    num_samples: int  # n, completions per prompt
    sampling: Sampling  # how the completions are drawn; temperature 0 takes the likeliest token
    scored_as: Sampling  # the distributions whose KL is taken: the training's own
    pass_mark: float  # a reward of at least this much is a pass
    seed: int
    max_steps: int = 0  # of the run, for reward functions that ask
    reward_timeout: float = 0.0  # seconds; 0: any
    text: tuple[tuple[int, ...], ...] = ()  # windows of token ids (text_loss.py)
    notes: tuple[str, ...] = ()  # what a person should know of the held-out data


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one evaluation has found."""

    metrics: dict[str, float]  # eval/* and eval_error/*
    samples: list[dict[str, Any]] = field(default_factory=list)  # one record per completion
    per_prompt: dict[str, list[float]] = field(default_factory=dict)  # by measure, what the means are over

    def in_words(self) -> str:
        """The numbers on one line, with their standard errors."""
        parts = []
        for metric in METRICS:
            if metric.key.startswith("eval/") and metric.label:
                for key, label in metric.labels(self.metrics).items():
                    error = self.metrics.get(f"eval_error/{key.removeprefix('eval/')}")
                    written = f"{label.removeprefix('held-out ')} {metric.write(self.metrics[key])}"
                    parts.append(written if error is None else f"{written} ± {metric.write(error)}")
        return ", ".join(parts)


def evaluate(
    evaluator: Evaluator,
    generator: Generator | None,
    policy: ScoredModel,
    reference: ScoredModel | None,
    *,
    step: int,
    micro_batch_tokens: int,
    world: World = ALONE,
) -> Evaluation:
    """Measures the policy, whose weights the generator has. generator: None where there are no prompts.

    reference: None leaves eval/kl out. step: what reward functions are told. micro_batch_tokens: packed tokens
    per forward. Raises UserError as compute_rewards does.
    """
    found = Evaluation({})
    if evaluator.prompts and generator is not None:
        completions = draw(evaluator, generator, world)
        rewards = compute_rewards(
            evaluator.rewards, evaluator.prompts, completions,
            step=step, max_steps=evaluator.max_steps, timeout=evaluator.reward_timeout, world=world,
        )  # fmt: skip
        kl = (
            None
            if reference is None
            else exact_kl(evaluator, completions, policy, reference, micro_batch_tokens, world)
        )
        by_prompt = per_prompt(evaluator, completions, rewards, kl)
        found = Evaluation(measured(by_prompt, rewards), records(evaluator, completions, rewards, kl), by_prompt)
    if evaluator.text:
        found.metrics["eval/loss"] = text_loss(policy, evaluator.text, micro_batch_tokens, world)
    return found


def draw(evaluator: Evaluator, generator: Generator, world: World = ALONE) -> Completions:
    """n completions of each held-out prompt, [P][n]."""
    requests = requests_of(evaluator.prompts, evaluator.num_samples, seed=evaluator.seed, step=EVAL_STREAM)
    with sampling_as(generator, evaluator.sampling):
        return grouped(generate(generator, requests, world), evaluator.num_samples)


@contextmanager
def sampling_as(generator: Generator, sampling: Sampling) -> Iterator[None]:
    """The generator draws by `sampling` while the context lasts."""
    kept, generator.sampling = generator.sampling, sampling
    try:
        yield
    finally:
        generator.sampling = kept


@torch.no_grad()
def exact_kl(
    evaluator: Evaluator,
    completions: Completions,
    policy: ScoredModel,
    reference: ScoredModel,
    micro_batch_tokens: int,
    world: World = ALONE,
) -> torch.Tensor:
    """sum_t KL_t(policy, reference) of every completion over the whole vocabulary, nats: f32 [P, n], CPU."""
    shape = len(completions), evaluator.num_samples
    batch = RolloutBatch(
        evaluator.prompts, completions, torch.zeros(shape), torch.ones(shape, dtype=torch.bool), policy_version=0
    )
    found: list[tuple[list[int], torch.Tensor]] = []
    with policy.scoring(), reference.scoring():
        equally, groups = policy.is_sharded, range(len(completions))
        for members, micro in pack(batch, groups, micro_batch_tokens, policy.device, world=world, equally=equally):
            scores = policy(micro, reference.hidden(micro), sampling=evaluator.scored_as).scores
            sums = sequence_sums(scores.kl, micro.completion_cu_seqlens).float().cpu()
            found += [(members, sums.view(-1, shape[1]))] if members else []
    kl = torch.zeros(shape)
    for members, sums in world.gathered(found):
        kl[members] = sums
    return kl


def per_prompt(
    evaluator: Evaluator, completions: Completions, rewards: Rewards, kl: torch.Tensor | None
) -> dict[str, list[float]]:
    """One number per prompt, by measure. A completion to which no reward applies has no part in reward and pass@k, nor
    has a prompt with fewer than k others in pass@k."""
    return {
        "reward": [float(r[v].double().mean()) for r, v in zip(rewards.total, rewards.valid, strict=True) if v.any()],
        **{f"pass@{k}": passes(rewards, evaluator.pass_mark, k) for k in pass_ks(evaluator.num_samples)},
        "length": [sum(len(c.token_ids) for c in group) / len(group) for group in completions],
        "truncated_share": [sum(c.finish_reason == "length" for c in group) / len(group) for group in completions],
        "kl": [] if kl is None else kl.double().mean(dim=1).tolist(),
    }


def measured(by_prompt: Mapping[str, list[float]], rewards: Rewards) -> dict[str, float]:
    """The measures and their standard errors."""
    found: dict[str, float] = {}
    errors: dict[str, float] = {}
    for name, values in by_prompt.items():
        if values:
            found[f"eval/{name}"], error = mean_and_error(values)
            errors |= {} if error is None else {f"eval_error/{name}": error}
    if len(rewards.by_function) > 1:
        found |= {f"eval/reward/{name}": mean for name, mean in rewards.by_function.items()}
    return found | errors


def passes(rewards: Rewards, mark: float, k: int) -> list[float]:
    """pass@k of every prompt with at least k rewarded samples."""
    counted = rewards.valid.sum(dim=1).tolist()
    # float32 holds no 0.99: a reward of just that much is a pass
    passed = ((rewards.total >= torch.tensor(mark, dtype=torch.float32)) & rewards.valid).sum(dim=1).tolist()
    return [pass_at_k(n, c, k) for n, c in zip(counted, passed, strict=True) if n >= k]


def records(
    evaluator: Evaluator, completions: Completions, rewards: Rewards, kl: torch.Tensor | None
) -> list[dict[str, Any]]:
    """One record per completion; the reward is null where none applies."""
    found: list[dict[str, Any]] = []
    for b, (prompt, group) in enumerate(zip(evaluator.prompts, completions, strict=True)):
        for k, completion in enumerate(group):
            record: dict[str, Any] = {
                **about_prompt(prompt),
                "completion": completion.text,
                "reward": float(rewards.total[b, k]) if rewards.valid[b, k] else None,
                "rewards": {name: values[len(found)] for name, values in rewards.notes.values.items()},
                "kl": None if kl is None else float(kl[b, k]),
                "num_tokens": len(completion.token_ids),
                "finish_reason": completion.finish_reason,
            }
            found.append(record | extra_of(rewards.notes, len(found)))
    return found
