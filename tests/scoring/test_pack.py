"""Packing: the shift by one, group bounds and micro-batches, against the plain definition."""

from __future__ import annotations

import random

import pytest
import torch
from test_backbone import alike_batch
from toy import toy_batch, toy_model

from fastkl.scoring.pack import pack, sample_tokens, scorable_groups, split_groups
from fastkl.scoring.prefixes import Begun, tree_of

CPU = torch.device("cpu")


def test_every_completion_token_is_predicted_from_the_position_before_it():
    batch = toy_batch(toy_model())
    ((members, micro),) = pack(batch, [0, 1, 2], 1 << 30, CPU)
    assert members == [0, 1, 2]
    n = 0
    for i in range(12):
        b, k = divmod(i, 4)
        lo, hi = micro.cu_seqlens[i : i + 2].tolist()
        first, last = micro.completion_cu_seqlens[i : i + 2].tolist()
        prompt, completion = batch.prompts[b].token_ids, batch.completions[b][k].token_ids
        if not batch.valid[b, k]:
            assert (lo, first) == (hi, last)
            continue
        assert tuple(micro.input_ids[lo:hi].tolist()) == prompt + completion
        assert micro.position_ids[lo:hi].tolist() == list(range(hi - lo))
        for t, token in enumerate(completion):
            assert micro.target_ids[n] == token
            assert micro.score_positions[n] == lo + len(prompt) + t - 1
            assert micro.input_ids[micro.score_positions[n] + 1] == token
            n += 1
        assert last == n
    assert n == micro.target_ids.numel() == micro.score_positions.numel() == micro.engine_logprobs.numel()


def test_end_of_sequence_is_scored_once_and_nothing_after_it():
    batch = toy_batch(toy_model(seed=3), max_new_tokens=12)
    ((_, micro),) = pack(batch, [0, 1, 2], 1 << 30, CPU)
    stopped = [c for group in batch.completions for c in group if c.finish_reason == "stop"]
    assert stopped, "the toy must stop sometimes for this test to mean anything"
    scored = [
        micro.target_ids[lo:hi].tolist()
        for lo, hi in zip(micro.completion_cu_seqlens, micro.completion_cu_seqlens[1:], strict=False)
    ]
    assert all(tokens.count(22) <= 1 and 22 not in tokens[:-1] for tokens in scored)


def test_groups_stay_whole_and_fill_micro_batches_in_order():
    assert split_groups([5, 5, 5, 30, 1, 1], 11) == [[0, 1], [2], [3], [4, 5]]
    assert split_groups([], 11) == []


def test_micro_batches_hold_the_same_tokens_as_the_one_big_batch():
    batch = toy_batch(toy_model())
    ((_, whole),) = pack(batch, [0, 1, 2], 1 << 30, CPU)
    parts = pack(batch, [0, 1, 2], 20, CPU)
    assert len(parts) > 1
    assert [g for members, _ in parts for g in members] == [0, 1, 2]
    assert torch.equal(torch.cat([micro.target_ids for _, micro in parts]), whole.target_ids)
    assert torch.equal(torch.cat([micro.input_ids for _, micro in parts]), whole.input_ids)


def test_what_is_computed_once_is_counted_once():
    """By the rows that are computed then: two groups fit exactly, or not at all."""
    for batch in (toy_batch(toy_model()), alike_batch()):
        groups = range(len(batch.prompts))
        sizes = [len(pack(batch, [g], 1 << 30, CPU)[0][1].tree.source) for g in groups]
        assert [sum(sample_tokens(batch, g, once=True)) for g in groups] == sizes
        limit = sizes[0] + sizes[1]
        assert pack(batch, [0, 1, 2], limit, CPU, once=True)[0][0] == [0, 1]
        assert pack(batch, [0, 1, 2], limit - 1, CPU, once=True)[0][0] == [0]
        assert pack(batch, [0, 1, 2], limit, CPU)[0][0] == [0]


def test_equal_tokens_after_equal_ones_in_samples_of_a_prompt_are_one_distinct_token():
    """Not so across prompts, whose tokens may have other limits (min_tokens). By the plain definition, in a dict."""
    batch = alike_batch()
    ((_, micro),) = pack(batch, range(4), 1 << 30, CPU)
    kinds, expected = {}, []
    for g, (p, group, valid) in enumerate(zip(batch.prompts, batch.completions, batch.valid.tolist(), strict=True)):
        for ids in (c.token_ids for c, ok in zip(group, valid, strict=True) if ok):
            for end in range(1, len(ids) + 1):
                expected.append(kinds.setdefault((g, p.token_ids + ids[:end]), len(kinds)))
    copies, rows, splits = micro.distinct.copies, micro.distinct.rows, micro.distinct.splits
    assert len(rows) == len(kinds) < len(expected) == len(copies)
    assert torch.equal(copies[:, None] == copies, torch.tensor(expected)[:, None] == torch.tensor(expected))
    assert torch.equal(copies[rows], torch.arange(len(rows)))  # each row is one of its kind
    assert torch.equal(micro.target_ids[rows][copies], micro.target_ids)
    of_groups = torch.searchsorted(micro.completion_cu_seqlens[::4].contiguous(), rows, right=True) - 1
    assert splits == (0, *torch.bincount(of_groups, minlength=4).cumsum(0).tolist())
    ((_, alone),) = pack(batch, [3], 1 << 30, CPU)
    different = toy_batch(toy_model())
    different.valid[:, 1:] = False
    assert pack(different, [0, 1, 2], 1 << 30, CPU)[0][1].distinct is None and alone.distinct is not None


@pytest.mark.parametrize("seed", range(5))
def test_a_tree_is_the_tree_of_all_beginnings(seed):
    """Random sequences of three ids: by sets of beginnings, and by which beginning is one of which."""
    drawn = random.Random(seed)
    sequences = [tuple(drawn.randrange(3) for _ in range(drawn.randrange(1, 7))) for _ in range(12)]
    starts = [0, *torch.tensor([len(s) for s in sequences]).cumsum(0).tolist()]
    tree, begun = tree_of(sequences, starts[:-1], starts[-1]), Begun()
    added = [begun.add(ids[:-1]) for ids in sequences]
    rows = {}
    for ids, start in zip(sequences, starts[:-1], strict=True):
        assert tree.place[start + len(ids) - 1] == len(tree.source)
        for end in range(1, len(ids)):
            row = int(tree.place[start + end - 1])
            assert rows.setdefault(ids[:end], row) == row
    assert sorted(rows.values()) == list(range(len(tree.source))) and sum(added) == len(rows)
    for a, row in rows.items():
        assert tree.depth[row] == len(a) - 1
        seen = {rows[a[:end]] for end in range(1, len(a))}
        assert set(tree.before(row).tolist()) == seen
        assert all((row <= other < tree.end[row]) == (b[: len(a)] == a) for b, other in rows.items())
    assert len(tree.starts) == len(tree.paths) > 3 and tree.starts[0] == 0
    for start, path in zip(tree.starts, tree.paths, strict=True):
        assert torch.equal(path, tree.before(start))
    flat = [token for ids in sequences for token in ids]
    assert [flat[at] for at in tree.source] == [ids[-1] for ids, _ in sorted(rows.items(), key=lambda item: item[1])]


def test_a_group_without_enough_valid_samples_is_not_scorable():
    valid = torch.tensor([[True, True], [True, False], [False, False]])
    assert scorable_groups(valid, 2) == [0]
    assert scorable_groups(valid, 1) == [0, 1]
