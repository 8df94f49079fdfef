"""Metrics: what a step reports about itself. Standard library and torch only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fastkl.config.settings import TrainConfig, penalty_of
from fastkl.kernels.types import TokenScores
from fastkl.objective.importance import engine_kl_sum, importance_weights
from fastkl.objective.kl_estimators import sampled_logprobs, sampled_ref_logprobs, support_kl
from fastkl.objective.rloo import penalized_rewards, sequence_penalty, sequence_sums
from fastkl.rollout.agreement import logprob_gaps
from fastkl.types import PackedBatch, RolloutBatch


def distinct_2(texts: Sequence[str]) -> float:
    """Distinct word bigrams over all word bigrams of the texts together (Li et al. 2016); 0 without any bigram."""
    bigrams = [pair for text in texts for pair in _pairs(text.split())]
    return len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def _pairs(words: list[str]) -> Iterator[tuple[str, str]]:
    return zip(words, words[1:], strict=False)


# Per-sequence sums over a completion's tokens, each a column of StepReport.sums.
COLUMNS = ("logprob", "ref_logprob", "entropy", "kl_exact", "kl_support", "kl_penalized", "reward_penalized")


class StepReport:
    """Collects what the micro-batches of one step report, then words it."""

    def __init__(
        self,
        step: int,
        batch: RolloutBatch,
        reward_by_function: Mapping[str, float],
        config: TrainConfig,
        kl_coef: float | None = None,
    ) -> None:
        """kl_coef: the step's beta, where it is not the configured one."""
        self.step = step
        self.batch = batch
        self.config = config
        self.penalty = penalty_of(config, kl_coef)
        self.reward_by_function = reward_by_function
        self.sums = torch.full((*batch.rewards.shape, len(COLUMNS)), torch.nan)  # f32 [B, K, columns]; NaN: not scored
        self.loss = 0.0
        self.grad_norm = 0.0
        self.num_tokens = 0
        self.max_gap = 0.0
        self.num_weights_cut = 0
        self._gap_sum = 0.0
        self._engine_kl_sum = 0.0

    @property
    def mean_support_kl(self) -> float:
        """Mean over scored samples of the exact KL on the support, summed over the completion, nats."""
        values = self.sums[..., COLUMNS.index("kl_support")]
        return float(values[~values.isnan()].mean())

    @property
    def mean_gap(self) -> float:
        """Mean |engine - trainer| log-prob over the scored tokens, nats."""
        return self._gap_sum / max(1, self.num_tokens)

    def add(
        self,
        members: Sequence[int],
        micro: PackedBatch,
        scores: TokenScores,
        loss: torch.Tensor,
    ) -> None:
        """Takes in one micro-batch: its groups' indices, its tokens' scores [N] and its share of the loss."""
        config, cu_seqlens, logprobs = self.config, micro.completion_cu_seqlens, sampled_logprobs(scores)
        values = (logprobs, sampled_ref_logprobs(scores), scores.entropy, scores.kl, support_kl(scores))
        columns = [sequence_sums(column, cu_seqlens) for column in values]
        kl = sequence_penalty(scores, cu_seqlens, self.penalty)
        penalized = penalized_rewards(micro.rewards, kl, self.penalty)
        table = torch.stack([*columns, kl, penalized.flatten()], dim=-1).float().cpu().view(*micro.valid.shape, -1)
        self.sums[list(members)] = table.masked_fill(~micro.valid.cpu()[..., None], torch.nan)
        self.loss += float(loss.detach())
        self.num_weights_cut += importance_weights(
            micro.engine_logprobs, logprobs, cu_seqlens, config.importance, config.importance_cap
        ).num_cut
        self._engine_kl_sum += engine_kl_sum(micro.engine_logprobs, logprobs)
        gap_sum, gap_max, count = logprob_gaps(micro.engine_logprobs, logprobs)
        self._gap_sum += gap_sum
        self.max_gap = max(self.max_gap, gap_max)
        self.num_tokens += count

    def metrics(
        self, lr: float, seconds: Mapping[str, float], well_formed: Callable[..., float] | None
    ) -> dict[str, float | int]:
        """The step's line of metrics.jsonl, but for the run's own counters."""
        batch, scored = self.batch, ~self.sums[..., 0].isnan()
        completions = [completion for group in batch.completions for completion in group]
        texts = [completion.text for completion in completions]
        lengths = torch.tensor([len(completion.token_ids) for completion in completions], dtype=torch.float32)
        mean = {name: float(self.sums[..., i][scored].mean()) for i, name in enumerate(COLUMNS)}
        per_token = {
            name: float(self.sums[..., i][scored].sum()) / max(1, self.num_tokens) for i, name in enumerate(COLUMNS)
        }
        rewards = batch.rewards[batch.valid]
        values: dict[str, float | int] = {
            "step": self.step,
            "reward/raw": float(rewards.mean()),
            "reward/std": float(rewards.std(correction=0)),
            "reward/penalized": mean["reward_penalized"],
            **{f"reward/{name}": value for name, value in self.reward_by_function.items()},
            "kl/mean": mean["logprob"] - mean["ref_logprob"],
            "kl/per_token": per_token["logprob"] - per_token["ref_logprob"],
            "kl/exact": mean["kl_exact"],
            "kl/support": mean["kl_support"],
            "kl/penalty": self.penalty.coef * mean["kl_penalized"],
            "kl/coef": self.penalty.coef,
            "lm_cross_entropy": -per_token["logprob"],
            "original_lm_cross_entropy": -per_token["ref_logprob"],
            "entropy": per_token["entropy"],
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "lr": lr,
            "diversity/distinct_2": distinct_2(texts),
            "completion/mean_length": float(lengths.mean()),
            "completion/truncated_share": sum(c.finish_reason == "length" for c in completions) / len(completions),
            "groups/skipped": int((~scored.any(dim=1)).sum()),
            "throughput/tokens_per_second": float(lengths.sum()) / sum(seconds.values()),
            **{
                f"time/{stage}_s": seconds.get(stage, 0.0)
                for stage in ("generate", "reward", "score", "update", "sync")
            },
            "time/step_s": sum(seconds.values()),
            "mismatch/mean_abs_logprob": self.mean_gap,
            "mismatch/max_abs_logprob": self.max_gap,
            "mismatch/engine_kl": self._engine_kl_sum / max(1, self.num_tokens),
            "mismatch/weights_cut": self.num_weights_cut / max(1, self.num_tokens),
            "policy_version": self.batch.policy_version,
        }
        if well_formed is not None:
            prompted = [
                p.text + c.text for p, group in zip(batch.prompts, batch.completions, strict=True) for c in group
            ]
            values["grammar/well_formed"] = well_formed(prompted)
        return values

    def samples(self) -> list[dict[str, Any]]:
        """One record per completion, for samples.jsonl; scores are null for a sample that left its group."""
        records = []
        for b, (prompt, group) in enumerate(zip(self.batch.prompts, self.batch.completions, strict=True)):
            for k, completion in enumerate(group):
                valid = bool(self.batch.valid[b, k])
                row = dict(zip(COLUMNS, self.sums[b, k].tolist(), strict=True))
                num_tokens = len(completion.token_ids)
                records.append(
                    {
                        "step": self.step,
                        "prompt": prompt.text,
                        "completion": completion.text,
                        "reward": float(self.batch.rewards[b, k]) if valid else None,
                        "penalized_reward": row["reward_penalized"],
                        "kl": row["logprob"] - row["ref_logprob"],
                        "lm_cross_entropy": -row["logprob"] / max(1, num_tokens),
                        "original_lm_cross_entropy": -row["ref_logprob"] / max(1, num_tokens),
                        "num_tokens": num_tokens,
                        "finish_reason": completion.finish_reason,
                    }
                )
        return records
