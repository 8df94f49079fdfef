"""`fastkl bench`: the scoring kernels against plain PyTorch and their peers, with the physical floor beside every time.

In: a machine. Out: a table, bench.json, and two pictures (roofline.svg, memory.svg). Every row is checked against
float64 before it is timed. The ceilings (device copy, matrix product of the head's shape) are measured in the same run;
a row's floor is its minimal work over those ceilings. Left out: whole training steps (bench/training.py).

The jobs: A logits -> logp, entropy.  B the same with reference and exact KL.  C B with the gradient over the logits.
D hidden states -> B's scores, no gradient.  E hidden -> logp, entropy, with gradients.  F hidden -> B's scores and
exact-KL gradient.  G a GRPO step with k3 in the loss.  H F with a frozen head shared with the reference.  I B on a support.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from .kernels import reference
from .kernels.operators import Support, TokenCoefficients, linear_token_loss, linear_token_scores, token_scores

CHECK_ROWS = 32  # rows that are compared with float64
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 6e-2}  # of a score in nats; gradients: of the largest entry


@dataclass(frozen=True)
class Shape:
    """N rows, H features, V ids; the dtype of hidden states, heads and logits."""

    name: str
    rows: int
    hidden: int
    vocab: int
    dtype: torch.dtype
    softcap: float | None = None


CPU_SHAPES = (Shape("cpu-small", 512, 256, 16000, torch.float32),)
CPU_TARGET_SHAPES = (Shape("cpu-target", 2048, 512, 32000, torch.float32),)
GPU_SHAPES = (
    Shape("Qwen2.5-0.5B", 8192, 896, 151936, torch.bfloat16),
    Shape("Llama-3.2-1B", 8192, 2048, 128256, torch.bfloat16),
    Shape("Llama-3.1-8B", 8192, 4096, 128256, torch.bfloat16),
    Shape("Gemma-2-2B", 4096, 2304, 256000, torch.bfloat16, 30.0),
)


@dataclass(frozen=True)
class Row:
    """One implementation of one job: a call that returns its results, and what the job costs at the very least."""

    job: str
    name: str
    shape: Shape
    call: Callable[[], list[Tensor]]  # scores [N] (and the hidden or logits gradient last)
    expected: Callable[[], list[Tensor]]  # the same of the first CHECK_ROWS rows, in float64
    head_products: float  # in units of 2 N H V operations
    logit_passes: float  # N V logits read or written


@dataclass(frozen=True)
class Result:
    """What was measured. Times in ms; peak memory beyond what lived before the call."""

    job: str
    name: str
    shape: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    floor_ms: float
    percent_of_floor: float
    flops: float
    bytes: float
    peak_mib: float | None
    max_error: float


class Problem:
    """The inputs of one shape. Random, never zeros: zeros draw less power and run faster."""

    def __init__(self, shape: Shape, device: str) -> None:
        g = torch.Generator(device).manual_seed(0)
        self.shape, n, h, v = shape, shape.rows, shape.hidden, shape.vocab

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, generator=g, device=device)

        weight = randn(v, h) * 2.0 / h**0.5
        self.weight = weight.to(shape.dtype).requires_grad_()
        self.ref_weight = (weight + 0.02 * randn(v, h)).to(shape.dtype)
        hidden = randn(n, h)
        self.hidden = hidden.to(shape.dtype).requires_grad_()
        self.ref_hidden = (hidden + 0.05 * randn(n, h)).to(shape.dtype)
        self.targets = torch.randint(0, v, (n,), generator=g, device=device)
        self.a, self.c = randn(n), 0.1 * randn(n).abs()

    def heads(self, rows: slice = slice(None)) -> tuple[Tensor, ...]:
        """The first five arguments of linear_token_scores."""
        return self.hidden[rows], self.weight, self.ref_hidden[rows], self.ref_weight, self.targets[rows]

    def logits(self) -> tuple[Tensor, Tensor]:
        """Policy and reference logits in the shape's dtype."""
        with torch.no_grad():
            return self.hidden @ self.weight.t(), self.ref_hidden @ self.ref_weight.t()

    def gradients(self, loss: Tensor, *extra: Tensor, frozen: bool = False) -> list[Tensor]:
        """The scores, then the hidden gradient (the head's is computed, and dropped)."""
        leaves = [self.hidden] if frozen else [self.hidden, self.weight]
        return [*(x.detach() for x in extra), torch.autograd.grad(loss, leaves)[0]]


