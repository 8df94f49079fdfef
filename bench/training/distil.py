"""On-policy distillation: a student of half the storyteller's width, from random weights, by exact and sampled KLs.

    python bench/training/distil.py --seeds 0 1 2       writes bench/results/cpu/distil.json, after every run
    python bench/training/distil.py --only "exact, loss" "forward, loss" "jsd, loss"

Every run is `fastkl train --reference storyteller --reward none --kl-coef 1` on the student's own completions of one
prompt. The seed is that of the student's weights, too. Measured every EVERY steps: the student's loss on stories of the
grammar that nobody trained on, and the exact KL to the teacher on the student's own completions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bench.common import RESULTS, parser, read_lines, run_alone, write
from fastkl.config.settings import TrainConfig
from fastkl.storyteller import model_path
from fastkl.storyteller.grammar import story
from fastkl.training.loop import train

KLS: dict[str, dict[str, Any]] = {
    "exact, loss": {"kl_estimator": "exact", "kl_placement": "loss"},
    "forward, loss": {"kl_estimator": "exact", "kl_placement": "loss", "kl_direction": "forward"},
    "jsd, loss": {"kl_estimator": "exact", "kl_placement": "loss", "kl_direction": "jsd"},
    "k1, reward": {"kl_estimator": "k1", "kl_placement": "reward"},
}
LR = 5e-3
EVERY, HELD_OUT = 10, range(10**6, 10**6 + 60)  # seeds of stories beyond those of the training data


def make_student(folder: Path, seed: int) -> int:
    """Saves a storyteller of half the width with random weights; returns the number of its parameters."""
    config = AutoConfig.from_pretrained(model_path())
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(config, name, getattr(config, name) // 2)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(folder)
    return model.num_parameters()


def one_run(name: str, seed: int, steps: int) -> dict[str, Any]:
    """The measurements of one run, by step."""
    with tempfile.TemporaryDirectory() as place:
        folder, text = Path(place), Path(place, "stories.txt")
        text.write_text("\n".join(story(i) for i in HELD_OUT))
        parameters, start = make_student(folder / "student", seed), time.perf_counter()
        train(
            TrainConfig(
                model=str(folder / "student"),
                reference="storyteller",
                reward=("none",),
                kl_coef=1.0,
                seed=seed,
                steps=steps,
                lr=LR,
                lr_decay="cosine",
                prompts_per_step=8,
                num_samples=4,
                max_new_tokens=48,
                generator="transformers",
                dtype="float32",
                report_to=(),
                save_every=0,
                sample_every=0,
                eval_text=str(text),
                eval_every=EVERY,
                output=str(folder / "run"),
                **KLS[name],
            )  # fmt: skip
        )
        seconds, rows = time.perf_counter() - start, read_lines(folder / "run" / "metrics.jsonl")
    held = {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}
    per_token = {row["step"]: row["kl/exact"] / row["completion/mean_length"] for row in rows if "kl/exact" in row}
    return {"held_out_nats": held, "kl_per_token": per_token, "seconds": seconds, "parameters": parameters}


def summary(runs: list[dict[str, Any]], key: str, step: str) -> list[float]:
    """Mean over seeds, and its standard error."""
    values = [run[key][step] for run in runs if step in run[key]]
    return [statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0]


def table_of(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Mean and standard error over the seeds that are finished, of every contender that has one."""
    return {
        name: {
            key: {step: summary(runs, key, step) for step in runs[0][key] if int(step) % EVERY == 0 or int(step) == 1}
            for key in ("held_out_nats", "kl_per_token")
        }
        | {"seconds": statistics.fmean(run["seconds"] for run in runs), "num_seeds": len(runs)}
        for name, runs in found.items()
    }


def main(options: argparse.Namespace) -> None:
    """All runs, one after the other, each in a process of its own; every seed of all contenders before the next."""
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in options.seeds:
        for name in options.only or KLS:
            found.setdefault(name, []).append(run_alone(one_run, name, seed, options.steps))
            table = table_of(found)
            write(options.output, {"seeds": options.seeds, "steps": options.steps, "runs": table, "note": options.note})
            print(f"{name}, seed {seed}: {json.dumps(table[name])}", flush=True)


if __name__ == "__main__":
    made = parser(__doc__ or "", "cpu/distil.json")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--steps", type=int, default=40)
    made.add_argument("--only", nargs="+", choices=KLS, metavar="CONTENDER", help="some of the contenders")
    made.add_argument("--note", default="", help="what else ran on the machine")
    assert RESULTS.is_dir()
    main(made.parse_args())
