"""One matrix of checks for every device: PyTorch on a CPU, the Triton kernels under Triton's interpreter, and on a GPU.

`checks(device)` lists them; each is a function without arguments that raises AssertionError. pytest runs them in
test_matrix.py (CPU, GPU) and interpreted_triton.py (interpreter), bench/gpu.py on a GPU without pytest.

The rule that tolerances come from: at most twice (gradients: three times) the error that the plain PyTorch line makes
in the same dtype, both measured against float64. On a GPU, where sums have another order than the line's, an error
below fixed bounds will do as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastkl.kernels import operators, reference
from fastkl.kernels.types import DIVERGENCES, OUTPUTS, Support, TokenCoefficients, TokenScores

POLICY_SCORES = ("policy_logprobs", "entropy", "kl", "policy_logprobs_support", "kl_support")
EVERY_SCORE = (*POLICY_SCORES, *DIVERGENCES, *(f"{name}_support" for name in DIVERGENCES))
EVERY_OUTPUT = (*OUTPUTS, *DIVERGENCES)


@dataclass(frozen=True)
class Case:
    """One call of linear_token_scores, in float64; `to` gives the same in another dtype."""

    policy_hidden: Tensor
    policy_weight: Tensor
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    target_ids: Tensor
    options: dict = field(default_factory=dict)
    upstream_seed: int = 0

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        names = ("policy_hidden", "policy_weight", "ref_hidden", "ref_weight", "target_ids")
        options = {k: on_device(v, dtype, device) for k, v in self.options.items()}
        return replace(self, **{n: on_device(getattr(self, n), dtype, device) for n in names}, options=options)

    def args(self) -> tuple:
        return self.policy_hidden, self.policy_weight, self.ref_hidden, self.ref_weight, self.target_ids


def on_device(x, dtype: torch.dtype, device: str):
    """x with its floating-point numbers in another dtype, on another device: a tensor, a Support or anything else."""
    if isinstance(x, Support):
        return Support(*(on_device(getattr(x, name), dtype, device) for name in Support.__slots__))
    if not isinstance(x, Tensor):
        return x
    return x.to(device, dtype) if x.is_floating_point() else x.to(device)


def make_case(
    num_rows: int = 9,
    hidden: int = 8,
    vocab: int = 37,
    seed: int = 0,
    scale: float = 3.0,
    shift: float = 0.0,
    reference: bool = True,
    bias: bool = False,
    mask: str = "none",
    per_row_temperature: bool = False,
    support: Support | None = None,
    hot: bool = False,
    **options,
) -> Case:
    """Random heads; logits of standard deviation about `scale`. hot: targets are the argmax. mask: none, some, all"""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):  # values that bfloat16 holds exactly, so that every dtype sees the same problem
        return torch.randn(*shape, generator=g, dtype=torch.float64).bfloat16().double()

    weight = (randn(vocab, hidden) * scale / hidden**0.5).bfloat16().double()
    ref_weight = (weight + 0.1 * randn(vocab, hidden)).bfloat16().double() if reference else None
    hidden_states = randn(num_rows, hidden)
    ref_states = (hidden_states + 0.1 * randn(num_rows, hidden)).bfloat16().double() if reference else None
    targets = torch.randint(0, vocab, (num_rows,), generator=g)
    targets[: num_rows // 4] = vocab - 1  # the last id must be scored too
    if hot:
        targets = (hidden_states @ weight.t()).argmax(1)
    if bias:
        options["policy_bias"] = (randn(vocab) + shift).bfloat16().double()
        options["ref_bias"] = (randn(vocab) + shift).bfloat16().double() if reference else None
    if mask != "none":
        options["mask"] = torch.rand(num_rows, generator=g) > 0.4 if mask == "some" else torch.zeros(num_rows).bool()
    if per_row_temperature:
        options["temperature"] = (torch.rand(num_rows, generator=g, dtype=torch.float64) + 0.5).bfloat16().double()
    if support is not None:
        options["support"] = support
    return Case(hidden_states, weight, ref_states, ref_weight, targets, options, seed)


def run(function, case: Case, scores: tuple[str, ...] = EVERY_SCORE) -> tuple[TokenScores, dict[str, Tensor]]:
    """Scores, and the gradients of sum(random factor * score) over the scores named and present."""
    leaves = {"hidden": case.policy_hidden, "weight": case.policy_weight, "bias": case.options.get("policy_bias")}
    leaves = {k: v.detach().clone().requires_grad_() for k, v in leaves.items() if v is not None}
    options = dict(case.options)
    if "bias" in leaves:
        options["policy_bias"] = leaves["bias"]
    out = function(leaves["hidden"], leaves["weight"], *case.args()[2:], **options)
    g = torch.Generator().manual_seed(case.upstream_seed + 1)
    loss = out.policy_logprobs.new_zeros((), dtype=torch.float64)
    for name in EVERY_SCORE:
        factor = torch.randn(len(case.target_ids), generator=g, dtype=torch.float64).to(case.target_ids.device)
        if name in scores and getattr(out, name) is not None:
            loss = loss + (factor * getattr(out, name).double()).sum()
    loss.backward()
    return out, {k: v.grad for k, v in leaves.items()}


def error(x: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; of gradients and scores alike."""
    assert x.shape == truth.shape
    assert x.isfinite().all()
    return float((x.detach().double() - truth.detach()).abs().max()) if x.numel() else 0.0