def rows_of(problem: Problem) -> Iterator[Row]:
    """Every job with every implementation that can be had here."""
    p, s = problem, problem.shape
    first = slice(0, CHECK_ROWS)
    options = {"softcap": s.softcap}

    def oracle(weighted: bool = False, grad: bool = True, shared: bool = False) -> list[Tensor]:
        hidden, weight, ref_hidden, ref_weight, targets = (x.detach() for x in p.heads(first))
        leaf = hidden.double().requires_grad_()
        ref_weight = weight if shared else ref_weight
        out = reference.linear_token_scores(
            leaf, weight.double(), ref_hidden.double(), ref_weight.double(), targets, **options
        )
        if not grad:
            return [out.policy_logprobs, out.entropy]
        loss = (p.a[first] * out.policy_logprobs).sum() + (p.c[first] * (out.kl if weighted else out.entropy)).sum()
        kl = [out.kl] if weighted else [out.entropy]
        return [out.policy_logprobs.detach(), *(x.detach() for x in kl), torch.autograd.grad(loss, leaf)[0]]

    def scores(function: Callable, grad: bool, shared: bool = False) -> list[Tensor]:
        hidden, weight, ref_hidden, ref_weight, targets = p.heads()
        if shared:
            weight = ref_weight = p.weight.detach()
        with torch.set_grad_enabled(grad):
            out = function(hidden, weight, ref_hidden, ref_weight, targets, **options)
        if not grad:
            return [out.policy_logprobs, out.kl]
        loss = (p.a * out.policy_logprobs).sum() + (p.c * out.kl).sum()
        return p.gradients(loss, out.policy_logprobs, out.kl, frozen=shared)

    def loss(shared: bool = False) -> list[Tensor]:
        weight, ref_weight = (p.weight.detach(),) * 2 if shared else (p.weight, p.ref_weight)
        factors = TokenCoefficients(policy_logprobs=p.a, kl=p.c)
        value, out = linear_token_loss(p.hidden, weight, p.ref_hidden, ref_weight, p.targets, factors, **options)
        return p.gradients(value, out.policy_logprobs, out.kl, frozen=shared)

    def entropy_step(function: Callable) -> list[Tensor]:
        out = function(p.hidden, p.weight, None, None, p.targets, **options)
        total = (p.a * out.policy_logprobs).sum() + (p.c * out.entropy).sum()
        return p.gradients(total, out.policy_logprobs, out.entropy)

    def with_kl(shared: bool = False) -> list[Tensor]:
        return oracle(weighted=True, shared=shared)

    plain = reference.linear_token_scores
    yield Row("D", "fastkl", s, lambda: scores(linear_token_scores, False), lambda: with_kl()[:2], 2, 0)
    yield Row("D", "plain PyTorch", s, lambda: scores(plain, False), lambda: with_kl()[:2], 2, 0)
    yield Row("E", "fastkl", s, lambda: entropy_step(linear_token_scores), oracle, 4, 0)
    yield Row("E", "plain PyTorch", s, lambda: entropy_step(plain), oracle, 4, 0)
    yield Row("F", "fastkl, autograd", s, lambda: scores(linear_token_scores, True), with_kl, 4, 0)
    yield Row("F", "fastkl, gradient in the forward", s, loss, with_kl, 4, 0)
    yield Row("F", "plain PyTorch", s, lambda: scores(plain, True), with_kl, 4, 0)
    yield Row("H", "fastkl, autograd", s, lambda: scores(linear_token_scores, True, True), lambda: with_kl(True), 3, 0)
    yield Row("H", "fastkl, gradient in the forward", s, lambda: loss(True), lambda: with_kl(True), 3, 0)
    yield Row("H", "plain PyTorch", s, lambda: scores(plain, True, True), lambda: with_kl(True), 3, 0)
    yield from _grpo_rows(p, options)
    if s.softcap is None:
        yield from _trl_rows(p, oracle)
        yield from _logits_rows(p)


