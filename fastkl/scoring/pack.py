"""Pack: a RolloutBatch becomes micro-batches of whole prompt groups, laid end to end without padding.

In: one step's prompts, completions and rewards. Out: PackedBatches of at most `micro_batch_tokens` tokens. A group
larger than that gets one of its own, or is cut between samples where the caller can do with parts of groups: then each
part holds some of its samples, and only a single sample may be larger than the limit. A sample whose reward does not
apply keeps its place in the group with length zero: it is neither forwarded nor scored. Groups in which no sample can
have an advantage are left out by the caller.

Beginnings that sequences have in common are found here, while their ids are at hand (prefixes.py).

There is no padding, so none can be scored. The end-of-sequence token is scored once, as the token that the policy
chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fastkl.distributed.world import ALONE, World
from fastkl.scoring.prefixes import Begun, distinct_of, tree_of
from fastkl.types import Completion, PackedBatch, Prompt, RolloutBatch, Settled


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


def dealt_groups(group_tokens: Sequence[int], size: int) -> list[list[int]]:
    """The groups of each of `size` processes, in order: the longest that is left goes to the one with the least to do.

    It follows from the lengths alone, so that every process knows what all others have.
    """
    shares: list[list[int]] = [[] for _ in range(size)]
    loads = [0] * size
    for group in sorted(range(len(group_tokens)), key=lambda g: -group_tokens[g]):
        rank = loads.index(min(loads))
        shares[rank].append(group)
        loads[rank] += group_tokens[group]
    return [sorted(share) for share in shares]


def pack(
    batch: RolloutBatch,
    groups: Sequence[int],
    micro_batch_tokens: int,
    device: torch.device,
    *,
    once: bool = False,
    cut: bool = False,
    world: World = ALONE,
    equally: bool = False,
) -> list[tuple[list[int], PackedBatch]]:
    """Packs the named groups of `batch`; returns (group indices, PackedBatch) per micro-batch, tensors on `device`.

    once: micro_batch_tokens counts what samples of a group begin with alike once, for a layout that computes it once.
    cut: a group that is larger comes in parts, in which the other samples are not valid. world: only this process's
    share of the groups is packed; equally: into as many micro-batches as every other process has, the last ones without
    a scored token (their forwards are collective).
    """
    tokens = [sum(sample_tokens(batch, g, once=once)) for g in groups]

    def parts_for(share: Sequence[int]) -> list[tuple[list[int], RolloutBatch]]:
        found: list[tuple[list[int], RolloutBatch]] = []
        for run in split_groups([tokens[i] for i in share], micro_batch_tokens):
            members, parts = [groups[share[i]] for i in run], [batch]
            if cut and tokens[share[run[0]]] > micro_batch_tokens:
                parts = parts_of(batch, members[0], micro_batch_tokens, once=once)
            found += [(members, part) for part in parts]
        return found

    shares = dealt_groups(tokens, world.size)
    mine = parts_for(shares[world.rank])
    missing = max(len(parts_for(share)) for share in shares) - len(mine) if equally else 0
    packed = [(members, _pack_groups(part, members, device)) for members, part in mine]
    return packed + [([], nothing(batch, device))] * missing


def sample_tokens(batch: RolloutBatch, group: int, *, once: bool) -> list[int]:
    """The tokens that each sample [K] of a group adds to a micro-batch; 0 for one that is not valid."""
    begun, found = Begun(), []
    for ids, valid in zip(_ids(batch, group), batch.valid[group].tolist(), strict=True):
        found.append(0 if not valid else begun.add(ids[:-1]) if once else len(ids))
    return found


def too_large(batch: RolloutBatch, groups: Sequence[int], micro_batch_tokens: int, *, once: bool) -> list[int]:
    """Those of the groups that `pack` would cut."""
    return [g for g in groups if sum(sample_tokens(batch, g, once=once)) > micro_batch_tokens]


def parts_of(batch: RolloutBatch, group: int, micro_batch_tokens: int, *, once: bool) -> list[RolloutBatch]:
    """The batch several times, each with a run of the group's samples for its only valid ones, in their order."""
    sequences, runs = _ids(batch, group), list[list[int]]()
    filled, begun = 0, Begun()
    for k in batch.valid[group].nonzero()[:, 0].tolist():
        tokens = begun.add(sequences[k][:-1]) if once else len(sequences[k])
        if not runs or filled + tokens > micro_batch_tokens:
            runs.append([])
            filled, begun = 0, Begun()
            tokens = begun.add(sequences[k][:-1]) if once else len(sequences[k])
        runs[-1].append(k)
        filled += tokens
    return [_only(batch, group, run) for run in runs]


