"""One command for the owner of a GPU: checks every operator on the device against float64, then measures, then writes
the table. Less than nine minutes.

    python bench/gpu.py [--output bench/results/gpu] [--quick] [--checks-only] [--budget 480]
    python bench/gpu.py --dry-run       the same lines on tiny sizes without a GPU, through Triton's interpreter

First the correctness part: hidden in and logits in, forward and gradient, every kind of support, masks, bias, softcap,
row temperatures, the gradient in the forward, batch independence bit for bit, the last id of a vocabulary beyond 2^31
logits. Nothing is timed unless all of it passes. Then the jobs of fastkl/microbench/jobs.py on real model shapes, with
the peers of fastkl/microbench/peers.py that are installed and the ceilings of this very GPU measured in the same run,
and the memory target: N 65536, V 151936 within 3.5 GB beyond inputs and outputs.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from fastkl.kernels import reference
from fastkl.kernels.dispatch import interpreting
from fastkl.kernels.operators import (
    Support,
    TokenCoefficients,
    TokenScores,
    linear_token_loss,
    linear_token_scores,
    token_scores,
)
from fastkl.microbench.jobs import GPU_SHAPES, Shape
from fastkl.microbench.measure import machine, peak_mib
from fastkl.microbench.run import run_bench

DRY_RUN = interpreting()


@dataclass(frozen=True)
class Sizes:
    """Where things run, and how large they are."""

    device: str
    check: tuple[int, int, int]  # rows, hidden, vocabulary
    large: tuple[int, int]  # rows, vocabulary
    memory: tuple[int, int, int]
    shapes: tuple[Shape, ...]
    seconds: float | None  # how long a row is timed
    slack: float  # on the bounds of the checks: the interpreter truncates to bfloat16 where the hardware rounds


GPU = Sizes("cuda", (300, 256, 4099), (14400, 151936), (65536, 896, 151936), GPU_SHAPES, None, 1.0)
TINY = (Shape("tiny", 64, 32, 211, torch.float32), Shape("tiny, softcap", 64, 32, 211, torch.bfloat16, 30.0))
DRY = Sizes("cpu", (24, 32, 131), (5, 257), (64, 32, 211), TINY, 0.0, 3.0)
SIZES = DRY if DRY_RUN else GPU
DEVICE = SIZES.device

NAMES = ("policy_logprobs", "entropy", "kl", "policy_logprobs_support", "kl_support")
OPTIONS = {
    "plain": {},
    "bias, softcap, scale": {"bias": True, "softcap": 20.0, "logit_scale": 0.7},
    "row temperatures, mask": {"row_temperature": True, "mask": True},
    "top_k": {"support": Support(top_k=20)},
    "top_p and min_p": {"support": Support(top_p=0.9, min_p=0.001)},
    "banned ids": {"support": "banned"},
    "valid vocabulary": {"valid_vocab": SIZES.check[2] - 98},
}


def problem(dtype: torch.dtype, options: dict):
    """Inputs of one check, on the device, and the keyword arguments of the call."""
    rows, hidden, vocab = SIZES.check
    g = torch.Generator(DEVICE).manual_seed(0)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, device=DEVICE)

    weight = randn(vocab, hidden) * 3 / hidden**0.5
    states = randn(rows, hidden)
    heads = [states, weight, states + 0.1 * randn(rows, hidden), weight + 0.02 * randn(vocab, hidden)]
    heads = [x.to(dtype) for x in heads]
    valid = options.get("valid_vocab", vocab)
    targets = torch.randint(0, valid, (rows,), generator=g, device=DEVICE)
    targets[: rows // 6] = valid - 1
    keywords = {k: v for k, v in options.items() if k in ("softcap", "logit_scale", "support", "valid_vocab")}
    if options.get("support") == "banned":
        keywords["support"] = Support(banned_ids=torch.tensor([0, 7, vocab - 1], device=DEVICE))
    if options.get("bias"):
        keywords |= {"policy_bias": randn(vocab), "ref_bias": randn(vocab)}
    if options.get("row_temperature"):
        keywords["temperature"] = torch.rand(rows, generator=g, device=DEVICE) + 0.5
    if options.get("mask"):
        keywords["mask"] = torch.rand(rows, generator=g, device=DEVICE) > 0.4
    return heads, targets, keywords


def step(function, heads, targets, keywords):
    """Scores and gradients of a fixed mixture of all scores."""
    leaves = [heads[0].clone().requires_grad_(), heads[1].clone().requires_grad_()]
    scores = function(*leaves, *heads[2:], targets, **keywords)
    g = torch.Generator(DEVICE).manual_seed(1)
    loss = 0.0
    for name in NAMES:
        factor = torch.randn(len(targets), generator=g, device=DEVICE)
        if getattr(scores, name) is not None:
            loss = loss + (factor * getattr(scores, name)).sum()
    return scores, torch.autograd.grad(loss, leaves)


def detached(scores: TokenScores) -> TokenScores:
    """The scores as constants."""
    return TokenScores(
        *(None if x is None else x.detach() for x in [getattr(scores, f) for f in TokenScores.__slots__])
    )


def double(x):
    """Floats as float64, everything else as it is."""
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


BOUNDS = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (1e-4, 1e-2), torch.float16: (1e-4, 4e-3)}
"""Largest error of a score in nats, and of a gradient by its relative norm."""


def check_option(dtype: torch.dtype, name: str) -> list[str]:
    """One option in one dtype; returns what is wrong."""
    wrong = []
    score_bound, gradient_bound = BOUNDS[dtype]
    heads, targets, keywords = problem(dtype, OPTIONS[name])
    truth, true_grads = step(
        reference.linear_token_scores, [x.double() for x in heads], targets,
        {k: double(v) for k, v in keywords.items()},
    )  # fmt: skip
    got, grads = step(linear_token_scores, heads, targets, keywords)
    with torch.no_grad():  # another kernel, which stores no logits
        scored = linear_token_scores(*heads, targets, **keywords)
    truth = detached(truth)
    for ours in (detached(got), scored):
        for field in truth.__slots__:
            if getattr(truth, field) is None:
                continue
            # a borderline id may fall on either side of a recomputed threshold in another precision
            error = (getattr(ours, field) - getattr(truth, field)).abs()
            value = error.quantile(0.98) if "support" in field else error.max()
            if not float(value) <= score_bound * SIZES.slack:
                wrong.append(f"{dtype} {name}: {field} off by {float(value):.2e}")
    if "support" not in keywords or name == "banned ids":
        for x, y, what in zip(grads, true_grads, ("hidden", "head"), strict=True):
            error = float((x.double() - y).norm() / y.norm())
            if not error <= gradient_bound * SIZES.slack:
                wrong.append(f"{dtype} {name}: {what} gradient off by {error:.2e} (relative norm)")
    return wrong


def check_operators() -> list[str]:
    """Every option in three dtypes, in parallel processes, since most of the time is Triton's compiler's."""
    cases = [(dtype, name) for dtype in BOUNDS for name in OPTIONS]
    wrong = []
    with ProcessPoolExecutor(1 if DRY_RUN else 12, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(check_option, *case) for case in cases]
        for (dtype, name), job in zip(cases, jobs, strict=True):
            try:
                found = job.result()
            except Exception as error:  # a kernel that does not compile or launch: say which, and go on
                found = [f"{dtype} {name}: {type(error).__name__}: {str(error)[:300]}"]
            wrong += found
            print(f"  {dtype!s:<16}{name:<26}{'WRONG' if found else 'ok'}", flush=True)
    return wrong


def check_logits_in() -> list[str]:
    """token_scores with the gradient over the logits, in bfloat16, strided."""
    heads, targets, _ = problem(torch.bfloat16, {})
    z, r = heads[0] @ heads[1].t(), heads[2] @ heads[3].t()
    rows, vocab = z.shape
    leaf = torch.empty(rows, vocab + 901, device=DEVICE, dtype=z.dtype)[:, :vocab].copy_(z).requires_grad_()
    out = token_scores(leaf * 1, r, targets, inplace_backward=True)
    (grad,) = torch.autograd.grad((out.kl + out.policy_logprobs - out.entropy).sum(), leaf)
    exact = z.double().requires_grad_()
    truth = reference.token_scores(exact, r.double(), targets)
    (true_grad,) = torch.autograd.grad((truth.kl + truth.policy_logprobs - truth.entropy).sum(), exact)
    wrong = []
    out, truth = detached(out), detached(truth)
    if not float((out.kl - truth.kl).abs().max()) <= 1e-4 * SIZES.slack:
        wrong.append("logits in: kl")
    if not float((grad.double() - true_grad).norm() / true_grad.norm()) <= 4e-3 * SIZES.slack:
        wrong.append("logits in: gradient")
    return wrong


def check_loss_and_independence() -> list[str]:
    """The gradient in the forward equals autograd's; a row's scores are the same bits in any company."""
    heads, targets, _ = problem(torch.bfloat16, {})
    rows = len(targets)
    a, c = torch.randn(rows, device=DEVICE), torch.rand(rows, device=DEVICE)
    leaves = [heads[0].requires_grad_(), heads[1].requires_grad_()]
    scores = linear_token_scores(*leaves, *heads[2:], targets)
    expected = torch.autograd.grad((a * scores.policy_logprobs + c * scores.kl).sum(), leaves)
    loss, _ = linear_token_loss(*leaves, *heads[2:], targets, TokenCoefficients(policy_logprobs=a, kl=c))
    wrong = []
    for x, y in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        if not float((x.float() - y.float()).norm() / y.float().norm()) <= 1e-2 * SIZES.slack:
            wrong.append("the gradient taken in the forward differs from autograd's")
    if DRY_RUN:  # numpy's product, which stands in for the tensor cores there, depends on a row's place in the tile
        return wrong
    for some in (slice(rows - 1, rows), slice(7, rows * 2 // 3)):
        part = linear_token_scores(heads[0][some], heads[1], heads[2][some], heads[3], targets[some])
        if not torch.equal(part.kl.detach(), scores.kl.detach()[some]):
            wrong.append(f"scores of rows {some} depend on their neighbours")
    return wrong


def check_large_offsets() -> list[str]:
    """The last row and id of 2^31 logits and more (4.4 GB in bfloat16)."""
    rows, vocab = SIZES.large
    z = torch.zeros(rows, vocab, dtype=torch.bfloat16, device=DEVICE)
    z[-1, -1] = 5.0
    targets = torch.full((rows,), vocab - 1, device=DEVICE)
    got = token_scores(z, None, targets, outputs=()).policy_logprobs
    first = -math.log(vocab)
    last = 5 - math.log(vocab - 1 + math.exp(5))
    ok = abs(float(got[0]) - first) < 1e-4 and abs(float(got[-1]) - last) < 1e-4
    return [] if ok else ["64-bit offsets: the last row is wrong"]


def memory_target() -> dict[str, float]:
    """Peak beyond inputs and outputs at N 65536, V 151936, H 896: scoring alone, and the loss with its gradients."""
    rows, hidden, vocab = SIZES.memory
    states, ref_states = (torch.randn(rows, hidden, device=DEVICE).bfloat16() for _ in range(2))
    weight, ref_weight = ((torch.randn(vocab, hidden, device=DEVICE) * 0.05).bfloat16() for _ in range(2))
    targets = torch.randint(0, vocab, (rows,), device=DEVICE)
    leaves = [states.requires_grad_(), weight.requires_grad_()]
    factors = TokenCoefficients(policy_logprobs=torch.randn(rows, device=DEVICE), kl=torch.rand(rows, device=DEVICE))
    gradients_mib = sum(x.numel() * x.element_size() for x in leaves) / 2**20

    def train() -> None:
        loss, _ = linear_token_loss(*leaves, ref_states, ref_weight, targets, factors)
        torch.autograd.grad(loss, leaves)

    def score() -> None:
        with torch.no_grad():
            linear_token_scores(*leaves, ref_states, ref_weight, targets)

    peaks = {"scoring_mib": peak_mib(score, DEVICE), "loss_mib": peak_mib(train, DEVICE) - gradients_mib}
    print("  " + ", ".join(f"{k} {v:.0f}" for k, v in peaks.items()) + " (target: 3500 MB)", flush=True)
    return peaks


def main() -> None:
    """Checks, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", default="bench/results/gpu")
    parser.add_argument("--quick", action="store_true", help="two shapes instead of four")
    parser.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="start no row after that")
    parser.add_argument("--checks-only", action="store_true", help="time nothing")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, without a GPU; the numbers mean nothing")
    options = parser.parse_args()
    if options.dry_run and not DRY_RUN:  # Triton reads this when it is imported, which may have happened by now
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})
    if not DRY_RUN and not torch.cuda.is_available():
        sys.exit("bench/gpu.py needs an NVIDIA GPU (or --dry-run); on a CPU run: fastkl bench")
    started = time.perf_counter()
    print("checking every operator on the device against float64", flush=True)
    wrong = check_operators() + check_logits_in() + check_loss_and_independence() + check_large_offsets()
    if wrong:
        sys.exit("wrong results, nothing was timed:\n  " + "\n  ".join(wrong))
    print(f"all right, after {time.perf_counter() - started:.0f} s", flush=True)
    if options.checks_only:
        return
    torch.cuda.empty_cache()
    print("memory at N {}, H {}, V {}".format(*SIZES.memory), flush=True)
    peaks = {"machine": machine(DEVICE), "rows_hidden_vocab": SIZES.memory, **memory_target()}
    Path(options.output).mkdir(parents=True, exist_ok=True)
    Path(options.output, "memory_target.json").write_text(json.dumps(peaks, indent=1))
    torch.cuda.empty_cache()
    shapes = SIZES.shapes[:2] if options.quick else SIZES.shapes
    left = options.budget - (time.perf_counter() - started)
    run_bench(options.output, device=DEVICE, shapes=shapes, seconds=SIZES.seconds, budget_s=left)
    print(f"all of it took {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
