"""Generation of several samples of each prompt without vLLM's prefix cache, and with it by the size of its blocks.

    python bench/training/prefix_cache.py [--rounds 3]
    python bench/training/prefix_cache.py --prompts 8 --prompt-tokens 47 --samples 8 --output FILE

A random Llama with 12 of the 30 layers of SmolLM2-135M in float32, and the embedded tokenizer's vocabulary; samples of
14 tokens. Samples share whole blocks of their prompt only: 128 tokens are what vLLM takes on a CPU by itself, 32 what
fastkl asks for. Each measurement is a process of its own: the better of two calls after one that is not counted.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.common import make_llama, parser, run_alone, seconds_of, take_turns

NEW_TOKENS = 14
CONTENDERS = {"off": None, "blocks of 128": 128, "blocks of 32": 32}
SHAPE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 9,
    "num_key_value_heads": 3,
}  # fmt: skip


def measured(name: str, folder: str, num_prompts: int, prompt_tokens: int, samples: int) -> float:
    """Seconds of a call. name: one of CONTENDERS."""
    import torch
    import vllm

    from fastkl.rollout import vllm as backend
    from fastkl.rollout.requests import requests_of
    from fastkl.sampling.params import Sampling
    from fastkl.scoring.models import load_tokenizer
    from fastkl.types import Prompt

    if block := CONTENDERS[name]:
        backend.CPU_KV_BLOCK = block
    else:
        engine = vllm.LLM

        def without(*arguments: Any, **options: Any) -> Any:
            return engine(*arguments, **options | {"enable_prefix_caching": False})

        vllm.LLM = without  # type: ignore[assignment,misc]
    generator = backend.VllmGenerator(
        folder, load_tokenizer(folder), Sampling(1.0, NEW_TOKENS, min_tokens=NEW_TOKENS), dtype="float32",
        max_model_len=512, gpu_memory_utilization=0.3, log=Path(folder) / "engine.log",
    )  # fmt: skip
    ids = torch.randint(5, 250, (num_prompts, prompt_tokens), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [Prompt(tuple(row), "", "", 0) for row in ids]
    calls = [requests_of(prompts, samples, seed=0, step=step) for step in range(3)]
    return min([seconds_of(lambda call=call: generator.generate(call)) for call in calls][1:])


if __name__ == "__main__":
    options = parser(__doc__ or "", "cpu/prefix_cache.json")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--prompts", type=int, default=1)
    options.add_argument("--prompt-tokens", type=int, default=478)
    options.add_argument("--samples", type=int, default=16)
    given = options.parse_args()
    sizes = given.prompts, given.prompt_tokens, given.samples
    from fastkl.scoring.models import load_tokenizer
    from fastkl.storyteller import model_path

    with tempfile.TemporaryDirectory() as folder:
        make_llama(Path(folder), load_tokenizer(str(model_path())), **SHAPE)
        take_turns(
            list(CONTENDERS),
            given.rounds,
            lambda name: run_alone(measured, name, folder, *sizes),
            lambda name, found: f"{name}: {median(found):.2f} s (of {len(found)})",
            given.output,
            dict(zip(("prompts", "prompt_tokens", "samples"), sizes, strict=True), new_tokens=NEW_TOKENS, **SHAPE),
        )
