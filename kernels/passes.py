"""What the two implementations of the operators share: the rows and options of a call, and two protocols.

A `Source` makes the logits of a range of rows and takes their gradient back. `Passes` go over these logits: statistics
first, gradients from them. cpu/ implements both in PyTorch, gpu/ in Triton, under the same names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .types import Support, TokenCoefficients
from .vocab_group import Share


@dataclass(frozen=True, slots=True)
class Rows:
    """What belongs to the rows being scored, beside their logits."""

    target_ids: Tensor  # i64 [n]; all of them in the vocabulary (of a share of it: 0 where the target is elsewhere)
    support: Support | None
    entropy: bool  # whether the entropy or its gradient is wanted
    kl: bool  # whether a KL or its gradient is wanted
    divergences: tuple[str, ...] = ()  # those of types.DIVERGENCES that are wanted, or their gradients
    share: Share | None = None  # of the vocabulary, where several processes hold it
    untargeted: Tensor | None = None
    """f32 [n]: what the scores of a row are whose target is no id, 0 or NaN; inf in the other rows. None: no such row.

    These rows are passed over like the others, with id 0 for their target. So nobody needs to know their number, for
    which a GPU would have to be waited for.
    """

    def __len__(self) -> int:
        return len(self.target_ids)

    def select(self, rows: Tensor | slice) -> Rows:
        """Some of them: i64 [m] in any order, or a slice without a step."""
        return replace(
            self,
            target_ids=self.target_ids[rows],
            support=None if self.support is None else self.support.select(rows),
            share=None if self.share is None else self.share.select(rows),
            untargeted=None if self.untargeted is None else self.untargeted[rows],
        )


def chunk_ranges(num_rows: int, chunk_rows: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of at most `chunk_rows` rows."""
    for lo in range(0, num_rows, chunk_rows):
        yield lo, min(lo + chunk_rows, num_rows)


@dataclass(frozen=True, slots=True)
class LogitOptions:
    """How a head's output becomes the logits that are sampled from: rounding, softcap, scale, then temperature.

    gradient_dtype: of the two products that take the gradient back through the head, on a CPU.
    """

    temperature: float | Tensor = 1.0  # a number, or [n]
    softcap: float | None = None
    logit_scale: float = 1.0
    logits_dtype: str = "float32"
    gradient_dtype: str = "float32"

    @property
    def scale(self) -> float:
        """logit_scale / temperature, unless every row has its own temperature: then the kernels that read the logits
        apply it."""
        return float(self.logit_scale if isinstance(self.temperature, Tensor) else self.logit_scale / self.temperature)

    @property
    def has_scale(self) -> bool:
        """Whether logits change by scale and temperature."""
        return isinstance(self.temperature, Tensor) or self.scale != 1.0

    def rounded_by_product(self, dtype: torch.dtype, *biases: Tensor | None) -> bool:
        """Whether the logits of heads in this dtype are what a bfloat16 product on a GPU writes: its float32
        accumulators, rounded once, before anything is done to them."""
        no_bias = all(bias is None for bias in biases)
        return dtype == torch.bfloat16 and self.logits_dtype == "bfloat16" and no_bias

    def apply_(self, logits: Tensor) -> None:
        """Rounds and caps the head's output [n, V] in place: what comes before scale and temperature."""
        if self.logits_dtype == "bfloat16":
            logits.copy_(logits.bfloat16())
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def temperature_of(self, lo: int, hi: int) -> float | Tensor:
        """The temperature of rows lo..hi."""
        return self.temperature[lo:hi] if isinstance(self.temperature, Tensor) else self.temperature

    def scale_(self, logits: Tensor, lo: int, hi: int) -> None:
        """Applies logit scale and temperature to the logits [hi - lo, V] of rows lo..hi."""
        if self.logit_scale != 1.0:
            logits.mul_(self.logit_scale)
        temperature = self.temperature_of(lo, hi)
        if isinstance(temperature, Tensor):
            logits.div_(temperature[:, None])
        elif temperature != 1.0:
            logits.div_(temperature)

    def factor(self, lo: int, hi: int, device: torch.device) -> Tensor | None:
        """What scale_ multiplies with, logit_scale / temperature, f64 [hi - lo]; None if it is one."""
        if not self.has_scale:
            return None
        ones = torch.ones(hi - lo, dtype=torch.float64, device=device)
        return ones * self.logit_scale / self.temperature_of(lo, hi)


@dataclass(frozen=True, slots=True)
class Side:
    """One model's side of a call: hidden states [*, H], weight [V, H], bias [V] or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def to(self, dtype: torch.dtype) -> Side:
        """Weight in the compute dtype, bias in float32 or finer."""
        bias = self.bias
        if bias is not None:
            bias = bias.detach().to(torch.promote_types(dtype, torch.float32))
        return Side(self.hidden.detach(), self.weight.detach().to(dtype), bias)

    def shares_weights_with(self, other: Side) -> bool:
        """Whether both use the same head in memory, so that one product serves both."""
        a, b = self.weight, other.weight
        same_weight = a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
        biases = [None if side.bias is None else side.bias.data_ptr() for side in (self, other)]
        return same_weight and biases[0] == biases[1]


class Source(Protocol):
    """The logits of the scored rows, policy's and reference's. Rows are numbered as they are scored."""

    vocab: int
    row_ids: Tensor | None  # i64 [n]: the place of each scored row in the inputs; None: all of them in order
    options: LogitOptions

    def load(self, lo: int, hi: int, need_ref: bool = True) -> tuple[Tensor, Tensor | None]:
        """Policy and reference logits of rows lo..hi, before scale and temperature; the caller may overwrite them."""

    def store(self, lo: int, hi: int, dlogits: Tensor) -> None:
        """Takes the gradient with respect to the head's output [hi - lo, V]; the rows are among those loaded last."""

    def collect_gradients(self, needed: Sequence[bool], inplace: bool) -> None:
        """Asks for the gradients of those inputs that need one; rows that are never stored are zero in them.

        inplace: given logits may be overwritten by theirs.
        """

    def gradients(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """What was collected, in the dtypes of the inputs: (hidden, weight, bias) or (logits,)."""


class Passes(Protocol):
    """The passes over one source; their lifetime is one operator call. lo..hi: a range of the scored rows."""

    rows: Rows

    @property
    def source(self) -> Source:
        """Where the logits come from and their gradient goes."""

    def allowed(self) -> tuple[Tensor, Tensor] | None:
        """(row, id), i64 [M] each: the support of the rows scored last, if it was recomputed and found as a list."""

    def score(self, lo: int, hi: int) -> tuple[Tensor, Tensor | None]:
        """Fills the statistics of the rows; returns what `gradient_` needs, [hi - lo, V] each."""

    def reload(self, lo: int, hi: int, need_gap: bool) -> tuple[Tensor, Tensor | None]:
        """What `score` returned for these rows, computed again from the known statistics."""

    def gradient_(self, lo: int, hi: int, z: Tensor, gap: Tensor | None, coefficients: TokenCoefficients) -> None:
        """Turns the result of `score` or `reload` into the gradient and stores it. coefficients: of these rows."""

    def gradient_of_active_(self, lo: int, z: Tensor, gap: Tensor | None, coefficients: TokenCoefficients) -> None:
        """`gradient_` of those rows of a chunk that have one; z, gap, coefficients: of rows lo, lo + 1, ..."""

    def score_and_gradient(self, lo: int, hi: int, coefficients: TokenCoefficients) -> None:
        """`score`, then `gradient_` of the same rows."""
