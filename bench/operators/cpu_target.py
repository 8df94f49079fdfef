"""Policy, reference and exact-KL gradient on a CPU: fastkl, TRL's operators and the materialised line, side by side.

    python bench/operators/cpu_target.py [--rows 2048 --hidden 512 --vocab 32000]   writes bench/results/cpu_target.json

The job: hidden states and heads of both models in; log-prob, reference log-prob, entropy and exact KL out, with the
gradient of sum(a logp + c KL) towards hidden states and head; float32. Every contender runs in a process of its own and
is compared with float64 before it is timed. Each is measured in three settings of the C library's memory allocator,
because a fresh page costs more than anything done to it here, and its best is what counts: "default"; "recycled", where
freed memory is kept and used again (glibc.malloc.mmap_max=0); "huge pages" (PyTorch's THP_MEM_ALLOC_ENABLE).

TRL computes on tiles of 4096 x 32768 logits, which is everything at once here; smaller tiles are tried for it as well.
It is left out, and said to be, where it is not installed: pip install "trl==1.16.*".
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.common import parser, run_alone, write
from fastkl.kernels.operators import linear_token_scores
from fastkl.kernels.types import TokenScores
from fastkl.microbench.jobs import Job, Problem, Scorer, Shape, errors, in_the_forward, solve
from fastkl.microbench.measure import peak_mib, times_ms
from fastkl.microbench.peers import TRL_TILE, trl_scores

SETTINGS = {
    "default": {},
    "recycled": {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"},
    "huge pages": {"THP_MEM_ALLOC_ENABLE": "1"},
}
JOB = Job("hidden, heads", "scores, gradients", ("policy_logprobs", "ref_logprobs", "entropy", "kl"), 4, 0)
TRL_TILES = {"TRL": TRL_TILE, "TRL, tiles of 1024 x 4096": (1024, 4096)}
OURS = ("fastkl, autograd", "fastkl, gradient in the forward")
CONTENDERS = ("materialised", *OURS, *TRL_TILES)
TOLERANCE = 2e-4


def problem(rows: int, hidden: int, vocab: int) -> Problem:
    """The job's inputs."""
    return Problem(Shape("cpu target", rows, hidden, vocab, torch.float32), "cpu")


def materialised(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, targets: Tensor
) -> TokenScores:
    """What a careful user of PyTorch writes: all logits at once, no work done twice."""
    logp = (hidden @ weight.t()).log_softmax(1)
    with torch.no_grad():
        logq = (ref_hidden @ ref_weight.t()).log_softmax(1)
    prob = logp.exp()
    kl = (prob * (logp - logq)).sum(1)
    entropy = -(prob.detach() * logp.detach()).sum(1)
    return TokenScores(*(x.gather(1, targets[:, None])[:, 0] for x in (logp, logq)), entropy, kl)


def scorer_of(name: str, p: Problem) -> Scorer:
    """A contender's function."""
    if name in TRL_TILES:
        return trl_scores(tile=TRL_TILES[name])
    return {"materialised": materialised, OURS[0]: linear_token_scores, OURS[1]: in_the_forward(p)}[name]


def write_truth(shape: tuple[int, int, int], path: Path) -> None:
    """Scores and gradients in float64, 128 rows at a time."""
    p, parts = problem(*shape), []
    head = torch.zeros(p.weight.shape, dtype=torch.float64)
    for low in range(0, shape[0], 128):
        *found, head_gradient = solve(JOB, p.exact(False, slice(low, low + 128)), materialised)
        head += head_gradient
        parts.append(found)
    torch.save([*(torch.cat(rows) for rows in zip(*parts, strict=True)), head], path)


def measure(name: str, shape: list[int], truth_path: str, seconds: float) -> dict[str, Any]:
    """One contender in this process: error first, then times, then peak memory beyond inputs and outputs."""
    p = problem(*shape)
    if name == "one head product":
        out = torch.empty(shape[0], shape[2])
        return {"name": name, "seconds": timed(lambda: torch.mm(p.hidden, p.weight.t(), out=out), seconds)}
    scorer = scorer_of(name, p)
    found = solve(JOB, p, scorer)
    off = errors(found, torch.load(truth_path))
    if not all(value <= TOLERANCE for value in off.values()):
        raise SystemExit(f"{name}: {off} against float64; a wrong answer has no speed")
    outputs_mib = sum(x.numel() * x.element_size() for x in found) / 2**20
    del found
    times = timed(lambda: solve(JOB, p, scorer), seconds)
    peak = peak_mib(lambda: solve(JOB, p, scorer), "cpu")
    return {"name": name, "seconds": times, "peak_mib": None if peak is None else peak - outputs_mib, "errors": off}


