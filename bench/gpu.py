"""One command for the owner of a GPU: checks every operator on the device against float64, then measures, then writes
the table. Less than nine minutes.

    python bench/gpu.py [--output bench/results/gpu] [--quick]

First the correctness part: hidden in and logits in, forward and gradient, every kind of support, masks, bias, softcap,
row temperatures, the gradient in the forward, batch independence bit for bit, the last id of a vocabulary beyond 2^31
logits. Nothing is timed unless all of it passes. Then the jobs of fastkl/bench.py on real model shapes, peers included
where they are installed (pip install "trl==1.16.*"), with the ceilings of this very GPU measured in the same run, and
the memory target: N 65536, V 151936 within 3.5 GB beyond inputs and outputs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from fastkl.kernels.operators import Support, TokenCoefficients, linear_token_loss, linear_token_scores, token_scores

from fastkl.bench import GPU_SHAPES, peak_mib, run_bench
from fastkl.kernels import reference

NAMES = ("policy_logprobs", "entropy", "kl", "policy_logprobs_support", "kl_support")
OPTIONS = {
    "plain": {},
    "bias, softcap, scale": {"bias": True, "softcap": 20.0, "logit_scale": 0.7},
    "row temperatures, mask": {"row_temperature": True, "mask": True},
    "top_k": {"support": Support(top_k=50)},
    "top_p and min_p": {"support": Support(top_p=0.9, min_p=0.001)},
    "banned ids": {"support": "banned"},
    "valid vocabulary": {"valid_vocab": 4001},
}


def problem(dtype: torch.dtype, options: dict, rows: int = 300, hidden: int = 256, vocab: int = 4099):
    """Inputs of one check, on the GPU, and the keyword arguments of the call."""
    g = torch.Generator("cuda").manual_seed(0)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, device="cuda")

    weight = randn(vocab, hidden) * 3 / hidden**0.5
    states = randn(rows, hidden)
    heads = [states, weight, states + 0.1 * randn(rows, hidden), weight + 0.02 * randn(vocab, hidden)]
    heads = [x.to(dtype) for x in heads]
    valid = options.get("valid_vocab", vocab)
    targets = torch.randint(0, valid, (rows,), generator=g, device="cuda")
    targets[:50] = valid - 1
    keywords = {k: v for k, v in options.items() if k in ("softcap", "logit_scale", "support", "valid_vocab")}
    if options.get("support") == "banned":
        keywords["support"] = Support(banned_ids=torch.tensor([0, 7, vocab - 1], device="cuda"))
    if options.get("bias"):
        keywords |= {"policy_bias": randn(vocab), "ref_bias": randn(vocab)}
    if options.get("row_temperature"):
        keywords["temperature"] = torch.rand(rows, generator=g, device="cuda") + 0.5
    if options.get("mask"):
        keywords["mask"] = torch.rand(rows, generator=g, device="cuda") > 0.4
    return heads, targets, keywords


def step(function, heads, targets, keywords):
    """Scores and gradients of a fixed mixture of all scores."""
    leaves = [heads[0].clone().requires_grad_(), heads[1].clone().requires_grad_()]
    scores = function(*leaves, *heads[2:], targets, **keywords)
    g = torch.Generator("cuda").manual_seed(1)
    loss = 0.0
    for name in NAMES:
        factor = torch.randn(len(targets), generator=g, device="cuda")
        if getattr(scores, name) is not None:
            loss = loss + (factor * getattr(scores, name)).sum()
    return scores, torch.autograd.grad(loss, leaves)


def double(x):
    """Floats as float64, everything else as it is."""
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def check_operators() -> list[str]:
    """Every option in three dtypes; returns what is wrong."""
    wrong = []
    bounds = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (1e-4, 1e-2), torch.float16: (1e-4, 4e-3)}
    for dtype, (score_bound, gradient_bound) in bounds.items():
        for name, options in OPTIONS.items():
            heads, targets, keywords = problem(dtype, options)
            truth, true_grads = step(
                reference.linear_token_scores, [x.double() for x in heads], targets,
                {k: double(v) for k, v in keywords.items()},
            )  # fmt: skip
            got, grads = step(linear_token_scores, heads, targets, keywords)
            for field in got.__slots__:
                if getattr(got, field) is None:
                    continue
                # a borderline id may fall on either side of a recomputed threshold in another precision
                error = (getattr(got, field) - getattr(truth, field)).abs()
                value = error.quantile(0.98) if "support" in field else error.max()
                if not float(value) <= score_bound:
                    wrong.append(f"{dtype} {name}: {field} off by {float(value):.2e}")
            if "support" not in keywords or name == "banned ids":
                for x, y, what in zip(grads, true_grads, ("hidden", "head"), strict=True):
                    error = float((x.double() - y).norm() / y.norm())
                    if not error <= gradient_bound:
                        wrong.append(f"{dtype} {name}: {what} gradient off by {error:.2e} (relative norm)")
            print(f"  {dtype!s:<16}{name:<26}{'ok' if not wrong else 'WRONG'}", flush=True)
    return wrong


def check_logits_in() -> list[str]:
    """token_scores with the gradient over the logits, in bfloat16, strided."""
    heads, targets, _ = problem(torch.bfloat16, {})
    z, r = heads[0] @ heads[1].t(), heads[2] @ heads[3].t()
    leaf = torch.empty(300, 5000, device="cuda", dtype=z.dtype)[:, :4099].copy_(z).requires_grad_()
    out = token_scores(leaf * 1, r, targets, inplace_backward=True)
    (grad,) = torch.autograd.grad((out.kl + out.policy_logprobs - out.entropy).sum(), leaf)
    exact = z.double().requires_grad_()
    truth = reference.token_scores(exact, r.double(), targets)
    (true_grad,) = torch.autograd.grad((truth.kl + truth.policy_logprobs - truth.entropy).sum(), exact)
    wrong = []
    if not float((out.kl - truth.kl).abs().max()) <= 1e-4:
        wrong.append("logits in: kl")
    if not float((grad.double() - true_grad).norm() / true_grad.norm()) <= 4e-3:
        wrong.append("logits in: gradient")
    return wrong


def check_loss_and_independence() -> list[str]:
    """The gradient in the forward equals autograd's; a row's scores are the same bits in any company."""
    heads, targets, _ = problem(torch.bfloat16, {})
    a, c = torch.randn(300, device="cuda"), torch.rand(300, device="cuda")
    leaves = [heads[0].requires_grad_(), heads[1].requires_grad_()]
    scores = linear_token_scores(*leaves, *heads[2:], targets)
    expected = torch.autograd.grad((a * scores.policy_logprobs + c * scores.kl).sum(), leaves)
    loss, _ = linear_token_loss(*leaves, *heads[2:], targets, TokenCoefficients(policy_logprobs=a, kl=c))
    wrong = []
    for x, y in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        if not float((x.float() - y.float()).norm() / y.float().norm()) <= 1e-2:
            wrong.append("the gradient taken in the forward differs from autograd's")
    for rows in (slice(299, 300), slice(7, 200)):
        part = linear_token_scores(heads[0][rows], heads[1], heads[2][rows], heads[3], targets[rows])
        if not torch.equal(part.kl, scores.kl[rows]):
            wrong.append(f"scores of rows {rows} depend on their neighbours")
    return wrong


def check_large_offsets() -> list[str]:
    """The last row and id of 2^31 logits and more (4.4 GB in bfloat16)."""
    rows, vocab = 14400, 151936
    z = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    z[-1, -1] = 5.0
    targets = torch.full((rows,), vocab - 1, device="cuda")
    got = token_scores(z, None, targets, outputs=()).policy_logprobs
    other = -torch.log(torch.tensor(float(vocab), dtype=torch.float64))
    last = 5 - torch.log(torch.tensor(vocab - 1 + 5.0, dtype=torch.float64).fill_(vocab - 1) + torch.tensor(5.0).exp())
    ok = abs(float(got[0]) - float(other)) < 1e-4 and abs(float(got[-1]) - float(last)) < 1e-4
    return [] if ok else ["64-bit offsets: the last row is wrong"]


def memory_target() -> dict[str, float]:
    """Peak beyond inputs and outputs at N 65536, V 151936, H 896, with gradients: scoring, and the loss."""
    rows, hidden, vocab = 65536, 896, 151936
    states, ref_states = (torch.randn(rows, hidden, device="cuda").bfloat16() for _ in range(2))
    weight, ref_weight = ((torch.randn(vocab, hidden, device="cuda") * 0.05).bfloat16() for _ in range(2))
    targets = torch.randint(0, vocab, (rows,), device="cuda")
    leaves = [states.requires_grad_(), weight.requires_grad_()]
    factors = TokenCoefficients(policy_logprobs=torch.randn(rows, device="cuda"), kl=torch.rand(rows, device="cuda"))
    gradients_mib = sum(x.numel() * x.element_size() for x in leaves) / 2**20

    def train() -> None:
        loss, _ = linear_token_loss(*leaves, ref_states, ref_weight, targets, factors)
        torch.autograd.grad(loss, leaves)

    def score() -> None:
        with torch.no_grad():
            linear_token_scores(*leaves, ref_states, ref_weight, targets)

    peaks = {"scoring_mib": peak_mib(score, "cuda"), "loss_mib": peak_mib(train, "cuda") - gradients_mib}
    print("  " + ", ".join(f"{k} {v:.0f}" for k, v in peaks.items()) + " (target: 3500 MB)", flush=True)
    return peaks


def main() -> None:
    """Checks, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", default="bench/results/gpu")
    parser.add_argument("--quick", action="store_true", help="two shapes instead of four")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/gpu.py needs an NVIDIA GPU; on a CPU run: fastkl bench")
    started = time.perf_counter()
    print("checking every operator on the device against float64", flush=True)
    wrong = check_operators() + check_logits_in() + check_loss_and_independence() + check_large_offsets()
    if wrong:
        sys.exit("wrong results, nothing was timed:\n  " + "\n  ".join(wrong))
    torch.cuda.empty_cache()
    shapes = GPU_SHAPES[1:3] if options.quick else GPU_SHAPES
    left = 480 - (time.perf_counter() - started)
    run_bench(options.output, device="cuda", shapes=shapes, jobs="BCDFHGAEI", budget_s=left)
    torch.cuda.empty_cache()
    print("memory at N 65536, V 151936", flush=True)
    Path(options.output, "memory_target.json").write_text(json.dumps(memory_target()))
    print(f"all of it took {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
