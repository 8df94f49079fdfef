"""What a step reports: what the update computed, as records of samples.jsonl and a line of metrics.jsonl.

In: what went into the step and what came out (`StepReport`). Out: the step's samples, and what the formulas of
metrics.py read (`FinishedStep`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from fastkl.types import SAMPLE_SUMS, Breakdown, Completion, Prompt, Redraws, RewardNotes, RolloutBatch, StepOutcome

COLUMN_CHARACTERS = 2000  # of a data set's column in samples.jsonl, which repeats it for every completion


def distinct_2(texts: Sequence[str]) -> float:
    """Distinct word bigrams over all word bigrams of the texts together (Li et al. 2016); 0 without any bigram."""
    bigrams = [pair for text in texts for pair in _pairs(text.split())]
    return len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def _pairs(words: list[str]) -> Iterator[tuple[str, str]]:
    return zip(words, words[1:], strict=False)


def about_prompt(prompt: Prompt) -> dict[str, Any]:
    """What samples.jsonl says of a prompt: its row in the prompt file, its text, its messages where it is a chat, and
    the data set's other columns, such as the expected answer."""
    chat = {} if isinstance(prompt.raw, str) else {"messages": prompt.raw}
    columns = {name: bounded(value) for name, value in prompt.columns.items()}
    return {"row": prompt.row, "prompt": prompt.text, **chat, **({"columns": columns} if columns else {})}


def bounded(value: Any) -> Any:
    """The value; the beginning of its text where that is longer than COLUMN_CHARACTERS."""
    text = value if isinstance(value, str) else str(value)
    return value if len(text) <= COLUMN_CHARACTERS else f"{text[:COLUMN_CHARACTERS]}…"


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did."""

    step: int
    batch: RolloutBatch
    reward_by_function: Mapping[str, float]
    kl_coef: float  # the beta that the step's loss was computed with
    outcome: StepOutcome
    reward_notes: RewardNotes = RewardNotes()  # what the reward functions left beside the rewards
    redraws: Redraws | None = None  # None without dynamic sampling
    has_reference: bool = True  # False: nothing about a KL is logged
    kl_direction: str = "reverse"  # what the penalty charges, as in --kl-direction
    canary: Breakdown | None = None  # with --rollout-ahead: of what was drawn right after the push of this step

    @property
    def is_stale(self) -> bool:
        """Whether the samples are those of an earlier policy than the step's."""
        return self.batch.is_stale(self.step)

    def kl_of(self, sums: Mapping[str, float]) -> float:
        """The estimate of the KL from a row of SAMPLE_SUMS, or a mean of rows; of stale samples it is weighted."""
        return sums["kl_weighted"] if self.is_stale else sums["logprob"] - sums["ref_logprob"]

    def samples(self) -> list[dict[str, Any]]:
        """One record per completion, for samples.jsonl; scores are null for a sample that left its group."""
        records = []
        for b, (prompt, group) in enumerate(zip(self.batch.prompts, self.batch.completions, strict=True)):
            for k, completion in enumerate(group):
                valid = bool(self.batch.valid[b, k])
                row = dict(zip(SAMPLE_SUMS, self.outcome.total.sums[b, k].tolist(), strict=True))
                num_tokens = len(completion.token_ids)
                place = b * len(group) + k
                records.append(
                    {
                        "step": self.step,
                        **about_prompt(prompt),
                        "completion": completion.text,
                        "reward": float(self.batch.rewards[b, k]) if valid else None,
                        "rewards": {name: values[place] for name, values in self.reward_notes.values.items()},
                        "penalized_reward": row["reward_penalized"],
                        **({"kl": self.kl_of(row)} if self.has_reference else {}),
                        "lm_cross_entropy": -row["logprob"] / max(1, num_tokens),
                        **(
                            {"original_lm_cross_entropy": -row["ref_logprob"] / max(1, num_tokens)}
                            if self.has_reference
                            else {}
                        ),
                        "num_tokens": num_tokens,
                        "finish_reason": completion.finish_reason,
                    }
                    | extra_of(self.reward_notes, place)
                )
        return records


