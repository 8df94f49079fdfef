"""Adapters (LoRA, Hu et al. 2021): low-rank updates of a frozen model's matrices, W + alpha / r * B A, by PEFT.

In: a causal language model. Out: the same module, whose adapters are all that is trained. With them off it is the
model that they started from, to the last bit, and so the reference needs no second copy: `ScoredModel(model,
adapters=False)`. B starts at zero, so the policy starts as the reference.

The output head and the embeddings carry none. What an engine gets is `merged`: W and the update added in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastkl.errors import UserError
from fastkl.scoring.pieces import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "default"  # PEFT's for an adapter that has no other
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # in PEFT's format
ALL_LINEAR = ("all-linear",)


def check_adapters(rank: int, targets: Sequence[str]) -> None:
    """UserError where adapters are asked for and cannot be had, before a model is read."""
    if not rank:
        return
    try:
        import peft
    except ModuleNotFoundError as missing:
        raise UserError(
            "lora_rank: adapters need PEFT, which is not installed; pip install peft brings it."
        ) from missing
    _check_version(peft.__version__)
    if heads := [target for target in targets if "head" in target or "embed" in target]:
        raise UserError(
            f"lora_targets: {heads[0]!r} is the output head or an embedding, which is scored without adapters; leave "
            "it out."
        )


def _check_version(installed: str) -> None:
    """UserError for a PEFT that is too old for this transformers, whose own ValueError would look like a layer's."""
    from packaging.version import Version
    from transformers import __version__
    from transformers.integrations import peft

    if Version(installed) < Version(lowest := getattr(peft, "MIN_PEFT_VERSION", "0")):
        raise UserError(
            f"lora_rank: transformers {__version__} asks for PEFT {lowest} or newer, and {installed} is installed; "
            "pip install -U peft, or an older transformers."
        )


def add_adapters(model: PreTrainedModel, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
    """Freezes the model and adds adapters to the layers whose names end in `targets` ("all-linear": every matrix but
    the head). A starts at random numbers that depend on the seed alone. UserError for a layer that does not exist.
    """
    from peft import LoraConfig

    chosen = "all-linear" if tuple(targets) == ALL_LINEAR else list(targets)
    settings = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=chosen, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"
    )
    model.requires_grad_(False)
    with torch.random.fork_rng(), _keeping_numbers(model):
        torch.manual_seed(seed)
        try:
            model.add_adapter(settings, adapter_name=NAME)
        except (ValueError, TypeError) as failure:
            reason = " ".join(str(failure).split())[:200]
            raise UserError(f"lora_targets: {', '.join(targets)} cannot carry adapters ({reason}).") from failure
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    model.eval()


@contextmanager
def _keeping_numbers(model: nn.Module) -> Iterator[None]:
    """Adapters of an unread model (unread.py) keep their numbers: PEFT moves adapters to where their matrices are, and
    on the meta device they would have none. Meanwhile its parameters are on the CPU, one number each, expanded."""
    places = [(m, name, p) for m in model.modules() for name, p in m.named_parameters(recurse=False) if p.is_meta]
    for module, name, unread in places:
        setattr(module, name, nn.Parameter(torch.zeros(()).expand(unread.shape), requires_grad=False))
    try:
        yield
    finally:
        for module, name, unread in places:
            setattr(module, name, unread)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return f".{NAME}." in name and ".lora_" in name


def load_adapters(folder: Path, model: PreTrainedModel) -> None:
    """The adapters of a checkpoint into those of the model. UserError unless they are the same ones."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    if not (folder / WEIGHTS).is_file():
        raise UserError(f"lora_rank: the checkpoint {str(folder)!r} holds no adapters; leave lora_rank at 0.")
    saved = load_file(folder / WEIGHTS)
    saved = {name.removeprefix("base_model.model."): tensor for name, tensor in saved.items()}
    own = get_peft_model_state_dict(model, adapter_name=NAME)
    if {name: t.shape for name, t in saved.items()} != {name: t.shape for name, t in own.items()}:
        raise UserError(
            f"resume: the adapters in {str(folder)!r} are not those of lora_rank and lora_targets; resume with the "
            "settings that the run was started with."
        )
    set_peft_model_state_dict(model, saved, adapter_name=NAME)


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The model without its adapters; nothing to do for one that has none."""
    layers: list[Any] = [module for module in model.modules() if _carries(module)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter by the name that it has without adapters; where there is an update, with it, f32."""
    layers = {f"{name}.": module for name, module in model.named_modules() if _carries(module)}
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            continue
        prefix = name.removesuffix("base_layer.weight")
        if prefix != name and prefix in layers:
            delta = whole(layers[prefix].get_delta_weight(NAME).detach()).float()
            yield f"{prefix}weight", plain(parameter).float() + delta
        else:
            yield name.replace(".base_layer.", "."), plain(parameter)


def plain(parameter: torch.Tensor) -> torch.Tensor:
    """A weight as numbers: itself, all of one that lies in pieces, or what bitsandbytes makes of its 4 bits."""
    quantised = getattr(parameter, "quant_state", None)
    if quantised is None:
        return whole(parameter.detach())
    from bitsandbytes.functional import dequantize_4bit

    numbers: torch.Tensor = dequantize_4bit(parameter.data, quantised)
    return numbers


def _carries(module: nn.Module) -> bool:
    """Whether a layer has an adapter."""
    return NAME in getattr(module, "lora_A", ())