def scale_of(x: Tensor) -> float:
    return float(x.detach().abs().max()) if x.numel() else 0.0


def assert_as_good_as_the_line(
    scores, grads, line, line_grads, truth, true_grads, unit: float = 2.0**-23, device: Device | None = None
) -> None:
    """error <= 2x (gradients 3x) the line's error + eps, where eps is a few units in the last place of the values."""
    score_floor, gradient_floor = (0.0, 0.0) if device is None else (device.score_floor, device.gradient_floor)
    for name in TokenScores.__slots__:
        exact = getattr(truth, name)
        got = getattr(scores, name)
        assert (got is None) == (exact is None), name
        if exact is not None:
            bound = max(2 * error(getattr(line, name), exact) + 8 * unit * (1 + scale_of(exact)), score_floor)
            assert error(got.detach(), exact) <= bound, (name, error(got.detach(), exact), bound)
    for name, exact in true_grads.items():
        bound = 3 * error(line_grads[name], exact) + 8 * unit * (1e-3 + scale_of(exact))
        bound = max(bound, gradient_floor * scale_of(exact))
        assert error(grads[name], exact) <= bound, (name, error(grads[name], exact), bound)


@dataclass(frozen=True)
class Device:
    """Where a matrix runs, and what it knows to be unavoidable there."""

    name: str
    device: str = "cpu"
    score_floor: float = 0.0  # nats; an error below it is no fault
    gradient_floor: float = 0.0  # in units of the largest entry
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    large: bool = False  # whether the cases that name no size get one of many tiles


CPU = Device("cpu")
INTERPRETER = Device("interpreter")
CUDA = Device("cuda", "cuda", 1e-4, 1e-2, (torch.float32, torch.bfloat16), large=True)

SUPPORTS = {
    "top_k": Support(top_k=5),
    "top_p": Support(top_p=0.8),
    "min_p": Support(min_p=0.05),
    "min_p and top_p": Support(top_p=0.9, min_p=0.01),
    "all three": Support(top_k=9, top_p=0.9, min_p=0.01),
    "banned": Support(banned_ids=torch.tensor([0, 36])),
    "recorded": Support(kept_ids=torch.arange(30) % 37, kept_offsets=torch.tensor([0, 1, 1, 4, 8, 10, 20, 25, 27, 30])),
}
SIZED = {"num_rows": 9}  # as many as the recorded support has
MIXED = {"softcap": 4.0, "bias": True, "per_row_temperature": True}
HEADS: list[dict] = [
    {},
    {"reference": False},
    {"bias": True},
    {"softcap": 4.0},
    {"logit_scale": 0.3},
    {"softcap": 4.0, "logit_scale": 0.3, "temperature": 0.7, "bias": True},
    {"mask": "some", "per_row_temperature": True},
    {"mask": "all"},
    {"num_rows": 0},
    {"num_rows": 0, "valid_vocab": 31},
    {"num_rows": 1},
    {"num_rows": 35, "vocab": 100, "hidden": 24},
    {"num_rows": 6, "vocab": 1},
    {"num_rows": 6, "vocab": 2},
    {"num_rows": 6, "vocab": 16},
    {"num_rows": 6, "vocab": 17},
    {"scale": 300.0},
    {"bias": True, "shift": 1e4},
    {"bias": True, "shift": -1e4},
    {"hot": True, "scale": 20.0},
]
ON_SUPPORT: list[dict] = [
    *({"support": name, "seed": 3, **SIZED} for name in SUPPORTS),
    *({"support": name, "reference": False, **SIZED} for name in SUPPORTS),
    *({"support": name, **MIXED, **SIZED} for name in SUPPORTS),
    {"support": "top_k", "mask": "some", "per_row_temperature": True, **SIZED},
    {"support": "top_p", "vocab": 1, **SIZED},
]
APART: list[dict] = [
    {},
    {"reference": False},
    {**MIXED, "support": "banned", **SIZED},
    {**MIXED, "support": "top_k", "num_rows": 4},
    {"scale": 300.0},
    {"hot": True, "scale": 20.0, "mask": "some"},
    *({"support": name, "seed": 3, **SIZED} for name in ("top_k", "all three", "recorded")),
]
"""With forward_kl and jsd."""

