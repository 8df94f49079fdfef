"""A training step where a group's prompt is computed once, and where each of its samples has its own: time and memory.

    python bench/training/prompts_once.py [--rounds 3]
    python bench/training/prompts_once.py --model MODEL     # a model of yours: 47-token and 478-token prompts

Policy and reference are a random Llama with 6 of the 30 layers of SmolLM2-135M in float32, with the embedded
tokenizer's vocabulary; one prompt, 16 samples of 32 tokens, prompts of 8 to 512 tokens. Measured is update(): both
forwards, the backward and AdamW, in one micro-batch. Each measurement is a process of its own, with the better of two
updates after one that is not counted; a last one shows the peak over weights and moments, gradients included.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.common import Peak, make_llama, parser, run_alone, seconds_of, take_turns

CASES = {f"{ratio:g} x": (1, round(32 * ratio), 16, 32) for ratio in (0.25, 1, 4, 16)}
"""By the ratio of prompt to completion: prompts, tokens of each, samples of each, tokens of each."""
CASES_OF_A_MODEL = {"47 tokens": (6, 47, 8, 14), "478 tokens": (1, 478, 16, 14)}
LAYOUTS = ("packed", "shared")
SHAPE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 1024,
}  # fmt: skip


def measured(
    layout: str, folder: str, prompts: int, prompt_tokens: int, samples: int, new_tokens: int
) -> dict[str, float]:
    """Seconds and bytes of an update. layout: one of LAYOUTS."""
    import torch

    from fastkl.config.settings import TrainConfig
    from fastkl.sampling.params import Sampling
    from fastkl.scoring.backbone import register_packed_attention
    from fastkl.scoring.models import load_model
    from fastkl.scoring.scored_model import ScoredModel
    from fastkl.training.loop import update
    from fastkl.training.setup import objective_of
    from fastkl.training.state import StepLimits
    from fastkl.training.stopwatch import Stopwatch
    from fastkl.types import Completion, Prompt, RolloutBatch

    cpu, numbers = torch.device("cpu"), torch.Generator().manual_seed(0)
    register_packed_attention()
    policy, reference = (ScoredModel(load_model(folder, cpu), layout) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    objective = objective_of(TrainConfig(num_samples=samples), Sampling(1.0, new_tokens))

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, 250, (count,), generator=numbers).tolist())

    batch = RolloutBatch(
        tuple(Prompt(ids(prompt_tokens), "", "", row) for row in range(prompts)),
        tuple(
            tuple(Completion(ids(new_tokens), (0.0,) * new_tokens, "length", "") for _ in range(samples))
            for _ in range(prompts)
        ),
        torch.randn(prompts, samples, generator=numbers), torch.ones(prompts, samples, dtype=torch.bool), 0,
    )  # fmt: skip
    limits = StepLimits(micro_batch_tokens=1 << 20, max_grad_norm=1.0, agreement_nats=float("inf"))

    def step() -> None:
        assert update(policy, reference, optimizer, batch, objective, limits, Stopwatch(cpu), step=1).applied

    step()  # the moments and gradients are there from now on
    seconds = min(seconds_of(step) for _ in range(2))
    peak = Peak()
    step()
    return {"seconds": seconds, "peak_bytes": peak.bytes()}


if __name__ == "__main__":
    options = parser(__doc__ or "", "cpu/prompts_once.json")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--model", type=Path, help="a folder; measured with CASES_OF_A_MODEL")
    given = options.parse_args()
    from fastkl.scoring.models import load_tokenizer
    from fastkl.storyteller import model_path

    cases = CASES_OF_A_MODEL if given.model else CASES

    def line(name: str, found: list[dict[str, Any]]) -> str:
        peak = median(run["peak_bytes"] for run in found) / 2**30
        return f"{name}: {median(run['seconds'] for run in found):.2f} s, {peak:.2f} GiB (of {len(found)})"

    def measure(name: str) -> dict[str, float]:
        layout, _, case = name.partition(", ")
        return run_alone(measured, layout, given.model or scratch, *cases[case])

    with tempfile.TemporaryDirectory() as scratch:
        if not given.model:
            make_llama(Path(scratch), load_tokenizer(str(model_path())), **SHAPE)
        names = [f"{layout}, {case}" for case in cases for layout in LAYOUTS]
        about = {"model": given.model.name, **cases} if given.model else {**SHAPE, **cases}
        take_turns(names, given.rounds, measure, line, given.output, about)
