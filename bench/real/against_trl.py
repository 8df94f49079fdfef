"""SmolLM2-135M-Instruct learns to add, with fastkl and with TRL's RLOOTrainer: seconds per step and reward per step.

    python bench/real/model.py MODEL
    python bench/real/against_trl.py MODEL [--seeds 0 1 2] [--task sums] [--new-tokens 16]
    python bench/real/against_trl.py --picture     draws docs/against_trl.png from the file; needs Chromium

Both get the same model (float32 weights; bfloat16 products where the processor is fast at them), questions in the same
order, reward, 6 prompts x 8 samples, learning rate, KL coefficient and clipping. Every run is a process of its own,
fastkl and TRL in turn, and each seed gives one of both. The time of a step is the wall time between the ends of two
steps, logging included; the first two steps do not count. TRL generates with transformers, since its vLLM mode needs a
GPU. Writes bench/results/cpu/real_against_trl.json as it goes.
"""

from __future__ import annotations

import importlib.metadata
import json
import resource
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from bench import common
from bench.real import task

B, K = 6, 8
LR, BETA = 3e-5, 0.05
NUM_QUESTIONS = 2000


def peak_gib() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def in_bfloat16() -> bool:
    """Whether products are in bfloat16, as fastkl decides by itself."""
    from fastkl.scoring.models import bfloat16_is_fast

    return bfloat16_is_fast(torch.device("cpu"))


def in_order(chosen: str, seed: int) -> list[dict[str, Any]]:
    """The questions in the order in which both take them: that in which TRL's own sampler would, with this seed. Some
    steps have harder questions than others, and few steps would not average that out."""
    rows = task.questions(chosen, NUM_QUESTIONS, seed=1)
    return [rows[at] for at in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()]


def fastkl_run(model: str, chosen: str, new_tokens: int, steps: int, seed: int) -> dict[str, Any]:
    """`fastkl train`."""
    from fastkl import TrainConfig, train

    seen = common.Steps()
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "questions.jsonl"
        prompts.write_text("".join(json.dumps(row) + "\n" for row in in_order(chosen, seed)))
        train(
            TrainConfig(
                model=model, prompts=str(prompts), shuffle=False, reward=(f"{task.__file__}:right",), kl_coef=BETA,
                lr=LR, warmup_steps=0, lr_decay="constant", steps=steps + common.WARM_UP_STEPS,
                prompts_per_step=B, num_samples=K, max_new_tokens=new_tokens, dtype="auto", seed=seed,
                save_every=0, sample_every=0, report_to=(), output=f"{folder}/run",
            ),
            callbacks=[seen],
        )  # fmt: skip
    stages = {key: [row[key] for row in seen.metrics] for key in seen.metrics[0] if key.startswith("time/")}
    rewards, lengths = ([row[key] for row in seen.metrics] for key in ("reward/raw", "completion/mean_length"))
    return {
        "step_s": common.step_seconds(seen.ends), "rewards": rewards, "lengths": lengths, "peak_gib": peak_gib(),
        "stages": stages,
    }  # fmt: skip


def trl_run(model: str, chosen: str, new_tokens: int, steps: int, seed: int) -> dict[str, Any]:
    """TRL's RLOOTrainer, all 48 sequences at a time."""
    rewards: list[float] = []

    def logged(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
        values = task.right(completions, answer, **columns)
        rewards.append(fmean(values))
        return values

    rows = in_order(chosen, seed)
    prompts, answers = ([row[name] for row in rows] for name in ("prompt", "answer"))
    with tempfile.TemporaryDirectory() as folder:
        trainer, ends = common.trl_run(
            Path(model), prompts, logged, steps, columns={"answer": answers},
            output_dir=folder, per_device_train_batch_size=B * K, num_generations=K, max_completion_length=new_tokens,
            learning_rate=LR, lr_scheduler_type="constant", temperature=1.0, bf16=in_bfloat16(), seed=seed,
            shuffle_dataset=False,
        )  # fmt: skip
        trainer.train()
    return {"step_s": common.step_seconds(ends), "rewards": rewards, "peak_gib": peak_gib()}


CONTENDERS = {"fastkl": fastkl_run, "trl": trl_run}


def curve(runs: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """The mean reward of each step over the runs, and its standard error over them."""
    by_step = list(zip(*(run["rewards"] for run in runs), strict=True))
    return [fmean(step) for step in by_step], [statistics.stdev(step) / len(step) ** 0.5 for step in by_step]


def apart(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> list[float]:
    """How far the two curves are apart at each step, in standard errors of their difference.

    The errors of single steps come from few runs and are themselves uncertain, so that one error holds for all steps:
    the root of the mean of their squares.
    """
    (mean, error), (mean2, error2) = curve(ours), curve(theirs)
    whole = fmean(a * a + b * b for a, b in zip(error, error2, strict=True)) ** 0.5
    return [(a - b) / whole for a, b in zip(mean, mean2, strict=True)]


def picture(found: dict[str, Any], output: Path) -> None:
    """Both curves with bands of one standard error, as a PNG."""
    from bench.training.pictures import screenshot
    from fastkl.report.charts import line_chart
    from fastkl.report.svg import Series

    series = []
    for number, (name, label) in enumerate({"fastkl": "fastkl", "trl": "TRL's RLOOTrainer"}.items()):
        mean, error = curve(found["results"][name])
        series.append(Series(label, list(range(1, len(mean) + 1)), mean, number, spread=error))
    chart = line_chart(
        series, title="reward by step", y_label="answers that are right", share=True, width=860, height=380
    )
    screenshot(f"<figure>{chart}</figure>", output, height=430)


def main() -> None:
    p = common.parser(__doc__, "cpu/real_against_trl.json")
    p.add_argument("model", type=Path, nargs="?")
    p.add_argument("--task", choices=tuple(task.TASKS), default="sums")
    p.add_argument("--new-tokens", type=int, default=16)
    p.add_argument("--steps", type=int, default=6, help="counted steps of a run")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--only", nargs="+", choices=tuple(CONTENDERS), default=tuple(CONTENDERS))
    p.add_argument("--picture", action="store_true")
    given = p.parse_args()
    if given.picture:
        found = json.loads(given.output.read_text())
        print("apart, in standard errors:", [round(z, 1) for z in apart(*found["results"].values())])
        return picture(found, common.ROOT / "docs" / "against_trl.png")
    if given.model is None:
        p.error("name the folder of the model")
    job = {
        "prompts": B, "samples": K, "new_tokens": given.new_tokens, "lr": LR, "kl_coef": BETA,
        "task": task.TASKS[given.task], "trl": importlib.metadata.version("trl"), "seeds": given.seeds,
        "bfloat16": in_bfloat16(),
    }  # fmt: skip
    seeds = iter([seed for seed in given.seeds for _ in given.only])
    common.take_turns(
        given.only,
        len(given.seeds),
        lambda name: common.run_alone(
            CONTENDERS[name], str(given.model), given.task, given.new_tokens, given.steps, next(seeds)
        ),
        lambda name, runs: (
            f"{name:7} {statistics.median(s for run in runs for s in run['step_s']):6.2f} s per step, "
            f"{max(run['peak_gib'] for run in runs):.1f} GiB, rewards {[round(r, 2) for r in runs[-1]['rewards']]}"
        ),
        given.output,
        job,
    )


if __name__ == "__main__":
    main()