LOGITS: list[dict] = [
    {},
    {"reference": False},
    {"mask": "some", "per_row_temperature": True},
    {"mask": "all"},
    {"num_rows": 0},
    {"temperature": 0.5, "support": "top_k", **SIZED},
    {"mask": "some", "support": "banned", **SIZED},
    {"num_rows": 6, "vocab": 1},
    {"scale": 300.0},
    {"hot": True, "scale": 20.0},
]


def shrink_blocks(put: Callable[[object, str, object], None] = setattr) -> None:
    """Several blocks per row, tiles per share and shares per vocabulary, even for the interpreter's tiny sizes."""
    from fastkl.kernels.gpu import heads, passes, slices, supports

    several = passes.Shape(16, 8, 1)
    for name, value in (("SCORE", several), ("DIVERGENCES", several), ("GRADIENT_BLOCK", 16)):
        put(passes, name, value)
    for name in ("SCORE_AND_GRADIENT", "SCORE_MORE"):
        put(passes, name, passes.Shape(8, 8, 1))
    for name, value in (
        ("SUPPORT_BLOCK", 16), ("SUPPORT_LANES", 4), ("SUMS_BLOCK", 8), ("SUMS_LANES", 4), ("LIST", 16),
        ("SHORT_LIST", 8), ("ROWS_AT_A_TIME", 5),
    ):  # fmt: skip
        put(supports, name, value)
    for name, value in (("BLOCK_ROWS", 16), ("MAX_SPLITS", 3), ("GROUP", 2), ("GROUP_OF_TWO_HEADS", 2)):
        put(heads, name, value)
    put(heads, "tile_shape", lambda *_: heads.Shape(16, 16, 1))
    for name, value in (("BLOCK_ROWS", 16), ("SLICE_IDS", 32), ("SLICE_ROWS", 16)):
        put(slices, name, value)


class Check(NamedTuple):
    """One check, and which kernels it has to launch where kernels are launched (None: whichever)."""

    name: str
    run: Callable[[], None]
    kernels: tuple[str, ...] | None = None


def sized(device: Device, options: dict) -> Case:
    """The case of these options, whose support is named, in a size that suits the device."""
    size = {"num_rows": 300, "hidden": 256, "vocab": 4099} if device.large else {"num_rows": 9, "vocab": 37}
    if "num_rows" in options or "vocab" in options:
        size = {"num_rows": 9, "vocab": 53}
    options = {**size, **options}
    return make_case(**{**options, "support": SUPPORTS.get(options.get("support"))})


def check_case(device: Device, function: Callable, case: Case, dtype: torch.dtype = torch.float32) -> None:
    """Scores and gradients against float64 and the plain line, of a function with linear_token_scores's arguments."""
    truth, true_grads = run(reference.linear_token_scores, case.to(torch.float64, device.device))
    line, line_grads = run(reference.linear_token_scores, case.to(dtype, device.device))
    got, grads = run(function, case.to(dtype, device.device))
    assert got.policy_logprobs.dtype == torch.float32
    assert_as_good_as_the_line(got, grads, line, line_grads, truth, true_grads, torch.finfo(dtype).eps, device)


