"""AdamW in little memory: moments of 8 bits, weights in bfloat16, moments that wait in the host's memory.

In: gradients. Out: the weights after one step of

    m <- b1 m + (1 - b1) g      v <- b2 v + (1 - b2) g^2      w <- (1 - lr wd) w - lr (m / c1) / (sqrt(v / c2) + eps)

with c1 = 1 - b1^t, c2 = 1 - b2^t (Loshchilov and Hutter 2019), computed in float32, CHUNK numbers at a time.

Moments of 8 bits follow Dettmers et al. 2022, "8-bit optimizers via block-wise quantization": BLOCK numbers share one
scale, their largest magnitude, and tensors below SMALL numbers keep float32. Three things differ. A number x is stored
as the code c with x = scale * (c / levels)^3: like the paper's tree this spans seven decades and is finest at the top,
but it needs no table. Of v the root is stored, of which the update is made: it spans as many decades as m. And codes
are rounded at random, up with the probability that makes the mean right: a decay of v by b2 = 0.999 is less than half
the distance of two codes, so rounding to the nearest would undo it in every step.

Weights in bfloat16 are rounded at random, too (as in Zamirai et al. 2020, "Revisiting BFloat16 training"): an update of
less than half a unit in the last place would always be lost otherwise. The random numbers follow from seed, step and
the parameter's place, so that a resumed run draws the same ones. The three roundings of a number share one.

Where parameters lie in pieces on several processes (scoring/shard.py), each updates its own numbers, by the random
numbers and in the blocks that one process would have for them: all of them draw the whole tensor's random numbers, and
a piece has to begin with a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from fastkl.distributed.world import World
from fastkl.errors import UserError
from fastkl.scoring.pieces import as_pieces, num_pieces, own_part, rows_of, whole

BLOCK = 256
CHUNK = 1 << 20  # numbers that are updated at a time: what float32 copies of them take is all that comes on top
SMALL = 4096
LEVELS = {torch.int8: 127, torch.uint8: 255}
"""The largest code: of m, which has a sign, and of the root of v."""


class SmallAdamW(torch.optim.Optimizer):
    """eight_bit: moments of 8 bits. home: where the moments wait between steps; None: beside their parameter."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eight_bit: bool = False,
        home: torch.device | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})
        self.eight_bit, self.home, self.seed = eight_bit, home, seed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch's may return a loss
        """One step; parameters without a gradient stay as they are."""
        assert closure is None, "the loss has been computed"
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group, place)
        if self.home is not None and torch.cuda.is_available():
            torch.cuda.synchronize()  # the moments are on their way to the host, where a checkpoint would read them

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any], place: int) -> None:
        state = self.state[parameter]
        if not state:
            state.update(self._empty(parameter))
        state["step"] += 1
        step, (b1, b2) = int(state["step"]), group["betas"]
        weights, grads, start = own_part(parameter).view(-1), own_part(grad).reshape(-1), span_of(parameter).start
        random = torch.Generator(parameter.device).manual_seed(rounding_seed(self.seed, step, place))
        for lo in range(0, parameter.numel(), CHUNK):
            hi = min(lo + CHUNK, parameter.numel())
            uniform = torch.rand(hi - lo, generator=random, device=parameter.device)
            lo, drawn_from = max(lo, start), lo
            span = slice(lo - start, min(hi - start, len(weights)))
            if span.start >= span.stop:
                continue  # another process's numbers
            uniform = uniform[lo - drawn_from :][: span.stop - span.start]
            g, w = grads[span].float(), weights[span].float()
            m, root = (self._read(state, name, span, parameter.device) for name in ("exp_avg", "exp_avg_sq"))
            m.lerp_(g, 1 - b1)
            root.square_().mul_(b2).addcmul_(g, g, value=1 - b2).sqrt_()
            w.mul_(1 - group["lr"] * group["weight_decay"])
            denominator = (root / (1 - b2**step) ** 0.5).add_(group["eps"])
            w.addcdiv_(m, denominator, value=-group["lr"] / (1 - b1**step))
            self._write(state, "exp_avg", span, m, uniform)
            self._write(state, "exp_avg_sq", span, root, uniform)
            weights[span] = w if parameter.dtype == torch.float32 else rounded_at_random(w, uniform)

    def _empty(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state before the first step, of this process's piece. float32 moments have torch's own names and
        meaning."""
        place, own = self.home or parameter.device, own_part(parameter)
        pinned = place.type == "cpu" and parameter.is_cuda
        kinds: dict[str, tuple[Sequence[int], torch.dtype]]
        if not self.eight_bit or parameter.numel() < SMALL:
            kinds = dict.fromkeys(("exp_avg", "exp_avg_sq"), (own.shape, torch.float32))
        else:
            blocks = (-(-own.numel() // BLOCK),)
            kinds = {"exp_avg": (own.shape, torch.int8), "exp_avg_scale": (blocks, torch.float32)}
            kinds |= {"exp_avg_sq": (own.shape, torch.uint8), "exp_avg_sq_scale": (blocks, torch.float32)}
        made = {
            name: torch.zeros(shape, dtype=dtype, device=place, pin_memory=pinned)
            for name, (shape, dtype) in kinds.items()
        }
        return {"step": torch.zeros(()), **made}

    def own_state(self, parameter: Tensor, saved: Tensor) -> Tensor:
        """What of a saved state, which is that of the whole parameter, belongs to this process's piece."""
        if saved.ndim:
            numbers = span_of(parameter)
            own = rows_of(parameter) if saved.shape == parameter.shape else _blocks(numbers)
            saved = saved[own]
        return saved.to(self.home or parameter.device, copy=True)

    def whole_state(self, parameter: Tensor, own: Tensor, world: World) -> Tensor:
        """The state of the whole parameter, to be saved; every process must come here."""
        if not own.ndim or num_pieces(parameter) == 1:
            return own
        if own.shape == own_part(parameter).shape:
            return whole(as_pieces(parameter, own.to(parameter.device)))
        return torch.cat(world.everybodys(own.cpu())[: num_pieces(parameter)])

    def _read(self, state: dict[str, Tensor], name: str, span: slice, device: torch.device) -> Tensor:
        """f32, a copy: the moment itself, or the root of the second one."""
        stored = fetched(state[name].view(-1)[span], device)
        if stored.dtype in LEVELS:
            return expanded(stored, fetched(state[f"{name}_scale"][_blocks(span)], device))
        return stored.sqrt() if name == "exp_avg_sq" else stored.clone()

    def _write(self, state: dict[str, Tensor], name: str, span: slice, value: Tensor, uniform: Tensor) -> None:
        target = state[name].view(-1)[span]
        if target.dtype in LEVELS:
            codes, scale = compressed(value, uniform, target.dtype)
            put_back(state[f"{name}_scale"][_blocks(span)], scale)
            put_back(target, codes)
        else:
            put_back(target, value.square() if name == "exp_avg_sq" else value)


def fetched(stored: Tensor, device: torch.device) -> Tensor:
    """A part of the state, where the parameter is."""
    return stored.to(device, non_blocking=True)


def put_back(stored: Tensor, value: Tensor) -> None:
    """The new value into its place in the state."""
    stored.copy_(value, non_blocking=True)


def compressed(x: Tensor, uniform: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """f32 [n] -> codes [n] and scales f32 [ceil(n / BLOCK)], rounded up where `uniform` f32 [n] in [0, 1) is small.

    Unsigned codes are at least 1: a root of 0 would divide what is left of m.
    """
    levels, (blocks, chance) = LEVELS[dtype], (_in_blocks(values) for values in (x, uniform))
    scale = blocks.abs().amax(dim=1)
    t = blocks.abs() * (levels**3 / scale.clamp(min=torch.finfo(torch.float32).tiny))[:, None]
    code = t.pow(1 / 3).floor_()
    width = 3 * code * code + 3 * code + 1  # (c + 1)^3 - c^3
    code += chance * width < t - code**3
    code = code.clamp_(min=0 if dtype.is_signed else 1, max=levels)
    if dtype.is_signed:
        code = code.copysign_(blocks)
    return code.flatten()[: len(x)].to(dtype), scale


def expanded(codes: Tensor, scale: Tensor) -> Tensor:
    """scale * (code / levels)^3, f32 [n]."""
    cubes = _in_blocks(codes.float()) ** 3
    return (cubes * (scale / LEVELS[codes.dtype] ** 3)[:, None]).flatten()[: len(codes)]


def _in_blocks(x: Tensor) -> Tensor:
    """f32 [n] -> [ceil(n / BLOCK), BLOCK], with zeros at the end."""
    return nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)


def _blocks(span: slice) -> slice:
    """The blocks of these numbers; the span begins with a block."""
    return slice(span.start // BLOCK, -(-span.stop // BLOCK))


def rounded_at_random(x: Tensor, uniform: Tensor) -> Tensor:
    """f32 -> bf16, up or down with the probabilities that make the mean x. uniform: in [0, 1), of the same shape.

    bfloat16 is the upper half of float32's bits: what is cut off is the chance, in 2^-16, of one more.
    """
    bits = x.view(torch.int32) + (uniform * (1 << 16)).to(torch.int32)
    return (bits & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


def span_of(parameter: Tensor) -> slice:
    """Which numbers of a parameter, laid end to end, this process holds."""
    rows = rows_of(parameter)
    width = parameter[:1].numel() if parameter.ndim else 0
    return slice(rows.start * width, rows.stop * width)


def check_pieces(named: Iterable[tuple[str, Tensor]]) -> None:
    """UserError where a piece of a parameter does not begin with a block of moments of 8 bits."""
    for name, parameter in named:
        first = span_of(parameter)
        if parameter.requires_grad and parameter.numel() >= SMALL and first.stop > first.start and first.start % BLOCK:
            rows, pieces = " x ".join(map(str, parameter.shape)), num_pieces(parameter)
            raise UserError(
                f"optimizer: adamw8bit keeps moments in blocks of {BLOCK} numbers, and {name} ({rows}) in {pieces} "
                "pieces would cut one; use another number of processes, --optimizer adamw, or --shard none."
            )


def rounding_seed(seed: int, step: int, place: int) -> int:
    """A 63-bit seed for the rounding of one parameter in one step."""
    key = b"".join(value.to_bytes(8, "little", signed=True) for value in (seed, step, place))
    return int.from_bytes(blake2b(key, digest_size=8, person=b"rounding").digest(), "little") >> 1
