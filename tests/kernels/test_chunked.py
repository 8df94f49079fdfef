"""The chunked path in PyTorch: any shape against float64, and what holds bit for bit or to the last digits.

Every option against float64: test_matrix.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix import EVERY_OUTPUT, assert_as_good_as_the_line, make_case, run

from fastkl.kernels import operators, reference
from fastkl.kernels.cpu.sources import HeadSource
from fastkl.kernels.operators import Support


def check(case, dtype=torch.float32, unit=2.0**-23, **call_options):
    truth, true_grads = run(reference.linear_token_scores, case)
    line, line_grads = run(reference.linear_token_scores, case.to(dtype))
    got, grads = run(lambda *a, **k: operators.linear_token_scores(*a, **k, **call_options), case.to(dtype))
    assert got.policy_logprobs.dtype == torch.float32
    assert_as_good_as_the_line(got, grads, line, line_grads, truth, true_grads, unit)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 5, 100])
def test_chunk_size_changes_nothing_but_the_order_of_the_weight_gradients_sum(chunk_tokens):
    options = {"mask": "some", "support": Support(top_k=6, min_p=0.02), "outputs": EVERY_OUTPUT}
    case = make_case(num_rows=23, **options).to(torch.float32)
    got, grads = run(lambda *a, **k: operators.linear_token_scores(*a, **k, chunk_tokens=chunk_tokens), case)
    whole, whole_grads = run(operators.linear_token_scores, case)
    for name in got.__slots__:
        assert torch.equal(getattr(got, name), getattr(whole, name)), name
    assert torch.equal(grads["hidden"], whole_grads["hidden"])
    torch.testing.assert_close(grads["weight"], whole_grads["weight"])


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)  # the bound is one run of the line, which may be lucky
@given(
    num_rows=st.integers(0, 20),
    hidden=st.integers(1, 9),
    vocab=st.integers(1, 70),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.01, 1.0, 10.0, 1000.0]),
    shift=st.sampled_from([0.0, 1e4, -1e4]),
    mask=st.sampled_from(["none", "some", "all"]),
    per_row_temperature=st.booleans(),
    hot=st.booleans(),
    support=st.sampled_from([None, Support(top_k=3), Support(banned_ids=torch.tensor([0])), Support(min_p=0.1)]),
    chunk_tokens=st.integers(1, 24),
)
def test_scores_and_gradients_match_float64_for_any_shape(chunk_tokens, **options):
    check(make_case(bias=True, **options), chunk_tokens=chunk_tokens)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "bias": True, "per_row_temperature": True, "mask": "some"}])
@pytest.mark.parametrize("support", [None, Support(top_k=3), Support(banned_ids=torch.tensor([1]))])
def test_gradcheck_in_float64(options, support):
    case = make_case(num_rows=4, hidden=3, vocab=6, support=support, **options)
    leaves = [x.clone().requires_grad_() for x in (case.policy_hidden, case.policy_weight)]

    def flat(function, hidden, weight):
        scores = function(hidden, weight, *case.args()[2:], **case.options)
        names = ("policy_logprobs", "entropy", "kl", "policy_logprobs_support", "kl_support")
        return tuple(x for x in (getattr(scores, n) for n in names) if x is not None)

    for function in (reference.linear_token_scores, operators.linear_token_scores):
        assert torch.autograd.gradcheck(lambda h, w, f=function: flat(f, h, w), leaves, eps=1e-6, atol=1e-7)


def test_valid_vocab_ignores_the_padding_rows_of_the_head():
    case = make_case(vocab=40)
    weight = case.policy_weight.clone()
    weight[33:] = torch.nan
    targets = case.target_ids.clamp(max=32)
    got = operators.linear_token_scores(case.policy_hidden, weight, *case.args()[2:4], targets, valid_vocab=33)
    cut = operators.linear_token_scores(
        case.policy_hidden, case.policy_weight[:33], case.ref_hidden, case.ref_weight[:33], targets
    )
    assert torch.equal(got.kl, cut.kl)
    assert torch.equal(got.policy_logprobs, cut.policy_logprobs)
    logits, ref_logits = case.policy_hidden @ weight.t(), case.ref_hidden @ case.ref_weight.t()
    by_logits = operators.token_scores(logits, ref_logits, targets, valid_vocab=33)
    torch.testing.assert_close(by_logits.kl, cut.kl)
    torch.testing.assert_close(by_logits.entropy, cut.entropy)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_bfloat16_logits_round_the_heads_output_and_nothing_else(softcap):
    case = make_case(num_rows=30, softcap=softcap, logits_dtype="bfloat16").to(torch.float32)
    got = operators.linear_token_scores(*case.args(), **case.options)
    logits = (case.policy_hidden @ case.policy_weight.t()).bfloat16().double()
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    expected = logits.log_softmax(1).gather(1, case.target_ids[:, None])[:, 0]
    assert float((got.policy_logprobs - expected).abs().max()) < 3e-6
    exact = operators.linear_token_scores(*case.args(), softcap=softcap)
    assert float((exact.policy_logprobs - expected).abs().max()) > 1e-4, "rounding must be visible in this case"


def test_the_head_is_scored_in_float32_under_autocast():
    case = make_case(num_rows=12, hidden=64).to(torch.float32)
    plain, grads = run(operators.linear_token_scores, case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, grads_inside = run(operators.linear_token_scores, case)
    assert torch.equal(plain.kl, inside.kl)
    assert torch.equal(grads["weight"], grads_inside["weight"])


def test_shared_head_gives_the_scores_of_two_equal_heads():
    case = make_case(num_rows=33, bias=True).to(torch.float32)
    shared = {"policy_bias": case.options["policy_bias"], "ref_bias": case.options["policy_bias"]}
    copies = {k: v.clone() for k, v in shared.items()}
    weight = case.policy_weight
    one = operators.linear_token_scores(case.policy_hidden, weight, case.ref_hidden, weight, case.target_ids, **shared)
    two = operators.linear_token_scores(
        case.policy_hidden, weight, case.ref_hidden, weight.clone(), case.target_ids, **copies
    )
    assert torch.equal(one.kl, two.kl)


def test_a_frozen_head_gets_no_gradient_and_hidden_states_still_do():
    case = make_case().to(torch.float32)
    hidden = case.policy_hidden.clone().requires_grad_()
    operators.linear_token_scores(hidden, *case.args()[1:]).kl.sum().backward()
    _, grads = run(operators.linear_token_scores, case)
    assert case.policy_weight.grad is None
    assert hidden.grad.abs().max() > 0


def test_minus_infinity_in_both_logits_removes_an_id_from_the_vocabulary():
    g = torch.Generator().manual_seed(0)
    z, r = (torch.randn(6, 20, generator=g) for _ in range(2))
    targets = torch.randint(0, 19, (6,), generator=g)
    keep = torch.arange(20) != 19
    got = operators.token_scores(z.masked_fill(~keep, -torch.inf), r.masked_fill(~keep, -torch.inf), targets)
    cut = operators.token_scores(z[:, :19], r[:, :19], targets)
    torch.testing.assert_close(got.kl, cut.kl)
    torch.testing.assert_close(got.policy_logprobs, cut.policy_logprobs)


def test_log_probability_near_zero_keeps_its_relative_accuracy():
    logits = torch.tensor([[0.0, -30.0, -31.0]], requires_grad=True)
    got = operators.token_scores(logits, None, torch.tensor([0]))
    truth = -torch.tensor([-30.0, -31.0], dtype=torch.float64).exp().sum().log1p()
    assert got.policy_logprobs.item() == pytest.approx(float(truth), rel=1e-6, abs=0)
    got.policy_logprobs.sum().backward()
    assert float(logits.grad[0, 0]) == pytest.approx(float(-truth), rel=1e-6, abs=0)


def test_small_exact_kl_is_resolved():
    """True KL about 1e-4 among logits of size 20: the sum over z - r must not drown in rounding."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(50, 3000, generator=g, dtype=torch.float64).float() * 3 + 20
    r = z + 0.02 * torch.randn(50, 3000, generator=g)
    targets = torch.zeros(50, dtype=torch.int64)
    truth = reference.token_scores(z.double(), r.double(), targets).kl
    got = operators.token_scores(z, r, targets).kl
    assert 5e-5 < float(truth.mean()) < 5e-4
    assert float((got - truth).abs().max()) < 5e-7
    same = operators.token_scores(z, z.clone(), targets).kl
    assert torch.equal(same, torch.zeros(50)), "equal logits must give exactly zero"