def from_logits(hidden, weight, ref_hidden, ref_weight, target_ids, **options) -> TokenScores:
    """token_scores with the arguments of linear_token_scores."""
    z = hidden.float() @ weight.float().t()
    r = None if ref_hidden is None else ref_hidden.float() @ ref_weight.float().t()
    return operators.token_scores(z, r, target_ids, chunk_tokens=4 if len(z) < 100 else None, **options)


def check_strided_logits(device: Device, dtype: torch.dtype, inplace: bool) -> None:
    """Logits in rows of a wider tensor, in any dtype: the scores are those of these very numbers, and the gradient
    comes back in their dtype, over the logits if asked for."""
    support, outputs = ("banned", EVERY_OUTPUT) if inplace else ("top_k", OUTPUTS)
    size = {**SIZED, "vocab": 37, "outputs": outputs}
    case = sized(device, {"mask": "some", "per_row_temperature": True, "support": support, **size})
    case = case.to(torch.float64, device.device)
    z, r = (case.policy_hidden @ case.policy_weight.t()).to(dtype), (case.ref_hidden @ case.ref_weight.t()).to(dtype)
    leaf = torch.full((9, 60), torch.nan, dtype=dtype, device=device.device)[:, 3:40].copy_(z).requires_grad_()
    options = {**case.options, "temperature": case.options["temperature"].float()}
    got = operators.token_scores(leaf * 1 if inplace else leaf, r, case.target_ids, inplace_backward=inplace, **options)
    exact = z.double().requires_grad_()
    truth = reference.token_scores(exact, r.double(), case.target_ids, **case.options)
    for name in TokenScores.__slots__:
        if getattr(truth, name) is not None:
            torch.testing.assert_close(getattr(got, name).double(), getattr(truth, name), rtol=1e-5, atol=2e-6)

    def loss(scores: TokenScores) -> Tensor:
        total = (scores.kl + scores.policy_logprobs_support - scores.entropy).sum()
        return total + (scores.forward_kl + scores.jsd_support).sum() if inplace else total

    (grad,) = torch.autograd.grad(loss(got), leaf)
    (true_grad,) = torch.autograd.grad(loss(truth), exact)
    assert grad.dtype == dtype
    # one unit in the last place: the interpreter truncates to bfloat16 where the hardware rounds
    torch.testing.assert_close(grad.double(), true_grad, rtol=max(1e-5, torch.finfo(dtype).eps), atol=1e-6)


def check_loss(device: Device, dtype: torch.dtype, mask: str, support: str | None, factor: float = 1.0) -> None:
    """Known coefficients, some of them zero, give the gradient that autograd takes of the same loss."""
    case = sized(device, {"mask": mask, "support": support, "softcap": 6.0, **(SIZED if support else {})})
    case = case.to(dtype, device.device)
    g = torch.Generator().manual_seed(0)
    names = POLICY_SCORES if support else POLICY_SCORES[:3]
    num_rows = len(case.target_ids)
    values = {name: torch.randn(num_rows, generator=g).to(device.device) for name in names}
    for value in values.values():
        value[4] = 0
    leaves = [case.policy_hidden.requires_grad_(), case.policy_weight.requires_grad_()]
    scores = operators.linear_token_scores(*case.args(), **case.options)
    loss = factor * sum((values[name] * getattr(scores, name)).sum() for name in names)
    expected = torch.autograd.grad(loss, leaves)
    chunk = None if device.large else 8 if mask == "none" else 3
    got, _ = operators.linear_token_loss(*case.args(), TokenCoefficients(**values), chunk_tokens=chunk, **case.options)
    for x, y in zip(torch.autograd.grad(factor * got, leaves), expected, strict=True):
        if dtype == torch.float32 and not device.large:
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
        assert float((x.double() - y.double()).norm()) <= 1e-2 * float(y.double().norm())


