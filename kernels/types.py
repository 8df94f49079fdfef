"""The types of the scoring operators' arguments and results: what the sampler allowed, the scores, the factors of a
loss.

Letters: N scored tokens (rows), V vocabulary, S the set of token ids that the sampler allowed at a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

IGNORED_ID = -100
"""The target of a row that is not scored, as in the labels of Hugging Face and PyTorch's cross entropy."""

OUTPUTS = ("entropy", "kl")
"""What comes back beside the log-probabilities unless something else is asked for."""

DIVERGENCES = ("forward_kl", "jsd")
"""What comes back only where it is asked for: it takes another pass over the logits."""


@dataclass(frozen=True, slots=True)
class Head:
    """The output head of a language model: hidden states in, logits over the vocabulary out."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    softcap: float | None = None  # logits are softcap * tanh(logits / softcap): Gemma-2
    logit_scale: float = 1.0  # Cohere multiplies by it, Granite divides

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., H] -> logits [..., V], both in the weight's dtype: logit_scale * softcap * tanh(. / softcap)."""
        logits = functional.linear(hidden, self.weight, self.bias)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits * self.logit_scale


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Per-token scores, each f32 [N] (f64 [N] for f64 inputs), in nats, exactly zero where masked.

    With policy logits z, reference logits r (both after temperature), p = softmax(z), q = softmax(r), target y:

        policy_logprobs          log p(y)                        ref_logprobs           log q(y)
        entropy                  -sum_v p(v) log p(v)            kl                     sum_v p(v) (log p(v) - log q(v))

        forward_kl               sum_v q(v) (log q(v) - log p(v))
        jsd                      1/2 KL(p, m) + 1/2 KL(q, m) with m = (p + q) / 2, at most log 2

    and the `_support` twins with p and q both renormalised on the same S. outside_support is 1 where y is not in S as
    it was recorded or recomputed, else 0; all others are computed with y in S, since it was sampled. A field is None
    where nothing was asked for or no reference (no support) was given. Gradients flow through the policy only;
    ref_logprobs has none.

    An id with the logit -inf has probability zero: it adds nothing to a sum over p, its own log-prob is -inf, and the
    KL is inf where q excludes an id that p does not; forward_kl where p excludes one that q does not; jsd nowhere. Of a
    row whose logits are all -inf, every score is NaN.
    """

    policy_logprobs: Tensor
    ref_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    kl: Tensor | None = None
    policy_logprobs_support: Tensor | None = None
    ref_logprobs_support: Tensor | None = None
    kl_support: Tensor | None = None
    outside_support: Tensor | None = None
    forward_kl: Tensor | None = None
    jsd: Tensor | None = None
    forward_kl_support: Tensor | None = None
    jsd_support: Tensor | None = None

    def values(self) -> tuple[Tensor | None, ...]:
        """The fields in order."""
        return tuple(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True, slots=True)
class TokenCoefficients:
    """The factors of a loss that is linear in the scores: loss = sum over fields and rows of coefficient * score.

    Each is f32 [N] or None (zero). They are constants: no gradient flows into them.
    """

    policy_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    kl: Tensor | None = None
    policy_logprobs_support: Tensor | None = None
    kl_support: Tensor | None = None
    forward_kl: Tensor | None = None
    jsd: Tensor | None = None
    forward_kl_support: Tensor | None = None
    jsd_support: Tensor | None = None

    @property
    def of_divergences(self) -> tuple[Tensor | None, ...]:
        """Those of forward_kl, jsd, forward_kl_support and jsd_support."""
        return self.forward_kl, self.jsd, self.forward_kl_support, self.jsd_support

    @property
    def need_reference(self) -> bool:
        """Whether the gradient depends on the reference's logits."""
        return any(c is not None for c in (self.kl, self.kl_support, *self.of_divergences))

    @property
    def need_support(self) -> bool:
        """Whether the gradient depends on the support."""
        on_support = self.policy_logprobs_support, self.kl_support, self.forward_kl_support, self.jsd_support
        return any(c is not None for c in on_support)

    def select(self, rows: Tensor | slice) -> TokenCoefficients:
        """The same factors for some of the rows (int64 indices [n], bool [N] or a slice)."""
        return TokenCoefficients(*(None if c is None else c[rows] for c in self.values()))

    def values(self) -> tuple[Tensor | None, ...]:
        """The fields in order."""
        return tuple(getattr(self, f.name) for f in fields(self))