@pytest.mark.parametrize("mask", ["none", "some"])
def test_inplace_backward_writes_the_same_gradient_over_the_logits(mask):
    case = make_case(num_rows=11, mask=mask, temperature=0.7).to(torch.float32)
    ref_logits = case.ref_hidden @ case.ref_weight.t()
    gradients = []
    for inplace in (False, True):
        leaf = (case.policy_hidden @ case.policy_weight.t()).requires_grad_()
        logits = leaf * 1.0
        places = []
        logits.register_hook(lambda gradient, places=places: places.append(gradient.data_ptr()))
        scores = operators.token_scores(logits, ref_logits, case.target_ids, inplace_backward=inplace, **case.options)
        (scores.kl + scores.policy_logprobs).sum().backward()
        gradients.append(leaf.grad)
        assert (places == [logits.data_ptr()]) == inplace
    assert torch.equal(*gradients)


def test_the_backward_loads_no_chunk_that_is_still_there(monkeypatch):
    loads = []
    load = HeadSource.load
    monkeypatch.setattr(
        HeadSource, "load", lambda self, lo, hi, **k: (loads.append((lo, hi)), load(self, lo, hi, **k))[1]
    )
    case = make_case(num_rows=10).to(torch.float32)
    hidden = case.policy_hidden.requires_grad_()
    scores = operators.linear_token_scores(hidden, *case.args()[1:], chunk_tokens=4)
    assert loads == [(0, 4), (4, 8), (8, 10)]
    loads.clear()
    scores.kl.sum().backward()
    assert loads == [(0, 4), (4, 8)]