def check_independence(device: Device, dtype: torch.dtype) -> None:
    """A row's scores are the same bits in any company. (numpy's products, which stand in for tensor cores in the
    interpreter, depend on a row's place within its tile, so rows keep it there.)

    On a GPU the kernel that multiplies by itself serves bfloat16 and float16 only, and nobody else promises this there:
    float32 heads are multiplied by the BLAS, which picks its tiles, and so its order of summation, by the number of
    rows."""
    case = sized(device, {"num_rows": 40, "hidden": 24, "vocab": 75}).to(dtype, device.device)
    everything = operators.linear_token_scores(*case.args())
    for rows in (range(32, 40), range(16, 40), (16, 1, 34, 3)):
        index = torch.tensor(list(rows), device=device.device)
        some = operators.linear_token_scores(
            case.policy_hidden[index], case.policy_weight, case.ref_hidden[index], case.ref_weight,
            case.target_ids[index],
        )  # fmt: skip
        for name in ("policy_logprobs", "ref_logprobs", "entropy", "kl"):
            assert torch.equal(getattr(some, name), getattr(everything, name)[index]), name


def check_nan_is_reported(device: Device) -> None:
    """A NaN in a head reaches the border and is named there, not swallowed by a maximum."""
    case = sized(device, {}).to(torch.float32, device.device)
    case.policy_weight[20] = torch.nan
    try:
        operators.linear_token_scores(*case.args(), check_values=True)
    except operators.UserError as error:
        assert "policy_logprobs is NaN" in str(error)
    else:
        raise AssertionError("NaN was not reported")


def check_equal_models(device: Device) -> None:
    """The KL of a policy from itself is zero."""
    case = sized(device, {}).to(torch.float32, device.device)
    scores = operators.linear_token_scores(*case.args()[:2], *case.args()[:2], case.target_ids)
    assert float(scores.kl.abs().max()) < 1e-6


NO = -math.inf
ROWS_WITHOUT_SOME_LOGITS = [  # (excluded in the policy, excluded in the reference, target), of ids 0..11
    ((), (), 3),
    ((), (5,), 3),
    ((), (3,), 3),
    ((4, 5), (), 3),
    ((4, 5), (4, 5), 3),
    ((4, 5), (4,), 11),
    ((3,), (), 3),
    ((3,), (3,), 3),
    ((0, 1, 2, 4, 5, 6, 7, 8, 9, 10), (0, 1), 3),
    (range(12), (), 3),
    ((), range(12), 3),
    (range(12), range(12), 3),
]
EXCLUDING_SUPPORTS = {
    "none": None,
    "top_k": Support(top_k=4),
    "top_p": Support(top_p=0.8),
    "min_p": Support(min_p=0.05),
    "banned": Support(banned_ids=torch.tensor([5, 11])),
    "recorded": Support(kept_ids=torch.tensor([0, 3, 4, 5] * 12), kept_offsets=torch.arange(0, 49, 4)),
}


def assert_scores(got: TokenScores, truth: TokenScores, rows: Tensor | slice = slice(None)) -> None:
    """Equal up to float32's rounding, infinite and NaN in the same places."""
    for name in TokenScores.__slots__:
        exact = getattr(truth, name)
        assert (getattr(got, name) is None) == (exact is None), name
        if exact is not None:
            x, y = getattr(got, name)[rows].double(), exact[rows]
            torch.testing.assert_close(
                x, y, rtol=1e-5, atol=1e-5, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
            )


