"""The Triton kernels run by Triton's interpreter on the CPU: not collected by name, test_triton.py starts it in a
process of its own, where TRITON_INTERPRET=1 is set before triton is imported. Small odd shapes, every branch.

Of the matrix's many combinations, those that launch every kernel with every flag run with all other tests, the rest
under `make kernels`."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from interpreter import call_without_patching_anew
from matrix import INTERPRETER, check_case, checks, make_case, shrink_blocks
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

from fastkl.kernels import call, operators, reference, resources
from fastkl.kernels.dispatch import interpreting
from fastkl.kernels.gpu import heads, passes, slices, supports
from fastkl.kernels.operators import TokenCoefficients

assert interpreting(), "run with TRITON_INTERPRET=1"

launches: list[str] = []
flags_of: dict[str, set[str]] = {}
"""The flags that were set when a kernel was launched, all tests together."""

REST = pytest.mark.kernels
"""Left to `make kernels`."""

FAMILIES = ("divergences", "gradient in the forward", "half precision", "strided", "excluded", "biases", "targets")
"""Checks of many combinations, and those on a support: of these only the ones in COVERING run with all other tests."""

COVERING = {
    "heads {'support': 'all three', 'softcap': 4.0, 'bias': True, 'per_row_temperature': True, 'num_rows': 9}",
    "heads {'support': 'banned', 'reference': False, 'num_rows': 9}",
    "heads {'support': 'top_k', 'mask': 'some', 'per_row_temperature': True, 'num_rows': 9}",
    "heads {'support': 'top_p', 'vocab': 1, 'num_rows': 9}",
    "divergences {'reference': False}",
    "divergences {'softcap': 4.0, 'bias': True, 'per_row_temperature': True, 'support': 'top_k', 'num_rows': 4}",
    "divergences {'support': 'all three', 'seed': 3, 'num_rows': 9}",
    "excluded logits with divergences on support none",
    "gradient in the forward, mask some, support None",
    "gradient in the forward times -0.3",
    "half precision torch.bfloat16",
    "half precision torch.float16",
    "strided logits torch.float32, apart",
    "excluded logits on support none, scale 8.0",
    "biases that exclude ids in both, support recorded, loss False",
    "biases that exclude ids in policy, support None, loss True",
    "biases that exclude ids in reference, support top_k, loss False",
    "targets that are no ids, support None, masked True",
}


def with_marks(check):
    """Marks a check that is one of many combinations and not in COVERING."""
    costly = check.name.startswith(FAMILIES) or "'support'" in check.name
    marks = [REST] if costly and check.name not in COVERING else []
    return pytest.param(check, id=check.name, marks=marks)


def fused_multiply_add(self, x, y, z):
    """As the hardware's, it rounds once. Triton's own interpreter rounds twice before 3.9."""
    exact = x.data.astype(np.float64) * y.data + z.data
    return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Many blocks and tiles even for tiny sizes, and a log of launches."""
    shrink_blocks(monkeypatch.setattr)
    monkeypatch.setattr(InterpreterBuilder, "create_fma", fused_multiply_add)
    monkeypatch.setattr(InterpretedFunction, "__call__", call_without_patching_anew)
    launches.clear()
    for module, name in (
        (passes, "score_kernel"), (passes, "gradient_kernel"), (passes, "scale_kernel"),
        (passes, "divergence_kernel"), (heads, "linear_score_kernel"), (slices, "linear_gradient_kernel"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, Logged(name, getattr(module, name), launches.append))
    for module, name in (
        (heads, "merge_kernel"), (supports, "support_kernel"), (supports, "support_sums_kernel"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, Logged(name, getattr(module, name)))


class Logged:
    """A kernel whose launches are noted in flags_of and, for those that the tests count, in `launches`."""

    def __init__(self, name, kernel, note=lambda name: None):
        self.__name__, self.kernel, self.note = name, kernel, note

    def __getitem__(self, grid):
        self.note(self.__name__)
        return self.launch(self.kernel[grid])

    def launch(self, start):
        def noted(*arguments, **constants):
            flags_of.setdefault(self.__name__, set()).update(flags_set(constants))
            return start(*arguments, **constants)

        return noted


def flags_set(constants):
    """Names of the flags that are set among a launch's compile-time constants."""
    groups = (constants[name] for name in ("FLAGS", "WHICH", "TILE") if name in constants)
    return {name for group in groups for name, value in group._asdict().items() if value is True}


@pytest.mark.parametrize("check", [with_marks(check) for check in checks(INTERPRETER)])
def test_the_kernels_pass_the_matrix_with_the_launches_they_should_need(check):
    check.run()
    assert check.kernels is None or sorted(set(launches)) == sorted(check.kernels)


def test_scoring_heads_takes_one_launch_for_the_scores_and_one_per_slice_for_the_gradient():
    check_case(INTERPRETER, operators.linear_token_scores, make_case(num_rows=9, vocab=37))  # 32 ids to a slice
    assert launches == ["linear_score_kernel", "linear_gradient_kernel", "linear_gradient_kernel"]


def assert_equal_scores(case, names, **options):
    """The operator's scores of float32 inputs and the definition's of the same inputs in float64."""
    exact = reference.linear_token_scores(*case.args(), **case.options)
    single = case.to(torch.float32)
    if case.ref_weight is case.policy_weight:
        single = replace(single, ref_weight=single.policy_weight)
    got = operators.linear_token_scores(*single.args(), **single.options, **options)
    for name in names:
        torch.testing.assert_close(getattr(got, name).double(), getattr(exact, name), rtol=1e-5, atol=1e-5)


def test_without_the_kl_each_head_is_scored_alone():
    case = make_case(softcap=4.0, mask="some")
    assert_equal_scores(case, ("policy_logprobs", "ref_logprobs", "entropy"), outputs=("entropy",))
    assert launches == ["linear_score_kernel"] * 2


@pytest.mark.parametrize("outputs", [("entropy", "kl"), ("entropy",)])
def test_one_head_for_both_models_is_read_once(outputs):
    case = make_case(softcap=4.0)
    case = replace(case, ref_weight=case.policy_weight)
    assert_equal_scores(case, ("policy_logprobs", "ref_logprobs", *outputs), outputs=outputs)
    assert launches == ["linear_score_kernel"]


def test_given_logits_take_one_launch_however_many_they_are_unless_chunks_are_asked_for(monkeypatch):
    monkeypatch.setattr(call, "CHUNK_BYTES", {"cpu": 1})  # 16 rows, the least
    z = torch.randn(17, 5)
    targets = torch.zeros(17, dtype=torch.int64)
    for chunk, expected in ((None, 1), (16, 2)):
        launches.clear()
        leaf = z.clone().requires_grad_()
        operators.token_scores(leaf, z, targets, chunk_tokens=chunk).kl.sum().backward()
        assert launches == ["score_kernel"] * expected + ["gradient_kernel"] * expected


def flat_logits(g):
    return torch.randn(6, 300, generator=g) * 0.3


def tied_logits(g):
    return (torch.randn(6, 300, generator=g) * 4).round() / 2


def equal_logits(g):
    return torch.zeros(6, 300)


def banned_above_all(g):
    z = torch.randn(6, 300, generator=g) * 2
    z[:, 7] = 30.0
    return z


BANS = {"banned_ids": torch.tensor([7, 299]), "banned_rows": torch.tensor([1, 1, 0, 1, 0, 1]).bool(),
        "excluded_ids": torch.tensor([7, 3])}  # fmt: skip


@pytest.mark.parametrize(
    ("logits", "limits", "by_mask"),
    [
        pytest.param(flat_logits, {"top_p": 0.9}, 0, marks=REST),  # two hundred ids are kept: pivots, sums apart
        pytest.param(flat_logits, {"top_p": torch.tensor([0.9, 1.0, 0.02, 1.5, 0.3, 0.999])}, 0, marks=REST),
        pytest.param(flat_logits, {"top_k": torch.tensor([0, 3, 300, 1, 7, -1])}, 0, marks=REST),
        pytest.param(flat_logits, {"top_k": 200}, 6, marks=REST),  # more than the lanes: no bound
        pytest.param(flat_logits, {"top_p": 0.9, **BANS}, 0, marks=REST),
        pytest.param(tied_logits, {"top_k": 5}, 0, marks=REST),
        pytest.param(tied_logits, {"top_p": 0.5}, None, marks=REST),  # equal logits are cut where the definition's are
        pytest.param(tied_logits, {"min_p": 0.05, "top_k": 4, "top_p": 0.7}, None, marks=REST),
        pytest.param(tied_logits, {"top_k": 5, "ties": "lowest_ids"}, 0, marks=REST),
        pytest.param(tied_logits, {"top_p": 0.5, "ties": "lowest_ids"}, 0, marks=REST),
        pytest.param(flat_logits, {"top_p": 0.9, "ties": "lowest_ids", **BANS}, 0, marks=REST),
        pytest.param(tied_logits, {"min_p": 0.05, "top_k": 4, "top_p": 0.7, "ties": "lowest_ids"}, 0, marks=REST),
        pytest.param(equal_logits, {"top_p": 0.4983}, 6, marks=REST),
        pytest.param(equal_logits, {"top_k": 5}, 6, marks=REST),
        # nothing is left of a difference of sums
        pytest.param(banned_above_all, {"top_p": 0.9, **BANS}, 6, marks=REST),
        pytest.param(banned_above_all, {"top_k": 4, **BANS}, 0, marks=REST),
        pytest.param(banned_above_all, {"min_p": 0.05, **BANS}, 6, marks=REST),
    ],
)
def test_a_threshold_keeps_what_the_definition_keeps(logits, limits, by_mask, monkeypatch):
    for name, value in (("LIST", 64), ("SHORT_LIST", 16), ("SUPPORT_BLOCK", 128), ("SUPPORT_LANES", 64)):
        monkeypatch.setattr(supports, name, value)
    monkeypatch.setattr(passes, "SCORE", passes.Shape(64, 32, 1))
    monkeypatch.setattr(passes, "SCORE_MORE", passes.Shape(32, 32, 1))
    masked = []
    keep = passes.GpuPasses._keep
    monkeypatch.setattr(passes.GpuPasses, "_keep", lambda *a: masked.append(len(a[2])) or keep(*a))
    g = torch.Generator().manual_seed(0)
    z, r = logits(g), torch.randn(6, 300, generator=g)
    targets = torch.tensor([299, 0, 7, 5, 16, 63])
    support = reference.Support(**limits)
    outputs = ("entropy", "kl", "jsd") if support.lowest_ids else ("entropy", "kl")
    leaf, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    got = operators.token_scores(leaf, r, targets, support=support, outputs=outputs)
    assert by_mask is None or sum(masked) == by_mask
    truth = reference.token_scores(exact, r.double(), targets, support=support, outputs=outputs)
    names = ("policy_logprobs_support", "ref_logprobs_support", "kl_support", "outside_support")
    for name in (*names, "jsd_support") if support.lowest_ids else names:
        torch.testing.assert_close(getattr(got, name).double(), getattr(truth, name), rtol=1e-5, atol=1e-5)
    (got.kl_support + got.policy_logprobs_support).sum().backward()
    (truth.kl_support + truth.policy_logprobs_support).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("gap", "shift"),
    [
        *((5.0, 0.0), (40.0, 0.0), (18.0, 1e4), (18.0, -1e4)),
        *(pytest.param(*x, marks=REST) for x in ((18.0, 0.0), (5.0, 1e4), (5.0, -1e4), (40.0, 1e4), (40.0, -1e4))),
    ],
)
def test_given_logits_far_from_zero_keep_their_log_probs(gap, shift):
    """The target stands `gap` above 300 others: -log p(y) is about 300 exp(-gap), far below the unit of 1 - p(y)."""
    g = torch.Generator().manual_seed(0)
    z = (torch.randn(6, 301, generator=g) / 64 + shift).float()
    targets = torch.tensor([0, 300, 7, 16, 15, 150])
    z[torch.arange(6), targets] = shift + gap
    r = (z.double() + torch.randn(6, 301, generator=g).double() / 64).float()
    got = operators.token_scores(z, r, targets)
    truth = reference.token_scores(z.double(), r.double(), targets)
    others = (z.double() - z.double().gather(1, targets[:, None])).scatter(1, targets[:, None], -torch.inf)
    exact = -others.exp().sum(1).log1p()
    torch.testing.assert_close(got.policy_logprobs.double(), exact, rtol=1e-5, atol=0)
    for name in ("ref_logprobs", "entropy", "kl"):
        torch.testing.assert_close(getattr(got, name).double(), getattr(truth, name), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 4.0, "bias": True}, {"mask": "some", "hidden": 24, "num_rows": 35}]
)
def test_before_hopper_the_heads_are_read_through_pointers(options, monkeypatch):
    monkeypatch.setattr(heads, "architecture_of", lambda _: 80)
    monkeypatch.setattr(heads, "TensorDescriptor", None)
    check_case(INTERPRETER, operators.linear_token_scores, make_case(**{"num_rows": 6, "vocab": 53, **options}))
    assert set(launches) == {"linear_score_kernel", "linear_gradient_kernel"}


@pytest.mark.parametrize("mask", ["none", "some"])
def test_known_coefficients_need_no_kernel_but_the_one_that_scores(mask):
    case = make_case(num_rows=9, mask=mask).to(torch.float32)
    case.policy_hidden.requires_grad_()
    loss, _ = operators.linear_token_loss(*case.args(), TokenCoefficients(kl=torch.ones(9)), **case.options)
    assert set(launches) == {"score_kernel"}
    launches.clear()
    torch.autograd.grad(loss, case.policy_hidden)
    assert launches == ["scale_kernel"]


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


def test_all_of_this_launched_every_kernel_with_every_flag_that_it_is_compiled_for(request):
    """The flags of resources.py's configurations, and the kernels; the last test of the file."""
    chosen = {item.callspec.id for item in request.session.items if hasattr(item, "callspec")}
    if not chosen >= COVERING or "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("not all of it ran in this process")
    for configuration in resources.configurations(90):
        name, flags = configuration.kernel.__name__, flags_set(configuration.constants)
        assert name in flags_of and flags <= flags_of[name], (name, flags - flags_of[name])
