"""The data that moves between the stages, one type per arrow.

    prompts (B) -> rollout -> completions (B x K) -> reward -> RolloutBatch
        -> pack -> PackedBatch -> score -> TokenScores -> objective -> TokenCoefficients, Breakdown

Letters used for shapes everywhere in the project:

    B  prompts in a step            S  sequences, S = B * K         V  vocabulary
    K  samples per prompt           M  packed tokens (prompts and completions, no padding)
    T  completion length (tokens)   N  scored tokens (completions only, no padding)          H  hidden size

Everything here is frozen: a stage reads its input and returns something new. `TokenScores`, the output of scoring,
stands beside the operators in kernels/reference.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # settings and messages should not wait for torch
    import torch


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, ready for the generator."""

    token_ids: tuple[int, ...]  # what the model sees, special tokens and chat template included
    text: str  # the prompt as text; for chat messages, their rendering
    raw: str | list[dict[str, str]]  # what a reward function receives: the text, or the chat messages
    row: int  # position in the prompt file, for messages to people
    columns: Mapping[str, Any] = field(default_factory=dict)  # the data set's other columns, for reward functions


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled continuation. token_ids holds the end-of-sequence token, scored once, where the model sampled one."""

    token_ids: tuple[int, ...]  # [T]
    logprobs: tuple[float, ...]  # [T], nats; the generator's log-probs under the distribution it sampled from
    finish_reason: str  # "stop" (end-of-sequence sampled) or "length" (cut at max_new_tokens)
    text: str  # decoded without special tokens


@dataclass(frozen=True, slots=True)
class Settled:
    """What a rollout brings to its updates that is computed once, before the first of them.

    A tensor per prompt, f32 [tokens of its valid samples, end to end], on the CPU. None: computed in the update itself.
    """

    advantages: tuple[torch.Tensor | None, ...] | None = None  # [B]; each token's
    old_logprobs: tuple[torch.Tensor | None, ...] | None = None  # [B]; under the policy before the first update


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """One step's samples and their rewards."""

    prompts: tuple[Prompt, ...]  # [B]
    completions: tuple[tuple[Completion, ...], ...]  # [B][K]
    rewards: torch.Tensor  # f32 [B, K], CPU; 0 where not valid
    valid: torch.Tensor  # bool [B, K], CPU; False: the reward does not apply, the sample has left its group
    policy_version: int  # weight version that sampled the completions
    settled: Settled = Settled()

    def is_stale(self, step: int) -> bool:
        """Whether the policy that trains on it in this step is no longer the one that sampled it."""
        return self.policy_version < step - 1


@dataclass(frozen=True, slots=True)
class RewardNotes:
    """What the reward functions left in a step beside their sum."""

    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # of log_extra, each [B * K]
    seconds: Mapping[str, float] = field(default_factory=dict)  # wall time by function
    values: Mapping[str, Sequence[float | None]] = field(default_factory=dict)  # each function's rewards [B * K]
    retried: Mapping[str, int] = field(default_factory=dict)  # failed attempts that were repeated, by function


@dataclass(frozen=True, slots=True)
class Redraws:
    """What dynamic sampling did in a step."""

    num_replaced: int  # groups that were drawn and left out, since their rewards did not differ
    mean_reward: float | None  # over all samples that were drawn, those left out included


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """Packed tokens as a tree of sequences that begin alike: the m tokens of a row in which none is computed twice.

    The row is in depth-first order, so that the tokens which see one, directly or not, stand end to end behind it.
    What says how attention is to be laid out stays on the CPU.
    """

    source: torch.Tensor  # i64 [m]; the packed position of every token of the row
    place: torch.Tensor  # i64 [M]; where each packed token stands in the row; m for a sequence's last, not computed
    starts: tuple[int, ...]  # where a sequence begins to differ from all before it, ascending
    paths: tuple[torch.Tensor, ...]  # i64, on the CPU: the row's tokens that the one at each of `starts` sees before it
    depth: torch.Tensor  # i64 [m], on the CPU; how many tokens of its sequences come before it
    end: torch.Tensor  # i64 [m], on the CPU; row[i : end[i]] see token i

    def before(self, token: int) -> torch.Tensor:
        """The row's tokens that this one sees before it, i64, on the CPU."""
        return (self.end[:token] > token).nonzero().flatten()

    def to(self, device: torch.device) -> PrefixTree:
        """With `source` and `place` on the device."""
        return replace(self, source=self.source.to(device), place=self.place.to(device))


