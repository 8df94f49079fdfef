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
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from bench.common import Steps, parser, write
from fastkl.config.settings import TrainConfig
from fastkl.rollout.requests import Request
from fastkl.training.loop import run_steps
from fastkl.training.setup import set_up
from fastkl.training.state import Run
from fastkl.types import Completion

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


class InTurn:
    """The run's generator, whose sampling, and with it the scorer's, changes from step to step."""

    def __init__(self, run: Run) -> None:
        self.run, self.generator, self.whole, self.step = run, run.generator, run.objective.sampling, 0

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.step += 1
        name, scorer = case_of(self.step)
        drawn = self.generator.sampling = dataclasses.replace(self.whole, **DRAWS[name])
        scored = self.whole if scorer == "blind" else drawn
        self.run.objective = dataclasses.replace(self.run.objective, sampling=scored)
        return self.generator.generate(requests)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.generator, name)


def run_in_turn(config: TrainConfig) -> list[Mapping[str, Any]]:
    """The run; returns its metrics, one mapping per step."""
    steps = Steps()
    run = set_up(config, callbacks=[steps])
    run.generator = InTurn(run)
    run.limits = dataclasses.replace(
        run.limits, agreement_nats=math.inf
    )  # it would stop the blind steps, and rightly so
    run_steps(run)
    return steps.metrics


def costs(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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
