"""Policy, reference and exact-KL gradient on a CPU: fastkl, TRL's operators and the materialised line, side by side.

    python bench/cpu_target.py [--rows 2048 --hidden 512 --vocab 32000] [--output bench/results/cpu_target.json]

The job: hidden states and heads of both models in; log-prob, reference log-prob, entropy and exact KL out, with the
gradient of sum(a logp + c KL) towards hidden states and head; float32. Every contender runs in a process of its own and
is compared with float64 before it is timed. Each is measured in three settings of the C library's memory allocator,
because a fresh page costs more than anything done to it here, and its best is what counts: "default"; "recycled", where
freed memory is kept and used again (glibc.malloc.mmap_max=0); "huge pages" (PyTorch's THP_MEM_ALLOC_ENABLE).

TRL computes on tiles of 4096 x 32768 logits, which is everything at once here; smaller tiles are tried for it as well.
It is left out, and said to be, where it is not installed: pip install "trl==1.16.*".
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastkl.kernels.operators import TokenCoefficients, linear_token_loss, linear_token_scores
from fastkl.microbench.run import peak_mib

SETTINGS = {
    "default": {},
    "recycled": {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"},
    "huge pages": {"THP_MEM_ALLOC_ENABLE": "1"},
}
TRL_TILES = {"TRL": (4096, 32768), "TRL, tiles of 1024 x 4096": (1024, 4096)}
CONTENDERS = ("materialised", "fastkl, autograd", "fastkl, gradient in the forward", *TRL_TILES)
TOLERANCE = 2e-4


@dataclass(frozen=True)
class Problem:
    """The job's inputs; a, c [N] are the loss's factors."""

    hidden: Tensor
    weight: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    targets: Tensor
    a: Tensor
    c: Tensor

    @classmethod
    def make(cls, rows: int, hidden: int, vocab: int) -> Problem:
        g = torch.Generator().manual_seed(0)

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, generator=g)

        states, weight = randn(rows, hidden), randn(vocab, hidden) * 3 / hidden**0.5
        ref_states, ref_weight = states + 0.1 * randn(rows, hidden), weight + 0.02 * randn(vocab, hidden)
        targets = torch.randint(0, vocab, (rows,), generator=g)
        factors = randn(rows), 0.1 * torch.rand(rows, generator=g)
        return cls(states.requires_grad_(), weight.requires_grad_(), ref_states, ref_weight, targets, *factors)

    def double(self) -> Problem:
        """The same in float64."""
        leaves = (x.detach().double().requires_grad_() for x in (self.hidden, self.weight))
        return Problem(*leaves, self.ref_hidden.double(), self.ref_weight.double(), self.targets, self.a, self.c)


Scores = tuple[Tensor, Tensor, Tensor, Tensor]  # logp, reference logp, entropy, KL: [N]


def step(p: Problem, scores: Callable[[Problem], Scores]) -> tuple[Scores, Tensor, Tensor]:
    """Scores and both gradients through autograd."""
    out = scores(p)
    loss = (p.a * out[0]).sum() + (p.c * out[3]).sum()
    return out, *torch.autograd.grad(loss, (p.hidden, p.weight))


def materialised(p: Problem) -> Scores:
    """What a careful user of PyTorch writes: all logits at once, no work done twice."""
    logp = (p.hidden @ p.weight.t()).log_softmax(1)
    with torch.no_grad():
        logq = (p.ref_hidden @ p.ref_weight.t()).log_softmax(1)
    prob = logp.exp()
    kl = (prob * (logp - logq)).sum(1)
    entropy = -(prob.detach() * logp.detach()).sum(1)
    targets = p.targets[:, None]
    return logp.gather(1, targets)[:, 0], logq.gather(1, targets)[:, 0], entropy, kl


def fastkl(p: Problem) -> Scores:
    """linear_token_scores."""
    out = linear_token_scores(p.hidden, p.weight, p.ref_hidden, p.ref_weight, p.targets)
    return out.policy_logprobs, out.ref_logprobs, out.entropy, out.kl


def fastkl_loss(p: Problem) -> tuple[Scores, Tensor, Tensor]:
    """linear_token_loss."""
    factors = TokenCoefficients(policy_logprobs=p.a, kl=p.c)
    loss, out = linear_token_loss(p.hidden, p.weight, p.ref_hidden, p.ref_weight, p.targets, factors)
    scores = out.policy_logprobs, out.ref_logprobs, out.entropy, out.kl
    return scores, *torch.autograd.grad(loss, (p.hidden, p.weight))


def trl(p: Problem, tile: tuple[int, int]) -> Scores:
    """TRL 1.16: log-probs of both models and the reverse KL, whose operator returns the entropy as well."""
    from trl.kernels import chunked_divergence, chunked_logprob

    for module in (chunked_divergence, chunked_logprob):
        module.TOKEN_CHUNK_SIZE = tile[0]
    chunked_divergence.VOCAB_CHUNK_SIZE = tile[1]

    def logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
        apply = chunked_logprob.ChunkedLogProbFunction.apply
        return apply(hidden, weight, None, p.targets, 1.0, tile[1], None, 1.0, ())[0]

    logp = logprobs(p.hidden, p.weight)
    with torch.no_grad():
        ref_logp = logprobs(p.ref_hidden, p.ref_weight)
    kl, entropy = chunked_divergence.ChunkedDivergenceFunction.apply(
        p.hidden, p.weight, None, p.ref_hidden, p.ref_weight, None, 1.0
    )
    return logp, ref_logp, entropy, kl


def call_of(name: str, p: Problem) -> Callable[[], tuple[Scores, Tensor, Tensor]]:
    """One run of a contender's job."""
    if name == "fastkl, gradient in the forward":
        return lambda: fastkl_loss(p)
    if name in TRL_TILES:
        return lambda: step(p, lambda q: trl(q, TRL_TILES[name]))
    return lambda: step(p, {"materialised": materialised, "fastkl, autograd": fastkl}[name])


