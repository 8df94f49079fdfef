"""The Triton kernels run by Triton's interpreter on the CPU: not collected by name, test_triton.py starts it in a
process of its own, where TRITON_INTERPRET=1 is set before triton is imported. Small odd shapes, every branch."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import assert_as_good_as_the_line, make_case, run

from fastkl.kernels import operators, reference
from fastkl.kernels.dispatch import interpreting
from fastkl.kernels.gpu import heads, passes
from fastkl.kernels.operators import Support, TokenCoefficients

assert interpreting(), "run with TRITON_INTERPRET=1"

launches: list[str] = []


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks per row, tiles per share and shares per vocabulary, even for tiny sizes; and a log of launches."""
    monkeypatch.setattr(passes, "FORWARD_BLOCK", 16)
    monkeypatch.setattr(passes, "FORWARD_LANES", 4)
    monkeypatch.setattr(passes, "GRADIENT_BLOCK", 16)
    monkeypatch.setattr(heads, "BLOCK_ROWS", 16)
    monkeypatch.setattr(heads, "MAX_SPLITS", 3)
    monkeypatch.setattr(heads, "GROUP", 2)
    monkeypatch.setattr(heads, "tile_shape", lambda *_: (16, 16, 1))
    launches.clear()
    for module, name in (
        (passes, "score_kernel"), (passes, "gradient_kernel"), (passes, "scale_kernel"),
        (heads, "linear_score_kernel"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, Logged(name, getattr(module, name)))


class Logged:
    def __init__(self, name, kernel):
        self.name, self.kernel = name, kernel

    def __getitem__(self, grid):
        launches.append(self.name)
        return self.kernel[grid]


def check(case, function=operators.linear_token_scores, dtype=torch.float32, unit=2.0**-23):
    truth, true_grads = run(reference.linear_token_scores, case)
    line, line_grads = run(reference.linear_token_scores, case.to(dtype))
    got, grads = run(function, case.to(dtype))
    assert_as_good_as_the_line(got, grads, line, line_grads, truth, true_grads, unit)


OPTIONS = [
    {},
    {"reference": False},
    {"bias": True},
    {"softcap": 4.0},
    {"softcap": 4.0, "logit_scale": 0.3, "temperature": 0.7, "bias": True},
    {"mask": "some", "per_row_temperature": True},
    {"mask": "all"},
    {"num_rows": 0},
    {"num_rows": 1},
    {"num_rows": 35, "vocab": 100, "hidden": 24},
    {"vocab": 1},
    {"vocab": 16},
    {"vocab": 17},
    {"scale": 300.0},
    {"bias": True, "shift": 1e4},
    {"bias": True, "shift": -1e4},
    {"hot": True, "scale": 20.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_hidden_in_matches_float64_and_stores_no_logits_in_the_forward(options):
    case = make_case(**{"num_rows": 6, "vocab": 53, **options})
    check(case)
    if len(case.target_ids) and options.get("mask") != "all":
        assert launches == ["linear_score_kernel", "gradient_kernel"]


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 4.0, "bias": True}, {"mask": "some", "hidden": 24, "num_rows": 35}]
)
def test_before_hopper_the_heads_are_read_through_pointers(options, monkeypatch):
    monkeypatch.setattr(heads, "architecture_of", lambda _: 80)
    monkeypatch.setattr(heads, "TensorDescriptor", None)
    check(make_case(**{"num_rows": 6, "vocab": 53, **options}))
    assert launches == ["linear_score_kernel", "gradient_kernel"]


SUPPORTS = {
    "top_k": Support(top_k=5),
    "banned": Support(banned_ids=torch.tensor([0, 36])),
    "min_p and top_p": Support(top_p=0.9, min_p=0.01),
    "recorded": Support(kept_ids=torch.arange(12), kept_offsets=torch.tensor([0, 1, 1, 4, 8, 10, 12])),
}


MIXED = {"softcap": 4.0, "bias": True, "per_row_temperature": True}


@pytest.mark.parametrize("name", SUPPORTS)
@pytest.mark.parametrize("options", [{}, {"reference": False}, MIXED])
def test_supports_match_float64(name, options):
    check(make_case(num_rows=6, support=SUPPORTS[name], **options))
    assert launches == ["score_kernel", "gradient_kernel"]


def logits_of(case):
    def function(hidden, weight, ref_hidden, ref_weight, target_ids, **options):
        z = hidden.float() @ weight.float().t()
        r = None if ref_hidden is None else ref_hidden.float() @ ref_weight.float().t()
        return operators.token_scores(z, r, target_ids, chunk_tokens=4, **options)

    return function


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reference": False},
        {"mask": "some", "per_row_temperature": True},
        {"mask": "all"},
        {"num_rows": 0},
        {"temperature": 0.5, "support": Support(top_k=4)},
        {"mask": "some", "support": SUPPORTS["banned"]},
        {"vocab": 1},
        {"scale": 300.0},
        {"hot": True, "scale": 20.0},
    ],
    ids=str,
)
def test_logits_in_matches_float64(options):
    case = make_case(**{"num_rows": 6, **options})
    check(case, logits_of(case))
    if len(case.target_ids) and options.get("mask") != "all":
        assert set(launches) == {"score_kernel", "gradient_kernel"}


