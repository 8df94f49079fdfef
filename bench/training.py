"""Whole training steps, side by side in one run: fastkl, TRL's RLOOTrainer, one text at a time, and a step's parts.

    python bench/training.py [--steps 6] [--output bench/results/training.json] [--only fastkl-3.2M trl-3.2M ...]

The job: 16 prompts x 8 samples x 96 new tokens, beta 0.05, lr 1e-6, AdamW, no checkpoints, on two randomly initialised
Llamas made here: 3.2 million parameters (vLLM generates) and 0.26 million with heads too small for vLLM's CPU kernels
(transformers generates). Every contender runs in a process of its own, one after another, `--rounds` times in turn; the
time of a step is the wall time between the ends of two steps, logging included; the first two steps do not count.

On a GPU: 256 new tokens, bfloat16, a Llama with the sizes and the vocabulary of Qwen2.5-0.5B, vLLM on both sides
(TRL's "colocate" mode).

"parts" measures the unavoidable parts of a fastkl step alone, in one process: the engine's bare generation of as many
tokens, one reference trunk forward, one policy trunk forward and backward, and the head's four matrix products.

TRL is needed for its rows only: pip install "trl==1.16.*" (rows without it are left out, and said to be).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

B, K, T = 16, 8, 96
SIZES: dict[str, dict[str, int]] = {
    "3.2M": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 8},
    "0.26M": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 8},
    "0.5B": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936,
    },
}  # fmt: skip
PROMPT = "Once upon a time"
WARM_UP_STEPS = 2


def make_model(folder: Path, size: str) -> None:
    """A randomly initialised Llama of the given size with the storyteller's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from fastkl.storyteller import model_path

    tokenizer = AutoTokenizer.from_pretrained(model_path())
    torch.manual_seed(0)
    heads = SIZES[size]["num_attention_heads"]
    config = LlamaConfig(
        **({"vocab_size": len(tokenizer), "num_key_value_heads": heads} | SIZES[size]),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def vowels(completions: list[str], **_: Any) -> list[float]:
    """A reward that costs nothing to compute."""
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def step_times(ends: list[float]) -> list[float]:
    """Seconds between the ends of steps, warm-up left out."""
    return [b - a for a, b in zip(ends, ends[1:], strict=False)][WARM_UP_STEPS - 1 :]


def fastkl_steps(model: Path, steps: int, generator: str, dtype: str, new_tokens: int = T) -> dict[str, Any]:
    """fastkl's training loop as `fastkl train` runs it."""
    from fastkl.config.settings import TrainConfig
    from fastkl.training import state
    from fastkl.training.loop import train

    ends: list[float] = []
    record = state.Run.record

    def timed_record(self: Any, *args: Any) -> None:
        record(self, *args)
        ends.append(time.perf_counter())

    state.Run.record = timed_record
    with tempfile.TemporaryDirectory() as folder:
        train(
            TrainConfig(
                model=str(model), prompts=PROMPT, reward=(f"{__file__}:vowels",), kl_coef=0.05, lr=1e-6, warmup_steps=0,
                lr_decay="constant", steps=steps + WARM_UP_STEPS, prompts_per_step=B, num_samples=K,
                max_new_tokens=new_tokens, generator=generator, dtype=dtype, save_every=0, sample_every=0,
                report_to=(), output=f"{folder}/run",
            )
        )  # fmt: skip
        rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    counted = rows[WARM_UP_STEPS:]
    stages = {key: statistics.median(row[key] for row in counted) for key in counted[0] if key.startswith("time/")}
    tokens = statistics.median(row["completion/mean_length"] for row in counted) * B * K
    return {"step_s": step_times(ends), "tokens_per_step": tokens, "stages": stages}


def trl_steps(
    model: Path, steps: int, dtype: str, new_tokens: int = T, batch: int = B * K, **options: Any
) -> dict[str, Any]:
    """TRL's RLOOTrainer on the same job, `batch` sequences at a time. options: more of RLOOConfig's, such as its vLLM
    mode, which needs a GPU; without it transformers generates.
    """
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        config = RLOOConfig(
            output_dir=folder, per_device_train_batch_size=batch, gradient_accumulation_steps=B * K // batch,
            num_generations=K, max_completion_length=new_tokens, max_steps=steps + WARM_UP_STEPS, learning_rate=1e-6,
            beta=0.05, temperature=1.0,
            bf16=dtype == "bfloat16", use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False,
            save_strategy="no", report_to=[], logging_strategy="no", disable_tqdm=True,
            model_init_kwargs={"dtype": "float32"}, **options,
        )  # fmt: skip
        prompts = Dataset.from_dict({"prompt": [PROMPT] * 1024})
        RLOOTrainer(
            model=str(model), reward_funcs=vowels, args=config, train_dataset=prompts, callbacks=[Clock()]
        ).train()
    return {"step_s": step_times(ends), "tokens_per_step": B * K * new_tokens}


def one_text_at_a_time(model: Path, steps: int) -> dict[str, Any]:
    """The loop this project grew out of: generate one text, score it twice, accumulate its gradient; then the next."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    policy, reference = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for _ in range(2))
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-6)
    times, tokens = [], []
    for _ in range(steps + 1):
        start, total = time.perf_counter(), 0
        for _ in range(K):
            with torch.no_grad():
                ids = policy.generate(prompt, do_sample=True, max_new_tokens=T, pad_token_id=tokenizer.pad_token_id)
                ref_loss = reference(ids, labels=ids).loss
            loss = policy(ids, labels=ids).loss
            text = tokenizer.decode(ids[0])
            ((vowels([text])[0] + 0.05 * float(loss.detach() - ref_loss)) * loss / K).backward()
            total += ids.shape[1] - prompt.shape[1]
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
        tokens.append(total)
    return {"step_s": times[1:], "tokens_per_step": statistics.median(tokens[1:])}


def parts(model: Path, steps: int, generator: str, dtype: str, new_tokens: int = T) -> dict[str, Any]:
    """The unavoidable parts of a step, each measured alone; seconds, medians over `steps` repeats."""
    import torch

    from fastkl.config.settings import TrainConfig
    from fastkl.scoring import backbone
    from fastkl.scoring.head import head_of
    from fastkl.scoring.pack import pack
    from fastkl.training.setup import set_up
    from fastkl.types import RolloutBatch

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            model=str(model), prompts=PROMPT, reward=(f"{__file__}:vowels",), prompts_per_step=B, num_samples=K,
            max_new_tokens=new_tokens, generator=generator, dtype=dtype, report_to=(), output=f"{folder}/run",
        )  # fmt: skip
        run = set_up(config)
        prompts = run.prompts.take(B)
        completions = run.generator.generate(prompts, K, seed=0, step=1)
        valid = torch.ones(B, K, dtype=torch.bool)
        batch = RolloutBatch(prompts, completions, torch.zeros(B, K), valid, 0)
        micros = [micro for _, micro in pack(batch, range(B), run.micro_batch_tokens, run.device)]
        weight = head_of(run.policy).weight

        def reference_forward() -> None:
            with torch.no_grad(), run.autocast(), backbone.scoring(run.reference, run.layout):
                for micro in micros:
                    backbone.hidden_states(run.reference, micro, run.layout)

        def policy_forward_backward() -> None:
            with backbone.scoring(run.policy, run.layout):
                for micro in micros:
                    with run.autocast():
                        hidden = backbone.hidden_states(run.policy, micro, run.layout)
                    hidden.backward(torch.ones_like(hidden))
            run.policy.zero_grad(set_to_none=True)

        head = weight.detach().to(run.compute_dtype if run.device.type == "cuda" else torch.float32)
        hidden, logits = (torch.randn(2048, size, device=run.device).to(head.dtype) for size in head.shape[::-1])

        @torch.no_grad()
        def head_products() -> None:
            for _ in range(-(-sum(m.target_ids.numel() for m in micros) // 2048)):
                hidden @ head.T, hidden @ head.T, logits @ head, logits.T @ hidden

        measured = {
            "generation": median_seconds(bare_generation(run, batch), steps),
            "reference_forward": median_seconds(reference_forward, steps),
            "policy_forward_backward": median_seconds(policy_forward_backward, steps),
            "head_products": median_seconds(head_products, steps),
        }
    return {"parts_s": measured, "sum_s": sum(measured.values())}


def bare_generation(run: Any, batch: Any) -> Callable[[], Any]:
    """Generation of as many tokens per sequence without seeds, log-probs, or anything made of the output."""
    lengths = [len(c.token_ids) for group in batch.completions for c in group]
    if run.generator.name == "transformers":
        return lambda: run.generator.generate(batch.prompts, K, seed=0, step=1)
    from vllm import SamplingParams

    params = [SamplingParams(temperature=1.0, max_tokens=n, ignore_eos=True, detokenize=False) for n in lengths]
    requests = [{"prompt_token_ids": list(p.token_ids)} for p in batch.prompts for _ in range(K)]
    return lambda: run.generator.llm.generate(requests, params, use_tqdm=False)


def median_seconds(action: Callable[[], Any], repeats: int) -> float:
    """Median wall seconds of `action` after two warm-up calls."""
    import torch

    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


CONTENDERS: dict[str, tuple[str, Callable[..., dict[str, Any]], dict[str, Any]]] = {
    "fastkl-3.2M": ("3.2M", fastkl_steps, {"generator": "vllm", "dtype": "float32"}),
    "trl-3.2M": ("3.2M", trl_steps, {"dtype": "float32"}),
    "parts-3.2M": ("3.2M", parts, {"generator": "vllm", "dtype": "float32"}),
    "fastkl-0.26M": ("0.26M", fastkl_steps, {"generator": "transformers", "dtype": "float32"}),
    "trl-0.26M": ("0.26M", trl_steps, {"dtype": "float32"}),
    "original-0.26M": ("0.26M", one_text_at_a_time, {}),
    "fastkl-3.2M-bf16": ("3.2M", fastkl_steps, {"generator": "vllm", "dtype": "bfloat16"}),
    "trl-3.2M-bf16": ("3.2M", trl_steps, {"dtype": "bfloat16"}),
}
ON_GPU = {"dtype": "bfloat16", "new_tokens": 256}
GPU_CONTENDERS: dict[str, tuple[str, Callable[..., dict[str, Any]], dict[str, Any]]] = {
    "fastkl-0.5B": ("0.5B", fastkl_steps, {"generator": "vllm", **ON_GPU}),
    "parts-0.5B": ("0.5B", parts, {"generator": "vllm", **ON_GPU}),
    "trl-0.5B": (
        "0.5B", trl_steps,
        {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3, "batch": 32, **ON_GPU},
    ),
}  # fmt: skip
CONTENDERS |= GPU_CONTENDERS


def run_alone(name: str, model: Path, steps: int) -> dict[str, Any]:
    """One contender in a process of its own; its result comes back as the last line of its output."""
    command = [sys.executable, __file__, "--contender", name, "--model", str(model), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def default_contenders() -> list[str]:
    """Everything that can be compared here: bfloat16 rows need a processor with bfloat16 products."""
    import torch

    from fastkl.scoring.models import bfloat16_is_fast

    names = [name for name in CONTENDERS if (name in GPU_CONTENDERS) == torch.cuda.is_available()]
    if importlib.util.find_spec("trl") is None:
        print("trl is not installed: its rows are left out")
        names = [name for name in names if not name.startswith("trl")]
    if not bfloat16_is_fast(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        print("this processor has no bfloat16 matrix products: the bf16 rows are left out")
        names = [name for name in names if not name.endswith("bf16")]
    return names


def machine() -> dict[str, Any]:
    """What the numbers were measured on and with."""
    import torch
    import transformers

    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "cpu": cpu.group(1) if cpu else platform.processor(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit,
        "command": " ".join(["python", *sys.argv]),
    }


def summary(name: str, found: list[dict[str, Any]]) -> str:
    """A contender's line of the table, from its rounds so far."""
    if "parts_s" in found[0]:
        parts = {part: statistics.median(f["parts_s"][part] for f in found) for part in found[0]["parts_s"]}
        cells = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in parts.items())
        return f"{name:18} {sum(parts.values()):7.2f} s   {cells}"
    times = sorted(second for f in found for second in f["step_s"])
    median, tokens = statistics.median(times), found[0]["tokens_per_step"]
    return f"{name:18} {median:7.2f} s/step ({times[0]:.2f} .. {times[-1]:.2f}) {tokens / median:9.0f} tokens/s"


def compare(names: list[str], steps: int, rounds: int, output: Path) -> None:
    """Runs the contenders in turn; prints and writes what is known after each."""
    results: dict[str, list[dict[str, Any]]] = {}
    origin = {"machine": machine(), "job": {"B": B, "K": K, "T": T}}
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        models = {size: Path(folder) / size for size in {CONTENDERS[name][0] for name in names}}
        for size, path in models.items():
            make_model(path, size)
        for name in names * rounds:
            found = results.setdefault(name, [])
            found.append(run_alone(name, models[CONTENDERS[name][0]], steps))
            print(summary(name, found), flush=True)
            output.write_text(json.dumps({**origin, "results": results}, indent=1))
    print(f"written to {output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="counted steps per contender and round")
    parser.add_argument("--rounds", type=int, default=2, help="how often the contenders run in turn")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="contenders [all that can run here]")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "training.json")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        _, measure, settings = CONTENDERS[options.contender]
        print("\n" + json.dumps(measure(options.model, options.steps, **settings)))
    else:
        compare(options.only or default_contenders(), options.steps, options.rounds, options.output)


if __name__ == "__main__":
    main()