def check_excluded_logits(
    device: Device, support: str, scale: float, chunk: int | None, outputs: tuple[str, ...] = OUTPUTS
) -> None:
    """Logits of -inf in the policy, the reference and at targets: scores as defined, and of every score the gradient
    in the rows where it is finite. The other rows have no part in the loss, and must not spoil it."""
    g = torch.Generator().manual_seed(0)
    z, r = (scale * torch.randn(12, 12, generator=g, dtype=torch.float64).float().double() for _ in range(2))
    for row, (excluded, ref_excluded, _) in enumerate(ROWS_WITHOUT_SOME_LOGITS):
        z[row, list(excluded)], r[row, list(ref_excluded)] = NO, NO
    targets = torch.tensor([target for *_, target in ROWS_WITHOUT_SOME_LOGITS])
    options: dict = {"temperature": 0.7, "outputs": outputs}
    if support != "none":
        options["support"] = on_device(EXCLUDING_SUPPORTS[support], torch.float64, device.device)
    z, r, targets = z.to(device.device), r.to(device.device), targets.to(device.device)
    truth = reference.token_scores(z, r, targets, **options)
    assert bool(truth.kl.isinf().any()) and bool(truth.kl.isnan().any())
    got = operators.token_scores(z.float(), r.float(), targets, chunk_tokens=chunk, check_values=False, **options)
    assert_scores(got, truth)

    z, r, targets = z[:9], r[:9], targets[:9]  # of an impossible row, the gradient is NaN too
    if "support" in options:
        options["support"] = options["support"].select(slice(0, 9))
    for name in EVERY_SCORE[1:]:
        if getattr(truth, name) is None:
            continue
        factor = torch.randn(9, generator=g, dtype=torch.float64).to(device.device)
        factor *= getattr(truth, name)[:9].abs() < math.inf
        leaf = z.float().requires_grad_()
        scores = operators.token_scores(leaf, r.float(), targets, chunk_tokens=chunk, **options)
        outputs, ones = [scores.policy_logprobs, getattr(scores, name)], torch.ones(9, device=device.device)
        (gradient,) = torch.autograd.grad(outputs, leaf, [ones, factor.float()])
        expected = torch.stack([defined_gradient(z, r, targets, options, name, row, factor) for row in range(9)])
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def defined_gradient(
    z: Tensor, r: Tensor, targets: Tensor, options: dict, name: str, row: int, factor: Tensor
) -> Tensor:
    """d (log p(y) + factor * score) / dz of one row, [V], by the definition; a score whose factor is 0 is left out."""
    one = slice(row, row + 1)
    if "support" in options:
        options = {**options, "support": options["support"].select(one)}
    leaf = z[one].clone().requires_grad_()
    scores = reference.token_scores(leaf, r[one], targets[one], **options)
    loss = scores.policy_logprobs.sum()
    if factor[row]:
        loss = loss + factor[row] * getattr(scores, name).sum()
    return torch.autograd.grad(loss, leaf)[0][0]


def check_excluding_biases(device: Device, excluded: str, support: str | None, loss: bool) -> None:
    """-inf in a head's bias: ids that neither model has, that only the policy excludes, or only the reference."""
    case = make_case(bias=True, reference=True, support=SUPPORTS.get(support or ""), temperature=1.3)
    if excluded in ("both", "policy"):
        case.options["policy_bias"][[5, 36]] = NO  # 36 is a target
    if excluded in ("both", "reference"):
        case.options["ref_bias"][[5, 36]] = NO
    case = case.to(torch.float64, device.device)
    truth = reference.linear_token_scores(*case.args(), **case.options)
    assert bool(truth.kl.isinf().all()) == (excluded == "reference")
    single = case.to(torch.float32, device.device)
    given = {name: getattr(truth, name) for name in POLICY_SCORES if getattr(truth, name) is not None}
    names = [name for name, x in given.items() if bool((x < math.inf).all())]  # log-probs may be -inf
    assert bool(names) and ("kl" in names) == (excluded != "reference")
    if loss:
        factors = TokenCoefficients(**{name: torch.ones(9, device=device.device) for name in names})
        leaf = single.policy_hidden.clone().requires_grad_()
        total, got = operators.linear_token_loss(leaf, *single.args()[1:], factors, chunk_tokens=4, **single.options)
        (gradient,) = torch.autograd.grad(total, leaf)
        exact = case.policy_hidden.clone().requires_grad_()
        scores = reference.linear_token_scores(exact, *case.args()[1:], **case.options)
        (true_gradient,) = torch.autograd.grad(sum(getattr(scores, name).sum() for name in names), exact)
        torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-4, atol=1e-5)
    else:
        got, grads = run(operators.linear_token_scores, single, tuple(names))
        _, true_grads = run(reference.linear_token_scores, case, tuple(names))
        for name, exact in true_grads.items():
            torch.testing.assert_close(grads[name].double(), exact, rtol=1e-4, atol=1e-4)
    assert_scores(got, truth)


