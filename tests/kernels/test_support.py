"""The support: the ids that the sampler keeps, against a plain loop over sorted ids and against vLLM's own function."""

from __future__ import annotations

import pytest
import torch
from cases import slow
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkl.errors import UserError
from fastkl.kernels import operators
from fastkl.kernels.cpu import supports
from fastkl.kernels.cpu.supports import allowed_pairs, banned_pairs, largest
from fastkl.kernels.support import keep_mask
from fastkl.kernels.types import Support


def by_hand(logits, *, banned=(), top_k=0, top_p=1.0, min_p=0.0, ties="torch"):
    """One row, float64, in words: ban, keep what is at least min_p of the best, keep the k best and their ties
    (lowest_ids: no ties, but the lowest ids), keep the fewest of the best that reach top_p."""
    alive = {i: float(x) for i, x in enumerate(logits) if i not in banned}
    if min_p > 0:
        best = max(alive.values())
        alive = {i: x for i, x in alive.items() if torch.tensor(x - best).exp() >= min_p}
    if 0 < top_k < len(alive):
        threshold = sorted(alive.values())[-top_k]
        alive = {i: x for i, x in alive.items() if x >= threshold}
        if ties == "lowest_ids":
            alive = {i: alive[i] for i in sorted(alive, key=lambda i: (-alive[i], i))[:top_k]}
    if top_p < 1:
        ids = sorted(alive, key=lambda i: (-alive[i], i))
        probs = torch.tensor([alive[i] for i in ids], dtype=torch.float64).softmax(0)
        before = probs.cumsum(0) - probs
        alive = {i: alive[i] for i, b in zip(ids, before.tolist(), strict=True) if b < top_p}
    return sorted(alive)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.integers(2, 40),
    levels=st.sampled_from([3, 1000]),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([1.0, 0.93, 0.51, 0.07]),
    min_p=st.sampled_from([0.0, 0.03, 0.41]),
    ties=st.sampled_from(["torch", "lowest_ids"]),
)
def test_support_is_what_a_loop_over_sorted_ids_keeps(seed, vocab, levels, top_k, top_p, min_p, ties):
    """With few levels of logits, ties are everywhere."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, levels, (5, vocab), generator=g).double() * (6.0 / levels)
    targets = torch.randint(0, vocab, (5,), generator=g)
    banned = torch.tensor([0])
    banned_rows = torch.tensor([True, False, True, False, False])
    limits = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "ties": ties}
    support = Support(banned_ids=banned, banned_rows=banned_rows, **limits)
    keep = keep_mask(support, logits)
    for i in range(5):
        expected = by_hand(logits[i], banned=[0] if banned_rows[i] else [], **limits)
        kept = keep[i].nonzero()[:, 0].tolist()
        if (
            top_p < 1 and ties == "torch"
        ):  # which of several equal logits top_p keeps is the sort's choice, how many is not
            assert sorted(logits[i, kept].tolist()) == sorted(logits[i, expected].tolist())
        else:
            assert kept == expected
    sampled = torch.nn.functional.one_hot(targets, vocab).bool()
    assert torch.equal(keep_mask(support, logits, targets), keep | sampled)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.sampled_from([5, 300, 1003, 2200]),
    levels=st.sampled_from([3, 60, 10**6]),
    scale=st.sampled_from([0.3, 4.0, 200.0]),
    top_k=st.sampled_from([None, 1, 7, 90, "rows"]),
    top_p=st.sampled_from([None, 0.95, 0.3, "rows"]),
    min_p=st.sampled_from([None, 0.05, 0.5]),
    banned=st.booleans(),
    ties=st.sampled_from(["torch", "lowest_ids"]),
)
def test_the_list_of_allowed_ids_is_the_mask_of_the_definition(
    seed, vocab, levels, scale, top_k, top_p, min_p, banned, ties
):
    """Ties, thresholds beyond the first few ids, limits that differ from row to row, and z left as it was."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randint(0, levels, (6, vocab), generator=g).float() * (scale / levels)
    targets = torch.randint(0, vocab, (6,), generator=g)
    support = Support(
        banned_ids=torch.tensor([0, 3, 4]) if banned else None,
        banned_rows=torch.arange(6) % 2 == 0 if banned else None,
        excluded_ids=torch.tensor([4]) if banned else None,
        top_k=torch.randint(-1, vocab + 3, (6,), generator=g) if top_k == "rows" else top_k,
        top_p=torch.rand(6, generator=g) + 0.1 if top_p == "rows" else top_p,
        min_p=min_p,
        ties=ties,
    )
    before = z.clone()
    expected = keep_mask(support, z, targets).nonzero()
    if support.is_recomputed:
        assert torch.equal(torch.stack(allowed_pairs(support, z, targets)[:2], 1), expected)
        assert torch.equal(z, before)
    else:
        keep = torch.ones(z.shape, dtype=torch.bool)
        keep[banned_pairs(support, targets)[:2]] = False
        assert torch.equal(keep.nonzero(), expected)