def _ids(batch: RolloutBatch, group: int) -> list[tuple[int, ...]]:
    """The token ids of a group's sequences, [K]."""
    return [batch.prompts[group].token_ids + completion.token_ids for completion in batch.completions[group]]


def _only(batch: RolloutBatch, group: int, samples: Sequence[int]) -> RolloutBatch:
    """The batch with these samples for the group's only valid ones."""
    valid = batch.valid.clone()
    valid[group] = False
    valid[group, list(samples)] = True
    lengths = [len(c.token_ids) for c, ok in zip(batch.completions[group], batch.valid[group], strict=True) if ok]
    taken = torch.tensor([k in samples for k in batch.valid[group].nonzero()[:, 0].tolist()], dtype=torch.bool)
    tokens = taken.repeat_interleave(torch.tensor(lengths))

    def of_part(values: tuple[torch.Tensor | None, ...] | None) -> tuple[torch.Tensor | None, ...] | None:
        if values is None or values[group] is None:
            return values
        return (*values[:group], values[group][tokens], *values[group + 1 :])

    settled = Settled(of_part(batch.settled.advantages), of_part(batch.settled.old_logprobs))
    return replace(batch, valid=valid, settled=settled)


def nothing(batch: RolloutBatch, device: torch.device) -> PackedBatch:
    """A micro-batch of one group without a sample that counts: two tokens are forwarded, none is scored."""

    def empty(dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(0, dtype=dtype, device=device)

    num_samples, settled = batch.rewards.shape[1], batch.settled
    lengths = (2, *[0] * (num_samples - 1))
    return PackedBatch(
        input_ids=torch.zeros(2, dtype=torch.int64, device=device),
        position_ids=torch.arange(2, device=device),
        cu_seqlens=cumulative(lengths, device),
        score_positions=empty(torch.int64),
        target_ids=empty(torch.int64),
        completion_cu_seqlens=cumulative([0] * num_samples, device),
        completion_positions=empty(torch.int64),
        engine_logprobs=empty(torch.float32),
        rewards=torch.zeros(1, num_samples, device=device),
        valid=torch.zeros(1, num_samples, dtype=torch.bool, device=device),
        lengths=lengths,
        tree=tree_of([(0, 0)], [0], 2).to(device),
        advantages=None if settled.advantages is None else empty(torch.float32),
        old_logprobs=None if settled.old_logprobs is None else empty(torch.float32),
    )


def _pack_groups(batch: RolloutBatch, groups: Sequence[int], device: torch.device) -> PackedBatch:
    input_ids: list[int] = []
    position_ids: list[int] = []
    score_positions: list[int] = []
    target_ids: list[int] = []
    completion_positions: list[int] = []
    engine_logprobs: list[float] = []
    lengths: list[int] = []
    scored: list[int] = []
    sequences: list[tuple[int, ...]] = []
    starts: list[int] = []
    for prompt, completion in _sequences(batch, groups):
        ids = prompt.token_ids + completion.token_ids if completion else ()
        if completion:
            sequences.append(ids)
            starts.append(len(input_ids))
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

    tree = tree_of(sequences, starts, len(input_ids))
    owners = torch.arange(len(groups)).repeat_interleave(torch.tensor(scored).view(len(groups), -1).sum(1))
    positions, targets = (torch.tensor(values, dtype=torch.int64) for values in (score_positions, target_ids))
    distinct = distinct_of(tree, positions, targets, owners, len(groups))

    def int64(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    def settled(of_groups: tuple[torch.Tensor | None, ...] | None) -> torch.Tensor | None:
        known = [value for g in groups if of_groups is not None and (value := of_groups[g]) is not None]
        return torch.cat(known).to(device) if known and len(known) == len(groups) else None

    return PackedBatch(
        input_ids=int64(input_ids),
        position_ids=int64(position_ids),
        cu_seqlens=cumulative(lengths, device),
        score_positions=positions.to(device),
        target_ids=targets.to(device),
        completion_cu_seqlens=cumulative(scored, device),
        completion_positions=int64(completion_positions),
        engine_logprobs=torch.tensor(engine_logprobs, dtype=torch.float32, device=device),
        rewards=batch.rewards[list(groups)].to(device),
        valid=batch.valid[list(groups)].to(device),
        lengths=tuple(lengths),
        tree=tree.to(device),
        distinct=distinct.to(device) if distinct else None,
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
