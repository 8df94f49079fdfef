"""TRL's RLOOTrainer with fastkl's scoring and without: seconds per step, its parts, and peak memory.

    python bench/trl_switch.py [--steps 5] [--rounds 2] [--output bench/results/trl_switch.json] [--only NAME ...]

The job: 4 prompts x 8 samples x 64 new tokens, beta 0.05, SGD, float32, no checkpointing of activations, on a random
Llama with 3 layers of width 256 and 32,000 tokens, made here. "x1" is one micro-batch per step; "x4" four, which TRL
generates at once and then scores one by one. Every contender runs in a process of its own, in turn, `--rounds` times.

step_s is the wall time between the ends of two steps, warm-up left out; generation_s of it is spent in TRL's own
generation, the same for all; scoring_and_update_s is the rest. Peak memory is that of the process during training
minus what it held before (weights, tokenizer, libraries).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

B, K, T, VOCAB = 4, 8, 64, 32_000
WARM_UP_STEPS = 2
CONTENDERS: dict[str, tuple[int, bool, bool | None]] = {  # name -> (micro-batches, switch, reuse_forward)
    "trl x1": (1, False, None),
    "fastkl x1": (1, True, None),
    "trl x4": (4, False, None),
    "fastkl x4": (4, True, None),
    "fastkl x4, kept forwards": (4, True, True),
}


def make_model(folder: Path) -> None:
    """A random Llama and a word tokenizer with as many words as it has tokens."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="w0", eos_token="w1", unk_token="w2", padding_side="left"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=3,
        num_attention_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def even_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that costs nothing to compute."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def memory_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def contend(name: str, model: Path, steps: int) -> dict[str, Any]:
    """One contender's step times and peak memory."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    from fastkl.integrations.trl import fastkl_scoring

    micro_batches, switch, reuse = CONTENDERS[name]
    ends: list[float] = []
    generation: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    class TimedTrainer(RLOOTrainer):
        def _generate(self, prompts: list[Any]) -> Any:
            start = time.perf_counter()
            found = super()._generate(prompts)
            generation.append(time.perf_counter() - start)
            return found

    with tempfile.TemporaryDirectory() as folder:
        config = RLOOConfig(
            output_dir=folder, per_device_train_batch_size=B * K // micro_batches,
            gradient_accumulation_steps=micro_batches, num_generations=K, max_completion_length=T,
            max_steps=steps + WARM_UP_STEPS, learning_rate=1e-4, optim="sgd", beta=0.05, bf16=False, use_cpu=True,
            gradient_checkpointing=False, save_strategy="no", report_to=[], logging_strategy="no", disable_tqdm=True,
            model_init_kwargs={"dtype": "float32"},
        )  # fmt: skip
        trainer = TimedTrainer(
            model=str(model),
            reward_funcs=even_ids,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["w3 w4 w5 w6 w7 w8"] * 64}),
            callbacks=[Clock()],
        )
        before = memory_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        with fastkl_scoring(trainer, reuse_forward=reuse) if switch else nullcontext():
            trainer.train()
    step_s = [b - a for a, b in zip(ends, ends[1:], strict=False)][WARM_UP_STEPS - 1 :]
    return {
        "step_s": step_s,
        "generation_s": generation[WARM_UP_STEPS:],
        "scoring_and_update_s": [a - b for a, b in zip(step_s, generation[WARM_UP_STEPS:], strict=True)],
        "peak_bytes": memory_bytes("VmHWM") - before,
    }


def run_alone(name: str, model: Path, steps: int) -> dict[str, Any]:
    """One contender in a process of its own; its result comes back as the last line of its output."""
    command = [sys.executable, __file__, "--contender", name, "--model", str(model), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(name: str, found: list[dict[str, Any]]) -> str:
    """Medians over the steps so far, and the highest peak."""
    cells = []
    for part in ("step_s", "generation_s", "scoring_and_update_s"):
        cells.append(f"{part} {statistics.median(second for f in found for second in f[part]):.2f}")
    return f"{name:26} {'  '.join(cells)}  peak {max(f['peak_bytes'] for f in found) / 2**20:.0f} MiB"


def machine() -> dict[str, Any]:
    """What the numbers were measured on and with."""
    from training import machine as training_machine

    return training_machine() | {name: importlib.metadata.version(name) for name in ("trl", "accelerate")}


def compare(names: list[str], steps: int, rounds: int, output: Path) -> None:
    """Runs the contenders in turn, prints the table, writes the JSON."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for _ in range(rounds):
            for name in names:
                results[name].append(run_alone(name, Path(folder), steps))
                print(summary(name, results[name]), flush=True)
    job = {"B": B, "K": K, "T": T, "vocab": VOCAB}
    output.write_text(json.dumps({"machine": machine(), "job": job, "results": results}, indent=1))
    print(f"written to {output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="counted steps per contender and round")
    parser.add_argument("--rounds", type=int, default=2, help="how often the contenders run in turn")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="contenders [all]")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "trl_switch.json")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        print(json.dumps(contend(args.contender, args.model, args.steps)))
    else:
        compare(args.only, args.steps, args.rounds, args.output)


if __name__ == "__main__":
    main()
