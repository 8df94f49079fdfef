"""Pack: a RolloutBatch becomes micro-batches of whole prompt groups, laid end to end without padding.

In: one step's prompts, completions and rewards. Out: PackedBatches of at most `micro_batch_tokens` tokens (a group
larger than that gets one of its own). A sample whose reward does not apply keeps its place in the group with length
zero: it is neither forwarded nor scored. Groups in which no sample can have an advantage are left out by the caller.

There is no padding, so none can be scored. The end-of-sequence token is scored once, as the token that the policy
chose.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastkl.types import Completion, PackedBatch, Prompt, RolloutBatch


def scorable(completions: Sequence[Sequence[Completion]], valid: torch.Tensor, truncated: str) -> torch.Tensor:
    """Which samples take part, bool [B, K]: the `valid` ones, without those cut at max_new_tokens if told to "drop".

    A sample takes part in everything (reward, baseline, KL, loss) or in nothing.
    """
    if truncated == "keep":
        return valid
    return valid & torch.tensor([[c.finish_reason != "length" for c in group] for group in completions])


def scorable_groups(valid: torch.Tensor, min_samples: int) -> list[int]:
    """Indices of the groups with at least `min_samples` valid samples. valid: bool [B, K]."""
    return [g for g, count in enumerate(valid.sum(dim=1).tolist()) if count >= min_samples]


def split_groups(group_tokens: Sequence[int], micro_batch_tokens: int) -> list[list[int]]:
    """Cuts consecutive groups into runs of at most `micro_batch_tokens` tokens; an oversized group stands alone."""
    runs: list[list[int]] = []
    filled = 0
    for group, tokens in enumerate(group_tokens):
        if not runs or filled + tokens > micro_batch_tokens:
            runs.append([])
            filled = 0
        runs[-1].append(group)
        filled += tokens
    return runs


def pack(
    batch: RolloutBatch,
    groups: Sequence[int],
    micro_batch_tokens: int,
    device: torch.device,
    *,
    prompts_once: bool = False,
) -> list[tuple[list[int], PackedBatch]]:
    """Packs the named groups of `batch`; returns (group indices, PackedBatch) per micro-batch, tensors on `device`.

    prompts_once: micro_batch_tokens counts a group's prompt once, for a layout that computes it once.
    """

    def tokens_of(g: int) -> int:
        prompt = len(batch.prompts[g].token_ids)
        completions = [len(c.token_ids) for c, ok in zip(batch.completions[g], batch.valid[g], strict=True) if ok]
        return sum(completions) + prompt * (1 if prompts_once else len(completions))

    runs = split_groups([tokens_of(g) for g in groups], micro_batch_tokens)
    members = [[groups[i] for i in run] for run in runs]
    return [(run, _pack_groups(batch, run, device)) for run in members]


def _pack_groups(batch: RolloutBatch, groups: Sequence[int], device: torch.device) -> PackedBatch:
    input_ids: list[int] = []
    position_ids: list[int] = []
    score_positions: list[int] = []
    target_ids: list[int] = []
    completion_positions: list[int] = []
    engine_logprobs: list[float] = []
    lengths: list[int] = []
    scored: list[int] = []
    for prompt, completion in _sequences(batch, groups):
        ids = prompt.token_ids + completion.token_ids if completion else ()
        if completion:
            # Token t of the completion is predicted at the position before it: the only shift by one in the project.
            first = len(input_ids) + len(prompt.token_ids) - 1
            score_positions.extend(range(first, first + len(completion.token_ids)))
            target_ids.extend(completion.token_ids)
            completion_positions.extend(range(len(completion.token_ids)))
            engine_logprobs.extend(completion.logprobs)
        input_ids.extend(ids)
        position_ids.extend(range(len(ids)))
        lengths.append(len(ids))
        scored.append(len(completion.token_ids) if completion else 0)

    def int64(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    def settled(of_groups: tuple[torch.Tensor, ...] | None) -> torch.Tensor | None:
        return None if of_groups is None else torch.cat([of_groups[g] for g in groups]).to(device)

    return PackedBatch(
        input_ids=int64(input_ids),
        position_ids=int64(position_ids),
        cu_seqlens=cumulative(lengths, device),
        score_positions=int64(score_positions),
        target_ids=int64(target_ids),
        completion_cu_seqlens=cumulative(scored, device),
        completion_positions=int64(completion_positions),
        engine_logprobs=torch.tensor(engine_logprobs, dtype=torch.float32, device=device),
        rewards=batch.rewards[list(groups)].to(device),
        valid=batch.valid[list(groups)].to(device),
        lengths=tuple(lengths),
        prompt_lengths=tuple(len(batch.prompts[g].token_ids) for g in groups),
        advantages=settled(batch.settled.advantages),
        old_logprobs=settled(batch.settled.old_logprobs),
    )


def _sequences(batch: RolloutBatch, groups: Sequence[int]) -> list[tuple[Prompt, Completion | None]]:
    return [
        (batch.prompts[g], completion if ok else None)
        for g in groups
        for completion, ok in zip(batch.completions[g], batch.valid[g].tolist(), strict=True)
    ]


def cumulative(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """cu_seqlens of the given lengths: i32 [len + 1], starting at 0."""
    ends = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    return ends.to(device=device, dtype=torch.int32)
