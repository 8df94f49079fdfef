"""fastkl's scoring functions beside those they replace in other projects: time, memory and error in one run on a CPU.

    pip install "trl==1.16.*" && pip install --no-deps verl openrlhf liger-kernel tensordict pyvers orjson
    python bench/operators/drop_in.py

Every contender of a job gets the same inputs and gives the same outputs and gradients. Each is compared with float64
first; then they take turns, one call each per round. Memory is the peak beyond what was there before the call (VmHWM
after clearing refs), gradients included. The errors are measured on a small bfloat16 problem, too. Projects that are
not installed are left out, and said to be. Left out: GPUs (the projects' Triton kernels and fastkl's), whole training
steps (bench/training/steps.py), prime-rl (not on PyPI).
"""

from __future__ import annotations

import importlib
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.common import ROOT, parser, seconds_of, write
from fastkl import linear_token_scores, token_scores
from fastkl.kernels import reference
from fastkl.kernels.types import TokenScores
from fastkl.microbench.jobs import Job, Problem, Scorer, Shape, errors, in_the_forward, solve
from fastkl.microbench.measure import peak_mib
from fastkl.microbench.peers import liger_scores, trl_scores

sys.path.append(str(ROOT / "tests" / "integrations"))
from others import function_module

LOGP, ENTROPY = ("policy_logprobs",), ("policy_logprobs", "entropy")
JOBS = {
    "A": Job("logits [N, V]", "log-prob", LOGP, 0, 0, of_logits=True, with_reference=False),
    "B": Job("logits [N, V]", "log-prob, entropy", ENTROPY, 0, 0, of_logits=True, with_reference=False),
    "C": Job("hidden [N, H], head [V, H]", "log-prob, entropy", ENTROPY, 0, 0, with_reference=False),
    "D": Job(
        "hidden and head, twice", "policy and reference log-prob, exact KL",
        ("policy_logprobs", "ref_logprobs", "kl"), 0, 0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """One function of one project, doing one job."""

    job: str
    project: str
    function: str
    scorer: Callable[[Problem], Scorer]

    def call(self, p: Problem, inputs: Any = None) -> list[Tensor]:
        """The job done once. inputs: fresh ones, made beforehand (a contender may overwrite its logits)."""
        return solve(JOBS[self.job], p, self.scorer(p), inputs)


def fastkl() -> Iterator[Contender]:
    """Through autograd, with the gradient over the logits, and in the forward."""
    logprobs, kl = partial(token_scores, outputs=()), partial(linear_token_scores, outputs=("kl",))
    in_place = partial(logprobs, inplace_backward=True)
    yield Contender("A", "fastkl", "token_scores(outputs=())", lambda _: logprobs)
    yield Contender("A", "fastkl", "token_scores(outputs=(), inplace_backward=True)", lambda _: in_place)
    yield Contender("B", "fastkl", "token_scores", lambda _: token_scores)
    yield Contender("C", "fastkl", "linear_token_scores", lambda _: linear_token_scores)
    yield Contender("D", "fastkl", 'linear_token_scores(outputs=("kl",))', lambda _: kl)
    yield Contender("D", "fastkl", 'linear_token_loss(outputs=("kl",))', partial(in_the_forward, outputs=("kl",)))


def pytorch() -> Iterator[Contender]:
    """As one would write it down."""

    def log_softmax(z: Tensor, _: Tensor | None, targets: Tensor) -> TokenScores:
        return TokenScores(z.float().log_softmax(-1).gather(1, targets[:, None])[:, 0])

    yield Contender("A", "PyTorch", "log_softmax, gather", lambda _: log_softmax)
    yield Contender("B", "PyTorch", "log_softmax; gather, entropy", lambda _: reference.token_scores)
    yield Contender("C", "PyTorch", "head, log_softmax", lambda _: reference.linear_token_scores)
    yield Contender("D", "PyTorch", "both heads, log_softmax", lambda _: reference.linear_token_scores)


def of_logits(project: str, logprobs: Callable, entropy: Callable) -> Iterator[Contender]:
    """Jobs A and B by a project's two functions of logits."""

    def scores(z: Tensor, _: Tensor | None, targets: Tensor, with_entropy: bool) -> TokenScores:
        return TokenScores(logprobs(z, targets), entropy=entropy(z) if with_entropy else None)

    name, other = (f.__name__ for f in (logprobs, entropy))
    yield Contender("A", project, name, lambda _: partial(scores, with_entropy=False))
    yield Contender("B", project, f"{name}, {other}", lambda _: partial(scores, with_entropy=True))


def trl() -> Iterator[Contender]:
    """TRL's functions; on a CPU their Triton kernels are replaced by PyTorch, by TRL itself."""
    utils, operators = importlib.import_module("trl.trainer.utils"), trl_scores()
    yield from of_logits("TRL", utils.selective_log_softmax, utils.entropy_from_logits)
    yield Contender("C", "TRL", "ChunkedLogProbFunction", lambda _: operators)
    yield Contender("D", "TRL", "ChunkedLogProbFunction twice, ChunkedDivergenceFunction", lambda _: operators)


def verl() -> Iterator[Contender]:
    """verl's PyTorch functions; its Triton head needs a GPU."""
    functions = function_module("verl.utils.torch_functional")
    fused = function_module("verl.utils.experimental.torch_functional").FusedLinearForPPO()

    def head(hidden: Tensor, weight: Tensor, _: None, __: None, targets: Tensor) -> TokenScores:
        logp, entropy = fused(hidden, weight, targets)
        return TokenScores(logp, entropy=entropy)

    yield from of_logits("verl", functions.logprobs_from_logits, functions.entropy_from_logits)
    yield Contender("C", "verl", "FusedLinearForPPO", lambda _: head)


def openrlhf() -> Iterator[Contender]:
    """OpenRLHF's functions, compute_entropy without torch.compile."""
    functions = function_module("openrlhf.models.utils", ("deepspeed",))
    entropy = functions.compute_entropy._torchdynamo_orig_callable
    yield from of_logits("OpenRLHF", functions.log_probs_from_logits, entropy)


def liger() -> Iterator[Contender]:
    """Liger's scaled cross entropy, which falls back to PyTorch on a CPU."""
    scorer = liger_scores()
    yield Contender("C", "Liger", "LigerFusedLinearScaledCrossEntropyFunction", lambda _: scorer)


def contenders() -> tuple[list[Contender], dict[str, str]]:
    """Everything that can be had here, job by job; and what cannot, with the reason."""
    found, left_out = [], {"prime-rl": "not on PyPI"}
    for project in (fastkl, pytorch, trl, verl, openrlhf, liger):
        try:
            found += project()
        except ImportError as error:
            left_out[project.__name__] = str(error)
    return sorted(found, key=lambda c: c.job), left_out


def measure(job: str, group: list[Contender], large: Problem, small: Problem, rounds: int) -> list[dict[str, Any]]:
    """Errors of both problems, then peak memory and times in turns of the large one: one row per contender."""
    rows: list[dict[str, Any]] = [{"job": job, "project": c.project, "function": c.function} for c in group]
    oracle = reference.token_scores if JOBS[job].of_logits else reference.linear_token_scores
    for p in (large, small):
        exact = solve(JOBS[job], p.exact(JOBS[job].of_logits, slice(None)), oracle)
        for contender, row in zip(group, rows, strict=True):
            row[str(p.shape.dtype).removeprefix("torch.")] = errors(contender.call(p), exact)
        del exact
    for contender, row in zip(group, rows, strict=True):
        row["peak_mib"] = peak_mib(partial(contender.call, large, JOBS[job].inputs(large)), "cpu")
    times: list[list[float]] = [[] for _ in group]
    for _ in range(rounds):
        for contender, seconds in zip(group, times, strict=True):
            seconds.append(seconds_of(partial(contender.call, large, JOBS[job].inputs(large))))
    for row, seconds in zip(rows, times, strict=True):
        row |= {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}
    return rows


def table(record: dict[str, Any]) -> str:
    """The page's tables (docs/drop-in.md), one per job."""
    lines = []
    for job, (given, scores, gradients) in record["jobs"].items():
        lines += [
            f"**{job}.** {given} → {scores}, and from these {gradients}:\n",
            "| | function | s | peak MiB | error, float32 | error, bfloat16 |",
            "|---|---|---:|---:|---:|---:|",
        ]
        for row in (row for row in record["rows"] if row["job"] == job):
            errors = [
                f"{row[dtype]['score_error']:.0e}, {row[dtype]['gradient_error']:.0e}"
                for dtype in ("float32", "bfloat16")
            ]
            lines.append(
                f"| {row['project']} | `{row['function']}` | {row['median_s']:.2f} | {row['peak_mib']:.0f} "
                f"| {errors[0]} | {errors[1]} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    p = parser(__doc__, "drop_in.json")
    p.add_argument("--rows", type=int, default=1024)
    p.add_argument("--hidden", type=int, default=256)
    p.add_argument("--vocab", type=int, default=32000)
    p.add_argument("--rounds", type=int, default=7, help="timed calls per contender")
    options = p.parse_args()
    large = Shape("large", options.rows, options.hidden, options.vocab, torch.float32)
    small = Shape("small", 64, 256, 4000, torch.bfloat16)
    found, left_out = contenders()
    rows = []
    for job in JOBS:
        rows += measure(
            job, [c for c in found if c.job == job], Problem(large, "cpu"), Problem(small, "cpu"), options.rounds
        )
    sizes = [{**asdict(shape), "dtype": str(shape.dtype)} for shape in (large, small)]
    jobs = {
        letter: (job.given, job.wanted, "dlogits" if job.of_logits else "dhidden, dhead")
        for letter, job in JOBS.items()
    }
    record = {"sizes": sizes, "jobs": jobs, "left_out": left_out, "rows": rows}
    write(options.output, record)
    print(table(record))
    print(f"left out: {left_out}")


if __name__ == "__main__":
    main()
