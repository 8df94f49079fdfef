"""Whole training steps on one GPU: fastkl beside TRL's RLOOTrainer, vLLM in the process of both.

    python bench/training/gpu_steps.py --output FOLDER [--budget 400] [--only NAME ...]
    python bench/training/gpu_steps.py --dry-run       the same lines on a tiny model, with or without a GPU

The job: 8 prompts x 8 samples, prompts of 100 tokens, completions of exactly 256 (1,024 where the name says so; one
prompt x 16 samples x 4,096 for the long group, whose memory is what counts), beta 0.05, AdamW, random weights of the
shapes of Qwen2.5 (gpu_models.py). Both sides train float32 weights under bfloat16 autocast without gradient
checkpointing; "bf16 weights" lets TRL keep policy, reference and moments in bfloat16, which is the least work;
"compiled" is fastkl with --compile. Both read prompts of one length, so that TRL pads nothing. TRL scores through its
fused head.

Models are written where temporary files go, in 2 bytes a parameter: TMPDIR may name a folder in memory.

Contenders of a phase start at the same time, each in a process of its own, and wait; then one after another runs its
steps while the others stand still. Two steps do not count. steps.jsonl has every step as soon as it is over, steps.json
all results, profile-NAME.json where a step's time goes (three steps more, not counted). A table of it, in Markdown:

    python bench/training/gpu_steps.py --table FOLDER/steps.json

Trainer MFU: (6 + 2) x parameters x tokens / time outside of generation and weight sync / the rate of a large bfloat16
product, measured in the same run. Tokens: every prompt once, and the completions: what has to be computed at least.
"""

from __future__ import annotations

import json
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from bench import common
from bench.training.gpu_contenders import Job
from bench.training.gpu_models import SHAPES, num_parameters

BF16_WEIGHTS = {"model_init_kwargs": {"dtype": "bfloat16"}}
PHASES: list[list[Job]] = [
    [
        Job("fastkl-0.5B", "fastkl", "0.5B", profiled=3),
        Job("fastkl-0.5B-compiled", "fastkl", "0.5B", profiled=3, options={"compile": True}),
        Job("trl-0.5B", "trl", "0.5B", options={"per_device_train_batch_size": 32}),
        Job("trl-0.5B-bf16-weights", "trl", "0.5B", options={"per_device_train_batch_size": 32} | BF16_WEIGHTS),
        Job("fastkl-1.5B", "fastkl", "1.5B"),
        Job("trl-1.5B", "trl", "1.5B", options={"per_device_train_batch_size": 16}),
    ],
    [
        Job("fastkl-0.5B-1024", "fastkl", "0.5B", new_tokens=1024, steps=3),
        Job("trl-0.5B-1024", "trl", "0.5B", new_tokens=1024, steps=3, options={"per_device_train_batch_size": 16}),
    ],
    [
        Job(
            "fastkl-7B-lora",
            "fastkl",
            "7B",
            steps=3,
            cache_gib=2,
            options={"lora_rank": 16, "gradient_checkpointing": True, "micro_batch_tokens": 2300},
        ),
    ],
    [
        Job(
            "fastkl-0.5B-one-long-group",  # 64k tokens in micro-batches of 16k: the group is cut between its samples
            "fastkl",
            "0.5B",
            prompts=1,
            samples=16,
            new_tokens=4096,
            steps=2,
            options={"micro_batch_tokens": 16384},
        ),
    ],
]
TINY = [
    Job("fastkl-tiny", "fastkl", "tiny", 2, 4, 8, 8, steps=2, profiled=2),
    Job("fastkl-tiny-compiled", "fastkl", "tiny", 2, 4, 8, 8, steps=2, profiled=2, options={"compile": True}),
    Job(
        "fastkl-tiny-lora",
        "fastkl",
        "tiny",
        2,
        4,
        8,
        8,
        steps=2,
        options={"lora_rank": 4, "gradient_checkpointing": True},
    ),
    Job("fastkl-tiny-one-long-group", "fastkl", "tiny", 1, 4, 8, 24, steps=2, options={"micro_batch_tokens": 40}),
    Job("trl-tiny", "trl", "tiny", 2, 4, 8, 8, steps=2, options={"per_device_train_batch_size": 4}),
]
SETUP_SECONDS = 180  # how long a contender may take to be ready
GENERATION = ("generate", "sync")
TRAINING = ("forward", "backward", "forward of the reference", "forwards without gradient")


