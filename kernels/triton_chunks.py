"""chunked.py on a GPU: the same passes, with one Triton launch per chunk where the CPU works block by block.

The source hands out raw logits (a head's output, or the caller's own logits without a copy); the kernels apply bias,
rounding, softcap, scale and temperature as they read. A recorded or recomputed support becomes one byte per logit.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .chunked import Chunks
from .linear import LinearSource, LogitOptions, Side, room_for_gradient
from .support import keep_mask
from .triton_epilogue import score_kernel
from .triton_gradient import gradient_kernel, scale_kernel
from .types import TokenCoefficients

FORWARD_BLOCK, FORWARD_LANES, FORWARD_WARPS = 2048, 512, 4
GRADIENT_BLOCK, GRADIENT_WARPS = 2048, 4
SCALE_BLOCK = 4096
FIELDS = len(TokenCoefficients.__slots__)


class GpuLinearSource(LinearSource):
    """Half-precision heads multiplied as they are, with float32 logits straight from the accumulators.

    The gradient of the logits is written in the heads' dtype: d hidden and dW are half-precision products that
    accumulate in float32.
    """

    def __init__(self, policy: Side, reference: Side | None, row_ids, options: LogitOptions, chunk_rows: int) -> None:
        dtype = policy.hidden.dtype
        super().__init__(policy, reference, row_ids, options, chunk_rows, dtype, raw=True)
        self.dtype = torch.float32  # of the logits
        self.dlogits_buffer = None

    def _product(self, head: Side, hidden: Tensor, out: Tensor) -> None:
        if hidden.dtype == torch.float32:
            torch.mm(hidden, head.weight.t(), out=out)
        else:
            torch.mm(hidden, head.weight.t(), out_dtype=torch.float32, out=out)

    def gradient_buffer(self, z: Tensor) -> Tensor:
        """Where the gradient of the chunk z goes: over the logits if the dtype is the same."""
        if self.policy.weight.dtype == z.dtype:
            return z
        if self.dlogits_buffer is None:
            self.dlogits_buffer = torch.empty_like(self.logits_buffers[0], dtype=self.policy.weight.dtype)
        return self.dlogits_buffer[: len(z)]

    def _accumulate_weight(self, dlogits: Tensor, hidden: Tensor) -> None:
        if hidden.dtype == torch.float32:
            super()._accumulate_weight(dlogits, hidden)
        elif self.grad_weight is None:
            self.grad_weight = torch.mm(dlogits.t(), hidden, out_dtype=torch.float32)
        else:
            torch.addmm(self.grad_weight, dlogits.t(), hidden, out_dtype=torch.float32, out=self.grad_weight)


class DirectLogitsSource:
    """The caller's logits, read in place; where rows are masked the kernel picks them by row_ids."""

    def __init__(self, policy_logits: Tensor, ref_logits: Tensor | None, row_ids, options: LogitOptions) -> None:
        # rows may be strided, ids may not
        self.policy, self.reference = (
            x if x is None or x.stride(1) == 1 else x.contiguous()
            for x in (policy_logits.detach(), None if ref_logits is None else ref_logits.detach())
        )
        self.row_ids, self.options = row_ids, options
        self.dtype, self.vocab = torch.float32, policy_logits.shape[1]
        self.grad_logits = None

    def collect_gradients(self, inplace: bool = False) -> None:
        """Asks for the gradient; rows that are never stored are zero in it."""
        self.grad_logits = room_for_gradient(self.policy, self.row_ids, inplace)

    def load(self, lo: int, hi: int, need_ref: bool = True) -> tuple[Tensor, Tensor | None]:
        """Rows lo..hi; or all rows, if the kernel has to find them through row_ids."""
        self.rows = slice(lo, hi) if self.row_ids is None else slice(None)
        return self.policy[self.rows], None if self.reference is None else self.reference[self.rows]

    def gradient_buffer(self, z: Tensor) -> Tensor:
        """The same rows of the gradient that is handed back."""
        return self.grad_logits[self.rows]

    def store(self, lo: int, hi: int, dlogits: Tensor) -> None:
        """Nothing to do: the kernel wrote it."""


def triton_source(policy: Side | Tensor, reference: Side | Tensor | None, row_ids, options, chunk_rows):
    """The source of a call's logits on a GPU; under the interpreter too, where products stay float32."""
    if isinstance(policy, Side):
        if policy.hidden.is_cuda:
            return GpuLinearSource(policy, reference, row_ids, options, chunk_rows)
        source = LinearSource(policy, reference, row_ids, options, chunk_rows, torch.float32, raw=True)
        source.gradient_buffer = lambda z: z
        return source
    return DirectLogitsSource(policy, reference, row_ids, options)


