"""Tokens that are the same have one row for the heads: loss, scores and gradients are those of a row for each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_backbone import alike_batch
from toy import toy_model

from fastkl.kernels.types import TokenCoefficients, TokenScores
from fastkl.sampling.params import Sampling
from fastkl.scoring import backbone
from fastkl.scoring.distinct import of_copies
from fastkl.scoring.pack import pack
from fastkl.scoring.scored_model import ScoredModel

CPU = torch.device("cpu")


def factors(n: slice, scores) -> TokenCoefficients:
    """Others for each of the N tokens, and dependent on its scores, as the objective's are."""
    places = torch.arange(n.start, n.stop, dtype=torch.float64)
    return TokenCoefficients(policy_logprobs=places.sin() * scores.ref_logprobs, entropy=places.cos() * scores.kl)


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_loss_scores_and_gradients_are_those_of_a_row_for_each_token(layout):
    """Among groups of which one has no sample that counts, and with ids that are banned in the first tokens."""
    backbone.register_packed_attention()
    policy, reference = (ScoredModel(toy_model(seed), layout) for seed in (0, 1))
    batch = alike_batch()
    batch.valid[1] = False
    ((_, micro),) = pack(batch, range(4), 1 << 30, CPU)
    assert micro.distinct is not None and len(micro.distinct.rows) < len(micro.target_ids)
    sampling = Sampling(min_tokens=2, stop_token_ids=(22,))
    splits, found = micro.completion_cu_seqlens[::4].tolist(), []
    for given in (micro, replace(micro, distinct=None)):
        policy.zero_grad()
        seen = []

        def noted(n, scores, seen=seen):
            seen.append((n.start, n.stop))
            return factors(n, scores)

        with policy.scoring(), reference.scoring():
            with torch.no_grad():
                hidden = reference.hidden(given)
            loss, scores = policy(given, hidden, sampling=sampling, coefficients=noted, row_splits=splits)
            loss.backward()
            plain = policy(given, hidden, sampling=sampling).scores
            weighted = (plain.policy_logprobs_support * torch.arange(len(micro.target_ids)).sin()).sum()
            gradient = torch.autograd.grad(weighted, policy.model.lm_head.weight)[0]
        assert seen[0][0] == 0 and seen[-1][1] == len(micro.target_ids) and {b for n in seen for b in n} <= {*splits}
        values = [x for x in (*scores.values(), *plain.values()) if x is not None]
        found.append([loss, gradient, *values, *(p.grad.clone() for p in policy.parameters())])
    assert len(found[0]) == len(found[1]) > 20
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_runs_of_groups_are_told_the_tokens_they_stand_for():
    """Group by group, each run's factors are the sums over the copies of its own tokens."""
    ((_, micro),) = pack(alike_batch(), range(4), 1 << 30, CPU)
    distinct, splits = micro.distinct, micro.completion_cu_seqlens[::4].tolist()
    values = torch.arange(len(distinct.rows), dtype=torch.float64)
    seen, sums = [], []

    def coefficients(n, scores):
        seen.append(n)
        assert torch.equal(scores.policy_logprobs, values[distinct.copies[n]])
        return TokenCoefficients(policy_logprobs=torch.arange(n.start, n.stop, dtype=torch.float64))

    summed = of_copies(coefficients, splits, distinct)
    for start, stop in ((0, 1), (1, 3), (3, 4)):
        rows = slice(distinct.splits[start], distinct.splits[stop])
        sums.append(summed(rows, TokenScores(values[rows])).policy_logprobs)
    assert seen == [slice(splits[0], splits[1]), slice(splits[1], splits[3]), slice(splits[3], splits[4])]
    expected = [sum(n for n, kind in enumerate(distinct.copies.tolist()) if kind == u) for u in range(len(values))]
    assert torch.cat(sums).tolist() == expected
