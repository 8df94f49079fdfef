"""Whole training steps, side by side in one run: fastkl, TRL's RLOOTrainer, one text at a time, and a step's parts.

    python bench/training/steps.py [--steps 6] [--output bench/results/training.json] [--only fastkl-3.2M trl-3.2M ...]

The job: 16 prompts x 8 samples x 96 new tokens, beta 0.05, lr 1e-6, AdamW, no checkpoints, on two randomly initialised
Llamas made here: 3.2 million parameters (vLLM generates) and 0.26 million with heads too small for vLLM's CPU kernels
(transformers generates). Every contender runs in a process of its own, one after another, `--rounds` times in turn; the
time of a step is the wall time between the ends of two steps, logging included; the first two steps do not count.

For a CPU; bench/training/gpu_steps.py measures whole steps on a GPU.

"parts" measures the unavoidable parts of a fastkl step alone, in one process: the engine's bare generation of as many
tokens, one reference backbone forward, one policy backbone forward and backward, and the head's four matrix products.

TRL is needed for its rows only: pip install "trl==1.16.*" (rows without it are left out, and said to be).
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import common

B, K, T = 16, 8, 96
SIZES: dict[str, dict[str, int]] = {
    "3.2M": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 8},
    "0.26M": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 8},
}  # fmt: skip
PROMPT = "Once upon a time"


def make_model(folder: Path, size: str) -> None:
    """A randomly initialised Llama of the given size with the storyteller's tokenizer."""
    from transformers import AutoTokenizer

    from fastkl.storyteller import model_path

    sizes = {"num_key_value_heads": SIZES[size]["num_attention_heads"]} | SIZES[size]
    common.make_llama(folder, AutoTokenizer.from_pretrained(model_path()), **sizes)


def vowels(completions: list[str], **_: Any) -> list[float]:
    """A reward that costs nothing to compute."""
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def fastkl_steps(model: Path, steps: int, generator: str, dtype: str) -> dict[str, Any]:
    """fastkl's training loop as `fastkl train` runs it."""
    from fastkl import TrainConfig, train

    steps_seen = common.Steps()
    with tempfile.TemporaryDirectory() as folder:
        train(
            TrainConfig(
                model=str(model), prompts=PROMPT, reward=(f"{__file__}:vowels",), kl_coef=0.05, lr=1e-6, warmup_steps=0,
                lr_decay="constant", steps=steps + common.WARM_UP_STEPS, prompts_per_step=B, num_samples=K,
                max_new_tokens=T, generator=generator, dtype=dtype, save_every=0, sample_every=0,
                report_to=(), output=f"{folder}/run",
            ),
            callbacks=[steps_seen],
        )  # fmt: skip
    counted = steps_seen.metrics[common.WARM_UP_STEPS :]
    stages = {key: statistics.median(row[key] for row in counted) for key in counted[0] if key.startswith("time/")}
    tokens = statistics.median(row["completion/mean_length"] for row in counted) * B * K
    return {"step_s": common.step_seconds(steps_seen.ends), "tokens_per_step": tokens, "stages": stages}


