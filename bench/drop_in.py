"""fastkl's scoring functions beside those they replace in other projects: time, memory and error in one run on a CPU.

    pip install "trl==1.16.*" && pip install --no-deps verl openrlhf liger-kernel tensordict pyvers orjson
    python bench/drop_in.py

Every contender of a job gets the same inputs and gives the same outputs and gradients. Each is compared with float64
first; then they take turns, one call each per round. Memory is the peak beyond what was there before the call
(VmHWM after clearing refs). A last table has the errors of a small bfloat16 problem. Projects that are not installed
are left out, and said to be. Left out: GPUs (the projects' Triton kernels and fastkl's), whole training steps
(training.py), prime-rl (not on PyPI).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastkl import TokenCoefficients, linear_token_loss, linear_token_scores, token_scores
from fastkl.bench import peak_mib
from fastkl.kernels import reference

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "integrations"))
from others import function_module  # noqa: E402

JOBS = {
    "A": ("logits [N, V]", "log-prob", "dlogits"),
    "B": ("logits [N, V]", "log-prob, entropy", "dlogits"),
    "C": ("hidden [N, H], head [V, H]", "log-prob, entropy", "dhidden, dhead"),
    "D": ("hidden and head, twice", "policy and reference log-prob, exact KL", "dhidden, dhead"),
}


@dataclass(frozen=True)
class Size:
    """N rows, H features, V ids."""

    rows: int
    hidden: int
    vocab: int
    dtype: torch.dtype


class Problem:
    """The inputs of every job, and the factors of the loss: sum of a * log-prob + b * (entropy or KL)."""

    def __init__(self, size: Size) -> None:
        g = torch.Generator().manual_seed(0)
        weight = torch.randn(size.vocab, size.hidden, generator=g) * 2 / size.hidden**0.5
        hidden = torch.randn(size.rows, size.hidden, generator=g)
        self.size = size
        self.weight = weight.to(size.dtype)
        self.hidden = hidden.to(size.dtype)
        self.ref_weight = (weight + 0.02 * torch.randn(weight.shape, generator=g)).to(size.dtype)
        self.ref_hidden = (hidden + 0.05 * torch.randn(hidden.shape, generator=g)).to(size.dtype)
        self.targets = torch.randint(0, size.vocab, (size.rows,), generator=g)
        self.a, self.b = torch.randn(size.rows, generator=g), torch.randn(size.rows, generator=g)
        self.logits = (self.hidden.float() @ self.weight.float().t()).to(size.dtype)

    def leaves(self, job: str) -> list[Tensor]:
        """Fresh copies of what is differentiated: a contender may overwrite its logits."""
        given = [self.logits] if job in "AB" else [self.hidden, self.weight]
        return [x.clone().requires_grad_() for x in given]

    def exact(self, job: str) -> list[Tensor]:
        """What every contender should give, in float64."""
        leaves = [x.detach().double().requires_grad_() for x in self.leaves(job)]
        if job in "AB":
            scores = reference.token_scores(leaves[0], None, self.targets)
        else:
            ref = (self.ref_hidden.double(), self.ref_weight.double()) if job == "D" else (None, None)
            scores = reference.linear_token_scores(*leaves, *ref, self.targets)
        kept = {"A": (), "B": (scores.entropy,), "C": (scores.entropy,), "D": (scores.ref_logprobs, scores.kl)}[job]
        return self.with_gradients(leaves, scores.policy_logprobs, *kept)

    def with_gradients(self, leaves: list[Tensor], logprobs: Tensor, *others: Tensor | None) -> list[Tensor]:
        """The scores, and the gradients of the loss: of a * log-prob + b * the last score."""
        loss = (self.a * logprobs).sum()
        if others:
            loss = loss + (self.b * others[-1]).sum()
        return [logprobs.detach(), *(x.detach() for x in others), *torch.autograd.grad(loss, leaves)]


@dataclass(frozen=True)
class Contender:
    """One function of one project, doing one job. The call gets fresh leaves."""

    job: str
    project: str
    function: str
    call: Callable[[Problem, list[Tensor]], list[Tensor]]


def ours_and_plain() -> Iterator[Contender]:
    """fastkl, and PyTorch as one would write it down."""

    def of_logits(function: Callable, outputs: dict) -> Callable:
        def call(p: Problem, leaves: list[Tensor]) -> list[Tensor]:
            scores = function(leaves[0], None, p.targets, **outputs)
            last = () if outputs.get("outputs") == () else (scores.entropy,)
            return p.with_gradients(leaves, scores.policy_logprobs, *last)

        return call

    def of_heads(function: Callable, ref: bool) -> Callable:
        def call(p: Problem, leaves: list[Tensor]) -> list[Tensor]:
            scores = function(*leaves, *((p.ref_hidden, p.ref_weight) if ref else (None, None)), p.targets)
            others = (scores.ref_logprobs, scores.kl) if ref else (scores.entropy,)
            return p.with_gradients(leaves, scores.policy_logprobs, *others)

        return call

    def log_softmax(p: Problem, leaves: list[Tensor]) -> list[Tensor]:
        logp = leaves[0].float().log_softmax(-1)
        return p.with_gradients(leaves, logp.gather(1, p.targets[:, None])[:, 0])

    def fused(p: Problem, leaves: list[Tensor]) -> list[Tensor]:
        factors = TokenCoefficients(policy_logprobs=p.a, kl=p.b)
        loss, s = linear_token_loss(*leaves, p.ref_hidden, p.ref_weight, p.targets, factors, outputs=("kl",))
        return [s.policy_logprobs, s.ref_logprobs, s.kl, *torch.autograd.grad(loss, leaves)]

    yield Contender("A", "fastkl", "token_scores(outputs=())", of_logits(token_scores, {"outputs": ()}))
    in_place = {"outputs": (), "inplace_backward": True}
    yield Contender("A", "fastkl", "token_scores(outputs=(), inplace_backward=True)", of_logits(token_scores, in_place))
    yield Contender("A", "PyTorch", "log_softmax, gather", log_softmax)
    yield Contender("B", "fastkl", "token_scores", of_logits(token_scores, {}))
    yield Contender("B", "PyTorch", "log_softmax; gather, entropy", of_logits(reference.token_scores, {}))
    yield Contender("C", "fastkl", "linear_token_scores", of_heads(linear_token_scores, False))
    yield Contender("C", "PyTorch", "head, log_softmax", of_heads(reference.linear_token_scores, False))
    kl_only = partial(linear_token_scores, outputs=("kl",))
    yield Contender("D", "fastkl", 'linear_token_scores(outputs=("kl",))', of_heads(kl_only, True))
    yield Contender("D", "fastkl", 'linear_token_loss(outputs=("kl",))', fused)
    yield Contender("D", "PyTorch", "both heads, log_softmax", of_heads(reference.linear_token_scores, True))


def of_two_functions(logprobs: Callable, entropy: Callable | None) -> Callable:
    """A job on logits by one function or two."""

    def call(p: Problem, leaves: list[Tensor]) -> list[Tensor]:
        others = () if entropy is None else (entropy(leaves[0]),)
        return p.with_gradients(leaves, logprobs(leaves[0], p.targets), *others)

    return call


def trl() -> Iterator[Contender]:
    """TRL's functions; on a CPU their Triton kernels are replaced by PyTorch, by TRL itself."""
    utils = importlib.import_module("trl.trainer.utils")
    head = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    divergence = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *outputs: str) -> tuple[Tensor, Tensor | None]:
        return head.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, outputs)[:2]

    def policy(p: Problem, leaves: list[Tensor]) -> list[Tensor]:
        return p.with_gradients(leaves, *logprobs(*leaves, p.targets, "entropy"))

    def both(p: Problem, leaves: list[Tensor]) -> list[Tensor]:
        logp, _ = logprobs(*leaves, p.targets)
        kl, _ = divergence.apply(*leaves, None, p.ref_hidden, p.ref_weight, None, 1.0)
        with torch.no_grad():
            ref, _ = logprobs(p.ref_hidden, p.ref_weight, p.targets)
        return p.with_gradients(leaves, logp, ref, kl)

    one, two = utils.selective_log_softmax, utils.entropy_from_logits
    yield Contender("A", "TRL", "selective_log_softmax", of_two_functions(one, None))
    yield Contender("B", "TRL", "selective_log_softmax, entropy_from_logits", of_two_functions(one, two))
    yield Contender("C", "TRL", "ChunkedLogProbFunction", policy)
    yield Contender("D", "TRL", "ChunkedLogProbFunction twice, ChunkedDivergenceFunction", both)


