"""linear_token_loss: the gradient taken in the forward is the one that autograd takes of the same loss."""

from __future__ import annotations

import pytest
import torch
from matrix import EVERY_OUTPUT, POLICY_SCORES, make_case

from fastkl.errors import UserError
from fastkl.kernels import operators, reference
from fastkl.kernels.operators import Support, TokenCoefficients


def leaves_of(case):
    return [case.policy_hidden.clone().requires_grad_(), case.policy_weight.clone().requires_grad_()]


def linear_loss(scores, coefficients):
    return sum(
        (getattr(coefficients, name) * getattr(scores, name)).sum()
        for name in POLICY_SCORES
        if getattr(coefficients, name) is not None
    )


def random_coefficients(num_rows, names=POLICY_SCORES, seed=0, zero_rows=()):
    g = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(num_rows, generator=g, dtype=torch.float64) for name in names}
    for value in values.values():
        value[list(zero_rows)] = 0
    return TokenCoefficients(**values)


@pytest.mark.parametrize("mask", ["none", "some", "all"])
@pytest.mark.parametrize("chunk_tokens", [3, 100])
@pytest.mark.parametrize("zero_rows", [(), (0, 1, 2, 7), tuple(range(23))])
def test_known_coefficients_give_the_gradient_of_autograd(mask, chunk_tokens, zero_rows):
    options = {"support": Support(top_k=5), "per_row_temperature": True, "softcap": 8.0, "outputs": EVERY_OUTPUT}
    case = make_case(num_rows=23, mask=mask, **options)
    coefficients = random_coefficients(23, zero_rows=zero_rows)
    hidden, weight = leaves_of(case)
    scores = operators.linear_token_scores(hidden, weight, *case.args()[2:], **case.options)
    expected_loss = linear_loss(scores, coefficients)
    expected = torch.autograd.grad(3 * expected_loss, (hidden, weight))

    hidden, weight = leaves_of(case)
    loss, got = operators.linear_token_loss(
        hidden, weight, *case.args()[2:], coefficients, chunk_tokens=chunk_tokens, **case.options
    )
    (3 * loss).backward()
    torch.testing.assert_close(loss.detach(), expected_loss.detach())
    torch.testing.assert_close(hidden.grad, expected[0])
    torch.testing.assert_close(weight.grad, expected[1])
    for name in got.__slots__:
        assert torch.equal(getattr(got, name), getattr(scores, name).detach()), name
        assert not getattr(got, name).requires_grad


@pytest.mark.parametrize("mask", ["none", "some"])
@pytest.mark.parametrize("chunk_tokens", [1, 16, 100])
def test_coefficients_computed_from_whole_groups_give_the_gradient_of_autograd(mask, chunk_tokens):
    """An advantage with a baseline over the group's own KL, as RLOO needs it."""
    splits = [0, 5, 5, 12, 20, 23]
    case = make_case(num_rows=23, mask=mask, bias=True)
    group = torch.bucketize(torch.arange(23), torch.tensor(splits[1:]), right=True)

    def advantages(rows, scores):
        groups = group[rows]
        kl = scores.policy_logprobs - scores.ref_logprobs
        one_hot = torch.nn.functional.one_hot(groups, 5).to(kl.dtype)
        mean = (kl @ one_hot) / one_hot.sum(0).clamp(min=1)
        return TokenCoefficients(policy_logprobs=kl - mean[groups], kl=torch.full_like(kl, 0.1))

    hidden, weight = leaves_of(case)
    bias = case.options["policy_bias"].clone().requires_grad_()
    options = {**case.options, "policy_bias": bias}
    scores = operators.linear_token_scores(hidden, weight, *case.args()[2:], **options)
    with torch.no_grad():
        coefficients = advantages(slice(0, 23), scores)
    expected = torch.autograd.grad(linear_loss(scores, coefficients), (hidden, weight, bias))

    seen = []

    def function(rows, scores):
        seen.append((rows.start, rows.stop))
        return advantages(rows, scores)

    hidden2, weight2 = leaves_of(case)
    bias2 = bias.detach().clone().requires_grad_()
    loss, _ = operators.linear_token_loss(
        hidden2, weight2, *case.args()[2:], function, row_splits=splits, chunk_tokens=chunk_tokens,
        **{**options, "policy_bias": bias2},
    )  # fmt: skip
    loss.backward()
    for leaf, gradient in zip((hidden2, weight2, bias2), expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)
    bounds = [0, *(stop for _, stop in seen)]
    assert [start for start, _ in seen] == bounds[:-1] and bounds[-1] == 23
    assert set(bounds) <= set(splits)
    assert len(seen) == {1: 4, 16: 2, 100: 1}[chunk_tokens]


