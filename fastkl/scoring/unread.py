"""Models whose weights are read piece by piece: no process holds a whole one.

In: a folder or hub id with safetensors. Out, first, the model without memory for its parameters, which are on the meta
device; buffers, such as the frequencies of rotary embeddings, are computed as ever. Once it has been cut (shard.py),
`fill` reads of every parameter the rows that this process holds, one parameter after the other.

Left to transformers, which reads whole weights, are models whose parameters are not in the files under their own names,
one by one, such as experts that are merged while they are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastkl.scoring.pieces import as_pieces, rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

META = torch.device("meta")

FLOATS = ("F64", "F32", "F16", "BF16")
"""safetensors' names of the dtypes that are read here."""


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """Where a model's tensors are."""

    file_of: Mapping[str, str]  # by the tensor's name

    @classmethod
    def of(cls, source: str) -> WeightFiles | None:
        """Those of a folder or hub id; None where there are none that can be read."""
        import json

        from safetensors import safe_open
        from transformers.utils import cached_file

        def path_of(name: str) -> str | None:
            found: str | None = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
            return found

        if (single := path_of("model.safetensors")) is not None:
            with safe_open(single, framework="pt") as file:
                return cls(dict.fromkeys(file.keys(), single))
        if (index := path_of("model.safetensors.index.json")) is None:
            return None
        with open(index, encoding="utf-8") as stream:
            names: dict[str, str] = json.load(stream)["weight_map"]
        paths = {name: path_of(name) for name in sorted(set(names.values()))}
        found = {tensor: path for tensor, name in names.items() if (path := paths[name]) is not None}
        return cls(found) if len(found) == len(names) else None

    def are_those_of(self, model: nn.Module) -> bool:
        """Whether they hold the model's parameters and buffers under their own names, in their shapes, and no others:
        of tied parameters one."""
        own = {name: tuple(tensor.shape) for name, tensor in _saved(model)}
        if self.file_of.keys() != own.keys():
            return False
        return all(self._shape_of(name) == shape for name, shape in own.items())

    def rows(self, name: str, rows: slice) -> torch.Tensor:
        """Rows of a tensor, in the file's dtype; nothing else of it is read."""
        from safetensors import safe_open

        with safe_open(self.file_of[name], framework="pt") as file:
            part = file.get_slice(name)
            shape = part.get_shape()
            if not shape:
                return file.get_tensor(name)
            first, last, _ = rows.indices(shape[0])
            return part[first:last] if first < last else torch.empty(0, *shape[1:])

    def _shape_of(self, name: str) -> tuple[int, ...] | None:
        """None for what is not stored as floating-point numbers."""
        from safetensors import safe_open

        with safe_open(self.file_of[name], framework="pt") as file:
            part = file.get_slice(name)
            return tuple(part.get_shape()) if part.get_dtype() in FLOATS else None


def _saved(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers as files have them: of tied parameters the first."""
    kept = set(model.state_dict())
    return [*model.named_parameters(), *((name, buffer) for name, buffer in model.named_buffers() if name in kept)]


def unread_model(source: str, config: Any, model_class: Any, attention: str | None) -> PreTrainedModel | None:
    """The model without its weights, in float32, dropout as it comes; None where transformers has to read them."""
    from transformers import GenerationConfig
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    files = None if getattr(config, "quantization_config", None) else WeightFiles.of(source)
    if files is None:
        return None
    build = getattr(model_class, "from_config", None) or model_class._from_config
    options = {"attn_implementation": attention} if attention else {}
    with parameters_on_meta():
        model: Any = build(config, dtype=torch.float32, **options)
    model.tie_weights()
    if any(not isinstance(change, WeightRenaming) for change in get_model_conversion_mapping(model)):
        return None
    if not files.are_those_of(model):
        return None
    if model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(source)
        except OSError:  # as transformers does where a model has none
            model.generation_config = GenerationConfig.from_pretrained(source, config_file_name="config.json")
    read: PreTrainedModel = model
    return read


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that are built inside have parameters without memory; their buffers are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to(META), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def is_unread(model: nn.Module) -> bool:
    """Whether a model's weights have still to be read."""
    return any(parameter.is_meta for parameter in model.parameters())


def first_rows(model: nn.Module, source: str, count: int) -> Iterator[torch.Tensor]:
    """The first `count` numbers of every parameter, f32, of a model that is unread."""
    files = WeightFiles.of(source)
    assert files is not None
    for name, parameter in model.named_parameters():
        width = max(1, parameter[:1].numel() if parameter.ndim else 1)
        yield files.rows(name, slice(0, -(-count // width))).flatten()[:count].float()


@torch.no_grad()
def fill(model: nn.Module, source: str, device: torch.device) -> None:
    """Reads the weights of an unread model, and of one in pieces this process's, each in the dtype that it has."""
    files = WeightFiles.of(source)
    assert files is not None
    for name, buffer in model.named_buffers():
        if name in files.file_of:
            buffer.copy_(files.rows(name, slice(None)))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                places.setdefault(id(parameter), []).append((module, name))
    for key, holders in places.items():
        module, own_name = holders[0]
        unread = getattr(module, own_name)
        numbers = files.rows(names[key].replace(".base_layer.", "."), rows_of(unread))
        read = (numbers.float() if numbers.dtype == torch.float64 else numbers).to(device, unread.dtype, copy=True)
        pieces = as_pieces(unread, read) if hasattr(unread, "full_tensor") else read
        parameter = nn.Parameter(pieces, unread.requires_grad)
        for module, own_name in holders:  # tied ones stay one
            setattr(module, own_name, parameter)
