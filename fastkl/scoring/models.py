"""Models: loading policy and reference, and splitting a language model into backbone and head.

Safetensors only, remote code off, dropout off. Weights are float32 (the optimizer's master weights); lower precision is
autocast's business. The head is described by data, not code, since the fused operators compute it: logits =
logit_scale * softcap * tanh((hidden @ weight.T + bias) / softcap).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastkl.errors import UserError
from fastkl.scoring.source import first_line
from fastkl.scoring.source import resolve_model as resolve_model  # who loads a model resolves its name first
from fastkl.scoring.unread import META, unread_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


def text_config(config: Any) -> Any:
    """The part of a configuration that is about text: multimodal ones nest it."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def load_model(source: str, device: torch.device, *, four_bit: bool = False) -> PreTrainedModel:
    """A causal language model in float32 on `device`, dropout off. UserError when it cannot be loaded.

    On the meta device it comes without its weights, which are read when it has been cut (unread.py); on the CPU, with
    them, where these cannot be read by pieces. four_bit: its matrices are NF4 of bitsandbytes (Dettmers et al. 2023,
    "QLoRA"), for a model that is not trained.
    """
    config = load_config(source)
    # Soft-capped attention scores (Gemma-2) exist only in the eager implementation; else transformers knows best.
    attention = "eager" if getattr(text_config(config), "attn_logit_softcapping", None) else None
    options: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}
    if four_bit:
        options |= {"quantization_config": nf4(), "device_map": {"": str(device)}}
    try:
        if device == META:
            device = torch.device("cpu")
            if (unread := unread_model(source, config, class_of(config), attention)) is not None:
                return without_dropout(unread)
        model, loading = class_of(config).from_pretrained(
            source, attn_implementation=attention, output_loading_info=True, **options
        )
    except Exception as failure:
        raise UserError(f"model: {source!r} could not be loaded ({first_line(failure)}); name another.") from failure
    check_weights(source, loading["missing_keys"], loading["unexpected_keys"])
    return without_dropout(model) if four_bit else aligned(without_dropout(model).to(device))


def nf4() -> Any:
    """How bitsandbytes is to store matrices. Products are float32 there, or what autocast makes of them: then the
    engine, which gets the same weights in bfloat16, computes with the same numbers."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
    )  # fmt: skip


@torch.no_grad()
def aligned(model: PreTrainedModel) -> PreTrainedModel:
    """Its tensors at multiples of 64 bytes, where torch itself puts them.

    safetensors maps a file wherever its header ends. Products with few rows round differently there, so a resumed run,
    which reads another file, would not be the uninterrupted one to the last bit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
    return model


def class_of(config: Any) -> Any:
    """What loads a model of this configuration: transformers' choice among causal models, or else the class that the
    configuration names (that of a multimodal model's text part, which has been saved by itself)."""
    import transformers

    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        for name in getattr(config, "architectures", None) or ():
            if name.endswith("ForCausalLM") and hasattr(transformers, name):
                return getattr(transformers, name)
    return transformers.AutoModelForCausalLM


def store_as_computed(model: PreTrainedModel, dtype: torch.dtype, *, trained: bool = False) -> None:
    """Rounds the matrices that autocast would round in every forward, for good: half the memory, and the same numbers.

    trained: weights that are trained, too, whose gradients then have this dtype; else they are left out. Head,
    embeddings and norms, which are computed in float32, keep it; so do matrices that are no Linear's. Nothing is
    rounded where the products are float32.
    """
    heads = {id(module) for module in (model.get_output_embeddings(),) if module is not None}
    for module in model.modules() if dtype != torch.float32 else ():
        if isinstance(module, nn.Linear) and id(module) not in heads:
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point() and (trained or not parameter.requires_grad):
                    parameter.data = parameter.data.to(dtype)


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Matrices that `store_as_computed` has rounded are float32 while they are multiplied, one at a time: forwards then
    need no autocast. For forwards without gradients."""
    stored: dict[nn.Module, dict[str, nn.Parameter | None]] = {}

    def widen(module: nn.Module, _inputs: Any) -> None:
        stored[module] = dict(module._parameters)
        for name, parameter in stored[module].items():
            module._parameters[name] = None if parameter is None else nn.Parameter(parameter.float(), False)

    def narrow(module: nn.Module, _inputs: Any, _output: Any) -> None:
        module._parameters.update(stored.pop(module))

    is_mixed = any(parameter.dtype == torch.float32 for parameter in model.parameters())
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)] if is_mixed else []
    rounded = [linear for linear in linears if linear.weight.dtype == torch.bfloat16]
    hooks = [m.register_forward_pre_hook(widen) for m in rounded]
    hooks += [m.register_forward_hook(narrow, always_call=True) for m in rounded]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


OTHER_MODALITIES = ("vision", "visual", "image", "audio", "speech", "multi_modal", "mm_")
"""Parts of a tensor's name that the text model of a multimodal checkpoint rightly leaves in the file."""