def check_targets_that_are_no_ids(device: Device, support: str | None, masked: bool) -> None:
    """-100 is a masked row; another target outside of the vocabulary makes its row NaN, whoever's memory lies there.
    Nothing else changes."""
    case = make_case(support=SUPPORTS.get(support or ""), valid_vocab=31)
    case.target_ids.clamp_(max=30)
    case.target_ids[torch.tensor([0, 2, 3, 5, 8])] = torch.tensor([-100, 31, 10**9, -1, -100])
    if masked:
        case.options["mask"] = torch.arange(9) % 3 != 0
    truth = reference.linear_token_scores(*case.to(torch.float64, device.device).args(),
                                          **case.to(torch.float64, device.device).options)  # fmt: skip
    assert bool(truth.kl.isnan().any()) and float(truth.kl[8]) == 0.0
    single = case.to(torch.float32, device.device)
    coefficients = torch.where(truth.kl.isnan(), torch.nan, 1.0).float()
    for rows in (heads_scores, logits_scores, loss_scores):
        got, gradient = rows(single, coefficients)
        assert_scores(got, truth)
        finite = truth.kl.isfinite() & (truth.kl != 0)
        assert bool((gradient[~finite] == 0).all()), gradient
        clean = replace(single, target_ids=torch.where(finite, single.target_ids, 0),
                        options={**single.options, "mask": finite})  # fmt: skip
        _, expected = rows(clean, torch.ones_like(coefficients))
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def heads_scores(case: Case, factor: Tensor) -> tuple[TokenScores, Tensor]:
    leaf = case.policy_hidden.clone().requires_grad_()
    scores = operators.linear_token_scores(leaf, *case.args()[1:], check_values=False, **case.options)
    return scores, torch.autograd.grad([scores.kl, scores.policy_logprobs], leaf, [factor, factor])[0]


def logits_scores(case: Case, factor: Tensor) -> tuple[TokenScores, Tensor]:
    leaf = case.policy_hidden.clone().requires_grad_()
    z, r = leaf @ case.policy_weight.t(), case.ref_hidden @ case.ref_weight.t()
    scores = operators.token_scores(z, r, case.target_ids, check_values=False, **case.options)
    return scores, torch.autograd.grad([scores.kl, scores.policy_logprobs], leaf, [factor, factor])[0]


def loss_scores(case: Case, factor: Tensor) -> tuple[TokenScores, Tensor]:
    leaf = case.policy_hidden.clone().requires_grad_()
    loss, scores = operators.linear_token_loss(
        leaf, *case.args()[1:], lambda rows, _: TokenCoefficients(policy_logprobs=factor[rows], kl=factor[rows]),
        row_splits=[0, 2, 4, 9], chunk_tokens=3, check_values=False, **case.options,
    )  # fmt: skip
    return scores, torch.autograd.grad(loss, leaf)[0]


def check_strided_heads(device: Device, dtype: torch.dtype, mask: str) -> None:
    """Hidden states and weights that are columns of wider tensors, whose own width fills no whole 16-byte units."""
    case = make_case(num_rows=20, hidden=18, vocab=53, mask=mask)
    wide = case.to(dtype, device.device)
    names = ("policy_hidden", "policy_weight", "ref_hidden", "ref_weight")
    strided = {name: torch.full((len(getattr(wide, name)), 64), torch.nan, dtype=dtype, device=device.device)[:, :18]
               .copy_(getattr(wide, name)) for name in names}  # fmt: skip
    across = {name: x.t().contiguous().t() for name, x in strided.items()}
    expected = operators.linear_token_scores(*wide.args(), **wide.options)
    for tensors in (strided, across):
        got = operators.linear_token_scores(*replace(wide, **tensors).args(), **wide.options)
        leaves = [tensors[name].detach().requires_grad_() for name in names[:2]]
        rest = tensors["ref_hidden"], tensors["ref_weight"], wide.target_ids
        scores = operators.linear_token_scores(*leaves, *rest, **wide.options)
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(scores.kl.sum(), leaves))
        for name in ("policy_logprobs", "ref_logprobs", "entropy", "kl"):
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-4, atol=1e-4)


