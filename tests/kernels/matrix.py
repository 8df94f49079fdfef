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
from fastkl.kernels.types import Support, TokenCoefficients, TokenScores

POLICY_SCORES = ("policy_logprobs", "entropy", "kl", "policy_logprobs_support", "kl_support")


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
        def cast(x):
            if isinstance(x, Support):
                return Support(*(cast(getattr(x, name)) for name in Support.__slots__))
            if not isinstance(x, Tensor):
                return x
            return x.to(device, dtype) if x.is_floating_point() else x.to(device)

        names = ("policy_hidden", "policy_weight", "ref_hidden", "ref_weight", "target_ids")
        options = {k: cast(v) for k, v in self.options.items()}
        return replace(self, **{name: cast(getattr(self, name)) for name in names}, options=options)

    def args(self) -> tuple:
        return self.policy_hidden, self.policy_weight, self.ref_hidden, self.ref_weight, self.target_ids


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


def run(function, case: Case, scores: tuple[str, ...] = POLICY_SCORES) -> tuple[TokenScores, dict[str, Tensor]]:
    """Scores, and the gradients of sum(random factor * score) over the scores named and present."""
    leaves = {"hidden": case.policy_hidden, "weight": case.policy_weight, "bias": case.options.get("policy_bias")}
    leaves = {k: v.detach().clone().requires_grad_() for k, v in leaves.items() if v is not None}
    options = dict(case.options)
    if "bias" in leaves:
        options["policy_bias"] = leaves["bias"]
    out = function(leaves["hidden"], leaves["weight"], *case.args()[2:], **options)
    g = torch.Generator().manual_seed(case.upstream_seed + 1)
    loss = out.policy_logprobs.new_zeros((), dtype=torch.float64)
    for name in POLICY_SCORES:
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
    from fastkl.kernels.gpu import heads, passes

    for name, value in (("FORWARD_BLOCK", 16), ("FORWARD_LANES", 4), ("GRADIENT_BLOCK", 16)):
        put(passes, name, value)
    for name, value in (("BLOCK_ROWS", 16), ("MAX_SPLITS", 3), ("GROUP", 2), ("tile_shape", lambda *_: (16, 16, 1))):
        put(heads, name, value)


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
    support = "banned" if inplace else "top_k"
    case = sized(device, {"mask": "some", "per_row_temperature": True, "support": support, **SIZED, "vocab": 37})
    case = case.to(torch.float64, device.device)
    z, r = (case.policy_hidden @ case.policy_weight.t()).to(dtype), (case.ref_hidden @ case.ref_weight.t()).to(dtype)
    leaf = torch.full((9, 60), torch.nan, dtype=dtype, device=device.device)[:, 3:40].copy_(z).requires_grad_()
    options = {**case.options, "temperature": case.options["temperature"].float()}
    got = operators.token_scores(leaf * 1 if inplace else leaf, r, case.target_ids, inplace_backward=inplace, **options)
    exact = z.double().requires_grad_()
    truth = reference.token_scores(exact, r.double(), case.target_ids, **case.options)
    for name in TokenScores.__slots__:
        torch.testing.assert_close(getattr(got, name).double(), getattr(truth, name), rtol=1e-5, atol=2e-6)
    (grad,) = torch.autograd.grad((got.kl + got.policy_logprobs_support - got.entropy).sum(), leaf)
    (true_grad,) = torch.autograd.grad((truth.kl + truth.policy_logprobs_support - truth.entropy).sum(), exact)
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
    interpreter, depend on a row's place within its tile, so rows keep it there.)"""
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
            kernels = launches(options, "linear_score_kernel", "gradient_kernel")
            yield Check(f"heads{of} {options}", case(heads, options, dtype), kernels)
        for options in ON_SUPPORT:
            kernels = launches(options, "score_kernel", "gradient_kernel")
            yield Check(f"heads{of} {options}", case(heads, options, dtype), kernels)
        for mask in ("none", "some"):
            for support in (None, "top_k"):
                name = f"gradient in the forward{of}, mask {mask}, support {support}"
                yield Check(name, partial(check_loss, device, dtype, mask, support))
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
    large = (14400, 151936) if device.large else (5, 257)
    yield Check(f"{large[0]} x {large[1]} logits", partial(check_large_offsets, device, *large))