def truth(rows: int, hidden: int, vocab: int, path: Path) -> None:
    """Scores and gradients in float64, 128 rows at a time."""
    p = Problem.make(rows, hidden, vocab).double()
    parts, grad_hidden, grad_weight = [], [], torch.zeros_like(p.weight)
    for lo in range(0, rows, 128):
        cut = slice(lo, lo + 128)
        states = p.hidden.detach()[cut].requires_grad_()
        part = Problem(states, p.weight, p.ref_hidden[cut], p.ref_weight, p.targets[cut], p.a[cut], p.c[cut])
        scores, dh, dw = step(part, materialised)
        parts.append(torch.stack([x.detach() for x in scores]))
        grad_hidden.append(dh)
        grad_weight += dw
    np.savez(path, scores=torch.cat(parts, 1), hidden=torch.cat(grad_hidden), weight=grad_weight)


def measure(name: str, rows: int, hidden: int, vocab: int, truth_path: Path, repeats: int) -> dict:
    """One contender in this process: error first, then times, then peak memory beyond inputs and outputs."""
    p = Problem.make(rows, hidden, vocab)
    if name == "one head product":
        out, weight_t = torch.empty(rows, vocab), p.weight.detach().t()
        times = timed(lambda: torch.mm(p.hidden.detach(), weight_t, out=out), repeats)
        return {"name": name, "seconds": times}
    call = call_of(name, p)
    with np.load(truth_path) as exact:
        scores, *grads = call()
        errors = [float((torch.stack([x.detach() for x in scores]) - torch.from_numpy(exact["scores"])).abs().max())]
        for got, key in zip(grads, ("hidden", "weight"), strict=True):
            expected = torch.from_numpy(exact[key])
            errors.append(float((got - expected).abs().max() / expected.abs().max()))
    if not max(errors) <= TOLERANCE:
        raise SystemExit(f"{name}: errors {errors} against float64; a wrong answer has no speed")
    outputs_mib = sum(x.numel() * x.element_size() for x in (*scores, *grads)) / 2**20
    del scores, grads
    times = timed(call, repeats)
    peak = peak_mib(call, "cpu")
    return {
        "name": name,
        "seconds": times,
        "peak_mib": None if peak is None else peak - outputs_mib,
        "errors": dict(zip(("scores, nats", "hidden gradient", "head gradient"), errors, strict=True)),
    }