def check_large_offsets(device: Device, rows: int, vocab: int) -> None:
    """The last row and id of 2^31 logits and more (4.4 GB in bfloat16)."""
    z = torch.zeros(rows, vocab, dtype=torch.bfloat16, device=device.device)
    z[-1, -1] = 5.0
    targets = torch.full((rows,), vocab - 1, device=device.device)
    got = operators.token_scores(z, None, targets, outputs=()).policy_logprobs
    for place, expected in ((0, -math.log(vocab)), (-1, 5 - math.log(vocab - 1 + math.exp(5)))):
        assert abs(float(got[place]) - expected) < 1e-4, place


def checks(device: Device) -> Iterator[Check]:
    """The matrix of one device."""
    heads, logits = operators.linear_token_scores, from_logits

    def launches(options: dict, *kernels: str) -> tuple[str, ...] | None:
        empty = options.get("mask") == "all" or options.get("num_rows") == 0
        return None if empty else kernels

    def case(function: Callable, options: dict, dtype: torch.dtype) -> Callable[[], None]:
        return lambda: check_case(device, function, sized(device, options), dtype)

    for dtype in device.dtypes:
        of = "" if dtype == torch.float32 else f", {dtype}"
        for options in HEADS:
            kernels = launches(options, "linear_score_kernel", "linear_gradient_kernel")
            yield Check(f"heads{of} {options}", case(heads, options, dtype), kernels)
        for options in ON_SUPPORT:
            kernels = launches(options, "score_kernel", "gradient_kernel")
            yield Check(f"heads{of} {options}", case(heads, options, dtype), kernels)
        for options in APART:
            kernels = launches(options, "score_kernel", "gradient_kernel", "divergence_kernel")
            if options.get("reference") is False:
                kernels = None
            yield Check(f"divergences{of} {options}", case(heads, {**options, "outputs": EVERY_OUTPUT}, dtype), kernels)
        for mask in ("none", "some"):
            for support in (None, "top_k"):
                name = f"gradient in the forward{of}, mask {mask}, support {support}"
                yield Check(name, partial(check_loss, device, dtype, mask, support))
        if device.device == "cpu" or dtype != torch.float32:
            yield Check(f"independent rows{of}", partial(check_independence, device, dtype))
    for options in LOGITS:
        kernels = launches(options, *["score_kernel", "gradient_kernel"])
        yield Check(f"logits {options}", case(logits, options, torch.float32), kernels)
    for dtype in (torch.bfloat16, torch.float16):
        name = f"half precision {dtype}"
        yield Check(name, case(heads, {"mask": "some", "num_rows": 5}, dtype))
        yield Check(f"{name} on a support", case(heads, ON_SUPPORT[-2], dtype))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for inplace in (False, True):
            name = f"strided logits {dtype}, {'in place' if inplace else 'apart'}"
            yield Check(name, partial(check_strided_logits, device, dtype, inplace))
    for factor in (1.0, -0.3):
        check = partial(check_loss, device, torch.float32, "none", None, factor)
        yield Check(f"gradient in the forward times {factor}", check)
    yield Check("NaN is reported", partial(check_nan_is_reported, device))
    yield Check("equal models", partial(check_equal_models, device))
    for support in EXCLUDING_SUPPORTS:
        for scale, chunk in ((1.0, None), (8.0, 5)):
            name = f"excluded logits on support {support}, scale {scale}"
            yield Check(name, partial(check_excluded_logits, device, support, scale, chunk))
        check = partial(check_excluded_logits, device, support, 1.0, None, EVERY_OUTPUT)
        yield Check(f"excluded logits with divergences on support {support}", check)
    for excluded in ("both", "policy", "reference"):
        for support in (None, "top_k", "banned", "recorded"):
            for loss in (False, True):
                name = f"biases that exclude ids in {excluded}, support {support}, loss {loss}"
                yield Check(name, partial(check_excluding_biases, device, excluded, support, loss))
    for support in (None, "top_k", "recorded"):
        for masked in (False, True):
            name = f"targets that are no ids, support {support}, masked {masked}"
            yield Check(name, partial(check_targets_that_are_no_ids, device, support, masked))
    for dtype in device.dtypes:
        for mask in ("none", "some"):
            yield Check(f"strided heads {dtype}, mask {mask}", partial(check_strided_heads, device, dtype, mask))
    large = (14400, 151936) if device.large else (5, 257)
    yield Check(f"{large[0]} x {large[1]} logits", partial(check_large_offsets, device, *large))
