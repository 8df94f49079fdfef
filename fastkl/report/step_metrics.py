"""One step's account of itself: what the update computed, as a line of metrics.jsonl and records of samples.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fastkl.types import SAMPLE_SUMS, RolloutBatch, StepOutcome


def distinct_2(texts: Sequence[str]) -> float:
    """Distinct word bigrams over all word bigrams of the texts together (Li et al. 2016); 0 without any bigram."""
    bigrams = [pair for text in texts for pair in _pairs(text.split())]
    return len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def _pairs(words: list[str]) -> Iterator[tuple[str, str]]:
    return zip(words, words[1:], strict=False)


class StepReport:
    """Words what one step did: its line of metrics.jsonl and its records of samples.jsonl."""

    def __init__(
        self,
        step: int,
        batch: RolloutBatch,
        reward_by_function: Mapping[str, float],
        kl_coef: float,
        outcome: StepOutcome,
    ) -> None:
        """kl_coef: the beta that the step's loss was computed with."""
        self.step = step
        self.batch = batch
        self.reward_by_function = reward_by_function
        self.kl_coef = kl_coef
        self.outcome = outcome

    def metrics(
        self, lr: float, seconds: Mapping[str, float], well_formed: Callable[..., float] | None
    ) -> dict[str, float | int]:
        """The step's line of metrics.jsonl, but for the run's own counters."""
        batch, total = self.batch, self.outcome.total
        scored = ~total.sums[..., 0].isnan()
        completions = [completion for group in batch.completions for completion in group]
        texts = [completion.text for completion in completions]
        lengths = torch.tensor([len(completion.token_ids) for completion in completions], dtype=torch.float32)
        mean = {name: float(total.sums[..., i][scored].mean()) for i, name in enumerate(SAMPLE_SUMS)}
        per_token = {
            name: float(total.sums[..., i][scored].sum()) / max(1, total.num_tokens)
            for i, name in enumerate(SAMPLE_SUMS)
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
            "kl/penalty": self.kl_coef * mean["kl_penalized"],
            "kl/coef": self.kl_coef,
            "lm_cross_entropy": -per_token["logprob"],
            "original_lm_cross_entropy": -per_token["ref_logprob"],
            "entropy": per_token["entropy"],
            "loss": total.loss,
            "grad_norm": self.outcome.grad_norm,
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
            "mismatch/mean_abs_logprob": total.mean_gap,
            "mismatch/max_abs_logprob": total.gap_max,
            "mismatch/engine_kl": total.engine_kl_sum / max(1, total.num_tokens),
            "mismatch/weights_cut": total.num_weights_cut / max(1, total.num_tokens),
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
                row = dict(zip(SAMPLE_SUMS, self.outcome.total.sums[b, k].tolist(), strict=True))
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