def timed(call: Callable[[], object], seconds: float) -> list[float]:
    """Wall seconds of each repeat."""
    return [ms / 1000 for ms in times_ms(call, "cpu", seconds)]


def verdicts(results: list[dict[str, Any]]) -> dict[str, float]:
    """The ratios that the targets are about: times of others over ours, each at its best and with the allocator's
    defaults; the materialised line's memory over ours."""
    ratios = {}
    for label, settings in (("best", [*SETTINGS]), ("default", ["default"])):
        times: dict[str, float] = {}
        for row in results:
            if row["setting"] in settings:
                rival = "TRL" if row["name"] in TRL_TILES else row["name"]
                times[rival] = min(times.get(rival, row["median_s"]), row["median_s"])
        for ours in OURS:
            for rival in ("materialised", "TRL"):
                if ours in times and rival in times:
                    ratios[f"{label}: {rival} / {ours}"] = round(times[rival] / times[ours], 2)
    peaks = {row["name"]: row.get("peak_mib") for row in results if row["setting"] == "default"}
    for ours in OURS:
        if peaks.get(ours) and peaks.get("materialised"):
            ratios[f"memory: materialised / {ours}"] = round(peaks["materialised"] / peaks[ours], 1)
    return ratios


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    peak = f"{row['peak_mib']:.0f}" if row.get("peak_mib") is not None else ""
    errors = " ".join(f"{x:.0e}" for x in row.get("errors", {}).values())
    low, high = min(row["seconds"]), max(row["seconds"])
    return f"{row['setting']:<12}{row['name']:<34}{row['median_s']:>10.3f}{low:>8.3f}{high:>8.3f}{peak:>10}  {errors}"


def main() -> None:
    """All contenders in all settings, in turn."""
    p = parser(__doc__, "cpu_target.json")
    p.add_argument("--rows", type=int, default=2048)
    p.add_argument("--hidden", type=int, default=512)
    p.add_argument("--vocab", type=int, default=32000)
    p.add_argument("--seconds", type=float, default=10.0, help="how long each contender is timed in each setting")
    p.add_argument("--settings", nargs="*", default=[*SETTINGS], choices=[*SETTINGS])
    p.add_argument("--contenders", nargs="*", default=[*CONTENDERS], choices=[*CONTENDERS])
    p.add_argument("--append", action="store_true", help="keep what the output has of others")
    options = p.parse_args()
    shape = options.rows, options.hidden, options.vocab
    contenders = ["one head product", *options.contenders]
    if not importlib.util.find_spec("trl"):
        print("TRL is not installed: no rows of it")
        contenders = [name for name in contenders if name not in TRL_TILES]
    results = []
    if options.append and options.output.exists():
        earlier = json.loads(options.output.read_text())["results"]
        results = [r for r in earlier if r["setting"] not in options.settings or r["name"] not in contenders]
    job = {"shape": dict(zip(("rows", "hidden", "vocab"), shape, strict=True)), "dtype": "float32"}
    with tempfile.TemporaryDirectory() as folder:
        truth = Path(folder) / "truth.pt"
        write_truth(shape, truth)
        print(f"{'setting':<12}{'contender':<34}{'median s':>10}{'min':>8}{'max':>8}{'peak MiB':>10}  errors")
        for setting in options.settings:
            for name in contenders:
                row = run_alone(measure, name, shape, truth, options.seconds, environment=SETTINGS[setting])
                results.append({"setting": setting, "median_s": statistics.median(row["seconds"]), **row})
                print(line(results[-1]), flush=True)
                write(options.output, {**job, "ratios": verdicts(results), "results": results})
    for what, ratio in verdicts(results).items():
        print(f"{what}: {ratio}")


if __name__ == "__main__":
    main()
