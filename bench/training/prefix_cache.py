"""Generation of long prompts, several samples of each, with and without vLLM's prefix cache; the two take turns.

    python bench/training/prefix_cache.py [--rounds 3]

A random Llama with 12 of the 30 layers of SmolLM2-135M in float32, and the embedded tokenizer's vocabulary; one prompt
of 478 tokens, 16 samples of 14. Each measurement is a process of its own: the better of two calls after one that is not
counted.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.common import make_llama, parser, run_alone, seconds_of, take_turns

PROMPTS, PROMPT_TOKENS, SAMPLES, NEW_TOKENS = 1, 478, 16, 14
SHAPE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 9,
    "num_key_value_heads": 3,
}  # fmt: skip


def measured(name: str, folder: str) -> float:
    """Seconds of a call. name: "on" or "off"."""
    import torch
    import vllm

    from fastkl.rollout.requests import requests_of
    from fastkl.rollout.vllm import VllmGenerator
    from fastkl.sampling.params import Sampling
    from fastkl.scoring.models import load_tokenizer
    from fastkl.types import Prompt

    if name == "off":
        engine = vllm.LLM

        def without(*arguments: Any, **options: Any) -> Any:
            return engine(*arguments, **options | {"enable_prefix_caching": False})

        vllm.LLM = without  # type: ignore[assignment,misc]
    generator = VllmGenerator(
        folder, load_tokenizer(folder), Sampling(1.0, NEW_TOKENS, min_tokens=NEW_TOKENS), dtype="float32",
        max_model_len=512, gpu_memory_utilization=0.3, log=Path(folder) / "engine.log",
    )  # fmt: skip
    ids = torch.randint(5, 250, (PROMPTS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [Prompt(tuple(row), "", "", 0) for row in ids]
    calls = [requests_of(prompts, SAMPLES, seed=0, step=step) for step in range(3)]
    return min([seconds_of(lambda call=call: generator.generate(call)) for call in calls][1:])


if __name__ == "__main__":
    options = parser(__doc__ or "", "cpu/prefix_cache.json")
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args()
    from fastkl.scoring.models import load_tokenizer
    from fastkl.storyteller import model_path

    with tempfile.TemporaryDirectory() as folder:
        make_llama(Path(folder), load_tokenizer(str(model_path())), **SHAPE)
        take_turns(
            ["off", "on"],
            given.rounds,
            lambda name: run_alone(measured, name, folder),
            lambda name, found: f"prefix cache {name}: {median(found):.2f} s (of {len(found)})",
            given.output,
            {"prompts": PROMPTS, "prompt_tokens": PROMPT_TOKENS, "samples": SAMPLES, "new_tokens": NEW_TOKENS, **SHAPE},
        )
