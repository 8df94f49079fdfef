"""One contender of gpu_steps.py in a process of its own.

It talks with its parent in lines: what it says on its standard output is JSON, what it hears on its standard input lets
it go on. It imports its libraries; hears a line; sets everything up, engine included; hears a line; and runs, saying
what every step took. It ends in the middle of the run, once the last step is measured, so nothing is saved.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Job:
    """What a contender does, and with what."""

    name: str
    trainer: str  # "fastkl" or "trl"
    shape: str  # of gpu_models.SHAPES
    prompts: int = 8  # B
    samples: int = 8  # K
    prompt_tokens: int = 100
    new_tokens: int = 256
    steps: int = 4  # counted
    profiled: int = 0  # steps after them that run under torch.profiler
    vllm: bool = True  # the generator; without it transformers'
    cache_gib: float = 4  # of keys and values, in vLLM: room for every sequence of a step
    options: Mapping[str, Any] = field(default_factory=dict)  # of TrainConfig or RLOOConfig

    @property
    def last_step(self) -> int:
        return WARM_UP_STEPS + self.steps + self.profiled


class Parent:
    """The line to the parent process. What libraries print goes to this process's standard error from now on."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, **what: Any) -> None:
        print(json.dumps(what), file=self._out, flush=True)

    def wait(self, **what: Any) -> None:
        """Says where it is, and waits until it may go on."""
        self.say(**what)
        if not sys.stdin.readline():
            os._exit(1)  # the parent is gone


class StepWatch:
    """Called at the end of every step: says what it took, profiles the last ones, and ends the process after them."""

    def __init__(self, job: Job, parent: Parent, folder: Path) -> None:
        from bench.training.gpu_stages import StageClock

        self.job, self.parent, self.folder = job, parent, folder
        self.clock = StageClock()
        self.step, self.profiler = 0, None
        self.last_end = 0.0

    def begin(self) -> None:
        """The first step begins now."""
        self.clock.take()
        self.last_end = time.perf_counter()

    def end(self, **extra: Any) -> None:
        """A step has ended. extra: what its trainer knows about it."""
        stages, now = self.clock.take(), time.perf_counter()
        self.step += 1
        done = self.step - WARM_UP_STEPS
        counted = 0 < done <= self.job.steps
        self.parent.say(
            step=self.step, counted=counted, step_s=now - self.last_end, stages=stages, memory=memory(), **extra
        )
        if self.step == WARM_UP_STEPS:
            forget_peak()
        if done == self.job.steps and self.job.profiled:
            self._start_profile()
        if self.step == self.job.last_step:
            self._finish()
        self.last_end = time.perf_counter()

    def _start_profile(self) -> None:
        from bench.training.gpu_profile import profiler

        self.parent.say(profiling=True)
        self.clock.profiling = True
        self.profiler = profiler()
        self.profiler.__enter__()

    def _finish(self) -> NoReturn:
        if self.profiler is not None:
            from bench.training.gpu_profile import summary

            self.profiler.__exit__(None, None, None)
            found = summary(self.profiler, self.job.profiled)
            Path(self.folder, f"profile-{self.job.name}.json").write_text(json.dumps(found, indent=1))
        self.parent.say(done=True)
        os._exit(0)


def memory() -> dict[str, float]:
    """Peaks of PyTorch's allocator since they were last forgotten, vLLM's part included, GB."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {
        "allocated_gb": torch.cuda.max_memory_allocated() / 1e9,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
    }


def forget_peak() -> None:
    """Peaks count from now on."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def sevens(completions: list[str], **_: Any) -> list[float]:
    """A reward that costs nothing to compute."""
    return [float(text.count("7")) for text in completions]


def give_fixed_cache(num_bytes: int) -> None:
    """vLLM takes so much for its cache; it does not look at how much is free, which others change meanwhile."""
    import vllm

    original = vllm.LLM.__init__

    def with_cache(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **({"kv_cache_memory_bytes": num_bytes} | kwargs))

    vllm.LLM.__init__ = with_cache


