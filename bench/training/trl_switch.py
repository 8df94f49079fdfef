"""TRL's RLOOTrainer with fastkl's scoring and without: seconds per step, its parts, and peak memory.

    python bench/training/trl_switch.py [--steps 5] [--rounds 2] [--only NAME ...]  writes bench/results/trl_switch.json

The job: 4 prompts x 8 samples x 64 new tokens, beta 0.05, SGD, float32, no checkpointing of activations, on a random
Llama with 3 layers of width 256 and 32,000 tokens, made here. "x1" is one micro-batch per step; "x4" four, which TRL
generates at once and then scores one by one. Every contender runs in a process of its own, in turn, `--rounds` times.

step_s is the wall time between the ends of two steps, warm-up left out; generation_s of it is spent in TRL's own
generation, the same for all; scoring_and_update_s is the rest. Peak memory is that of the process during training
minus what it held before (weights, tokenizer, libraries).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from bench.common import WARM_UP_STEPS, make_llama, parser, run_alone, step_seconds, take_turns, trl_run
from fastkl.microbench.measure import peak_mib

B, K, T, VOCAB = 4, 8, 64, 32_000
CONTENDERS: dict[str, tuple[int, bool, bool | None]] = {  # name -> (micro-batches, switch, reuse_forward)
    "trl x1": (1, False, None),
    "fastkl x1": (1, True, None),
    "trl x4": (4, False, None),
    "fastkl x4": (4, True, None),
    "fastkl x4, kept forwards": (4, True, True),
}


def make_model(folder: Path) -> None:
    """A random Llama and a word tokenizer with as many words as it has tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "w0", "bos_token": "w1", "eos_token": "w1", "unk_token": "w2"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special, padding_side="left")
    make_llama(folder, tokenizer, hidden_size=256, intermediate_size=768, num_hidden_layers=3, num_attention_heads=8)


def even_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that costs nothing to compute."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def contend(name: str, model: str, steps: int) -> dict[str, Any]:
    """One contender's step times and peak memory."""
    from trl import RLOOTrainer

    from fastkl.integrations.trl import fastkl_scoring

    micro_batches, switch, reuse = CONTENDERS[name]
    generation: list[float] = []

    class TimedTrainer(RLOOTrainer):
        def _generate(self, prompts: list[Any]) -> Any:
            start = time.perf_counter()
            found = super()._generate(prompts)
            generation.append(time.perf_counter() - start)
            return found

    with tempfile.TemporaryDirectory() as folder:
        trainer, ends = trl_run(
            Path(model), ["w3 w4 w5 w6 w7 w8"] * 64, even_ids, steps, TimedTrainer, output_dir=folder,
            per_device_train_batch_size=B * K // micro_batches, gradient_accumulation_steps=micro_batches,
            num_generations=K, max_completion_length=T, learning_rate=1e-4, optim="sgd", bf16=False,
        )  # fmt: skip
        with fastkl_scoring(trainer, reuse_forward=reuse) if switch else nullcontext():
            peak = peak_mib(trainer.train, "cpu")
    step_s, generation_s = step_seconds(ends), generation[WARM_UP_STEPS:]
    rest = [a - b for a, b in zip(step_s, generation_s, strict=True)]
    return {
        "step_s": step_s, "generation_s": generation_s, "scoring_and_update_s": rest, "peak_bytes": int(peak * 2**20),
    }  # fmt: skip


def summary(name: str, found: list[dict[str, Any]]) -> str:
    """Medians over the steps so far, and the highest peak."""
    cells = []
    for part in ("step_s", "generation_s", "scoring_and_update_s"):
        cells.append(f"{part} {statistics.median(second for f in found for second in f[part]):.2f}")
    return f"{name:26} {'  '.join(cells)}  peak {max(f['peak_bytes'] for f in found) / 2**20:.0f} MiB"


def main() -> None:
    """Runs the contenders in turn; prints and writes what is known after each."""
    p = parser(__doc__, "trl_switch.json")
    p.add_argument("--steps", type=int, default=5, help="counted steps per contender and round")
    p.add_argument("--rounds", type=int, default=2, help="how often the contenders run in turn")
    p.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="contenders [all]")
    options = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        take_turns(
            options.only, options.rounds, lambda name: run_alone(contend, name, folder, options.steps), summary,
            options.output, {"B": B, "K": K, "T": T, "vocab": VOCAB},
        )  # fmt: skip


if __name__ == "__main__":
    main()
