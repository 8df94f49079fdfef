"""What a support costs: training steps with and without truncated sampling, taken in turn inside one run.

    python bench/training/support_cost.py [--rounds 6]        writes bench/results/support_cost.json

One run of the default job (`fastkl train`, lr 1e-6 so that all steps see one model). Its steps go round the cases
below: "plain" draws from all ids; the others draw from a support. Each of those is taken twice a round: "aware", as
fastkl does it (policy and reference scored on the support and on all ids), and "blind", the same draws scored on all
ids alone, so that the difference is the price of being right and not the engine's price for drawing so. Medians over
rounds, the first round left out; ratios are taken within a round.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from bench.common import parser, read_lines, write
from fastkl.config.settings import TrainConfig
from fastkl.rollout import agreement
from fastkl.sampling.params import Sampling
from fastkl.sampling.replay import support_of
from fastkl.training import loop
from fastkl.training.state import Run

DRAWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top_k 20, min_tokens 32": {"top_k": 20, "min_tokens": 32},
    "top_p 0.95": {"top_p": 0.95},
    "min_p 0.05": {"min_p": 0.05},
}
CASES = [("plain", "aware"), *((name, scorer) for name in DRAWS if name != "plain" for scorer in ("aware", "blind"))]
STAGES = ("time/step_s", "time/generate_s", "time/score_s", "time/update_s")


def case_of(step: int) -> tuple[str, str]:
    """(draws, scorer) of a step; steps count from 1."""
    return CASES[(step - 1) % len(CASES)]


def run_in_turn(config: TrainConfig) -> list[dict[str, Any]]:
    """The run; returns its metrics, one dict per step."""
    set_up = loop.set_up
    scorer = ""

    def set_up_in_turn(config: TrainConfig) -> Run:
        """A run whose generator changes its sampling, and the trainer's, from step to step."""
        run = set_up(config)
        whole, generate = run.sampling, run.generator.generate

        def generate_in_turn(*args: Any, step: int, **options: Any) -> Any:
            nonlocal scorer
            name, scorer = case_of(step)
            run.sampling = run.generator.sampling = dataclasses.replace(whole, **DRAWS[name])
            return generate(*args, step=step, **options)

        run.generator.generate = generate_in_turn
        return run

    def support_in_turn(sampling: Sampling, *args: Any) -> Any:
        return None if scorer == "blind" else support_of(sampling, *args)

    with (
        mock.patch.object(loop, "set_up", set_up_in_turn),
        mock.patch.object(loop, "support_of", support_in_turn),
        mock.patch.object(
            agreement, "check_agreement", lambda *_: None
        ),  # it would stop the blind steps, and rightly so
    ):
        loop.train(config)
    return read_lines(Path(config.output, "metrics.jsonl"))


def costs(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median seconds of every case's stages, and of a whole step's difference to its blind twin and to plain."""
    rounds = [rows[i : i + len(CASES)] for i in range(len(CASES), len(rows), len(CASES))]
    found: dict[str, Any] = {}
    for i, (name, scorer) in enumerate(CASES):
        found[f"{name}, {scorer}"] = {key: statistics.median(r[i][key] for r in rounds) for key in STAGES}
    for i, (name, scorer) in enumerate(CASES):
        if scorer == "aware" and name != "plain":
            for other, j in (("blind", i + 1), ("plain", 0)):
                ratios = sorted(r[i]["time/step_s"] / r[j]["time/step_s"] for r in rounds)
                found[f"{name}, aware"][f"step / {other}"] = statistics.median(ratios)
                found[f"{name}, aware"][f"step / {other}, range"] = [ratios[0], ratios[-1]]
    return found


def main() -> None:
    p = parser(__doc__, "support_cost.json")
    p.add_argument("--rounds", type=int, default=6, help="counted rounds; one more warms up")
    p.add_argument("--generator", default="auto")
    p.add_argument("--prompts-per-step", type=int, default=8)
    options = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            lr=1e-6, warmup_steps=0, lr_decay="constant", steps=(options.rounds + 1) * len(CASES), save_every=0,
            sample_every=0, report_to=(), output=f"{folder}/run", generator=options.generator,
            prompts_per_step=options.prompts_per_step,
        )  # fmt: skip
        found = costs(run_in_turn(config))
    for name, values in found.items():
        print(
            f"{name:32}", ", ".join(f"{k.removeprefix('time/')} {v:.3g}" for k, v in values.items() if "range" not in k)
        )
    job = {"prompts_per_step": options.prompts_per_step, "num_samples": config.num_samples, "rounds": options.rounds}
    write(options.output, {"job": job, "cases": found})


if __name__ == "__main__":
    main()