@pytest.mark.parametrize("rows", [slice(None), slice(7, 10), slice(0, 3), slice(2, 9, 3)])
@pytest.mark.parametrize("support", [None, Support(top_k=4), Support(banned_ids=torch.tensor([1, 2]))])
def test_a_second_backward_gives_the_same_gradient(rows, support):
    """The first one has used the kept chunk up."""
    case = make_case(num_rows=10, support=support, bias=True)
    leaves = [x.clone().requires_grad_() for x in (case.policy_hidden, case.policy_weight, case.options["policy_bias"])]
    options = {**case.options, "policy_bias": leaves[2]}
    scores = operators.linear_token_scores(*leaves[:2], *case.args()[2:], chunk_tokens=4, **options)
    other = operators.linear_token_scores(*leaves[:2], *case.args()[2:], chunk_tokens=4, **options)
    loss = (scores.kl + scores.policy_logprobs)[rows].sum()
    if support is not None:
        loss = loss + scores.kl_support[rows].sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)
    assert float(first[0].abs().max()) > 0
    torch.testing.assert_close(
        torch.autograd.grad(other.kl.sum(), leaves[0]),
        torch.autograd.grad(
            operators.linear_token_scores(*leaves[:2], *case.args()[2:], **options).kl.sum(), leaves[0]
        ),
    )


@pytest.mark.parametrize("bias", [2.0, 9.0])
def test_a_banned_id_may_have_the_largest_logit(bias):
    """Then the full-vocabulary sums have another maximum than those on the support, from which they are made."""
    case = make_case(num_rows=12, bias=True, support=Support(banned_ids=torch.tensor([3, 4])))
    case.options["policy_bias"][3] += bias
    case.options["ref_bias"][4] += bias
    check(case)


def test_heads_with_one_weight_but_two_biases_are_two_heads():
    case = make_case(bias=True).to(torch.float32)
    weight = case.policy_weight
    args = case.policy_hidden, weight, case.ref_hidden
    one = operators.linear_token_scores(*args, weight, case.target_ids, **case.options)
    two = operators.linear_token_scores(*args, weight.clone(), case.target_ids, **case.options)
    torch.testing.assert_close(one.kl, two.kl)
    torch.testing.assert_close(one.ref_logprobs, two.ref_logprobs)


def test_a_bias_of_minus_infinity_removes_an_id_from_the_vocabulary():
    case = make_case(bias=True)
    for name in ("policy_bias", "ref_bias"):
        case.options[name][36] = -torch.inf
    targets = case.target_ids.clamp(max=35)
    got = operators.linear_token_scores(*case.args()[:4], targets, **case.options)
    cut = operators.linear_token_scores(*case.args()[:4], targets, valid_vocab=36, **case.options)
    torch.testing.assert_close(got.kl, cut.kl)
    torch.testing.assert_close(got.entropy, cut.entropy)
