"""Push check: after every push of weights, what the engine holds is the policy's, tensor by tensor and bit by bit.

Log-probs cannot show this. In bfloat16 equal weights differ by some 0.01 nats per token between engine and trainer, and
a step at a learning rate of 1e-6 moves them by less. So the tensors themselves are compared, by fingerprints
(fingerprint.py) of every part of the policy that the engine stores (places.py), cast to the dtype it is stored in.

Where the engine packs what it has loaded, tensors are compared in between, after they were loaded and before they were
packed; the packed form has to be there still when the push is over, and what can be multiplied with it is (packed.py).
That packing itself is right is the engine's part, and agreement.py's to see.

Where several processes share an engine, each compares what its own part of the engine holds; which part of a tensor
that is, the engine's loader has decided. So at the first push they also compare notes: together they must hold the
whole of every tensor. What is wrong in one process is said by all of them, before anything is drawn.

Where all parameters of an engine turn out to be copies of the policy's parts, the pushes after the first one write them
to their places directly (`place_all`), which spares the engine's loader its bookkeeping. On a GPU all of them can be
read. On a CPU matrices are put together one by one, and packed by the engine's own function.

Measured on one thread of a busy processor: 14 ms for the embedded model's 1.7 million parameters; 0.55 s for 135
million in float32 (SmolLM2-135M), in a push of 1.3 s, which takes 1.8 s through the engine's loader. Fingerprints alone
run at 10 to 15 GB a second where the tensor is in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from fastkl.distributed.world import ALONE, World
from fastkl.rollout.agreement import StaleEngineError
from fastkl.rollout.fingerprint import fingerprint
from fastkl.rollout.packed import Products, packed_as_they_are, packing_layers
from fastkl.rollout.places import Part, Place, Places, Watch, covered

Weights = Iterable[tuple[str, torch.Tensor]]

Prints = dict[Place, list[int]]
"""Fingerprints of the policy's parts, or of what the engine has in their places."""

Key = TypeVar("Key")

NAMED = 4
"""Tensors that an error names; it counts the others."""

NOT_LOADED, INCOMPLETE = "not loaded", "in part in no process of its engine"

PACKING_DEVICES = ("cpu",)
"""Where engines may compute with other copies of a parameter than the one that can be read."""