def run_fastkl(job: Job, model: Path, prompts: list[str], watch: StepWatch, parent: Parent) -> None:
    """fastkl's own loop, as `fastkl train` runs it."""
    import torch
    from transformers import AutoTokenizer

    from fastkl import TrainConfig
    from fastkl.training import loop
    from fastkl.training.given import taken
    from fastkl.training.setup import set_up

    class Callback:
        def on_step_end(self, metrics: Mapping[str, Any], samples: Any) -> None:
            own = {key: value for key, value in metrics.items() if key.startswith(("time/", "mismatch/mean", "kl/ex"))}
            watch.end(tokens=int(metrics["completion/mean_length"] * job.prompts * job.samples), own=own)

    settings = {
        "model": str(model),
        "reward": (f"{__file__}:sevens",),
        "kl_coef": 0.05,
        "lr": 1e-6,
        "warmup_steps": 0,
        "lr_decay": "constant",
        "steps": job.last_step + 1,
        "prompts_per_step": job.prompts,
        "num_samples": job.samples,
        "max_new_tokens": job.new_tokens,
        "generator": "vllm" if job.vllm else "transformers",
        "save_every": 0,
        "sample_every": 0,
        "report_to": (),
        "gpu_memory_utilization": 0.05,
        "output": str(model.parent / f"run-{job.name}"),
    }
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = None  # no completion ends before it is as long as all others
    config, given = taken(TrainConfig(**(settings | job.options)), None, prompts, None, tokenizer)
    run = set_up(config, callbacks=[Callback()], given=given)
    clock = watch.clock
    clock.wrap(run.generator, "generate", "generate")
    clock.wrap(run.generator, "sync", "sync")
    clock.wrap(run.reference, "hidden", "forward of the reference")
    clock.wrap(run.policy, "forward", "forward")
    clock.wrap(torch.Tensor, "backward", "backward")
    clock.wrap(loop, "clip_gradients", "optimizer")
    clock.wrap(run.optimizer, "step", "optimizer")
    parent.wait(ready=True, memory=memory(), micro_batch_tokens=run.limits.micro_batch_tokens,
                layout=run.policy.layout)  # fmt: skip
    watch.begin()
    loop.run_steps(run)


def run_trl(job: Job, model: Path, prompts: list[str], watch: StepWatch, parent: Parent) -> None:
    """TRL's RLOOTrainer."""
    import torch
    from transformers import AutoTokenizer, TrainerCallback

    from bench.common import trl_run

    class Callback(TrainerCallback):
        def on_train_begin(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
            watch.clock.wrap(optimizer, "step", "optimizer")
            parent.wait(ready=True, memory=memory())
            watch.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            lengths = trainer._metrics["train"]["completions/mean_length"]
            watch.end(tokens=int(lengths[-1] * job.prompts * job.samples))

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = "x300"
    engine = (
        {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_gpu_memory_utilization": 0.05,
            "vllm_max_model_length": job.prompt_tokens + job.new_tokens,
            "generation_kwargs": {"ignore_eos": True},
        }
        if job.vllm
        else {"generation_kwargs": {"min_new_tokens": job.new_tokens}}
    )
    settings = dict(
        output_dir=str(model.parent / f"run-{job.name}"), per_device_train_batch_size=job.prompts * job.samples,
        num_generations=job.samples, max_completion_length=job.new_tokens, learning_rate=1e-6, temperature=1.0,
        lr_scheduler_type="constant", bf16=True, **engine,
    )  # fmt: skip
    settings |= job.options
    batch = settings["per_device_train_batch_size"]
    settings["gradient_accumulation_steps"] = job.prompts * job.samples // batch
    rows = (prompts * job.last_step)[: job.prompts * (job.last_step + 1)]
    trainer, _ = trl_run(model, rows, sevens, job.last_step, tokenizer=tokenizer, callbacks=[Callback()], **settings)
    clock, generation = watch.clock, getattr(trainer, "vllm_generation", None)
    if generation is not None:
        clock.wrap(generation, "generate", "generate")
        clock.wrap(generation, "sync_weights", "sync")
    else:
        clock.wrap(trainer, "_generate_single_turn", "generate")

    def forward() -> str:
        return "forward" if torch.is_grad_enabled() else "forwards without gradient"

    clock.wrap(trainer, "_get_per_token_logps_and_entropies", forward)
    clock.wrap(trainer.accelerator, "backward", "backward")
    clock.wrap(trainer.accelerator, "clip_grad_norm_", "optimizer")
    trainer.train()


TRAINERS = {"fastkl": run_fastkl, "trl": run_trl}


def main() -> None:
    """JOB as JSON, the folder with the models, the folder for profiles."""
    from bench.training.gpu_models import prompts_of

    job, models, output = Job(**json.loads(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3])
    parent, start = Parent(), time.perf_counter()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    import transformers  # noqa: F401

    import fastkl.training.setup  # noqa: F401

    if job.trainer == "trl":
        from trl import RLOOTrainer  # noqa: F401
    if job.vllm:
        give_fixed_cache(int(job.cache_gib * 2**30))
    parent.wait(imported_s=time.perf_counter() - start)
    prompts = prompts_of(4 * job.prompts, job.prompt_tokens)
    watch = StepWatch(job, parent, output)
    TRAINERS[job.trainer](job, models / job.shape, prompts, watch, parent)


if __name__ == "__main__":
    main()
