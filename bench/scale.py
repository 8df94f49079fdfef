"""Tokens per second and the parts of a step, for every process of any launch:

    python -m bench.scale                                             one process
    torchrun --nproc-per-node 8 -m bench.scale --model ID --steps 8   eight, each with its GPU

Trains on the prompt of the main job, or on --prompts, with a reward that costs nothing, and leaves its run in a folder
that is deleted. The first two steps do not count. A process that waits for the others waits within the stage that it
waits in; what all processes generate together is counted once, over the time of the step.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bench.common import WARM_UP_STEPS, parser, write
from fastkl import TrainConfig, train
from fastkl.distributed.start import launched
from fastkl.distributed.world import World
from fastkl.report.metrics import STAGES


class Times:
    """A callback that keeps the steps' lines in every process."""

    every_process = True

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_step_end(self, metrics: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        self.steps.append(dict(metrics))


def no_reward(completions: list[str], **columns: Any) -> list[float]:
    """Numbers that differ, so that there is something to learn."""
    return [float(len(text) % 7) for text in completions]


def of_process(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the steps that count."""
    counted = steps[WARM_UP_STEPS:] or steps
    keys = [f"time/{stage}_s" for stage in STAGES] + ["time/step_s", "throughput/tokens_per_second"]
    return {key: median(step[key] for step in counted) for key in keys}


def table(rows: list[dict[str, float]]) -> str:
    """One line per process."""
    heads = ["process", *STAGES, "step", "tokens/s"]
    lines = ["  ".join(f"{head:>9}" for head in heads)]
    for rank, row in enumerate(rows):
        cells = [f"{value:9.3f}" for value in row.values()]
        lines.append("  ".join([f"{rank:>9}", *cells]))
    return "\n".join([*lines, "seconds per step; tokens/s are those of all processes together"])


def run(world: World, options: Any, folder: str) -> list[dict[str, float]]:
    """Trains; the medians of every process."""
    times = Times()
    config = TrainConfig(
        model=options.model,
        prompts=options.prompts,
        output=world.once(lambda: str(Path(folder) / "run")),
        steps=options.steps,
        prompts_per_step=options.prompts_per_step,
        num_samples=options.num_samples,
        max_new_tokens=options.max_new_tokens,
        generator=options.generator,
        save_every=0,
        report_to=(),
        sample_every=0,
    )
    train(config, reward=no_reward, callbacks=[times])
    return world.everybodys(of_process(times.steps))


def main(argv: list[str] | None = None) -> int:
    made = parser(__doc__ or "")
    made.add_argument("--model", default="storyteller")
    made.add_argument("--prompts", default="Once upon a time")
    made.add_argument("--generator", default="auto")
    made.add_argument("--steps", type=int, default=6)
    made.add_argument("--prompts-per-step", type=int, default=8)
    made.add_argument("--num-samples", type=int, default=16)
    made.add_argument("--max-new-tokens", type=int, default=128)
    made.add_argument("--output", type=Path, help="a results file, JSON")
    options = made.parse_args(argv)
    world = launched()
    with tempfile.TemporaryDirectory() as folder:
        rows = run(world, options, folder)
        world.everybodys(None)
    if world.is_first:
        print(table(rows))
        if options.output:
            settings = {name: str(value) for name, value in vars(options).items()}
            write(options.output, {"settings": settings, "processes": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