def timed(call: Callable[[], object], repeats: int) -> list[float]:
    """Wall seconds of each repeat, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times[1:]


def in_own_process(arguments: list[str], environment: dict[str, str]) -> str:
    """The last line that this script prints when started with these arguments."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments], env={**os.environ, **environment}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{arguments}: {done.stderr[-2000:]}")
    return done.stdout.splitlines()[-1] if done.stdout else ""


def versions() -> dict[str, str]:
    """What was measured with, and on."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor())
    return {
        "device": f"{cpu}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "trl": importlib.metadata.version("trl") if importlib.util.find_spec("trl") else "not installed",
        "commit": commit,
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
    }


def verdicts(results: list[dict]) -> dict[str, float]:
    """The ratios that the targets are about: times of others over ours, each at its best and with the allocator's
    defaults; the materialised line's memory over ours."""
    ratios = {}
    for label, settings in (("best", [*SETTINGS]), ("default", ["default"])):
        times: dict[str, float] = {}
        for row in results:
            if row["setting"] in settings:
                rival = "TRL" if row["name"] in TRL_TILES else row["name"]
                times[rival] = min(times.get(rival, row["median_s"]), row["median_s"])
        for ours in ("fastkl, autograd", "fastkl, gradient in the forward"):
            for rival in ("materialised", "TRL"):
                if ours in times and rival in times:
                    ratios[f"{label}: {rival} / {ours}"] = round(times[rival] / times[ours], 2)
    peaks = {row["name"]: row.get("peak_mib") for row in results if row["setting"] == "default"}
    for ours in ("fastkl, autograd", "fastkl, gradient in the forward"):
        if peaks.get(ours) and peaks.get("materialised"):
            ratios[f"memory: materialised / {ours}"] = round(peaks["materialised"] / peaks[ours], 1)
    return ratios


def write(output: Path, shape: tuple[int, int, int], results: list[dict]) -> None:
    """The file so far: after every contender, so that an interrupted run is not lost."""
    names = dict(zip(("rows", "hidden", "vocab"), shape, strict=True))
    record = {**versions(), "shape": names, "dtype": "float32", "ratios": verdicts(results), "results": results}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    """All contenders in all settings, in turn; or one, if told so."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--settings", nargs="*", default=[*SETTINGS], choices=[*SETTINGS])
    parser.add_argument("--contenders", nargs="*", default=[*CONTENDERS], choices=[*CONTENDERS])
    parser.add_argument("--output", type=Path, default=Path("bench/results/cpu_target.json"))
    parser.add_argument("--append", action="store_true", help="keep what the output has of other settings")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a contender's name: measure it in this process
    parser.add_argument("--truth", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = options.rows, options.hidden, options.vocab
    if options.one:
        print(json.dumps(measure(options.one, *shape, options.truth, options.repeats)))
        return
    contenders = ["one head product", *options.contenders]
    if not importlib.util.find_spec("trl"):
        print("TRL is not installed: no rows of it")
        contenders = [name for name in contenders if name not in TRL_TILES]
    results = []
    if options.append and options.output.exists():
        earlier = json.loads(options.output.read_text())["results"]
        results = [row for row in earlier if row["setting"] not in options.settings]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "truth.npz"
        truth(*shape, path)
        common = ["--rows", str(shape[0]), "--hidden", str(shape[1]), "--vocab", str(shape[2]), "--truth", str(path)]
        common += ["--repeats", str(options.repeats)]
        print(f"{'setting':<12}{'contender':<34}{'median s':>10}{'min':>8}{'max':>8}{'peak MiB':>10}  errors")
        for setting in options.settings:
            for name in contenders:
                row = json.loads(in_own_process(["--one", name, *common], SETTINGS[setting]))
                row = {"setting": setting, "median_s": statistics.median(row["seconds"]), **row}
                results.append(row)
                write(options.output, shape, results)
                peak = f"{row['peak_mib']:.0f}" if row.get("peak_mib") is not None else ""
                low, high, median = min(row["seconds"]), max(row["seconds"]), row["median_s"]
                errors = " ".join(f"{x:.0e}" for x in row.get("errors", {}).values())
                print(f"{setting:<12}{name:<34}{median:>10.3f}{low:>8.3f}{high:>8.3f}{peak:>10}  {errors}", flush=True)
    for what, ratio in verdicts(results).items():
        print(f"{what}: {ratio}")
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
