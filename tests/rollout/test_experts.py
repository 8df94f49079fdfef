"""Mixtures of experts: the policy's tensors travel under the names of its saved folder, and reach vLLM's experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import commands
import pytest
import torch
from safetensors.torch import load_file
from test_generators import PROMPTS, gaps
from toy import STOP, VOCAB, ToyTokenizer, draw
from transformers import AutoConfig, AutoModelForCausalLM

from fastkl.errors import UserError
from fastkl.rollout import weight_sync
from fastkl.rollout.generator import choose_generator
from fastkl.rollout.vllm import VllmGenerator
from fastkl.rollout.weight_sync import checkpoint_weights
from fastkl.sampling.params import Sampling
from fastkl.scoring.models import without_dropout

COMMON = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": STOP, "pad_token_id": None, "initializer_range": 0.1,
    "tie_word_embeddings": False,
}  # fmt: skip


DEEPSEEK = {
    "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": None, "n_group": 1,
    "topk_group": 1, "qk_nope_head_dim": 32, "v_head_dim": 32, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "mixtral, padded": ("mixtral", {"intermediate_size": 48}),  # by vLLM, on CPUs
    "qwen3_moe": ("qwen3_moe", {}),
    "olmoe": ("olmoe", {}),
}


def tiny(kind: str, seed: int = 0, **options) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **COMMON | options)
    return without_dropout(AutoModelForCausalLM.from_config(config).float())


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe", "qwen2_moe", "granitemoe", "llama", "qwen3", "gpt2"])
def test_weights_travel_under_the_names_and_in_the_shapes_of_the_saved_folder(tmp_path, kind):
    model = tiny(kind)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    sent = dict(checkpoint_weights(model))
    assert sent.keys() == saved.keys()
    assert all(torch.equal(sent[name], saved[name]) for name in saved)
    assert sum(weight.numel() for weight in sent.values()) == sum(p.numel() for p in model.parameters())


def engine(kind: str, folder: Path, **options) -> VllmGenerator:
    tiny(kind, **options).save_pretrained(folder)
    return VllmGenerator(
        str(folder), ToyTokenizer(), Sampling(1.0, 12, stop_token_ids=(STOP,)), dtype="float32", max_model_len=32,
        gpu_memory_utilization=0.2, log=folder / "engine.log",
    )  # fmt: skip


def exchanged(kind: str, folder: Path, **options) -> dict[str, Any]:
    """Largest gap after each of three pushes, of three models, and what was compared; of qwen3_moe also the mean gap
    after a push that is not the experts' own: on CPUs vLLM packs them once, and a reload leaves plain ones."""
    generator, largest = engine(kind, folder, **options), []
    for step, seed in enumerate((0, 1, 2)):
        model = tiny(kind, seed, **options)
        generator.sync(model, step)
        largest.append(float(gaps(model, PROMPTS, draw(generator, PROMPTS, 8, seed=3, step=step)).max()))
    check, names = generator.weights.check, {name for name, _ in checkpoint_weights(model)}
    found = {"gaps": largest, "compared": set(check.places.of_sent()) == names and not check.not_compared}
    if kind == "qwen3_moe":
        with mock.patch.object(weight_sync, "_pack", lambda original, layer: original(layer)):
            generator.sync(model, 3)
        found["plainly reloaded"] = float(gaps(model, PROMPTS, draw(generator, PROMPTS, 8, seed=3, step=3)).mean())
    generator.close()
    return found


def in_vllm(folder: Path, *cases: str) -> dict[str, Any]:
    """What the function above returns. In a process of its own: vLLM knows of experts from its first engine on."""
    script = "import sys, test_experts\ntest_experts.main(*sys.argv[1:])"
    done = commands.run(str(folder), *cases, script=script, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("kinds", [
    ("qwen3_moe",),
    pytest.param(tuple(kind for kind in CASES if kind != "qwen3_moe"), marks=pytest.mark.long),
], ids=" ".join)  # fmt: skip
def test_vllm_samples_what_the_trainer_scores_after_its_experts_were_exchanged(tmp_path, kinds):
    """The weights of each step are those of another model: one expert that stayed behind would show. The control:
    experts that are not packed anew multiply with something else."""
    found = in_vllm(tmp_path, *kinds)
    for kind in kinds:
        assert found[kind]["compared"] and max(found[kind]["gaps"]) < 1e-4, kind
    assert "qwen3_moe" not in kinds or found["qwen3_moe"]["plainly reloaded"] > 1e-2


@pytest.mark.vllm
def test_experts_that_vllms_cpu_kernels_do_not_take_are_left_to_transformers():
    config = tiny("mixtral", hidden_size=48).config
    config.architectures = ["MixtralForCausalLM"]
    name, why = choose_generator("auto", config, torch.device("cpu"))
    assert name == "transformers" and "experts" in why and "48" in why
    with pytest.raises(UserError, match="asked for, but vLLM's CPU experts"):
        choose_generator("vllm", config, torch.device("cpu"))


@pytest.mark.vllm
def test_latent_attention_of_another_size_than_vllms_is_left_to_transformers():
    config = tiny("deepseek_v3", **DEEPSEEK, kv_lora_rank=32, qk_rope_head_dim=32).config
    config.architectures = ["DeepseekV3ForCausalLM"]
    name, why = choose_generator("auto", config, torch.device("cpu"))
    assert name == "transformers" and "576" in why and "64" in why
    config.kv_lora_rank, config.qk_rope_head_dim = 512, 64
    assert choose_generator("auto", config, torch.device("cpu"))[0] == "vllm"


def main(folder: str, *cases: str) -> None:
    """Prints what `exchanged` returns of the cases."""
    about = {name: CASES[name] for name in cases}
    results = {name: exchanged(kind, Path(folder) / name, **options) for name, (kind, options) in about.items()}
    print("\n" + json.dumps(results))