def _grpo_rows(p: Problem, options: dict) -> Iterator[Row]:
    """k3 = exp(-k) - 1 + k in the loss, k = logp - ref logp: its factor on logp is 1 - exp(-k)."""

    def factor(a: Tensor, c: Tensor, logp: Tensor, ref_logp: Tensor) -> Tensor:
        return -a + c * (1 - torch.exp(ref_logp - logp))

    def fused() -> list[Tensor]:
        def coefficients(rows: slice, scores) -> TokenCoefficients:
            return TokenCoefficients(
                policy_logprobs=factor(p.a[rows], p.c[rows], scores.policy_logprobs, scores.ref_logprobs)
            )

        splits = range(0, p.shape.rows + 1, max(1, p.shape.rows // 64))
        splits = [*splits] if p.shape.rows in splits else [*splits, p.shape.rows]
        value, out = linear_token_loss(*p.heads(), coefficients, row_splits=splits, outputs=(), **options)
        return p.gradients(value, out.policy_logprobs)

    def step(function: Callable, rows: slice, *heads: Tensor) -> list[Tensor]:
        out = function(*heads, **options)
        a, c = p.a[rows], p.c[rows]
        gap = out.ref_logprobs - out.policy_logprobs
        loss = (-a * out.policy_logprobs + c * (gap.exp() - 1 - gap)).sum()
        leaves = [heads[0]] if heads[0] is not p.hidden else [p.hidden, p.weight]
        return [out.policy_logprobs.detach(), torch.autograd.grad(loss, leaves)[0]]

    def oracle() -> list[Tensor]:
        rows = slice(0, CHECK_ROWS)
        heads = [x.detach().double() if x.is_floating_point() else x for x in p.heads(rows)]
        return step(reference.linear_token_scores, rows, heads[0].requires_grad_(), *heads[1:])

    everything = slice(None)
    whole = (p.hidden, p.weight, p.ref_hidden, p.ref_weight, p.targets)
    yield Row("G", "fastkl, gradient in the forward", p.shape, fused, oracle, 4, 0)
    yield Row(
        "G", "plain PyTorch", p.shape, lambda: step(reference.linear_token_scores, everything, *whole), oracle, 4, 0
    )


def _trl_rows(p: Problem, oracle: Callable) -> Iterator[Row]:
    """TRL's chunked operators, composed for the same outputs; nothing where TRL is not installed."""
    if not _has("trl.kernels.chunked_divergence"):
        return
    logprob = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    divergence = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    def logprobs(hidden: Tensor, weight: Tensor, outputs: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
        return logprob.apply(hidden, weight, None, p.targets, 1.0, 32768, None, 1.0, outputs)[:2]

    def policy_step() -> list[Tensor]:
        logp, entropy = logprobs(p.hidden, p.weight, ("entropy",))
        return p.gradients((p.a * logp).sum() + (p.c * entropy).sum(), logp, entropy)

    def pair(grad: bool) -> list[Tensor]:
        with torch.set_grad_enabled(grad):
            logp, _ = logprobs(p.hidden, p.weight, ())
            kl, _ = divergence.apply(p.hidden, p.weight, None, p.ref_hidden, p.ref_weight, None, 1.0)
        with torch.no_grad():
            logprobs(p.ref_hidden, p.ref_weight, ())
        return p.gradients((p.a * logp).sum() + (p.c * kl).sum(), logp, kl) if grad else [logp, kl]

    yield Row("D", "TRL operators", p.shape, lambda: pair(False), lambda: oracle(True)[:2], 2, 0)
    yield Row("E", "TRL operators", p.shape, policy_step, oracle, 4, 0)
    yield Row("F", "TRL operators", p.shape, lambda: pair(True), lambda: oracle(True), 4, 0)


def _logits_rows(p: Problem) -> Iterator[Row]:
    """Logits in: forward alone, with the reference, with the gradient, and on a support."""
    s, first = p.shape, slice(0, CHECK_ROWS)
    z, r = p.logits()

    def forward(
        function: Callable, ref: Tensor | None, rows: slice, *, double: bool = False, **options
    ) -> list[Tensor]:
        logits, ref = z[rows], None if ref is None else ref[rows]
        if double:
            logits, ref = logits.double(), None if ref is None else ref.double()
        out = function(logits, ref, p.targets[rows], **options)
        last = out.kl_support if "support" in options else out.entropy if ref is None else out.kl
        return [out.policy_logprobs_support if "support" in options else out.policy_logprobs, last]

    def backward(function: Callable, rows: slice, double: bool = False, **options) -> list[Tensor]:
        leaf = (z[rows].double() if double else z[rows].clone()).requires_grad_()
        out = function(leaf, r[rows].double() if double else r[rows], p.targets[rows], **options)
        loss = (p.a[rows] * out.policy_logprobs).sum() + (p.c[rows] * out.kl).sum()
        return [out.policy_logprobs.detach(), torch.autograd.grad(loss, leaf)[0]]

    every = slice(None)
    plain, ours = reference.token_scores, token_scores
    for name, function, inplace in (("fastkl", ours, {"inplace_backward": True}), ("plain PyTorch", plain, {})):
        yield Row(
            "A",
            name,
            s,
            lambda f=function: forward(f, None, every),
            lambda: forward(plain, None, first, double=True),
            0,
            1,
        )
        yield Row(
            "B", name, s, lambda f=function: forward(f, r, every), lambda: forward(plain, r, first, double=True), 0, 2
        )
        yield Row(
            "C", name, s, lambda f=function, o=inplace: backward(f, every, **o),
            lambda: backward(plain, first, True), 0, 7,
        )  # fmt: skip
        for label, support in (
            ("top_k 50", Support(top_k=50)),
            ("top_p 0.95", Support(top_p=0.95)),
            ("min_p 0.05", Support(min_p=0.05)),
        ):
            yield Row(
                "I", f"{name}, {label}", s, lambda f=function, x=support: forward(f, r, every, support=x),
                lambda x=support: forward(plain, r, first, True, support=x), 0, 2,
            )  # fmt: skip


def _has(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def error_of(row: Row) -> float:
    """The largest deviation from float64 in the first rows; gradients relative to their largest entry."""
    worst = 0.0
    got, expected = row.call(), row.expected()
    for x, truth in zip(got, expected, strict=True):
        difference = float((x[: len(truth)].double() - truth.double()).abs().max())
        is_gradient = truth.dim() == 2
        worst = max(worst, difference / float(truth.abs().max()) if is_gradient else difference)
    return worst


def timed(call: Callable[[], object], device: str, repeats: int, warmups: int = 1) -> list[float]:
    """Wall times in ms; on a GPU device events, with the L2 cache flushed before each."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device) if device == "cuda" else None
    times = []
    for i in range(warmups + repeats):
        if flush is None:
            start = time.perf_counter()
            call()
            elapsed = (time.perf_counter() - start) * 1e3
        else:
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            elapsed = begin.elapsed_time(end)
        if i >= warmups:
            times.append(elapsed)
    return times


def peak_mib(call: Callable[[], object], device: str) -> float | None:
    """Peak memory of a call beyond what was there before it; None where it cannot be read."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # hands freed memory back, which would otherwise hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of this process
        before = _status_kib("VmRSS")
        call()
        return max(0.0, (_status_kib("VmHWM") - before) / 1024)
    except (OSError, AttributeError):
        return None


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def ceilings(shape: Shape, device: str) -> dict[str, float]:
    """Bytes per second of a copy (read + written), and operations per second of the head's own matrix product."""
    x = torch.randn(1 << (28 if device == "cuda" else 24), device=device)
    y = torch.empty_like(x)
    copy_ms = min(timed(lambda: y.copy_(x), device, 5))
    hidden = torch.randn(shape.rows, shape.hidden, device=device).to(shape.dtype)
    weight = torch.randn(shape.vocab, shape.hidden, device=device).to(shape.dtype)
    logits = torch.empty(shape.rows, shape.vocab, device=device, dtype=shape.dtype)
    product_ms = min(timed(lambda: torch.mm(hidden, weight.t(), out=logits), device, 5))
    return {
        "copy_bytes_per_s": 8 * x.numel() / copy_ms * 1e3,
        "matmul_flops_per_s": 2 * shape.rows * shape.hidden * shape.vocab / product_ms * 1e3,
        "head_product_ms": product_ms,
    }


def measure(row: Row, ceiling: dict[str, float], device: str, repeats: int) -> Result:
    """Checks, then times. Raises if the check fails: a wrong answer has no speed."""
    error = error_of(row)
    if not error <= TOLERANCE[row.shape.dtype]:
        raise AssertionError(f"job {row.job}, {row.name}: error {error:.2e} against float64, not timed")
    times = timed(row.call, device, repeats)
    s = row.shape
    flops = row.head_products * 2 * s.rows * s.hidden * s.vocab
    logits_bytes = row.logit_passes * s.rows * s.vocab * s.dtype.itemsize
    head_bytes = min(row.head_products, 2) * (s.rows + s.vocab) * s.hidden * s.dtype.itemsize
    moved = logits_bytes + head_bytes
    floor = max(flops / ceiling["matmul_flops_per_s"], moved / ceiling["copy_bytes_per_s"]) * 1e3
    median = statistics.median(times)
    low, high = _quantile(times, 0.2), _quantile(times, 0.8)
    memory = peak_mib(row.call, device)
    return Result(
        row.job, row.name, s.name, median, low, high, floor, 100 * floor / median, flops, moved, memory, error
    )


def _quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[round(q * (len(ordered) - 1))]


def run_bench(
    output: str | os.PathLike = "bench/results/kernels",
    *,
    device: str | None = None,
    shapes: tuple[Shape, ...] | None = None,
    jobs: str = "ABCDEFGHI",
    repeats: int | None = None,
    budget_s: float = 150.0,
    say: Callable[[str], None] = print,
) -> list[Result]:
    """Runs the matrix, prints the table, writes bench.json, roofline.svg and memory.svg into `output`.

    Stops adding rows once `budget_s` seconds have passed, and says which it left out.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    shapes = shapes or (GPU_SHAPES if device == "cuda" else CPU_SHAPES)
    repeats = repeats or (20 if device == "cuda" else 5)
    started, results, measured, left_out = time.perf_counter(), [], {}, []
    say(f"{machine(device)}; {'TRL found' if _has('trl.kernels.chunked_divergence') else 'TRL not installed: no rows'}")
    say(
        f"{'job':<4}{'implementation':<34}{'median ms':>11}{'p20':>9}{'p80':>9}{'% floor':>9}{'peak MiB':>10}{'error':>10}"
    )
    for shape in shapes:
        measured[shape.name] = ceilings(shape, device)
        say(f"-- {shape.name}: N {shape.rows}, H {shape.hidden}, V {shape.vocab}; "
            f"head product {measured[shape.name]['head_product_ms']:.1f} ms")  # fmt: skip
        for row in rows_of(Problem(shape, device)):
            if row.job not in jobs:
                continue
            if time.perf_counter() - started > budget_s:
                left_out.append(f"{shape.name} {row.job} {row.name}")
                continue
            result = measure(row, measured[shape.name], device, repeats)
            results.append(result)
            memory = "-" if result.peak_mib is None else f"{result.peak_mib:.0f}"
            say(f"{result.job:<4}{result.name:<34}{result.median_ms:>11.2f}{result.p20_ms:>9.2f}{result.p80_ms:>9.2f}"
                f"{result.percent_of_floor:>9.0f}{memory:>10}{result.max_error:>10.1e}")  # fmt: skip
    if left_out:
        say(f"left out after {budget_s:.0f} s: " + "; ".join(left_out))
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "machine": machine(device),
        "ceilings": measured,
        "left_out": left_out,
        "rows": [asdict(r) for r in results],
    }
    (folder / "bench.json").write_text(json.dumps(record, indent=1))
    from .bench_pictures import bars

    (folder / "roofline.svg").write_text(bars(results, "percent_of_floor", "% of the measured floor (100 is perfect)"))
    (folder / "memory.svg").write_text(bars(results, "peak_mib", "peak memory beyond inputs, MiB (less is better)"))
    say(f"written: {folder}/bench.json, roofline.svg, memory.svg")
    return results


def machine(device: str) -> str:
    """The machine in words."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