@pytest.mark.parametrize("limit", ["top_p", "min_p"])
def test_where_rounding_decides_the_list_follows_the_definition(limit):
    """Limits that are, to the last bit, what the definition compares with: float64 would often decide otherwise."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(200, 400, generator=g) * 3
    probs = z.softmax(1)
    place = torch.randint(395, 400, (200, 1), generator=g)
    ordered = probs.sort(1).values
    if limit == "top_p":
        support = Support(top_p=1 - z.sort(1).values.softmax(1).cumsum(1).gather(1, place)[:, 0])
    else:
        support = Support(min_p=(ordered.gather(1, place) / ordered[:, -1:])[:, 0])
    targets = z.argmax(1)
    assert torch.equal(torch.stack(allowed_pairs(support, z, targets)[:2], 1), keep_mask(support, z, targets).nonzero())


def test_flat_rows_are_settled_without_sorting_them(monkeypatch):
    """A search that goes astray would leave its rows to the definition, and nobody would see it but for the time."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(100, 1000, generator=g, dtype=torch.float64).float() * 2
    z[:, :5] = -torch.inf
    support, targets = Support(top_p=0.9), z.argmax(1)
    expected = keep_mask(support, z, targets).nonzero()
    assert len(expected) > 100 * 100
    sorted_rows = []
    monkeypatch.setattr(supports, "keep_mask", lambda s, x, *_: sorted_rows.append(len(x)) or keep_mask(s, x))
    assert torch.equal(torch.stack(allowed_pairs(support, z, targets)[:2], 1), expected)
    assert sum(sorted_rows) <= 10


@pytest.mark.parametrize("limits", [{"top_k": 50}, *slow({"top_p": 0.9}, {"top_k": 40, "top_p": 0.8, "min_p": 0.001})])
def test_rows_of_bfloat16_logits_whose_ties_go_to_the_lowest_ids_are_settled_without_sorting_them(limits, monkeypatch):
    g = torch.Generator().manual_seed(0)
    z = (torch.randn(200, 8000, generator=g) * 3).bfloat16().float()
    support, targets = Support(**limits, ties="lowest_ids"), z.argmax(1)
    expected = keep_mask(support, z, targets)
    tied = keep_mask(Support(**limits), z, targets) != expected
    assert int(tied.any(1).sum()) > 20
    sorted_rows = []
    monkeypatch.setattr(supports, "keep_mask", lambda s, x, *_: sorted_rows.append(len(x)) or keep_mask(s, x))
    assert torch.equal(torch.stack(allowed_pairs(support, z, targets)[:2], 1), expected.nonzero())
    assert "top_k" not in limits or sum(sorted_rows) <= 10


def test_equal_logits_beyond_the_largest_few_are_seen_before_the_lowest_ids_are_taken():
    """20 ids stand out, 200 are equal, and top_p takes five of these: more than 32 have to be looked at."""
    g = torch.Generator().manual_seed(0)
    levels = torch.cat([torch.full((20,), 5.0), torch.zeros(200), torch.full((180,), -20.0)])
    z = torch.stack([levels[torch.randperm(400, generator=g)] for _ in range(30)])
    mass = levels.double().exp()
    support = Support(top_p=float((mass[:20].sum() + 4.5) / mass.sum()), ties="lowest_ids")
    targets = z.argmax(1)
    rows, ids, _ = allowed_pairs(support, z, targets)
    for i in range(30):
        expected = [*(z[i] == 5).nonzero()[:, 0].tolist(), *(z[i] == 0).nonzero()[:5, 0].tolist()]
        assert ids[rows == i].tolist() == sorted(expected)


def test_scores_on_a_support_whose_ties_go_to_the_lowest_ids_are_those_of_its_ids():
    """Six logits, three of them equal where top_k and top_p cut."""
    z = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]], dtype=torch.float64)
    for limits in ({"top_k": 3}, {"top_p": 0.68}):
        support = Support(**limits, ties="lowest_ids")
        for target, kept in ((1, [1, 2, 3]), (4, [1, 2, 3, 4])):
            scores = operators.token_scores(z, None, torch.tensor([target]), support=support)
            exact = z[0, target] - z[0, kept].logsumexp(0)
            torch.testing.assert_close(scores.policy_logprobs_support, exact[None])
            assert scores.outside_support.tolist() == [float(target == 4)]


def test_another_rule_for_ties_is_refused():
    with pytest.raises(UserError, match=r"support.ties is 'first', expected one of \['torch', 'lowest_ids'\]"):
        operators.token_scores(torch.zeros(1, 3), None, torch.tensor([0]), support=Support(top_k=1, ties="first"))


@pytest.mark.parametrize("vocab", [64, 1000, 1007])
def test_largest_is_topk(vocab):
    z = torch.randn(5, vocab, generator=torch.Generator().manual_seed(0))
    z[:, -1], z[0, -2] = 9.0, 8.0  # beyond the last whole group
    for count in (1, 7, 15):
        values, columns = largest(z, count)
        assert torch.equal(values, z.topk(count).values)
        assert torch.equal(z.gather(1, columns), values)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("levels", [4, 10**6])
