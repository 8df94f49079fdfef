"""Memory of a run in bytes per parameter, by what it keeps: measured on a CPU, beside the plan that a run prints.

    python bench/training/memory.py [--layers 12]
    python bench/training/memory.py paper    # models of 1.5, 7.6 and 8 billion parameters, from the same arithmetic

Each measurement is a process of its own: a random Llama of 114 million parameters (embedded tokenizer), two steps of
two completions. The peak (VmHWM) of the steps is counted from a mark that is set after loading; what the same run takes
with the embedded model, 2 million parameters, is subtracted. Freed memory goes back to the system at once here, so that
the peak is of what lives; a run on a CPU lets glibc keep it, which is faster. Loading is told apart, checkpoints are
not written.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.common import Peak, make_llama, parser, run_alone, status_bytes, write

KINDS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {},
    "without a reference": {"no_reference": True, "kl_coef": 0.0},
    "8-bit moments": {"optimizer": "adamw8bit"},
    "bfloat16 weights": {"param_dtype": "bfloat16"},
    "bfloat16 weights, 8-bit moments": {"param_dtype": "bfloat16", "optimizer": "adamw8bit"},
    "adapters of rank 16": {"lora_rank": 16},
}
SHAPE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_key_value_heads": 12}
MODELS = {  # (numbers in matrices, numbers in embeddings and head, numbers in adapters of rank 16), from the shapes
    "Qwen2.5-1.5B": (1.310e9, 0.233e9, 18.5e6),
    "Qwen2.5-7B": (6.525e9, 1.090e9, 40.4e6),
    "Llama-3.1-8B": (6.979e9, 1.051e9, 41.9e6),
}
ENGINE = 2.0  # bytes per parameter of vLLM's own copy
STATE = ("policy", "gradients", "AdamW", "reference")


def measured(model: str, kind: str) -> dict[str, float]:
    """Bytes: the peak of loading and of the steps, and the plan's parts for weights, gradients and moments."""
    from fastkl.config.settings import TrainConfig
    from fastkl.training.loop import run_steps
    from fastkl.training.setup import set_up

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(**{
            "model": model, "generator": "transformers", "steps": 2, "prompts_per_step": 1, "num_samples": 2,
            "max_new_tokens": 8, "lr": 1e-5, "dtype": "bfloat16", "report_to": (), "save_every": 0,
            "output": str(Path(folder) / "run"), **KINDS[kind],
        })  # fmt: skip
        peaks: list[float] = []

        class AtStepEnd:
            def on_step_end(self, metrics: Any, samples: Any) -> None:
                peaks.append(status_bytes("VmHWM"))
                if len(peaks) == config.steps:
                    run.saved_step = config.steps  # nothing is left to save, which would take memory of its own
                    raise KeyboardInterrupt

        run = set_up(config, callbacks=[AtStepEnd()])
        loading = status_bytes("VmHWM")
        Peak()  # the mark
        with contextlib.suppress(KeyboardInterrupt):
            run_steps(run)
        count = sum(p.numel() for name, p in run.policy.model.named_parameters() if "lora_" not in name)
        return {"loading": loading, "steps": peaks[-1], "parameters": count}


def planned(matrices: float, others: float, adapters: float, kind: str) -> float:
    """Bytes of weights, gradients, moments and reference by the plan that a run prints."""
    import torch

    from fastkl.config.settings import TrainConfig
    from fastkl.training.memory_plan import plan_of

    config = TrainConfig(**KINDS[kind])
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    parts = plan_of(
        config, None, int(matrices + others), generator="transformers", device=torch.device("cpu"), dtype=dtype,
        max_tokens=20, adapters=int(adapters) if config.lora_rank else 0, matrices=int(matrices),
    ).parts  # fmt: skip
    return sum(parts[name] for name in STATE)


def paper() -> dict[str, dict[str, Any]]:
    """GB by model and kind, on paper: without the engine, and with its copy in bfloat16."""
    return {
        model: {
            kind: {"trainer_gb": state / 1e9, "with_engine_gb": (state + ENGINE * (matrices + others)) / 1e9}
            for kind in KINDS
            for state in [planned(matrices, others, adapters, kind)]
        }
        for model, (matrices, others, adapters) in MODELS.items()
    }


def table(layers: int) -> dict[str, Any]:
    """Every kind, measured and planned, in bytes per parameter of the large model."""
    from fastkl.scoring.models import load_tokenizer
    from fastkl.storyteller import model_path
    from fastkl.training.memory_plan import num_adapter_parameters, num_in_matrices, num_parameters

    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_llama(Path(folder), load_tokenizer(str(model_path())), num_hidden_layers=layers, **SHAPE)
        matrices, count = num_in_matrices(folder), num_parameters(folder) or 0
        adapters = num_adapter_parameters(folder, 16)
        for kind in KINDS:
            large, small = (run_alone(measured, model, kind) for model in (folder, "storyteller"))
            of_large = large["parameters"] - small["parameters"]
            rows[kind] = {
                "plan": planned(matrices, count - matrices, adapters, kind) / count,
                "steps": (large["steps"] - small["steps"]) / of_large,
                "loading": (large["loading"] - small["loading"]) / of_large,
            }
            print(f"{kind}: " + ", ".join(f"{name} {value:.1f}" for name, value in rows[kind].items()), flush=True)
    return {"parameters": count, "bytes_per_parameter": rows}


if __name__ == "__main__":
    options = parser(__doc__ or "", "cpu/memory.json")
    options.add_argument("what", nargs="?", choices=("measure", "paper"), default="measure")
    options.add_argument("--layers", type=int, default=12)
    given = options.parse_args()
    if given.what == "paper":
        for name, of_model in paper().items():
            for kind, sizes in of_model.items():
                print(f"{name}, {kind}: {sizes['trainer_gb']:.1f} GB, {sizes['with_engine_gb']:.1f} with the engine")
    else:
        write(given.output, {**table(given.layers), "on_paper": paper()})