def test_logits_in_reads_strided_half_precision_rows_and_returns_their_dtype():
    case = make_case(num_rows=5, vocab=37, mask="some")
    z = (case.policy_hidden @ case.policy_weight.t()).bfloat16()
    r = (case.ref_hidden @ case.ref_weight.t()).bfloat16()
    strided = torch.full((5, 60), torch.nan).bfloat16()[:, 3:40].copy_(z).requires_grad_()
    got = operators.token_scores(strided, r, case.target_ids, **case.options)
    leaf = z.double().requires_grad_()
    truth = reference.token_scores(leaf, r.double(), case.target_ids, **case.options)
    for name in ("policy_logprobs", "ref_logprobs", "entropy", "kl"):
        torch.testing.assert_close(getattr(got, name).double(), getattr(truth, name), rtol=1e-5, atol=2e-6)
    (grad,) = torch.autograd.grad((got.kl - got.entropy).sum(), strided)
    (true_grad,) = torch.autograd.grad((truth.kl - truth.entropy).sum(), leaf)
    assert grad.dtype == torch.bfloat16
    # one unit in the last place: the interpreter truncates to bfloat16 where the hardware rounds
    torch.testing.assert_close(grad.double(), true_grad, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_heads_are_scored_in_float32(dtype):
    check(make_case(num_rows=5, mask="some"), dtype=dtype, unit=torch.finfo(dtype).eps)


def test_bfloat16_logits_are_cut_to_sixteen_bits_in_the_kernel():
    """The interpreter truncates to bfloat16 where the hardware rounds, so the expectation truncates too."""
    case = make_case(num_rows=20, logits_dtype="bfloat16").to(torch.float32)

    def truncated(hidden, weight):
        return ((hidden @ weight.t()).view(torch.int32) & -65536).view(torch.float32)

    with torch.no_grad():
        got = operators.linear_token_scores(*case.args(), **case.options)
        z = truncated(case.policy_hidden, case.policy_weight)
        expected = reference.token_scores(z, truncated(case.ref_hidden, case.ref_weight), case.target_ids)
        exact = operators.linear_token_scores(*case.args())
    # a product that lies on the edge of two bfloat16 numbers may fall on either side
    assert float((got.policy_logprobs - expected.policy_logprobs).abs().median()) < 1e-5
    assert float((got.kl - expected.kl).abs().median()) < 1e-5
    assert float((got.policy_logprobs - exact.policy_logprobs).abs().median()) > 1e-4


@pytest.mark.parametrize("support", [None, Support(top_k=5)])
@pytest.mark.parametrize("mask", ["none", "some"])
def test_known_coefficients_give_the_gradient_of_autograd(mask, support):
    case = make_case(num_rows=9, mask=mask, support=support, softcap=6.0).to(torch.float32)
    g = torch.Generator().manual_seed(0)
    names = ("policy_logprobs", "entropy", "kl") + (
        () if support is None else ("policy_logprobs_support", "kl_support")
    )
    coefficients = TokenCoefficients(**{name: torch.randn(9, generator=g) for name in names})
    for values in coefficients.values():
        if values is not None:
            values[4] = 0
    leaves = [case.policy_hidden.requires_grad_(), case.policy_weight.requires_grad_()]
    scores = operators.linear_token_scores(*case.args(), **case.options)
    loss = sum((getattr(coefficients, name) * getattr(scores, name)).sum() for name in names)
    expected = torch.autograd.grad(loss, leaves)
    launches.clear()
    got, _ = operators.linear_token_loss(
        *case.args(), coefficients, chunk_tokens=8 if mask == "none" else 3, **case.options
    )
    for a, b in zip(torch.autograd.grad(got, leaves), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    if support is None:
        assert launches[0] == "score_kernel" and "gradient_kernel" not in launches


@pytest.mark.parametrize("factor", [1.0, -0.3])
def test_the_gradient_of_the_forward_is_scaled_by_what_the_backward_brings(factor):
    case = make_case(num_rows=6, vocab=53).to(torch.float32)
    leaves = [case.policy_hidden.requires_grad_(), case.policy_weight.requires_grad_()]
    coefficients = TokenCoefficients(kl=torch.ones(6))
    expected = torch.autograd.grad(factor * operators.linear_token_scores(*case.args()).kl.sum(), leaves)
    launches.clear()
    loss, _ = operators.linear_token_loss(*case.args(), coefficients)
    for a, b in zip(torch.autograd.grad(loss * factor, leaves), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert launches[-2:] == ["scale_kernel", "scale_kernel"]


def test_a_rows_scores_do_not_depend_on_its_neighbours_bit_for_bit():
    """Rows keep their place within a tile: numpy's product, which stands in for tensor cores here, depends on it."""
    case = make_case(num_rows=40, hidden=24, vocab=75).to(torch.float32)
    everything = operators.linear_token_scores(*case.args())
    for index in (torch.arange(32, 40), torch.arange(16, 40), torch.tensor([16, 1, 34, 3])):
        some = operators.linear_token_scores(
            case.policy_hidden[index],
            case.policy_weight,
            case.ref_hidden[index],
            case.ref_weight,
            case.target_ids[index],
        )
        for name in ("policy_logprobs", "ref_logprobs", "entropy", "kl"):
            assert torch.equal(getattr(some, name), getattr(everything, name)[index]), name


def test_nan_in_a_logit_is_reported_not_swallowed():
    case = make_case().to(torch.float32)
    case.policy_weight[20] = torch.nan
    with pytest.raises(Exception, match="policy_logprobs is NaN"):
        operators.linear_token_scores(*case.args())


def test_equal_models_have_a_kl_of_exactly_zero():
    case = make_case().to(torch.float32)
    scores = operators.linear_token_scores(
        case.policy_hidden, case.policy_weight, case.policy_hidden, case.policy_weight, case.target_ids
    )
    assert float(scores.kl.abs().max()) < 1e-6