def test_support_is_what_vllm_keeps(levels):
    sampler = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler")
    g = torch.Generator().manual_seed(0)
    logits = torch.randint(0, levels, (200, 101), generator=g).float() * (9.0 / levels)
    k = torch.randint(1, 102, (200,), generator=g)
    p = torch.rand(200, generator=g).clamp(0.05, 1.0)
    for top_k, top_p in ((k, None), (None, p), (k, p)):
        kept = sampler.apply_top_k_top_p_pytorch(logits.clone(), top_k, top_p, allow_cpu_sync=True) > -torch.inf
        targets = kept.int().argmax(1)
        assert torch.equal(keep_mask(Support(top_k=top_k, top_p=top_p), logits, targets), kept)


def test_temperature_comes_before_min_p_and_top_p():
    """At temperature 2 the distribution is flatter, so more ids reach the thresholds."""
    logits = torch.tensor([[3.0, 1.0, 0.0, -1.0]])
    target = torch.tensor([0])
    support = Support(min_p=0.2)
    cold = operators.token_scores(logits, None, target, support=support)
    hot = operators.token_scores(logits, None, target, support=support, temperature=2.0)
    assert float(cold.policy_logprobs_support) == 0.0
    two = torch.tensor([1.5, 0.5, 0.0])[:3]
    kept = two[(two - 1.5).exp() >= 0.2]
    assert float(hot.policy_logprobs_support) == pytest.approx(float(kept.log_softmax(0)[0]), abs=1e-6)


def test_the_sampled_token_is_kept_even_if_banned_or_missing_from_the_record():
    logits = torch.zeros(1, 6)
    target = torch.tensor([4])
    for support in (
        Support(banned_ids=torch.tensor([4]), top_k=2),
        Support(kept_ids=torch.tensor([1, 2]), kept_offsets=torch.tensor([0, 2])),
    ):
        assert bool(keep_mask(support, logits, target)[0, 4])


@pytest.mark.parametrize("limit", [{"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.4}, {"banned": (4,)}, {"record": True}])
def test_a_sampled_token_that_nothing_else_would_have_kept_is_marked(limit):
    """By the loop over sorted ids; the support of the other scores holds it all the same."""
    g = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(40, 9, generator=g).double() * 2, torch.randint(0, 9, (40,), generator=g)
    if "record" in limit:
        kept = [by_hand(row, top_k=3) for row in logits]
        offsets = torch.tensor([0, *(len(ids) for ids in kept)]).cumsum(0)
        support = Support(kept_ids=torch.tensor(sum(kept, [])), kept_offsets=offsets)
    else:
        kept = [by_hand(row, **limit) for row in logits]
        options = {"banned_ids": torch.tensor(limit["banned"])} if "banned" in limit else limit
        support = Support(**options)
    expected = torch.tensor([float(int(y) not in ids) for y, ids in zip(targets, kept, strict=True)])
    assert 0 < expected.sum() < 40
    mask = torch.arange(40) != 7
    for scores in (
        operators.token_scores(logits, None, targets, mask=mask, support=support),
        operators.token_scores(logits.float(), logits.float(), targets, mask=mask, support=support, chunk_tokens=16),
    ):
        assert torch.equal(scores.outside_support.float(), expected * mask)
        assert bool((scores.policy_logprobs_support > -torch.inf).all())


def test_a_support_of_everything_scores_like_the_full_vocabulary():
    g = torch.Generator().manual_seed(1)
    z, r = (torch.randn(7, 50, generator=g) for _ in range(2))
    targets = torch.randint(0, 50, (7,), generator=g)
    scores = operators.token_scores(z, r, targets, support=Support(top_k=50, top_p=1.0, min_p=0.0))
    assert torch.equal(scores.policy_logprobs_support, scores.policy_logprobs)
    assert torch.equal(scores.kl_support, scores.kl)


def test_selecting_rows_of_a_record_selects_their_ids():
    support = Support(kept_ids=torch.arange(10), kept_offsets=torch.tensor([0, 3, 3, 7, 10]))
    picked = support.select(torch.tensor([3, 1, 0]))
    assert picked.kept_ids.tolist() == [7, 8, 9, 0, 1, 2]
    assert picked.kept_offsets.tolist() == [0, 3, 3, 6]
    assert support.select(slice(1, 3)).kept_ids.tolist() == [3, 4, 5, 6]


def test_a_policy_that_puts_all_mass_on_a_banned_id_is_still_scored_on_its_support():
    """Removing banned ids by subtraction would leave 0/0 here."""
    logits = torch.tensor([[200.0, 1.0, 0.0]])
    ref = torch.tensor([[0.0, 0.0, 0.0]])
    scores = operators.token_scores(logits, ref, torch.tensor([1]), support=Support(banned_ids=torch.tensor([0])))
    pair = torch.tensor([1.0, 0.0], dtype=torch.float64).log_softmax(0)
    half = torch.tensor(0.5, dtype=torch.float64).log()
    assert float(scores.policy_logprobs_support) == pytest.approx(float(pair[0]), abs=1e-6)
    assert float(scores.kl_support) == pytest.approx(float((pair.exp() * (pair - half)).sum()), abs=1e-6)