class TritonChunks(Chunks):
    """The passes of Chunks as kernel launches. Raw logits take the place of centred ones between the calls."""

    def score(self, lo: int, hi: int) -> tuple[Tensor, Tensor | None]:
        """See Chunks.score."""
        z, r = self.source.load(lo, hi)
        self._launch_score(lo, hi, z, r, None)
        return z, r

    def reload(self, lo: int, hi: int, need_gap: bool) -> tuple[Tensor, Tensor | None]:
        """See Chunks.reload."""
        return self.source.load(lo, hi, need_ref=need_gap)

    def score_and_gradient(self, lo: int, hi: int, coefficients: TokenCoefficients) -> None:
        """See Chunks.score_and_gradient: one launch unless there is a support."""
        if self.support_stats is not None:
            super().score_and_gradient(lo, hi, coefficients)
            return
        z, r = self.source.load(lo, hi)
        self._launch_score(lo, hi, z, r, coefficients)
        self.source.store(lo, hi, self.source.gradient_buffer(z))

    def gradient_(self, lo: int, hi: int, z: Tensor, gap: Tensor | None, coefficients: TokenCoefficients) -> None:
        """See Chunks.gradient_; gap is the reference's logits here."""
        _, b, c, a_s, c_s = coefficients.values()
        has_support = a_s is not None or c_s is not None
        keep = self._keep(lo, hi, z) if has_support else None
        factors = _factors(coefficients, hi - lo, z.device)
        out = self.source.gradient_buffer(z)
        if hi > lo:
            gradient_kernel[(hi - lo, triton.cdiv(self.source.vocab, GRADIENT_BLOCK))](
                *self._common(lo, hi, z, gap, keep), factors, factors.stride(0), out, out.stride(0), *self._numbers(),
                **self._flags(keep), HAS_B=b is not None, HAS_C=c is not None, HAS_C_SUPPORT=c_s is not None,
                BLOCK=GRADIENT_BLOCK, num_warps=GRADIENT_WARPS,
            )  # fmt: skip
        self.source.store(lo, hi, out)

    def _launch_score(self, lo: int, hi: int, z: Tensor, r: Tensor | None, coefficients: TokenCoefficients | None):
        keep = None if self.support_stats is None else self._keep(lo, hi, z)
        factors, out = self.stats.max, z
        if coefficients is not None:
            factors, out = _factors(coefficients, hi - lo, z.device), self.source.gradient_buffer(z)
        if hi > lo:
            score_kernel[(hi - lo,)](
                *self._common(lo, hi, z, r, keep), factors, factors.stride(0), out, out.stride(0), *self._numbers(),
                **self._flags(keep), HAS_REF=r is not None, WRITE_GRADIENT=coefficients is not None,
                HAS_B=coefficients is not None and coefficients.entropy is not None,
                HAS_C=coefficients is not None and coefficients.kl is not None,
                BLOCK=FORWARD_BLOCK, LANES=FORWARD_LANES, num_warps=FORWARD_WARPS,
            )  # fmt: skip

    def _common(self, lo: int, hi: int, z: Tensor, r: Tensor | None, keep: Tensor | None) -> tuple:
        """The pointers that both kernels begin with; z stands in where there is nothing to point at."""
        source, rows = self.source, slice(lo, hi)
        direct = isinstance(source, DirectLogitsSource)
        row_ids = source.row_ids if direct and source.row_ids is not None else None
        bias, ref_bias = self._biases()
        temperature = source.options.temperature
        r = z if r is None else r
        stats = self.stats[rows]
        support_stats = stats if self.support_stats is None else self.support_stats[rows]
        return (
            z, z.stride(0), r, r.stride(0), z if bias is None else bias, z if ref_bias is None else ref_bias,
            z if keep is None else keep, self.rows.target_ids[rows], z if row_ids is None else row_ids[rows],
            temperature[rows] if isinstance(temperature, Tensor) else z,
            stats.max, support_stats.max, self.stats.log_sum.storage_offset() - self.stats.max.storage_offset(),
        )  # fmt: skip

    def _biases(self) -> tuple[Tensor | None, Tensor | None]:
        if isinstance(self.source, DirectLogitsSource):
            return None, None
        reference = self.source.reference
        biases = self.source.policy.bias, None if reference is None else reference.bias
        return tuple(None if b is None else b.float() for b in biases)

    def _numbers(self) -> tuple[int, float, float]:
        options = self.source.options
        return self.source.vocab, float(options.softcap or 1.0), options.scale

    def _flags(self, keep: Tensor | None) -> dict[str, bool]:
        options = self.source.options
        bias, ref_bias = self._biases()
        return {
            "HAS_BIAS": bias is not None,
            "HAS_REF_BIAS": ref_bias is not None,
            "HAS_KEEP": keep is not None,
            "HAS_ROW_IDS": isinstance(self.source, DirectLogitsSource) and self.source.row_ids is not None,
            "ROW_TEMPERATURE": isinstance(options.temperature, Tensor),
            "HAS_SOFTCAP": options.softcap is not None,
            "HAS_SCALE": options.has_scale,
            "ROUND_BF16": options.logits_dtype == "bfloat16",
        }

    def _keep(self, lo: int, hi: int, z: Tensor) -> Tensor:
        """The support as u8 [hi - lo, V]; recomputing it takes a processed copy of the policy's logits."""
        support = self.rows.support.select(slice(lo, hi))
        source = self.source
        if support.is_recomputed:
            if isinstance(source, DirectLogitsSource):
                z = z if source.row_ids is None else z.index_select(0, source.row_ids[lo:hi])
            bias = self._biases()[0]
            z = z.float().clone() if bias is None else z.float() + bias
            source.options.apply_(z)
            source.options.scale_(z, lo, hi)
        else:
            z = z[:1].expand(hi - lo, z.shape[1])  # only its shape and device matter
        return keep_mask(support, z, self.rows.target_ids[lo:hi]).view(torch.uint8)


def _factors(coefficients: TokenCoefficients, num_rows: int, device: torch.device) -> Tensor:
    """The five coefficients as float32 [5, n], zero where not given."""
    factors = torch.zeros(FIELDS, num_rows, device=device)
    for out, value in zip(factors, coefficients.values(), strict=True):
        if value is not None:
            out.copy_(value)
    return factors


def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor (one float32), without waiting to learn whether it is 1 and without a pass over x if it is."""
    if not (x.is_contiguous() and factor.dtype == torch.float32):
        x.mul_(factor)
    elif x.numel():
        scale_kernel[(triton.cdiv(x.numel(), SCALE_BLOCK),)](x, factor, x.numel(), BLOCK=SCALE_BLOCK, num_warps=4)
