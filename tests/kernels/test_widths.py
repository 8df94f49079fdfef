"""A reference of another width, and of another padding of the vocabulary: by sums over ids in float64."""

from __future__ import annotations

import math

import pytest
import torch

from fastkl.errors import UserError
from fastkl.kernels.operators import linear_token_loss, linear_token_scores
from fastkl.kernels.types import Support, TokenCoefficients

N, V, H = 7, 11, 6
SUPPORTS = {"none": None, "top_k": {"top_k": 3}, "top_p": {"top_p": 0.6}, "banned": {"banned_ids": (2, 9)}}


def sides(ref_width: int, padding: int, dtype=torch.float64, seed: int = 0):
    """Hidden states, weights and biases of both sides, the reference's weight with `padding` more rows; targets."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    policy = [normal(N, H).requires_grad_(), normal(V, H).requires_grad_(), normal(V).requires_grad_()]
    reference = [normal(N, ref_width), normal(V + padding, ref_width), normal(V + padding)]
    return policy, reference, torch.randint(V, (N,), generator=g)


def by_hand(policy, reference, targets, support: dict | None, temperature: float):
    """log p(y), log q(y), the three divergences and the entropy of every row, differentiable; p and q on the ids that
    the support keeps."""
    rows = []
    for i, y in enumerate(targets.tolist()):
        z = torch.stack([policy[0][i] @ policy[1][v] + policy[2][v] for v in range(V)]) / temperature
        r = torch.stack([reference[0][i] @ reference[1][v] + reference[2][v] for v in range(V)]) / temperature
        kept = list(range(V))
        if support and "top_k" in support:
            kept = sorted(kept, key=lambda v, z=z: -z[v].item())[: support["top_k"]]
        elif support and "top_p" in support:
            order, before, kept = sorted(range(V), key=lambda v, z=z: -float(z[v])), 0.0, []
            total = sum(math.exp(float(z[v])) for v in range(V))
            for v in order:
                if before < support["top_p"] * total:
                    kept.append(v)
                before += math.exp(float(z[v]))
        elif support:
            kept = [v for v in kept if v not in support["banned_ids"]]
        kept = sorted({*kept, y})
        logp, logq = z[kept].log_softmax(0), r[kept].log_softmax(0)
        p, q, at = logp.exp(), logq.exp(), kept.index(y)
        logm = ((p + q) / 2).log()
        jsd = (p * (logp - logm) + q * (logq - logm)).sum() / 2
        divergences = (p * (logp - logq)).sum(), (q * (logq - logp)).sum(), jsd
        rows.append(torch.stack([logp[at], logq[at], *divergences, -(p * logp).sum()]))
    names = ("policy_logprobs", "ref_logprobs", "kl", "forward_kl", "jsd", "entropy")
    return dict(zip(names, torch.stack(rows).unbind(1), strict=True))


def scored(operator, policy, reference, targets, support, *more, valid=None, **options):
    made = None
    if support is not None:
        values = {k: torch.tensor(v) if isinstance(v, tuple) else v for k, v in support.items()}
        made = Support(**values)
    return operator(
        policy[0], policy[1], reference[0], reference[1], targets, *more, policy_bias=policy[2], ref_bias=reference[2],
        support=made, valid_vocab=valid, **options,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("chunk", [2, None])
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("ref_width", [H, 3, 16])
def test_scores_and_gradients_are_the_sums_over_the_shared_ids(ref_width, padding, support, chunk, direction):
    policy, reference, targets = sides(ref_width, padding)
    settings, tau = SUPPORTS[support], 0.8
    expected = by_hand(policy, reference, targets, settings, tau)
    options = {"valid": V, "temperature": tau, "chunk_tokens": chunk, "outputs": (direction,)}
    scores = scored(linear_token_scores, policy, reference, targets, settings, **options)
    on = "_support" if settings else ""
    for name in ("policy_logprobs", "ref_logprobs", direction):
        torch.testing.assert_close(getattr(scores, name + on), expected[name], rtol=0, atol=1e-9)
    assert scores.entropy is None and sum(x is not None for x in scores.values()) == (7 if settings else 3)
    a, c = torch.randn(2, N, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    theirs = torch.autograd.grad((a * expected["policy_logprobs"] + c * expected[direction]).sum(), policy)
    logprobs, divergence = getattr(scores, "policy_logprobs" + on), getattr(scores, direction + on)
    ours = torch.autograd.grad((a * logprobs + c * divergence).sum(), policy)
    factors = TokenCoefficients(**{"policy_logprobs" + on: a, direction + on: c})
    loss, _ = scored(linear_token_loss, policy, reference, targets, settings, factors, **options)
    fused = torch.autograd.grad(loss, policy)
    for first, second, expected_gradient in zip(ours, fused, theirs, strict=True):
        torch.testing.assert_close(first, expected_gradient, rtol=0, atol=1e-9)
        torch.testing.assert_close(second, expected_gradient, rtol=0, atol=1e-9)


def test_masked_rows_cost_nothing_whatever_the_widths():
    policy, reference, targets = sides(3, 0)
    mask = torch.arange(N) % 2 == 0
    whole = scored(linear_token_scores, policy, reference, targets, None)
    some = scored(linear_token_scores, policy, reference, targets, None, mask=mask)
    assert torch.equal(some.kl[mask], whole.kl[mask]) and not some.kl[~mask].any()


@pytest.mark.parametrize(("padding", "valid", "words"), [
    (2, None, r"ref_weight has 13 ids and policy_weight 11: give valid_vocab"),
    (-2, 10, r"valid_vocab is 10, and the reference has only 9 ids"),
])  # fmt: skip
def test_vocabularies_that_differ_need_to_be_told_what_they_share(padding, valid, words):
    policy, reference, targets = sides(3, padding)
    with pytest.raises(UserError, match=words):
        scored(linear_token_scores, policy, reference, targets.clamp(max=8), None, valid=valid)


def test_float32_is_as_exact_as_the_plain_line():
    policy, reference, targets = sides(16, 5, torch.float32, seed=3)
    exact = [x.detach().double() for x in policy], [x.double() for x in reference]
    expected = by_hand(*exact, targets, None, 1.0)
    scores = scored(linear_token_scores, policy, reference, targets, None, valid=V)
    torch.testing.assert_close(scores.kl.double(), expected["kl"], rtol=1e-5, atol=2e-6)