def free_port() -> int:
    """A port that nobody listens on: contenders that stand in memory together must not share torch's default."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Contender:
    """A process that runs one job, and the lines that it has said."""

    def __init__(self, job: Job, models: Path, output: Path) -> None:
        self.job, self.output = job, output
        self.started, self.lines, self.waiting = time.perf_counter(), [], ""
        self.log = models / f"{job.name}.log"
        command = [sys.executable, "-m", "bench.training.gpu_contenders", json.dumps(asdict(job)), models, output]
        environment = common.child_environment(
            VLLM_CACHE_ROOT=models / f"cache-{job.name}", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port()
        )
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=environment, bufsize=1, start_new_session=True,
            )  # fmt: skip
        self._said: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self.process.stdout:
            self._said.put(line)
        self._said.put("")

    def go_on(self) -> None:
        """Lets the process go on that waits."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def heard(self, key: str, until: float) -> bool:
        """Listens for a line with this key; False where the process ends or is late, which ends it."""
        while (left := until - time.perf_counter()) > 0:
            try:
                line = self._said.get(timeout=left)
            except queue.Empty:
                break
            if not line:
                return False
            if line.startswith("{"):
                self.lines.append(said := json.loads(line))
                note = {"contender": self.job.name, "at_s": time.perf_counter() - self.started, **said}
                with Path(self.output, "steps.jsonl").open("a") as file:
                    file.write(json.dumps(note) + "\n")
                if key in said:
                    return True
        self.stop()
        return False

    def stop(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()

    def said(self, key: str, default: Any = None) -> Any:
        """What it said last about this."""
        return next((line[key] for line in reversed(self.lines) if key in line), default)

    def result(self) -> dict[str, Any]:
        """All that is known of it."""
        steps = [line for line in self.lines if line.get("counted")]
        start = {key: value for line in self.lines if "step" not in line for key, value in line.items()}
        found: dict[str, Any] = {"job": asdict(self.job), "start": start, "steps": steps}
        found["warm_up"] = [line for line in self.lines if line.get("counted") is False][:2]
        if not self.said("done"):
            logs = [self.log, self.log.parent / f"run-{self.job.name}" / "engine.log"]
            found["failed"] = "\n".join(log.read_text(errors="replace")[-3000:] for log in logs if log.exists())
        return found | ({"summary": summary(self.job, steps)} if steps else {})


def summary(job: Job, steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the counted steps."""
    step_s = median(step["step_s"] for step in steps)
    names = dict.fromkeys(name for step in steps for name in step["stages"])
    stages = {name: median(step["stages"].get(name, 0.0) for step in steps) for name in names}
    stages["other"] = median(step["step_s"] - sum(step["stages"].values()) for step in steps)
    main = sum(stages.get(name, 0.0) for name in ("generate", *TRAINING))
    drawn = median(step["tokens"] for step in steps)
    trained_s = step_s - sum(stages.get(name, 0.0) for name in GENERATION)
    return {
        "step_s": step_s,
        "stages_s": stages,
        "tokens_per_s": drawn / step_s,
        "outside_share": 1 - main / step_s,
        "training_s": trained_s,
        "training_flops": 8 * num_parameters(job.shape) * (drawn + job.prompts * job.prompt_tokens) / trained_s,
        "peak_gb": max((step["memory"].get("reserved_gb", 0.0) for step in steps), default=0.0),
    }


def phase(jobs: Sequence[Job], models: Path, output: Path, until: float, record: dict[str, Any]) -> None:
    """Starts all contenders, and measures one after another; writes what is known after each."""
    contenders = [Contender(job, models, output) for job in jobs]
    missing = [shape for shape in dict.fromkeys(job.shape for job in jobs) if not (models / shape).exists()]
    if missing:
        command = [sys.executable, "-m", "bench.training.gpu_models", models, *missing]
        made = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=common.child_environment())
        if made.returncode:
            sys.exit(f"no models: {made.stderr[-2000:]}")
        record.setdefault("matmul_flops", json.loads(made.stdout.splitlines()[-1])["matmul_flops"])
    ready_by = min(until, time.perf_counter() + SETUP_SECONDS)
    going = [c for c in contenders if c.heard("imported_s", ready_by)]
    for contender in going:
        contender.go_on()
    ready = [c for c in going if c.heard("ready", ready_by)]
    for contender in contenders:
        if contender in ready:
            contender.go_on()
            contender.heard("done", until)
        contender.stop()
        record["results"][contender.job.name] = result = contender.result()
        print(line(contender.job.name, result, record.get("matmul_flops")), flush=True)
        if "failed" in result:
            print(result["failed"][-1500:], file=sys.stderr, flush=True)
        common.write(output / "steps.json", record)


def line(name: str, result: dict[str, Any], peak: float | None) -> str:
    """A contender in words."""
    if "summary" not in result:
        return f"{name:24} failed"
    s = result["summary"]
    stages = ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in s["stages_s"].items())
    mfu = f", trainer MFU {s['training_flops'] / peak:.1%}" if peak else ""
    return (
        f"{name:24} {s['step_s']:.3f} s/step, {s['tokens_per_s']:.0f} tokens/s, peak {s['peak_gb']:.1f} GB{mfu}, "
        f"outside {s['outside_share']:.1%}: {stages}" + (" [not finished]" if "failed" in result else "")
    )


def table(record: dict[str, Any]) -> str:
    """The results as Markdown. Seconds per step; "other" is what lies outside of the named stages."""
    columns = ("generate", "forwards", "backward", "optimizer", "sync", "other")
    rows = [
        "| | s per step | " + " | ".join(columns) + " | tokens/s | trainer MFU | peak, GB |",
        "|---" * (len(columns) + 5) + "|",
    ]
    for name, result in record["results"].items():
        if "summary" not in result:
            continue
        s = result["summary"]
        stages = dict(s["stages_s"])
        stages["forwards"] = sum(stages.get(stage, 0.0) for stage in TRAINING if stage != "backward")
        cells = " | ".join(f"{stages.get(column, 0.0):.2f}" for column in columns)
        mfu = f"{s['training_flops'] / record['matmul_flops']:.0%}"
        rows.append(
            f"| {name} | **{s['step_s']:.2f}** | {cells} | {s['tokens_per_s']:,.0f} | {mfu} | {s['peak_gb']:.1f} |"
        )
    return "\n".join(rows)


def chosen(only: Sequence[str] | None, dry: bool, vllm: bool) -> list[list[Job]]:
    """The phases with the contenders that were asked for."""
    phases = [TINY] if dry else PHASES
    if dry:  # TRL's vLLM needs a GPU
        import torch

        phases = [[replace(job, vllm=vllm if job.trainer == "fastkl" else torch.cuda.is_available()) for job in TINY]]
    kept = [[job for job in jobs if not only or job.name in only] for jobs in phases]
    return [jobs for jobs in kept if jobs]


def main() -> None:
    """Runs the phases that the budget allows."""
    p = common.parser(__doc__)
    p.add_argument("--output", type=Path, default=common.RESULTS / "gpu")
    p.add_argument("--budget", type=float, default=400, metavar="SECONDS", help="all of it ends by then [400]")
    p.add_argument("--only", nargs="+", choices=[job.name for jobs in [*PHASES, TINY] for job in jobs])
    p.add_argument("--one-by-one", action="store_true", help="a contender starts when the one before has ended")
    p.add_argument("--dry-run", action="store_true", help="a tiny model; the numbers mean nothing")
    p.add_argument("--without-vllm", action="store_true", help="in a dry run: transformers generates")
    p.add_argument("--table", type=Path, metavar="FILE", help="only print the table of these results")
    options = p.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return
    begun = time.perf_counter()
    phases = chosen(options.only, options.dry_run, not options.without_vllm)
    if options.one_by_one:
        phases = [[job] for jobs in phases for job in jobs]
    options.output.mkdir(parents=True, exist_ok=True)
    models = Path(tempfile.mkdtemp(prefix="fastkl-"))
    record: dict[str, Any] = {"shapes": SHAPES, "results": {}}
    try:
        for number, jobs in enumerate(phases):
            if number and time.perf_counter() - begun > options.budget - 100:
                print(f"no time left for {', '.join(job.name for job in jobs)}")
                break
            phase(jobs, models, options.output, begun + options.budget, record)
    finally:
        shutil.rmtree(models, ignore_errors=True)
    if any("summary" in result for result in record["results"].values()):
        print(table(record))
    print(f"all of it took {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
