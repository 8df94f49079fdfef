"""The definition of the scoring operators in plain PyTorch: what every other implementation is tested against.

In: policy and reference logits, or the hidden states and heads that produce them. Out: TokenScores. Autograd
differentiates it as it stands. All of it is materialised, so it needs several times N * V numbers: read it, test with
it, measure against it. In fp32 it also serves as the baseline ("the plain PyTorch line") that tolerances come from.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn.functional import linear

from .support import keep_mask
from .types import IGNORED_ID, OUTPUTS, Head, Support, TokenScores


def token_scores(
    policy_logits: Tensor,
    ref_logits: Tensor | None,
    target_ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    support: Support | None = None,
    valid_vocab: int | None = None,
    outputs: Collection[str] = OUTPUTS,
) -> TokenScores:
    """Scores of the targets under policy and reference, with z = policy_logits / temperature, r likewise.

    policy_logits, ref_logits [N, V]; target_ids i64 [N]; mask bool [N]; temperature a number or [N]. Only the first
    `valid_vocab` columns exist. A row with the target -100 is masked. Any other target that is no id of the vocabulary
    makes all scores of its row NaN, constants without a gradient. Formulas in TokenScores; exact KL summed over the
    whole vocabulary, not sampled. outputs: which of OUTPUTS and DIVERGENCES are wanted.
    """
    dtype = torch.float64 if policy_logits.dtype == torch.float64 else torch.float32
    tau = torch.as_tensor(temperature, dtype=dtype, device=policy_logits.device).reshape(-1, 1)
    # a masked row may hold anything, NaN included: it must reach neither scores nor gradients
    scored = target_ids != IGNORED_ID if mask is None else mask & (target_ids != IGNORED_ID)
    policy_logits = torch.where(scored[:, None], policy_logits, 0)
    ref_logits = None if ref_logits is None else torch.where(scored[:, None], ref_logits, 0)
    tau = torch.where(scored[:, None], tau, 1)
    target_ids = torch.where(scored, target_ids, 0)

    z = policy_logits[:, :valid_vocab].to(dtype) / tau
    r = None if ref_logits is None else ref_logits.detach()[:, :valid_vocab].to(dtype) / tau
    known = (target_ids >= 0) & (target_ids < z.shape[1])
    target_ids = torch.where(known, target_ids, 0)
    full = _scores(z, r, target_ids, keep=None)
    found = {name: full.get(name) for name in ("policy_logprobs", "ref_logprobs", *outputs)}
    if support is not None:
        allowed = keep_mask(support, z.detach())
        found["outside_support"] = (~allowed.gather(1, target_ids[:, None])[:, 0]).to(dtype)
        on_support = _scores(z, r, target_ids, keep_mask(support, z.detach(), target_ids))
        twins = {name: f"{name}_support" for name in found if f"{name}_support" in TokenScores.__slots__}
        found |= {twin: on_support.get(name) for name, twin in twins.items()}

    def masked(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.where(scored, torch.where(known, x, torch.nan), 0)

    return TokenScores(**{name: masked(x) for name, x in found.items()})


def _scores(z: Tensor, r: Tensor | None, target_ids: Tensor, keep: Tensor | None) -> dict[str, Tensor]:
    """All scores by name, with p and q restricted to `keep` and renormalised."""

    def log_softmax(x: Tensor) -> Tensor:
        return (x if keep is None else x.masked_fill(~keep, -torch.inf)).log_softmax(1)

    def kl(p: Tensor, logp: Tensor, logq: Tensor) -> Tensor:  # where p is exactly zero the summand is, too
        return (p * (logp.masked_fill(p == 0, 0) - logq.masked_fill(p == 0, 0))).sum(1)

    logp = log_softmax(z)
    p = logp.exp()
    found = {"policy_logprobs": logp.gather(1, target_ids[:, None])[:, 0]}
    found["entropy"] = -(p * logp.masked_fill(p == 0, 0)).sum(1)
    if r is None:
        return found
    logq = log_softmax(r)
    q = logq.exp()
    m = (p + q) / 2
    logm = m.masked_fill(m == 0, 1).log()
    return found | {
        "ref_logprobs": logq.gather(1, target_ids[:, None])[:, 0],
        "kl": kl(p, logp, logq),
        "forward_kl": kl(q, logq, logp),
        "jsd": (kl(p, logp, logm) + kl(q, logq, logm)) / 2,
    }


def head_logits(hidden: Tensor, head: Head, logits_dtype: str = "float32") -> Tensor:
    """Logits [N, V] of a language-model head: softcap, then scale, of hidden [N, H] @ weight [V, H]^T + bias.

    The order of vLLM's LogitsProcessor. With logits_dtype "bfloat16" the product (bias included) is rounded to
    bfloat16, as an engine that keeps bfloat16 logits does; all the rest stays in float32.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    with torch.autocast(hidden.device.type, enabled=False):
        logits = linear(hidden.to(dtype), head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype))
        if logits_dtype == "bfloat16":
            logits = logits + (logits.bfloat16().to(dtype) - logits).detach()
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        return logits * head.logit_scale


def linear_token_scores(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    target_ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    support: Support | None = None,
    policy_bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    logits_dtype: str = "float32",
    outputs: Collection[str] = OUTPUTS,
) -> TokenScores:
    """token_scores of head_logits(policy_hidden [N, H], policy_weight [V, H]) and the same of the reference.

    The reference's H may be another one; so may its V, where valid_vocab is at most either.
    """
    if mask is not None:
        policy_hidden = torch.where(mask[:, None], policy_hidden, 0)
        ref_hidden = None if ref_hidden is None else torch.where(mask[:, None], ref_hidden, 0)
    z = head_logits(policy_hidden, Head(policy_weight, policy_bias, softcap, logit_scale), logits_dtype)
    r = None
    if ref_hidden is not None:
        with torch.no_grad():
            r = head_logits(ref_hidden, Head(ref_weight, ref_bias, softcap, logit_scale), logits_dtype)
    return token_scores(
        z, r, target_ids, mask=mask, temperature=temperature, support=support, valid_vocab=valid_vocab, outputs=outputs
    )
