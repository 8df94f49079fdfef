"""Models: loading policy and reference, and splitting a language model into backbone and head.

Safetensors only, remote code off, dropout off. Weights are float32 (the optimizer's master weights); lower precision is
autocast's business. The head is described by data, not code, since the fused operators compute it: logits =
logit_scale * softcap * tanh((hidden @ weight.T + bias) / softcap).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastkl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def resolve_model(name: str) -> str:
    """The folder or hub id to load: "storyteller" is the embedded model. UserError if a folder lacks what is needed."""
    if name == "storyteller":
        from fastkl.storyteller import model_path

        return str(model_path())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise UserError(f"model: the folder {name!r} holds no config.json; name a Hugging Face model folder.")
        if not any(folder.glob("*.safetensors")):
            raise UserError(f"model: the folder {name!r} holds no .safetensors weights; save it with save_pretrained.")
        return str(folder)
    looks_like_hub_id = name.count("/") <= 1 and not name.startswith((".", "/", "~")) and " " not in name
    if not looks_like_hub_id or folder.exists():
        raise UserError(
            f"model: there is no model folder {name!r}; name an existing folder, a hub id, or 'storyteller'."
        )
    return name


def quiet_transformers() -> None:
    """No progress bars and no advice from transformers; its errors are raised."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def load_tokenizer(source: str) -> Any:
    """The model's tokenizer; UserError where the folder or hub has none."""
    from transformers import AutoTokenizer

    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if Path(source).is_dir() and not any(Path(source, name).exists() for name in files):
        raise UserError(
            f"model: no tokenizer in {source!r} (none of {', '.join(files)}); save it there with save_pretrained."
        )
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as failure:  # transformers raises many types here; all mean that there is no usable tokenizer
        raise UserError(f"model: no tokenizer in {source!r} ({first_line(failure)}); save one there.") from failure


def load_config(source: str) -> Any:
    """The model's configuration, without its weights; UserError where there is none or it needs remote code."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as failure:
        raise UserError(
            f"model: {source!r} has no usable configuration ({first_line(failure)}); name another model."
        ) from failure


def load_model(source: str, device: torch.device) -> PreTrainedModel:
    """A causal language model in float32 on `device`, dropout off. UserError when it cannot be loaded."""
    from transformers import AutoModelForCausalLM

    config = load_config(source)
    # Soft-capped attention scores (Gemma-2) exist only in the eager implementation.
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    options = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}
    try:
        model = AutoModelForCausalLM.from_pretrained(source, attn_implementation=attention, **options)
    except Exception as failure:
        raise UserError(f"model: {source!r} could not be loaded ({first_line(failure)}); name another.") from failure
    return without_dropout(model).to(device)


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Sets every dropout probability to 0, so that train() and eval() score alike and no noise enters the KL."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model.eval()


def stop_token_ids(config: Any, source: str) -> tuple[int, ...]:
    """Every id that ends a completion: the union of the model config's and generation_config.json's eos_token_id."""
    from transformers import GenerationConfig

    ids: list[int] = []
    try:
        generation = GenerationConfig.from_pretrained(source)
    except OSError:  # many models ship none
        generation = None
    for holder in (config, generation):
        eos = getattr(holder, "eos_token_id", None)
        ids += eos if isinstance(eos, list) else [] if eos is None else [eos]
    return tuple(sorted(set(ids)))


def context_length(config: Any) -> int | None:
    """The longest sequence the model can take, in tokens; None where the configuration does not say."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether bfloat16 matrix products beat float32 ones: every GPU since 2020; CPUs with AVX-512 BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def first_line(failure: BaseException) -> str:
    """The first line of an exception's message, for one-line errors."""
    text = str(failure).strip() or type(failure).__name__
    return text.splitlines()[0][:200]
