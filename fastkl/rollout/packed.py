"""Packed matrices: what an engine multiplies with where its weights cannot be read.

On a CPU vLLM hands its matrices to oneDNN, which keeps them in a form of its own, and a tied output head is a second
copy beside the embeddings. So they are multiplied with some numbers, and the products are compared with the policy's.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import nn

from fastkl.rollout.places import Place, Places

PROBES, PRODUCTS = 4, 2048
"""Vectors of +1 and -1 that a matrix is multiplied with: at least PROBES, and so many that there are PRODUCTS."""

ROUNDING = 2.0
"""How much more a product of K terms may be off than a random walk of K roundings to 24 bits, sqrt(K) 2^-24 relative to
the products' root mean square. Measured for equal weights: 0.1 to 0.3."""

PLAIN = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")
"""vLLM's ways with layers that are not quantised: what they pack is the matrix that was loaded."""


class Products:
    """The policy's products with the probes, for all matrices that the engine multiplies with in packed form."""

    def __init__(self, model: nn.Module, places: Places) -> None:
        self.places = places
        self.layers = packed_layers(model, places)
        self._want: dict[str, torch.Tensor] = {}  # by parameter: f32 [P, rows], NaN where nothing was copied to

    def add(self, place: Place, part: torch.Tensor) -> None:
        """Takes the policy's part of a parameter, in the dtype in which the engine loads it."""
        if place.parameter not in self.layers:
            return
        rows, columns = self.places.shapes[place.parameter]
        first_row, first_column = divmod(place.target.offset, columns)
        x = probes(rows, columns)[:, first_column : first_column + part.shape[1]]
        want = self._want.setdefault(place.parameter, torch.full((len(x), rows), torch.nan))
        here = want[:, first_row : first_row + part.shape[0]]
        here.copy_(here.nan_to_num(nan=0.0) + x @ part.float().T)

    def differing(self) -> list[str]:
        """Parameters in whose place the engine multiplies with other numbers than the policy's."""
        return [
            parameter
            for parameter, want in self._want.items()
            for terms in [self.places.shapes[parameter][1]]
            if not all(alike(self._product(parameter, layer), want, terms) for layer in self.layers[parameter])
        ]

    def _product(self, parameter: str, layer: Any) -> torch.Tensor:
        x = probes(*self.places.shapes[parameter]).to(self.places.of_parameter[parameter][0].dtype)
        product: torch.Tensor = layer.cpu_linear(x, layer.weight, None)
        return product


def packed_layers(model: nn.Module, places: Places) -> dict[str, list[Any]]:
    """By parameter: the layers that multiply with it in packed form, a tied head among them."""
    return {
        name: used
        for name, layers in packing_layers(model, places).items()
        if name not in places.altered and _by_rows(places, name)
        if (used := [layer for layer in layers if _multiplies(layer, model)])
    }


def packed_as_they_are(model: nn.Module, places: Places) -> set[str]:
    """Parameters that the engine packs without changing a number: the matrices of plain layers."""
    return {
        name
        for name, layers in packing_layers(model, places).items()
        if _by_rows(places, name) and all(map(_is_plain, layers))
    }


def packing_layers(model: nn.Module, places: Places) -> dict[str, list[Any]]:
    """By parameter: the layers that have a packed form of it, those that only look rows up among them."""
    by_storage = {
        parameter.untyped_storage().data_ptr(): name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.numel() and name in places.of_parameter
    }
    found: dict[str, list[Any]] = {}
    for path, layer in model.named_modules():
        if hasattr(layer, "cpu_linear"):
            own = f"{path}.weight"
            name = own if own in places.of_parameter else by_storage.get(layer.weight.untyped_storage().data_ptr(), "")
            if name:
                found.setdefault(name, []).append(layer)
    return found


@cache
def probes(rows: int, columns: int) -> torch.Tensor:
    """f32 [P, columns] of +1 and -1 for a matrix of this shape, always the same ones."""
    shape = max(PROBES, PRODUCTS // rows), columns
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(columns)).float() * 2 - 1


def alike(have: torch.Tensor, want: torch.Tensor, terms: int) -> bool:
    """Whether two computations of products, sums of `terms` terms, are those of one matrix: have [P, rows] in the
    engine's dtype, want f32 [P, rows] with NaN where it is unknown.

    In float32 their root mean square difference is at most ROUNDING. In 16 bits it is the number of products that
    round to another number: an error of the 24-bit sum is 2^-16 of the distance between neighbours. One small number
    that has moved to its neighbour does not show; of a step's many some do.
    """
    known = ~want.isnan()
    if not known.all():  # picking takes longer than all the rest
        have, want = have[known], want[known]
    noise = ROUNDING * math.sqrt(terms) * 2.0**-24
    if have.dtype == torch.float32:
        return bool((have - want).square().mean().sqrt() <= noise * want.square().mean().sqrt())
    rounded_otherwise = (have != want.to(have.dtype)).sum()
    return bool(rounded_otherwise <= 2 + 2**9 * noise * want.numel())


def _multiplies(layer: nn.Module, model: nn.Module) -> bool:
    """Embeddings look rows up: nobody multiplies with their packed copy, unless they are the head, too."""
    return type(layer).__name__ != "VocabParallelEmbedding" or getattr(model, "lm_head", layer) is layer


def _is_plain(layer: Any) -> bool:
    """Whether a layer packs its weight and nothing else, by itself; those of latent attention are split elsewhere."""
    return type(layer.quant_method).__name__ in PLAIN and not getattr(layer, "_cpu_skip_gemm_dispatch", False)


def _by_rows(places: Places, name: str) -> bool:
    """Whether all places of a matrix are blocks of it, not turned round."""
    shape = places.shapes[name]
    return len(shape) == 2 and all(
        len(place.target.shape) == 2 and place.target.stride == (shape[1], 1) for place in places.of_parameter[name]
    )