@pytest.mark.slow
@pytest.mark.parametrize("support", [None, Support(top_k=5), Support(top_p=0.7)], ids=["none", "top_k", "top_p"])
@pytest.mark.parametrize("mask", ["none", "some"])
@pytest.mark.parametrize("given", [True, False], ids=["chunk_tokens", "HELD_BYTES"])
def test_a_group_larger_than_the_buffer_is_gone_over_twice_with_the_gradient_of_the_definition(
    monkeypatch, given, mask, support
):
    """512 rows of one group and 16 at a time, against the definition in float64, differentiated by autograd."""
    from fastkl.kernels import call, loss
    from fastkl.kernels.cpu.sources import HeadSource

    buffers = []
    made = HeadSource.__init__
    monkeypatch.setattr(
        HeadSource, "__init__", lambda self, *arguments: (buffers.append(arguments[4]), made(self, *arguments))[1]
    )
    if not given:
        monkeypatch.setattr(loss, "HELD_BYTES", {"cpu": 1})
        monkeypatch.setattr(call, "CHUNK_BYTES", {"cpu": 1})  # the least: 16 rows
    case = make_case(num_rows=530, mask=mask, support=support)
    splits, names = [0, 9, 521, 530], POLICY_SCORES if support else ("policy_logprobs", "entropy", "kl")

    def function(rows, scores):
        mean = scores.policy_logprobs.detach().mean()  # of the whole group
        weights = torch.linspace(-1, 1, 530, dtype=torch.float64)[rows].to(mean.dtype)
        weights[:4] = 0
        return TokenCoefficients(**dict.fromkeys(names, weights * mean))

    hidden, weight = leaves_of(case)
    scores = reference.linear_token_scores(hidden, weight, *case.args()[2:], **case.options)
    parts = []
    for lo, hi in zip(splits, splits[1:], strict=False):
        rows = slice(lo, hi)
        own = type(scores)(*(None if s is None else s[rows] for s in scores.values()))
        parts.append(linear_loss(own, function(rows, own)))
    expected = torch.autograd.grad(sum(parts), (hidden, weight))

    hidden, weight = leaves_of(case)
    options = {"chunk_tokens": 16} if given else {}
    found, _ = operators.linear_token_loss(
        hidden, weight, *case.args()[2:], function, row_splits=splits, **options, **case.options
    )
    found.backward()
    assert max(buffers) <= 16
    torch.testing.assert_close(found.detach().double(), sum(parts).detach().double(), rtol=1e-6, atol=1e-6)
    for leaf, gradient in zip((hidden, weight), expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


def test_rows_without_a_coefficient_cost_no_gradient_work(monkeypatch):
    from fastkl.kernels.cpu.sources import HeadSource

    stored = []
    original = HeadSource.store
    monkeypatch.setattr(
        HeadSource, "store", lambda self, lo, hi, d: (stored.append(hi - lo), original(self, lo, hi, d))
    )
    case = make_case(num_rows=200)
    hidden, weight = leaves_of(case)
    a = torch.zeros(200, dtype=torch.float64)
    a[10:14] = 1
    loss, _ = operators.linear_token_loss(hidden, weight, *case.args()[2:], TokenCoefficients(policy_logprobs=a))
    assert sum(stored) == 4
    stored.clear()
    operators.linear_token_loss(
        hidden, weight, *case.args()[2:], lambda rows, s: TokenCoefficients(policy_logprobs=a[rows]),
        row_splits=range(0, 201, 10),
    )  # fmt: skip
    assert sum(stored) == 4
    stored.clear()
    operators.linear_token_scores(hidden, weight, *case.args()[2:]).policy_logprobs.mul(a).sum().backward()
    assert sum(stored) == 4


def test_rows_with_a_coefficient_may_lie_far_apart():
    case = make_case(num_rows=200)
    a = torch.zeros(200, dtype=torch.float64)
    a[[10, 11, 12, 13, 150, 151]] = torch.arange(1.0, 7.0, dtype=torch.float64)
    hidden, weight = leaves_of(case)
    operators.linear_token_scores(hidden, weight, *case.args()[2:]).policy_logprobs.mul(a).sum().backward()
    hidden2, weight2 = leaves_of(case)
    loss, _ = operators.linear_token_loss(
        hidden2, weight2, *case.args()[2:], lambda rows, s: TokenCoefficients(policy_logprobs=a[rows])
    )
    loss.backward()
    expected = torch.autograd.grad(
        reference.linear_token_scores(hidden, weight, *case.args()[2:]).policy_logprobs.mul(a).sum(), (hidden, weight)
    )
    for got in ((hidden.grad, weight.grad), (hidden2.grad, weight2.grad)):
        torch.testing.assert_close(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1])