WRAPPERS = ("base_model.model.", "_orig_mod.", "module.", "_fsdp_wrapped_module.")
"""What PEFT, torch.compile, DistributedDataParallel and FSDP put before the names of the model inside."""


def check_weights(source: str, missing: Iterable[str], surplus: Iterable[str]) -> None:
    """UserError unless the file holds the model's weights and no others.

    A missing weight would be filled with random numbers, different ones in policy and reference. A surplus weight would
    be dropped, and what is left would be a model that nobody has trained.
    """
    missing = sorted(missing)
    surplus = sorted(name for name in surplus if not any(part in name for part in OTHER_MODALITIES))
    if not missing and not surplus:
        return
    wrapper = next((w for w in WRAPPERS if surplus and all(name.startswith(w) for name in surplus)), None)
    if wrapper:
        remedy = f"all its names begin with {wrapper!r}: save the model inside of the wrapper"
    elif missing == ["lm_head.weight"]:
        remedy = "save the head with it, or set tie_word_embeddings to true if the embedding is the head"
    else:
        remedy = "its config.json and its weights are not of one model; save both together with save_pretrained"
    wrong = [f"{text} {_some(names)}" for text, names in (("lacks", missing), ("has besides", surplus)) if names]
    raise UserError(f"model: {source!r} {' and '.join(wrong)}; {remedy}.")


def _some(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def backbone_of(model: Any) -> Any:
    """The transformer without its head, called as the model is; its output's last_hidden_state x head are the logits.

    That is `base_model`, or where that is the model itself (the text model of Llama-4) the transformer inside of it.
    Where the head has layers before its product with the vocabulary (BERT's), they belong to the backbone.
    """
    from transformers import PreTrainedModel

    children, output = list(model.children()), model.get_output_embeddings()
    inner = (child for child in children if isinstance(child, PreTrainedModel))
    base = model.base_model if model.base_model is not model else next(inner, model)
    others = (child.parameters() for child in children if child is not base and child is not output)
    return base if output is None or all(next(weights, None) is None for weights in others) else UpToHead(model)


class UpToHead:
    """A causal language model's forward, left at its output embedding; what would have entered there comes out."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def forward(self, **inputs: Any) -> SimpleNamespace:
        """last_hidden_state [B, T, H]: the input of the output embedding."""
        handle = self.model.get_output_embeddings().register_forward_pre_hook(_leave)
        try:
            self.model(**inputs)
        except _HeadReached as reached:
            return SimpleNamespace(last_hidden_state=reached.hidden)
        finally:
            handle.remove()
        raise UserError(f"model: {type(self.model).__name__} computes its logits without its output embedding.")

    __call__ = forward


class _HeadReached(BaseException):  # no Exception: a model's own code must not catch it
    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


def _leave(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    raise _HeadReached(inputs[0])


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Sets every dropout probability to 0, so that train() and eval() score alike and no noise enters the KL.

    That of the configuration, too, which some models (Falcon) read in every forward: a checkpoint says 0 then.
    """
    for holder in (*model.modules(), model.config, text_config(model.config)):
        for name in dropouts(holder):
            setattr(holder, name, 0.0)
    return model.eval()


def dropouts(holder: Any) -> list[str]:
    """The attributes of a module or a configuration that hold a dropout probability above 0."""
    if isinstance(holder, nn.modules.dropout._DropoutNd):
        return ["p"] if holder.p > 0 else []
    return [name for name, value in vars(holder).items() if "drop" in name and isinstance(value, float) and value > 0]


def vocabulary(config: Any) -> int | None:
    """How many token ids the model has; None where the configuration does not say."""
    return getattr(text_config(config), "vocab_size", None)


def stop_token_ids(config: Any, source: str, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a completion: the eos_token_id of config.json, of generation_config.json and of the tokenizer.

    The tokenizer's counts since a model that was tuned on its end of text samples that one and no other. Ids outside of
    the vocabulary, which cannot be sampled, are left out; UserError if there are no others, since every completion
    would run to its limit.
    """
    from transformers import GenerationConfig

    ids: list[int] = []
    try:
        generation = GenerationConfig.from_pretrained(source)
    except OSError:  # many models ship none
        generation = None
    for holder in (config, generation, tokenizer):
        eos = getattr(holder, "eos_token_id", None)
        ids += eos if isinstance(eos, list) else [] if eos is None else [eos]
    vocab = vocabulary(config)
    known = {i for i in ids if vocab is None or 0 <= i < vocab}
    if ids and not known:
        raise UserError(
            f"model: its end of text has the id {ids[0]}, which is not in its vocabulary, 0 to {vocab - 1}; correct "
            f"eos_token_id in the config.json of {source!r} and its tokenizer."
        )
    return tuple(sorted(known))


def context_length(config: Any) -> int | None:
    """The longest sequence the model can take, in tokens; None where the configuration does not say."""
    for name in ("max_position_embeddings", "max_target_positions", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text_config(config), name, None)
        if isinstance(value, int) and value > 0:  # XLNet says -1: no limit
            return value
    return None


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether bfloat16 matrix products beat float32 ones: every GPU since 2020; CPUs with AVX-512 BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