@dataclass(slots=True)
class Push:
    """One push, while it lasts."""

    places: Places
    watch: Watch | None  # the first one is watched
    names: frozenset[str] | None  # parameters to look at before they are packed; None: all
    loaded: dict[Place, torch.Tensor] = field(default_factory=dict)  # fingerprints before packing
    packed: dict[str, torch.Tensor] = field(default_factory=dict)  # and of the whole parameters after it

    def through(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights, on their way to the engine."""
        for name, tensor in weights:
            if self.watch is not None:
                self.watch.sending(name, tensor)
            yield name, tensor

    def pack(self, path: str, layer: nn.Module, pack: Callable[[], None]) -> None:
        """Lets the engine pack a layer, and looks at it before and after."""
        with self.watch.pause() if self.watch is not None else nullcontext():
            for full, parameter in self._of_interest(path, layer):
                for place in self.places.of_parameter.get(full, ()):
                    self.loaded[place] = fingerprint(place.target(parameter))
            pack()
            self.packed |= {full: fingerprint(parameter) for full, parameter in self._of_interest(path, layer)}

    def pack_anew(self, name: str, weight: torch.Tensor, layers: Sequence[Any]) -> None:
        """Lets the first of the layers that multiply with a parameter pack it, by the engine's own function, and the
        others, as a tied head beside the embedding, use what came of it."""
        for layer in layers[:1]:
            kept = layer.weight
            if name in (self.names or ()):  # empty, until it is loaded
                layer.weight = nn.Parameter(weight, requires_grad=False)
            try:
                path, method = name.rpartition(".")[0], layer.quant_method
                self.pack(path, layer, partial(method.process_weights_after_loading, layer))
            finally:
                layer.weight = kept
        for layer in layers[1:]:
            layer.cpu_linear = layers[0].cpu_linear

    def _of_interest(self, path: str, layer: nn.Module) -> list[tuple[str, torch.Tensor]]:
        named = ((f"{path}.{name}", parameter) for name, parameter in layer.named_parameters(recurse=False))
        return [(full, parameter) for full, parameter in named if self.names is None or full in self.names]


class PushCheck:
    """What is known of one engine, or of this process's part of it: where its parameters come from, and which of them
    it packs.

    dtype: the engine's. It may keep a parameter in float32 all the same. world: the processes that push at the same
    time. shared_by: how many neighbours among them share an engine.
    """

    def __init__(self, dtype: torch.dtype, world: World = ALONE, shared_by: int = 1) -> None:
        self.dtype = dtype
        self.world, self.shared_by = world, shared_by
        self.places = Places(shared_by=shared_by)
        self.packs: frozenset[str] | None = None  # parameters that cannot be read; None: nothing was pushed so far
        self.not_compared: list[str] = []  # the engine has no place for them, or computes with them as it loads
        self._before: Prints = {}  # the policy's, at the last push

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[Push]:
        """While a push lasts."""
        if self.packs is not None:
            yield Push(self.places, None, self.packs)
            return
        with Watch(model, self.places) as watch:
            yield Push(self.places, watch, None)
        self.places.sent.clear()

    def knows_all(self, model: nn.Module) -> bool:
        """Whether every parameter of the engine is known to be a copy of the policy's, and to be read as it is used.

        On CPUs, where an engine may multiply with packed copies, this is known of vectors. Matrices have to be those of
        plain layers, which pack them as they are.
        """
        if self.packs is None or self.places.altered:
            return False
        engine = dict(model.named_parameters(remove_duplicate=False))
        known = packed_as_they_are(model, self.places) | {name for name in engine if self._is_read(name, engine[name])}
        copies = {id(engine[name]) for name in known if self.places.filled(name)}
        return all(id(parameter) in copies for parameter in engine.values()) and all(
            engine[name].dtype == place.dtype and (name in self.packs or place.target.within(engine[name]))
            for name, found in self.places.of_parameter.items()
            for place in found
        )

    def _is_read(self, name: str, parameter: torch.Tensor) -> bool:
        """Whether the engine surely computes with the parameter that it holds."""
        return name not in (self.packs or ()) and (parameter.device.type not in PACKING_DEVICES or parameter.ndim < 2)

    @torch.no_grad()
    def place_all(self, model: nn.Module, weights: Weights) -> Push:
        """Copies the policy's weights to their places, for an engine of which `knows_all` is true.

        A matrix is packed as soon as it has all its parts. One of which the engine keeps the packed form alone is put
        together in new memory, which is free again then.
        """
        engine, at = dict(model.named_parameters(remove_duplicate=False)), self.places.of_sent()
        push, layers = Push(self.places, None, self.packs), packing_layers(model, self.places)
        missing = {name: len(found) for name, found in self.places.of_parameter.items()}
        begun: dict[str, torch.Tensor] = {}
        for sent, tensor in weights:
            for place in at.get(sent, ()):
                name = place.parameter
                if name not in begun:
                    begun[name] = self._to_fill(name, engine[name])
                place.target(begun[name]).copy_(place.source(tensor))
                missing[name] -= 1
                if not missing[name]:
                    push.pack_anew(name, begun.pop(name), layers.get(name, ()))
        return push

    def _to_fill(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """What takes a parameter's parts: itself, or what will be packed where it is empty."""
        packed = name in (self.packs or ())
        return torch.empty(self.places.shapes[name], dtype=parameter.dtype) if packed else parameter

    @torch.no_grad()
    def verify(self, model: nn.Module, weights: Callable[[], Weights], push: Push, step: int) -> None:
        """Compares the engine with the policy's weights, under the names that they are sent by.

        Raises StaleEngineError in all processes, naming tensors and step (0: before the first one).
        """
        engine = dict(model.named_parameters(remove_duplicate=False))
        want, products = self._wanted(model, weights())
        loaded, have = _numbers(push.loaded), _numbers(_readable(want, engine, self.packs or ()))
        complaints = self._learn(weights(), engine, want, loaded, have) if self.packs is None else {}
        held = {place: (loaded if place.parameter in (self.packs or ()) else have).get(place) for place in want}
        differing: dict[str, list[Place]] = {}
        for place in want:
            if held[place] != want[place]:
                differing.setdefault(place.sent, []).append(place)
        packed = {*products.differing(), *self._packed_away(push, engine)}
        before, self._before = self._before, want
        if not self.world.any(bool(complaints or differing or packed)):
            return
        for name, tensor in weights():  # in every process, since weights in pieces are gathered by all
            for place in differing.get(name, ()):
                complaints.setdefault(name, _reason(place, held[place], place.source(tensor), want, before))
        for parameter in packed:
            for place in self.places.of_parameter[parameter]:
                complaints.setdefault(place.sent, "packed from other weights")
        raise StaleEngineError(next(filter(None, self.world.everybodys(self._sentence(complaints, step)))))

    def _wanted(self, model: nn.Module, weights: Weights) -> tuple[Prints, Products]:
        """What the engine should hold, and what its packed matrices should give."""
        at, wanted, products = self.places.of_sent(), {}, Products(model, self.places)
        for name, tensor in weights:
            for place in at.get(name, ()):
                if place.parameter not in self.places.altered:
                    part = place.source(tensor).to(place.dtype)
                    wanted[place] = fingerprint(part)
                    products.add(place, part)
        return _numbers(wanted), products

    def _learn(
        self, weights: Weights, engine: Mapping[str, torch.Tensor], want: Prints, loaded: Prints, have: Prints
    ) -> dict[str, str]:
        """After the first push: finds what the engine packs and what cannot be compared; complaints by tensor.

        A tensor without a place in the engine is the engine's own affair (a part of the model that it leaves out),
        unless it has a parameter that got nothing. Single numbers are not copied but filled in, which is not seen.
        """
        self.packs = frozenset(place.parameter for place in want if have.get(place) != want[place] == loaded.get(place))
        sent, placed = {name: Part.of(tensor, tensor) for name, tensor in weights}, {place.sent for place in want}
        self.not_compared = [name for name in sent if name not in placed]
        homeless = [name for name in self.not_compared if name not in self.places.of_sent() and sent[name].numel > 1]
        filled = {id(engine[name]) for name in engine if name in self.places.altered or self.places.filled(name)}
        if all(id(parameter) in filled for parameter in engine.values() if parameter.numel() != 1):
            homeless = []
        kept = {p.sent: f"kept as {_name(p.dtype)}" for p in want if p.dtype not in (self.dtype, torch.float32)}
        return dict.fromkeys(homeless, NOT_LOADED) | kept | dict.fromkeys(self._incomplete(sent), INCOMPLETE)

    def _incomplete(self, sent: Mapping[str, Part]) -> list[str]:
        """Tensors of which the processes that share an engine do not hold all, taken together."""
        if self.shared_by == 1:
            return []
        compared = {
            name: [place.source for place in places]
            for name, places in self.places.of_sent().items()
            if not any(place.parameter in self.places.altered for place in places)
        }
        first = self.world.rank // self.shared_by * self.shared_by
        group = self.world.everybodys(compared)[first : first + self.shared_by]
        held = {name: [part for parts in group for part in parts.get(name, ())] for name in sent}
        return [name for name, whole in sent.items() if held[name] and not covered(whole, held[name])]

    def _packed_away(self, push: Push, engine: Mapping[str, torch.Tensor]) -> list[str]:
        """Parameters that are not, when all is over, what the engine has packed them to."""
        packed = {name: found for name, found in push.packed.items() if name in (self.packs or ())}
        now = _numbers({name: fingerprint(engine[name]) for name in packed})
        return [name for name, found in _numbers(packed).items() if found != now[name]]

    def _sentence(self, complaints: Mapping[str, str], step: int) -> str:
        """The error's text: at most NAMED tensors, each with its reason; empty where nothing is wrong here."""
        if not complaints:
            return ""
        named = ", ".join(f"{name} ({reason})" for name, reason in list(complaints.items())[:NAMED])
        more = f" and {len(complaints) - NAMED} more" if len(complaints) > NAMED else ""
        engine = f"the engine of process {self.world.rank}" if self.world.size > 1 else "the engine"
        return (
            f"step {step}: the weights that were pushed to {engine} did not all arrive: {named}{more}; no completion "
            "was drawn with them, and --generator transformers avoids a second copy of the weights."
        )


def _reason(place: Place, found: list[int] | None, part: torch.Tensor, want: Prints, before: Prints) -> str:
    """What the engine has in a place instead of the policy's numbers, which are `part`; before: the last push's."""
    if found is None:
        return NOT_LOADED
    if found == before.get(place):
        return "of an earlier push"
    for other in want:
        if other.sent != place.sent and want[other] == found:
            return f"replaced by {other.sent}"
    for dtype in (torch.float16, torch.bfloat16):
        if fingerprint(part.to(dtype).to(place.dtype)).tolist() == found:
            return f"rounded to {_name(dtype)}"
    return "unlike the policy's"


def _readable(
    places: Iterable[Place], engine: Mapping[str, torch.Tensor], packs: Collection[str]
) -> dict[Place, torch.Tensor]:
    """Fingerprints of what the engine holds in these places, where it can be read."""
    found = {}
    for place in places:
        parameter = engine[place.parameter]
        if place.parameter not in packs and parameter.dtype == place.dtype and place.target.within(parameter):
            found[place] = fingerprint(place.target(parameter))
    return found


def _numbers(prints: Mapping[Key, torch.Tensor]) -> dict[Key, list[int]]:
    """Fingerprints as Python's integers, with one copy from the device."""
    if not prints:
        return {}
    return dict(zip(prints, torch.stack(list(prints.values())).tolist(), strict=True))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