def verl() -> Iterator[Contender]:
    """verl's PyTorch functions; its Triton head needs a GPU."""
    functions = function_module("verl.utils.torch_functional")
    fused = function_module("verl.utils.experimental.torch_functional").FusedLinearForPPO()

    def head(p: Problem, leaves: list[Tensor]) -> list[Tensor]:
        return p.with_gradients(leaves, *fused(*leaves, p.targets))

    one, two = functions.logprobs_from_logits, functions.entropy_from_logits
    yield Contender("A", "verl", "logprobs_from_logits", of_two_functions(one, None))
    yield Contender("B", "verl", "logprobs_from_logits, entropy_from_logits", of_two_functions(one, two))
    yield Contender("C", "verl", "FusedLinearForPPO", head)


def openrlhf() -> Iterator[Contender]:
    """OpenRLHF's functions, compute_entropy without torch.compile."""
    functions = function_module("openrlhf.models.utils", ("deepspeed",))
    one, two = functions.log_probs_from_logits, functions.compute_entropy._torchdynamo_orig_callable
    yield Contender("A", "OpenRLHF", "log_probs_from_logits", of_two_functions(one, None))
    yield Contender("B", "OpenRLHF", "log_probs_from_logits, compute_entropy", of_two_functions(one, two))


def liger() -> Iterator[Contender]:
    """Liger's scaled cross entropy, which falls back to PyTorch on a CPU."""
    function = importlib.import_module("liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction

    def head(p: Problem, leaves: list[Tensor]) -> list[Tensor]:
        nll, entropy = function.apply(*leaves, p.targets, 1.0, -100, 1, True)
        return p.with_gradients(leaves, -nll, entropy)

    yield Contender("C", "Liger", "LigerFusedLinearScaledCrossEntropyFunction", head)


def contenders() -> tuple[list[Contender], dict[str, str]]:
    """Everything that can be had here, job by job; and what cannot, with the reason."""
    found, left_out = list(ours_and_plain()), {"prime-rl": "not on PyPI"}
    for project in (trl, verl, openrlhf, liger):
        try:
            found += project()
        except ImportError as error:
            left_out[project.__name__] = str(error)
    return sorted(found, key=lambda c: c.job), left_out


def errors_of(contender: Contender, problem: Problem, exact: list[Tensor]) -> dict[str, float]:
    """Largest deviations from float64: of a score in nats, of a gradient as a part of its largest entry."""
    found = contender.call(problem, problem.leaves(contender.job))
    scores, gradients = 0.0, 0.0
    for x, truth in zip(found, exact, strict=True):
        difference = float((x.double() - truth).abs().max())
        if truth.dim() == 1:
            scores = max(scores, difference)
        else:
            gradients = max(gradients, difference / float(truth.abs().max()))
    return {"score_error": scores, "gradient_error": gradients}


def measure(job: str, group: list[Contender], problem: Problem, rounds: int) -> list[dict]:
    """Errors, peak memory, then times in turns: one row per contender."""
    exact = problem.exact(job)
    rows = [{"job": job, "project": c.project, "function": c.function, **errors_of(c, problem, exact)} for c in group]
    del exact
    times: list[list[float]] = [[] for _ in group]
    for contender, row in zip(group, rows, strict=True):
        leaves = problem.leaves(job)
        row["peak_mib"] = peak_mib(lambda c=contender, x=leaves: c.call(problem, x), "cpu")
    for _ in range(rounds):
        for contender, seconds in zip(group, times, strict=True):
            leaves = problem.leaves(job)
            start = time.perf_counter()
            contender.call(problem, leaves)
            seconds.append(time.perf_counter() - start)
    for row, seconds in zip(rows, times, strict=True):
        row |= {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}
    return rows


def machine() -> dict[str, object]:
    """What the numbers were measured on and with."""
    versions = {}
    for name in ("torch", "trl", "verl", "openrlhf", "liger-kernel"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return {
        "device": cpu.group(1) if cpu else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip(),
        "command": " ".join(["python", os.path.relpath(__file__, ROOT), *sys.argv[1:]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=7, help="timed calls per contender")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "drop_in.json")
    options = parser.parse_args()
    large = Size(options.rows, options.hidden, options.vocab, torch.float32)
    small = Size(64, 256, 4000, torch.bfloat16)
    found, left_out = contenders()
    rows, rounded = [], []
    print(f"left out: {left_out}")
    for job, (given, scores, gradients) in JOBS.items():
        group = [c for c in found if c.job == job]
        print(f"-- {job}: {given} -> {scores}; {gradients}")
        problem = Problem(small)
        exact = problem.exact(job)
        half = [errors_of(c, problem, exact) for c in group]
        rounded += [
            {"job": job, "project": c.project, "function": c.function, **e} for c, e in zip(group, half, strict=True)
        ]
        for row, error in zip(measure(job, group, Problem(large), options.rounds), half, strict=True):
            rows.append(row)
            print(
                f"{row['project']:<10}{row['function']:<56}{row['median_s']:7.3f} s ({row['min_s']:.3f} to "
                f"{row['max_s']:.3f}){row['peak_mib']:8.0f} MiB  float32 {row['score_error']:.0e} "
                f"{row['gradient_error']:.0e}  bfloat16 {error['score_error']:.0e} {error['gradient_error']:.0e}"
            )
    sizes = {name: {**asdict(s), "dtype": str(s.dtype)} for name, s in (("float32", large), ("bfloat16", small))}
    record = {
        "machine": machine(),
        "sizes": sizes,
        "jobs": JOBS,
        "left_out": left_out,
        "rows": rows,
        "bfloat16": rounded,
    }
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