def test_without_gradients_the_loss_is_only_a_number():
    case = make_case()
    coefficients = random_coefficients(9, ("policy_logprobs",))
    loss, scores = operators.linear_token_loss(*case.args(), coefficients)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, (coefficients.policy_logprobs * scores.policy_logprobs).sum())


def test_a_second_backward_is_refused_rather_than_wrong():
    case = make_case()
    hidden, weight = leaves_of(case)
    loss, _ = operators.linear_token_loss(hidden, weight, *case.args()[2:], random_coefficients(9, ("kl",)))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        loss.backward()


@pytest.mark.parametrize(
    ("coefficients", "words"),
    [
        (TokenCoefficients(kl_support=torch.zeros(9)), "kl_support is given, but that score is not computed"),
        (TokenCoefficients(kl=torch.zeros(8)), r"shape \[8\], expected \[9\]"),
        (lambda rows, scores: TokenCoefficients(kl=torch.zeros(2)), r"shape \[2\], expected \[9\]"),
    ],
)
def test_coefficients_that_do_not_fit_are_refused(coefficients, words):
    with pytest.raises(UserError, match=words):
        operators.linear_token_loss(*make_case().args(), coefficients)


@pytest.mark.parametrize("splits", [[0, 5], [1, 9], [0, 6, 4, 9]])
def test_row_splits_must_ascend_from_zero_to_the_number_of_rows(splits):
    with pytest.raises(UserError, match="row_splits"):
        operators.linear_token_loss(*make_case().args(), TokenCoefficients(), row_splits=splits)


@pytest.mark.parametrize("in_the_forward", [True, False])
@pytest.mark.parametrize("chunk_tokens", [16, 100])
def test_bfloat16_products_take_the_gradient_back_within_their_rounding_and_leave_the_scores_alone(
    in_the_forward, chunk_tokens
):
    exact = make_case(num_rows=40, hidden=32, vocab=300, bias=True)
    coefficients = random_coefficients(40, names=("policy_logprobs", "entropy", "kl"))
    scores = reference.linear_token_scores(*(leaves := leaves_of(exact)), *exact.args()[2:], **exact.options)
    truth = torch.autograd.grad(linear_loss(scores, coefficients), leaves)
    case = exact.to(torch.float32)

    def run(**options):
        hidden, weight = leaves_of(case)
        arguments, options = (hidden, weight, *case.args()[2:]), {**case.options, **options}
        if in_the_forward:
            loss, scores = operators.linear_token_loss(
                *arguments, TokenCoefficients(*(None if c is None else c.float() for c in coefficients.values())),
                chunk_tokens=chunk_tokens, **options,
            )  # fmt: skip
        else:
            scores = operators.linear_token_scores(*arguments, chunk_tokens=chunk_tokens, **options)
            loss = linear_loss(scores, coefficients)
        return scores, torch.autograd.grad(loss, (hidden, weight))

    scores, gradients = run()
    rounded_scores, rounded = run(gradient_dtype="bfloat16")
    for name in ("policy_logprobs", "ref_logprobs", "entropy", "kl"):
        assert torch.equal(getattr(scores, name), getattr(rounded_scores, name))
    for narrow, wide, true in zip(rounded, gradients, truth, strict=True):
        assert narrow.dtype == torch.float32
        error, of_wide = (float((x.double() - true).norm() / true.norm()) for x in (narrow, wide))
        assert of_wide < 1e-5 < 1e-4 < error < 5e-3
