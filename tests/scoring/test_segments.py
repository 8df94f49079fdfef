"""Attention by segments: the places that are handed to the kernel, checked with a slow kernel in its place; and the
kernel itself, where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from cases import slow_where
from test_backbone import alike_batch, check_sliding_window, equal_lengths_batch, separate_hidden_states, states_of
from toy import toy_batch, toy_model

from fastkl.scoring import attention, backbone, segments
from fastkl.scoring.prefixes import tree_of


def slow_kernel(query, key, value, cu_queries, cu_keys, max_queries, max_keys, *, scale, window_size):
    """Query by query: [M, heads, d] against [L, kv_heads, d]; the last query of a segment sees all of its keys."""
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    starts, key_starts = cu_queries.tolist(), cu_keys.tolist()
    assert max_queries == max(b - a for a, b in zip(starts, starts[1:], strict=False))
    assert max_keys == max(b - a for a, b in zip(key_starts, key_starts[1:], strict=False))
    assert (starts[-1], key_starts[-1], window_size[1]) == (len(query), len(key), 0)
    out = []
    for segment in range(len(starts) - 1):
        for row in range(starts[segment], starts[segment + 1]):
            last = key_starts[segment + 1] - (starts[segment + 1] - 1 - row)
            first = key_starts[segment] if window_size[0] < 0 else max(key_starts[segment], last - 1 - window_size[0])
            k, v = (x[first:last].repeat_interleave(groups, 1) for x in (key, value))
            weights = (torch.einsum("hd,lhd->hl", query[row], k) * scale).softmax(-1)
            out.append(torch.einsum("hl,lhd->hd", weights, v))
    return torch.stack(out)


@pytest.fixture
def segments_everywhere(monkeypatch):
    monkeypatch.setattr(attention, "has_kernel", lambda device: True)
    monkeypatch.setattr(segments, "takes", lambda query, value: True)
    monkeypatch.setattr(segments, "kernel", slow_kernel)
    backbone.register_packed_attention()


@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize(
    "make_batch",
    [toy_batch, lambda model: alike_batch(), lambda model: equal_lengths_batch()],
    ids=["ragged", "alike", "equal"],
)
def test_segments_give_the_states_and_gradients_of_separate_forwards(segments_everywhere, layout, make_batch):
    model = toy_model()
    batch = make_batch(model)
    hidden, expected = states_of(model, batch, layout), separate_hidden_states(model, batch)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(expected)
    ours, theirs = (
        torch.autograd.grad((h * weights).sum(), list(model.base_model.parameters())) for h in (hidden, expected)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize("window", slow_where(lambda window: window != 2, [2, 3, 7]))
def test_segments_respect_sliding_windows(segments_everywhere, layout, window):
    check_sliding_window(layout, window)


def test_what_the_kernel_does_not_take_is_laid_side_by_side(monkeypatch):
    monkeypatch.setattr(attention, "has_kernel", lambda device: True)
    monkeypatch.setattr(segments, "kernel", slow_kernel)
    backbone.register_packed_attention()
    model = toy_model()  # float64
    batch = toy_batch(model)
    for layout in ("shared", "packed"):
        states, expected = states_of(model, batch, layout), separate_hidden_states(model, batch)
        torch.testing.assert_close(states, expected, rtol=0, atol=1e-12)
    assert not segments.takes(torch.zeros(1, 64), torch.zeros(1, 64))


def tree_of_groups(groups):
    """Sequences of (tokens of the prompt, tokens of each completion), the prompts of a group equal."""
    sequences, ids = [], iter(range(1 << 30))
    for prompt, completions in groups:
        begins = [next(ids) for _ in range(prompt)]
        sequences += [(*begins, *(next(ids) for _ in range(count + 1))) for count in completions]
    starts = [0, *torch.tensor([len(s) for s in sequences]).cumsum(0).tolist()]
    return tree_of(sequences, starts[:-1], starts[-1])


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("window", [None, 5])
def test_the_kernel_agrees_with_query_by_query_on_a_gpu(head_dim, window):
    """Errors of values and gradients are at most twice and three times those of bfloat16 arithmetic query by query."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    tree = tree_of_groups([(7, [5, 0, 9]), (3, [1]), (40, [33, 70])])
    places = segments.behind_prefixes(tree, device)
    tokens = int(places.cu_queries[-1])
    inputs = [torch.randn(heads, tokens, head_dim, device=device) for heads in (14, 2, 2)]
    weights = torch.randn(tokens, 14, head_dim, device=device)

    def values_and_gradients(dtype, kernel):
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in inputs]
        with pytest.MonkeyPatch.context() as patch:
            if kernel is not None:
                patch.setattr(segments, "kernel", kernel)
            out = places.attend(*leaves, None, window)
        return [out, *torch.autograd.grad((out * weights.to(dtype)).sum(), leaves)]

    exact = values_and_gradients(torch.float64, slow_kernel)
    plain = values_and_gradients(torch.bfloat16, slow_kernel)
    fast = values_and_gradients(torch.bfloat16, None)
    for factor, truth, slow, ours in zip((2, 3, 3, 3), exact, plain, fast, strict=True):
        assert (ours - truth).abs().max() <= factor * (slow - truth).abs().max()