def extra_of(notes: RewardNotes, place: int) -> dict[str, Any]:
    """What the reward functions gave to log_extra for one completion of the B * K."""
    columns = notes.columns
    return {"extra": {column: values[place] for column, values in columns.items()}} if columns else {}


@dataclass(frozen=True)
class FinishedStep:
    """What the formulas of metrics.py read: the step's report, what the run adds to it, and what several keys share."""

    report: StepReport
    lr: float
    seconds: Mapping[str, float]  # by stage
    checker: Callable[[list[str]], float] | None = None  # texts -> share of well-formed sentences
    skipped_steps: int = 0  # so far, as are the tokens
    tokens_generated: int = 0
    kl_alarm: bool = False
    peak_rss_bytes: int | None = None  # so far; None where it was not measured
    peak_gpu_bytes: int | None = None
    evaluation: Mapping[str, float] = field(default_factory=dict)  # eval/* and eval_error/* where there was one

    @property
    def total(self) -> Breakdown:
        """What the update computed."""
        return self.report.outcome.total

    @property
    def compared(self) -> Breakdown:
        """What compares generator and trainer where both have the same weights: the canary, or the step's samples."""
        return self.report.canary or self.total

    @property
    def num_tokens(self) -> int:
        """Scored tokens, at least 1: what sums over them are divided by."""
        return max(1, self.total.num_tokens)

    @cached_property
    def effective_share(self) -> float:
        """(sum W)^2 / (n sum W^2) over the n scored samples, W = pi(y) / e(y) of whole completions (Kish 1965)."""
        batch = self.report.batch
        engine = torch.tensor([[sum(c.logprobs) for c in g] for g in batch.completions], dtype=torch.float64)
        log_weights = (self.total.column("logprob") - engine)[self.scored]
        twice_the_sum, sum_of_squares = 2 * log_weights.logsumexp(0), (2 * log_weights).logsumexp(0)
        return float((twice_the_sum - sum_of_squares).exp()) / max(1, len(log_weights))

    @cached_property
    def scored(self) -> torch.Tensor:
        """Which samples took part in the update, bool [B, K]."""
        return ~self.total.sums[..., 0].isnan()

    @cached_property
    def mean(self) -> dict[str, float]:
        """Of each of SAMPLE_SUMS, the mean over the scored samples."""
        return {name: float(self.total.column(name)[self.scored].mean()) for name in SAMPLE_SUMS}

    @cached_property
    def per_token(self) -> dict[str, float]:
        """Of each of SAMPLE_SUMS, the mean over the scored tokens."""
        return {name: float(self.total.column(name)[self.scored].sum()) / self.num_tokens for name in SAMPLE_SUMS}

    @cached_property
    def rewards(self) -> torch.Tensor:
        """Those that apply, f32."""
        return self.report.batch.rewards[self.report.batch.valid]

    @cached_property
    def completions(self) -> list[Completion]:
        """All of the step, [B * K]."""
        return [completion for group in self.report.batch.completions for completion in group]

    @cached_property
    def lengths(self) -> torch.Tensor:
        """Their tokens, f32 [B * K]."""
        return torch.tensor([len(completion.token_ids) for completion in self.completions], dtype=torch.float32)

    @property
    def distinct_2(self) -> float:
        """Of all completions together."""
        return distinct_2([completion.text for completion in self.completions])

    @property
    def well_formed(self) -> float | None:
        """Share of well-formed sentences; None without a checker."""
        if self.checker is None:
            return None
        batch = self.report.batch
        pairs = zip(batch.prompts, batch.completions, strict=True)
        return self.checker([p.text + c.text for p, group in pairs for c in group])

    @property
    def step_seconds(self) -> float:
        """All stages together."""
        return sum(self.seconds.values())