@dataclass(frozen=True, slots=True)
class Distinct:
    """Which of a micro-batch's N scored tokens are the same: equal, after equal tokens, in samples of one prompt."""

    rows: torch.Tensor  # i64 [U]; one of each kind, group by group; indices into N
    copies: torch.Tensor  # i64 [N]; the kind of each scored token; indices into U
    splits: tuple[int, ...]  # len G + 1; group g owns rows[splits[g] : splits[g + 1]]

    def to(self, device: torch.device) -> Distinct:
        """With its tensors on the device."""
        return replace(self, rows=self.rows.to(device), copies=self.copies.to(device))


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Whole prompt groups laid end to end without padding: one micro-batch of G groups, s = G * K sequences. Or a part
    of one group, in which the samples of the other parts are not valid.

    The hidden state at packed position `score_positions[n]` predicts `target_ids[n]`: the shift by one happens once, in
    pack.py, and nowhere else.
    """

    input_ids: torch.Tensor  # i64 [M]
    position_ids: torch.Tensor  # i64 [M]; starts at 0 in every sequence
    cu_seqlens: torch.Tensor  # i32 [s + 1]; sequence i owns input_ids[cu_seqlens[i] : cu_seqlens[i + 1]]
    score_positions: torch.Tensor  # i64 [N]; indices into M
    target_ids: torch.Tensor  # i64 [N]
    completion_cu_seqlens: torch.Tensor  # i32 [s + 1]; sequence i owns the scored tokens between its two entries
    completion_positions: torch.Tensor  # i64 [N]; how many tokens of its completion come before the token
    engine_logprobs: torch.Tensor  # f32 [N]; what the generator recorded
    rewards: torch.Tensor  # f32 [G, K]
    valid: torch.Tensor  # bool [G, K]
    lengths: tuple[int, ...]  # the sequences' lengths as Python ints (no device round trip); len s
    tree: PrefixTree | None = None  # None: not looked for, so that only layouts that compute every sequence apart do
    distinct: Distinct | None = None  # None: each of the N has a row of its own
    advantages: torch.Tensor | None = None  # f32 [N], where they are known beforehand
    old_logprobs: torch.Tensor | None = None  # f32 [N], where the policy is no longer the one that sampled

    @property
    def state_positions(self) -> torch.Tensor:
        """The packed positions whose states the heads take, i64 [U]: N of them, or one for each distinct token."""
        return self.score_positions if self.distinct is None else self.score_positions[self.distinct.rows]

    @property
    def state_target_ids(self) -> torch.Tensor:
        """The token ids that these states are to predict, i64 [U]."""
        return self.target_ids if self.distinct is None else self.target_ids[self.distinct.rows]

    @property
    def completion_lengths(self) -> torch.Tensor:
        """Scored tokens per sequence, i64 [s]."""
        return self.completion_cu_seqlens.diff().long()


SAMPLE_SUMS = (
    *("logprob", "ref_logprob", "entropy", "kl_exact", "kl_support", "kl_off_support", "kl_weighted"),
    *("kl_penalized", "reward_penalized"),
)
"""What is summed over a completion's tokens, in nats; the last is its penalised reward R_i. Without a reference, what
needs one is NaN. kl_weighted: the estimate of the KL where the policy is not the one that sampled (weighted_k1)."""


@dataclass(frozen=True, slots=True)
class Breakdown:
    """What the objective computed for one micro-batch of G groups, or for a whole step of B. Sums are over tokens."""

    sums: torch.Tensor  # f32 [G, K, len(SAMPLE_SUMS)], CPU; NaN where the sample was not scored
    loss: float = 0.0  # the micro-batch's share
    num_tokens: int = 0  # scored tokens
    gap_sum: float = 0.0  # |engine's - trainer's log-prob|, nats
    gap_max: float = 0.0  # the largest of them
    engine_kl_sum: float = 0.0  # k3 estimate of KL(engine, trainer), nats
    num_weights_cut: int = 0  # importance weights cut at the cap
    num_clipped: int = 0  # tokens whose ratio to the policy that sampled was cut
    num_outside: int = 0  # tokens that the replayed sampling settings would not have allowed

    @property
    def mean_gap(self) -> float:
        """Mean |engine - trainer| log-prob over the scored tokens, nats."""
        return self.gap_sum / max(1, self.num_tokens)

    def column(self, name: str) -> torch.Tensor:
        """One of SAMPLE_SUMS, f32 [G, K]."""
        return self.sums[..., SAMPLE_SUMS.index(name)]

    def mean(self, name: str) -> float:
        """Its mean over the scored samples, nats; NaN where there are none."""
        values = self.column(name)
        return float(values[~values.isnan()].mean())


@dataclass(frozen=True, slots=True)
class Reused:
    """What became of a rollout that was trained on several times."""

    num_updates: int  # that were applied
    clipped_share: float  # of the tokens of all updates, those whose ratio was cut
    drift: float  # k3 estimate of KL(sampler, policy) in the last update, nats per token


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What became of one optimisation step."""

    total: Breakdown  # of the whole step
    grad_norm: float = 0.0  # before clipping
    applied: bool = True  # False: loss or gradient was not finite, and the weights are as they were
    reused: Reused | None = None  # None: one update
