"""One command for the owner of a GPU: checks every operator on the device against float64, then measures, then writes
the table. Less than nine minutes.

    python bench/gpu.py [--output bench/results/gpu] [--quick] [--checks-only] [--budget 480]
        [--jobs DFE,BA] [--seconds 0.3]
    python bench/gpu.py --dry-run       the same lines on tiny sizes without a GPU, through Triton's interpreter
    python bench/gpu.py --steps         whole training steps instead, beside TRL's (bench/training/gpu_steps.py)

First the checks of tests/kernels/matrix.py, the same as on a CPU: hidden in and logits in, forward and gradient, every
kind of support, masks, bias, softcap, row temperatures, the gradient in the forward, batch independence bit for bit,
the last id of a vocabulary beyond 2^31 logits. Nothing is timed unless all of them pass. Then the jobs of
fastkl/microbench/jobs.py on real model shapes, with the peers of fastkl/microbench/peers.py that are installed and the
ceilings of this very GPU measured in the same run, and the memory target: N 65536, V 151936 within 3.5 GB beyond inputs
and outputs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from fastkl.kernels.dispatch import interpreting
from fastkl.kernels.operators import TokenCoefficients, linear_token_loss, linear_token_scores
from fastkl.microbench.jobs import GPU_SHAPES, Shape
from fastkl.microbench.measure import machine, peak_mib
from fastkl.microbench.run import run_bench

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "kernels"))
import matrix

DRY_RUN = interpreting()


@dataclass(frozen=True)
class Sizes:
    """Where things run, and how large they are."""

    device: str
    memory: tuple[int, int, int]  # rows, hidden, vocabulary
    shapes: tuple[Shape, ...]
    seconds: float | None  # how long a row is timed


GPU = Sizes("cuda", (65536, 896, 151936), GPU_SHAPES, None)
TINY = (
    Shape("tiny", 64, 32, 211, torch.float32),
    Shape("tiny, softcap", 64, 32, 211, torch.bfloat16, 30.0),
    Shape("tiny, wider teacher", 64, 32, 211, torch.float32, ref_hidden=48),
)
DRY = Sizes("cpu", (64, 32, 211), TINY, 0.0)
SIZES = DRY if DRY_RUN else GPU
DEVICE = SIZES.device
CHECKS = list(matrix.checks(matrix.INTERPRETER if DRY_RUN else matrix.CUDA))


def failure_of(number: int) -> str:
    """Runs one check of the matrix; returns what is wrong, or nothing."""
    if DRY_RUN:
        matrix.shrink_blocks()
    try:
        CHECKS[number].run()
    except Exception as error:  # a kernel that does not compile or launch, too: say which, and go on
        return f"{CHECKS[number].name}: {type(error).__name__}: {str(error)[:300]}"
    return ""


def failures() -> list[str]:
    """The whole matrix, in parallel processes, since most of the time is Triton's compiler's."""
    wrong = []
    with ProcessPoolExecutor(1 if DRY_RUN else 12, multiprocessing.get_context("spawn")) as pool:
        for check, found in zip(CHECKS, pool.map(failure_of, range(len(CHECKS))), strict=True):
            wrong += [found] if found else []
            print(f"  {check.name:<90}{'WRONG' if found else 'ok'}", flush=True)
    return wrong


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


def run_steps(options: argparse.Namespace) -> NoReturn:
    """Whole training steps, in this process's place."""
    script = Path(__file__).parent / "training" / "gpu_steps.py"
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    given = ["--output", options.output, "--budget", str(options.budget), *["--dry-run"] * options.dry_run]
    os.execve(sys.executable, [sys.executable, str(script), *given], {**os.environ, "PYTHONPATH": path})


def main() -> None:
    """Checks, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", default="bench/results/gpu")
    parser.add_argument("--quick", action="store_true", help="two shapes instead of four")
    parser.add_argument("--jobs", metavar="LETTERS", help="in the order in which they are to run, groups by commas")
    parser.add_argument("--seconds", type=float, default=SIZES.seconds, help="how long a row is timed (default: 1)")
    parser.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="start no row after that")
    parser.add_argument("--checks-only", action="store_true", help="time nothing")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, without a GPU; the numbers mean nothing")
    parser.add_argument("--steps", action="store_true", help="whole training steps instead of the operators")
    options = parser.parse_args()
    if options.steps:
        run_steps(options)
    if options.dry_run and not DRY_RUN:  # Triton reads this when it is imported, which may have happened by now
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})
    if not DRY_RUN and not torch.cuda.is_available():
        sys.exit("bench/gpu.py needs an NVIDIA GPU (or --dry-run); on a CPU run: fastkl bench")
    started = time.perf_counter()
    print("checking every operator on the device against float64", flush=True)
    wrong = failures()
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
    run_bench(options.output, device=DEVICE, shapes=shapes, jobs=options.jobs, seconds=options.seconds, budget_s=left)
    print(f"all of it took {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