def trl_steps(model: Path, steps: int, dtype: str) -> dict[str, Any]:
    """TRL's RLOOTrainer on the same job; transformers generates, since its vLLM mode needs a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, ends = common.trl_run(
            model, [PROMPT] * 1024, vowels, steps, output_dir=folder, per_device_train_batch_size=B * K,
            gradient_accumulation_steps=1, num_generations=K, max_completion_length=T,
            learning_rate=1e-6, temperature=1.0, bf16=dtype == "bfloat16",
        )  # fmt: skip
        trainer.train()
    return {"step_s": common.step_seconds(ends), "tokens_per_step": B * K * T}


def one_text_at_a_time(model: Path, steps: int) -> dict[str, Any]:
    """The loop this project grew out of: generate one text, score it twice, accumulate its gradient; then the next."""
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


def parts(model: Path, steps: int, generator: str, dtype: str) -> dict[str, Any]:
    """The unavoidable parts of a step, each measured alone; seconds, medians over `steps` repeats."""
    from fastkl import TrainConfig
    from fastkl.rollout.requests import grouped, requests_of
    from fastkl.scoring.head import head_of
    from fastkl.scoring.pack import pack
    from fastkl.training.setup import set_up
    from fastkl.types import RolloutBatch

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            model=str(model), prompts=PROMPT, reward=(f"{__file__}:vowels",), prompts_per_step=B, num_samples=K,
            max_new_tokens=T, generator=generator, dtype=dtype, report_to=(), output=f"{folder}/run",
        )  # fmt: skip
        run = set_up(config)
        prompts = run.prompts.take(B)
        completions = grouped(run.generator.generate(requests_of(prompts, K, seed=0, step=1)), K)
        valid = torch.ones(B, K, dtype=torch.bool)
        batch = RolloutBatch(prompts, completions, torch.zeros(B, K), valid, 0)
        micros = [micro for _, micro in pack(batch, range(B), run.limits.micro_batch_tokens, run.device)]
        weight = head_of(run.policy.model).weight

        def reference_forward() -> None:
            with torch.no_grad(), run.reference.scoring():
                for micro in micros:
                    run.reference.hidden(micro)

        def policy_forward_backward() -> None:
            with run.policy.scoring():
                for micro in micros:
                    states = run.policy.hidden(micro).states
                    states.backward(torch.ones_like(states))
            run.policy.zero_grad(set_to_none=True)

        head = weight.detach().float()
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
    from fastkl.rollout.requests import requests_of
    from fastkl.rollout.vllm import VllmGenerator

    lengths = [len(c.token_ids) for group in batch.completions for c in group]
    if not isinstance(run.generator, VllmGenerator):
        return lambda: run.generator.generate(requests_of(batch.prompts, K, seed=0, step=1))
    from vllm import SamplingParams

    params = [SamplingParams(temperature=1.0, max_tokens=n, ignore_eos=True, detokenize=False) for n in lengths]
    requests = [{"prompt_token_ids": list(p.token_ids)} for p in batch.prompts for _ in range(K)]
    return lambda: run.generator.llm.generate(requests, params, use_tqdm=False)


def median_seconds(action: Callable[[], Any], repeats: int) -> float:
    """Median wall seconds of `action` after two warm-up calls."""
    return statistics.median([common.seconds_of(action) for _ in range(repeats + 2)][2:])


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


def measure(name: str, model: str, steps: int) -> dict[str, Any]:
    """One contender in this process."""
    _, function, settings = CONTENDERS[name]
    return function(Path(model), steps, **settings)


def default_contenders() -> list[str]:
    """Everything that can be compared here: bfloat16 rows need a processor with bfloat16 products."""
    from fastkl.scoring.models import bfloat16_is_fast

    names = list(CONTENDERS)
    if importlib.util.find_spec("trl") is None:
        print("trl is not installed: its rows are left out")
        names = [name for name in names if not name.startswith("trl")]
    if not bfloat16_is_fast(torch.device("cpu")):
        print("this processor has no bfloat16 matrix products: the bf16 rows are left out")
        names = [name for name in names if not name.endswith("bf16")]
    return names


def summary(name: str, found: list[dict[str, Any]]) -> str:
    """A contender's line of the table, from its rounds so far."""
    if "parts_s" in found[0]:
        parts = {part: statistics.median(f["parts_s"][part] for f in found) for part in found[0]["parts_s"]}
        cells = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in parts.items())
        return f"{name:18} {sum(parts.values()):7.2f} s   {cells}"
    times = sorted(second for f in found for second in f["step_s"])
    median, tokens = statistics.median(times), found[0]["tokens_per_step"]
    return f"{name:18} {median:7.2f} s/step ({times[0]:.2f} .. {times[-1]:.2f}) {tokens / median:9.0f} tokens/s"


def main() -> None:
    """Runs the contenders in turn; prints and writes what is known after each."""
    p = common.parser(__doc__, "training.json")
    p.add_argument("--steps", type=int, default=6, help="counted steps per contender and round")
    p.add_argument("--rounds", type=int, default=2, help="how often the contenders run in turn")
    p.add_argument("--only", nargs="+", choices=CONTENDERS, help="contenders [all that can run here]")
    options = p.parse_args()
    names = options.only or default_contenders()
    with tempfile.TemporaryDirectory() as folder:
        models = {CONTENDERS[name][0]: Path(folder) / CONTENDERS[name][0] for name in names}
        for size, path in models.items():
            make_model(path, size)

        def alone(name: str) -> dict[str, Any]:
            return common.run_alone(measure, name, models[CONTENDERS[name][0]], options.steps)

        common.take_turns(names, options.rounds, alone, summary, options.output, {"B": B, "K": K, "T": T})


if __name__ == "__main__":
    main()
