"""Forward KL and Jensen-Shannon divergence where the matrix and test_widths.py do not look: models that hardly differ,
TRL's chunked function, memory, and what is asked for."""

from __future__ import annotations

import math

import pytest
import torch
from matrix import EVERY_OUTPUT, make_case

from fastkl.errors import UserError
from fastkl.kernels import operators, reference
from fastkl.kernels.types import DIVERGENCES, Support, TokenCoefficients


def two_models(distance: float, num_rows: int = 64, vocab: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 logits of standard deviation 3 and others this far from them."""
    g = torch.Generator().manual_seed(1)
    z = 3 * torch.randn(num_rows, vocab, generator=g)
    return z, z + distance * torch.randn(num_rows, vocab, generator=g)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("distance", [1e-3, 1e-2, 1.0, 30.0])
def test_small_divergences_keep_their_digits_in_float32(name, distance):
    z, r = two_models(distance)
    targets = torch.zeros(len(z), dtype=torch.int64)
    exact = getattr(reference.token_scores(z.double(), r.double(), targets, outputs=(name,)), name)
    leaf, true_leaf = z.clone().requires_grad_(), z.double().requires_grad_()
    got = getattr(operators.token_scores(leaf, r, targets, outputs=(name,)), name)
    torch.testing.assert_close(got.double(), exact, rtol=2e-6 / min(distance, 0.1), atol=0)
    (gradient,) = torch.autograd.grad(got.sum(), leaf)
    truth = getattr(reference.token_scores(true_leaf, r.double(), targets, outputs=(name,)), name)
    (true_gradient,) = torch.autograd.grad(truth.sum(), true_leaf)
    error = float((gradient.double() - true_gradient).norm() / true_gradient.norm())
    assert error < 5e-6 / min(distance, 1.0)


@pytest.mark.parametrize("support", [None, Support(top_k=3), Support(banned_ids=torch.tensor([2]))])
def test_equal_models_have_none_to_the_bit_and_disjoint_ones_have_log_2(support):
    z, _ = two_models(0.0, vocab=37)
    targets = torch.arange(64) % 37
    same = operators.token_scores(z, z.clone(), targets, support=support, outputs=EVERY_OUTPUT)
    for name in DIVERGENCES:
        assert not getattr(same, name).any()
        assert support is None or not getattr(same, f"{name}_support").any()
    apart = torch.full((2, 4), -torch.inf)
    z, r = apart.clone(), apart.clone()
    z[:, :2], r[:, 2:] = 0.0, 0.0
    scores = operators.token_scores(z, r, torch.tensor([0, 1]), outputs=EVERY_OUTPUT, check_values=False)
    torch.testing.assert_close(scores.jsd, torch.full((2,), math.log(2)))
    assert bool(scores.forward_kl.isinf().all())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "beta"), [("forward_kl", 0.0), ("jsd", 0.5), ("kl", 1.0)])
def test_trl_computes_the_same_divergence_and_gradient(name, beta):
    chunked = pytest.importorskip("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    case = make_case(num_rows=40, hidden=16, vocab=200, bias=True, softcap=4.0, temperature=0.7).to(torch.float32)
    g = torch.Generator().manual_seed(2)
    teacher = [torch.randn(40, 24, generator=g), torch.randn(200, 24, generator=g) / 5, torch.randn(200, generator=g)]
    leaves = [x.clone().requires_grad_() for x in (case.policy_hidden, case.policy_weight, case.options["policy_bias"])]
    theirs, _ = chunked.apply(*leaves, *teacher, beta, 0.7, 1.0, 4.0, 1.0, 4.0)
    scores = operators.linear_token_scores(
        *leaves[:2], *teacher[:2], case.target_ids, policy_bias=leaves[2], ref_bias=teacher[2], softcap=4.0,
        temperature=0.7, outputs=(name,),
    )  # fmt: skip
    ours = getattr(scores, name)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    factor = torch.randn(40, generator=g)
    expected = torch.autograd.grad((factor * theirs).sum(), leaves)
    for a, b in zip(torch.autograd.grad((factor * ours).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_only_what_is_asked_for_comes_back_and_has_coefficients():
    case = make_case()
    usual = operators.linear_token_scores(*case.args())
    assert usual.forward_kl is None and usual.jsd is None
    more = operators.linear_token_scores(*case.args(), outputs=EVERY_OUTPUT)
    for name in ("policy_logprobs", "ref_logprobs", "entropy", "kl"):
        assert torch.equal(getattr(usual, name), getattr(more, name)), name
    one = operators.linear_token_scores(*case.args(), outputs=("jsd",))
    assert torch.equal(one.jsd, more.jsd) and one.forward_kl is None and one.kl is None
    alone = operators.linear_token_scores(*case.args()[:2], None, None, case.target_ids, outputs=EVERY_OUTPUT)
    assert alone.jsd is None and alone.kl is None
    with pytest.raises(UserError, match="forward_kl is given, but that score is not computed"):
        operators.linear_token_loss(*case.args(), TokenCoefficients(forward_kl=torch.zeros(9)))
    with pytest.raises(UserError, match=r"outputs has \['js'\], expected some of .*'forward_kl', 'jsd'"):
        operators.linear_token_scores(*case.args(), outputs=("js",))


def test_a_group_that_is_gone_over_twice_has_the_gradient_of_the_definition():
    case = make_case(num_rows=50, support=Support(top_k=5), outputs=EVERY_OUTPUT)
    leaves = [x.clone().requires_grad_() for x in case.args()[:2]]

    def function(rows, scores):
        weights = torch.linspace(-1, 1, 50, dtype=torch.float64)[rows]
        return TokenCoefficients(policy_logprobs=weights, forward_kl=weights, jsd_support=2 * weights)

    loss, _ = operators.linear_token_loss(
        *leaves, *case.args()[2:], function, row_splits=[0, 40, 50], chunk_tokens=16, **case.options
    )
    scores = reference.linear_token_scores(*leaves, *case.args()[2:], **case.options)
    weights = torch.linspace(-1, 1, 50, dtype=torch.float64)
    truth = (weights * (scores.policy_logprobs + scores.forward_kl + 2 * scores.jsd_support)).sum()
    torch.testing.assert_close(loss, truth)
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, leaves), strict=True):
        torch.testing.assert_close(a, b)
