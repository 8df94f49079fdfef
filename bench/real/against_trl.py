"""SmolLM2-135M-Instruct learns to add, with fastkl and with TRL's RLOOTrainer: seconds per step and reward per step.

    python bench/real/model.py MODEL
    python bench/real/against_trl.py MODEL [--steps 4] [--rounds 3]         seconds per step, in turn
    python bench/real/against_trl.py MODEL --steps 25 --rounds 1 --seeds 0 1 2      reward curves

Both get the same model (float32 weights; bfloat16 products where the processor is fast at them), prompts, reward, 6
prompts x 8 samples x 24 new tokens, learning rate, KL coefficient and clipping. Every run is a process of its own, one
after another. The time of a step is the wall time between the ends of two steps, logging included; the first two steps
do not count. TRL generates with transformers, since its vLLM mode needs a GPU. Writes
bench/results/real_against_trl.json as it goes.
"""

from __future__ import annotations

import importlib.metadata
import resource
import statistics
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from bench import common
from bench.real import task

B, K, T = 6, 8, 24
LR, BETA = 2e-5, 0.05
NUM_QUESTIONS = 2000


def peak_gib() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def in_bfloat16() -> bool:
    """Whether products are in bfloat16, as fastkl decides by itself."""
    from fastkl.scoring.models import bfloat16_is_fast

    return bfloat16_is_fast(torch.device("cpu"))


def fastkl_run(model: str, steps: int, seed: int) -> dict[str, Any]:
    """`fastkl train`."""
    from fastkl import TrainConfig, train

    seen = common.Steps()
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "questions.jsonl"
        task.write_questions(prompts, NUM_QUESTIONS, seed=1)
        train(
            TrainConfig(
                model=model, prompts=str(prompts), reward=(f"{task.__file__}:right",), kl_coef=BETA, lr=LR,
                warmup_steps=0, lr_decay="constant", steps=steps + common.WARM_UP_STEPS, prompts_per_step=B,
                num_samples=K, max_new_tokens=T, dtype="auto", seed=seed, save_every=0, sample_every=0,
                report_to=(), output=f"{folder}/run",
            ),
            callbacks=[seen],
        )  # fmt: skip
    stages = {key: [row[key] for row in seen.metrics] for key in seen.metrics[0] if key.startswith("time/")}
    rewards = [row["reward/raw"] for row in seen.metrics]
    return {"step_s": common.step_seconds(seen.ends), "rewards": rewards, "peak_gib": peak_gib(), "stages": stages}


def trl_run(model: str, steps: int, seed: int) -> dict[str, Any]:
    """TRL's RLOOTrainer, all 48 sequences at a time."""
    rewards: list[float] = []

    def logged(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
        values = task.right(completions, answer, **columns)
        rewards.append(fmean(values))
        return values

    rows = task.questions(NUM_QUESTIONS, seed=1)
    prompts, answers = ([row[name] for row in rows] for name in ("prompt", "answer"))
    with tempfile.TemporaryDirectory() as folder:
        trainer, ends = common.trl_run(
            Path(model), prompts, logged, steps, columns={"answer": answers},
            output_dir=folder, per_device_train_batch_size=B * K, num_generations=K, max_completion_length=T,
            learning_rate=LR, lr_scheduler_type="constant", temperature=1.0, bf16=in_bfloat16(), seed=seed,
        )  # fmt: skip
        trainer.train()
    return {"step_s": common.step_seconds(ends), "rewards": rewards, "peak_gib": peak_gib()}


CONTENDERS = {"fastkl": fastkl_run, "trl": trl_run}


def main() -> None:
    p = common.parser(__doc__, "real_against_trl.json")
    p.add_argument("model", type=Path)
    p.add_argument("--steps", type=int, default=4, help="counted steps of a run")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--only", nargs="+", choices=tuple(CONTENDERS), default=tuple(CONTENDERS))
    given = p.parse_args()
    job = {
        "prompts": B, "samples": K, "new_tokens": T, "lr": LR, "kl_coef": BETA, "task": {"chain_sum": task.TASK},
        "trl": importlib.metadata.version("trl"), "seeds": given.seeds, "bfloat16": in_bfloat16(),
    }  # fmt: skip
    seeds = iter([seed for _ in range(given.rounds) for seed in given.seeds for _ in given.only])
    common.take_turns(
        given.only,
        given.rounds * len(given.seeds),
        lambda name: common.run_alone(CONTENDERS[name], str(given.model), given.steps, next(seeds)),
        lambda name, runs: (
            f"{name:7} {statistics.median(s for run in runs for s in run['step_s']):6.2f} s per step, "
            f"{max(run['peak_gib'] for run in runs):.1f} GiB, rewards {[round(r, 2) for r in runs[-1]['rewards']]}"
        ),
        given.output,
        job,
    )


if __name__ == "__main__":
    main()
