"""Packing: the shift by one, group bounds and micro-batches, against the plain definition."""

from __future__ import annotations

import torch
from toy import toy_batch, toy_model

from fastkl.scoring.pack import pack, scorable_groups, split_groups

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


def test_a_prompt_that_is_computed_once_is_counted_once():
    batch = toy_batch(toy_model())
    sizes = [
        sum(len(c.token_ids) for c, ok in zip(group, valid, strict=True) if ok) + len(p.token_ids)
        for p, group, valid in zip(batch.prompts, batch.completions, batch.valid.tolist(), strict=True)
    ]
    assert [g for g, _ in pack(batch, [0, 1, 2], sum(sizes), CPU, prompts_once=True)] == [[0, 1, 2]]
    assert len(pack(batch, [0, 1, 2], sum(sizes), CPU)) > 1
    assert [g for g, _ in pack(batch, [0, 1, 2], sum(sizes) - 1, CPU, prompts_once=True)] == [[0, 1], [2]]


def test_a_group_without_enough_valid_samples_is_not_scorable():
    valid = torch.tensor([[True, True], [True, False], [False, False]])
    assert scorable_groups(valid, 2) == [0]
    assert scorable_groups(valid, 1) == [0, 1]