CoefficientsFunction = Callable[[slice, TokenScores], TokenCoefficients]
"""Called with a range of rows and their finished scores; returns the coefficients of those rows."""


@dataclass(frozen=True, slots=True)
class Support:
    """What the sampler allowed at each row: either its own record, or the settings from which it is recomputed.

    The record: `kept_ids` i64 [num_kept] holds the allowed ids of row 0, then of row 1, ...; row i owns
    kept_ids[kept_offsets[i]:kept_offsets[i + 1]], kept_offsets i64 [N + 1].

    The settings are applied to the policy's processed logits in the order of vLLM's sampler: excluded and banned ids,
    temperature, min_p, top_k, top_p. `excluded_ids` i64 [num_excluded] are removed from all rows, `banned_ids` i64
    [num_banned] from the rows where `banned_rows` bool [N] is true (from all rows if None): min_tokens bans the
    end-of-sequence ids in the first tokens.
    top_k, top_p and min_p are numbers or tensors [N]; top_k <= 0, top_p >= 1 and min_p <= 0 mean "off".
    ties says which of equal logits are kept where top_k or top_p cuts between them. "torch": at the top_k threshold
    all, at that of top_p as torch.sort orders them, as vLLM's PyTorch sampler does (CPUs) and transformers.
    "lowest_ids": exactly so many as are needed, the lowest ids first, as vLLM's Triton sampler does (GPUs, requests
    with seeds) but for its own rounding. With bfloat16 logits the two differ in one or two ids of a row, which together
    weigh 5e-5 (peaked rows) to 1e-3 (flat ones).

    The target of a row is kept in either form, whatever the rest says: it was sampled. TokenScores.outside_support
    marks the rows where nothing else would have kept it.
    """

    kept_ids: Tensor | None = None
    kept_offsets: Tensor | None = None
    banned_ids: Tensor | None = None
    banned_rows: Tensor | None = None
    top_k: int | Tensor | None = None
    top_p: float | Tensor | None = None
    min_p: float | Tensor | None = None
    excluded_ids: Tensor | None = None
    ties: str = "torch"

    @property
    def lowest_ids(self) -> bool:
        """Whether equal logits at a cut go to the lowest ids."""
        return self.ties == "lowest_ids"

    @property
    def is_recomputed(self) -> bool:
        """Whether S depends on the logits (otherwise it is known beforehand)."""
        return self.kept_ids is None and any(x is not None for x in (self.top_k, self.top_p, self.min_p))

    def select(self, rows: Tensor | slice) -> Support:
        """The same support for some rows: a slice without a step, or i64 [n] in any order."""

        def pick(value: Any) -> Any:
            return value[rows] if isinstance(value, Tensor) and value.dim() else value

        if self.kept_ids is None or self.kept_offsets is None:
            per_row = ("banned_rows", "top_k", "top_p", "min_p")
            return replace(self, **{name: pick(getattr(self, name)) for name in per_row})
        if isinstance(rows, slice):
            offsets = self.kept_offsets[rows.start : rows.stop + 1]
            return Support(kept_ids=self.kept_ids[offsets[0] : offsets[-1]], kept_offsets=offsets - offsets[0])
        counts = self.kept_offsets.diff()[rows]
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        starts = (self.kept_offsets[:-1][rows] - offsets[:-1]).repeat_interleave(counts)
        return Support(
            kept_ids=self.kept_ids[starts + torch.arange(starts.numel(), device=starts.device)], kept_offsets=offsets
        )
