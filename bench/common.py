"""What the benches share: options, results files, contenders in processes of their own, and small models to train."""

from __future__ import annotations

import argparse
import ctypes
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastkl.microbench.measure import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
WARM_UP_STEPS = 2  # of a training run, not counted
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def parser(description: str, output: str | None = None) -> argparse.ArgumentParser:
    """A parser that shows the script's docstring; `output` names its results file."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if output:
        made.add_argument("--output", type=Path, default=RESULTS / output, help=f"[bench/results/{output}]")
    return made


def write(output: Path, record: Mapping[str, Any]) -> None:
    """A results file: the machine, then the record."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"machine": machine(), **record}, indent=1, ensure_ascii=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_alone(function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None) -> Any:
    """function(*arguments) in a fresh Python process; arguments and result travel as JSON, so paths do as text.

    function: a module's, below bench/. environment: variables that the process sees from its start.
    """
    module = ".".join(Path(inspect.getfile(function)).resolve().relative_to(ROOT).with_suffix("").parts)
    done = subprocess.run(
        [sys.executable, "-m", "bench.common", module, function.__name__, json.dumps(arguments, default=str)],
        env=child_environment(**(environment or {})),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{function.__name__}{arguments} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def child_environment(**more: Any) -> dict[str, str]:
    """The environment of a Python process that imports fastkl and bench from here; more: its other variables."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    added = {name: str(value) for name, value in more.items()}
    return {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path, **added}


def take_turns(
    names: Sequence[str], rounds: int, measure: Callable[[str], Any], line: Callable[[str, list[Any]], str],
    output: Path, job: Mapping[str, Any],
) -> None:  # fmt: skip
    """Measures the contenders in turn, `rounds` times; prints and writes what is known after each."""
    results: dict[str, list[Any]] = {}
    for name in [*names] * rounds:
        results.setdefault(name, []).append(measure(name))
        print(line(name, results[name]), flush=True)
        write(output, {"job": job, "results": results})


def seconds_of(call: Callable[[], Any]) -> float:
    """Wall seconds of one call, for contenders that take turns."""
    import torch

    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Peak:
    """The most memory that this process holds from now on, beyond what it holds now. Linux with glibc.

    Freed memory goes back to the system at once from here on, so that the peak is of what lives.
    """

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            libc.mallopt(option, 1 << 20)
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        self.before = status_bytes("VmRSS")

    def bytes(self) -> float:
        """What the peak is above the start."""
        return status_bytes("VmHWM") - self.before


def status_bytes(name: str) -> float:
    """A size of this process as Linux reports it, such as VmHWM."""
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024.0 * float(found[1])


class Steps:
    """A callback of fastkl's training loop: when each step ended, and what it reported."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.metrics: list[Mapping[str, Any]] = []
        self.samples: list[Sequence[Mapping[str, Any]]] = []

    def on_step_end(self, metrics: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
        self.ends.append(time.perf_counter())
        self.metrics.append(metrics)
        self.samples.append(samples)


def step_seconds(ends: list[float]) -> list[float]:
    """Seconds between the ends of a training run's steps, warm-up left out."""
    return [b - a for a, b in zip(ends, ends[1:], strict=False)][WARM_UP_STEPS - 1 :]


def make_llama(folder: Path, tokenizer: Any, **sizes: Any) -> None:
    """A randomly initialised Llama with tied embeddings, and its tokenizer, in `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    defaults = {"vocab_size": len(tokenizer), "max_position_embeddings": 512, "tie_word_embeddings": True, **special}
    LlamaForCausalLM(LlamaConfig(**(defaults | sizes))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def trl_run(
    model: Path, prompts: list[Any], reward: Callable[..., list[float]], steps: int, trainer: type | None = None,
    columns: Mapping[str, list[Any]] | None = None, callbacks: Sequence[Any] = (), tokenizer: Any = None,
    **options: Any,
) -> tuple[Any, list[float]]:  # fmt: skip
    """TRL's RLOOTrainer, ready to train, and the list into which it will write when each step has ended.

    trainer: a subclass of it. columns: of the data set, beside the prompts. callbacks: of transformers' Trainer.
    tokenizer: in the place of the folder's. options: of RLOOConfig.
    """
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    defaults = {
        "max_steps": steps + WARM_UP_STEPS,
        "beta": 0.05,
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "report_to": [],
        "logging_strategy": "no",
        "disable_tqdm": True,
        "model_init_kwargs": {"dtype": "float32"},
    }
    data = Dataset.from_dict({"prompt": prompts, **(columns or {})})
    made = (trainer or RLOOTrainer)(
        model=str(model), reward_funcs=reward, args=RLOOConfig(**(defaults | options)), train_dataset=data,
        callbacks=[Clock(), *callbacks], processing_class=tokenizer,
    )  # fmt: skip
    return made, ends


if __name__ == "__main__":
    module, name, arguments = sys.argv[1:]
    print("\n" + json.dumps(getattr(importlib.import_module(module), name)(*json.loads(arguments))))
