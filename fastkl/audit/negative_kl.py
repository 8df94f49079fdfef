"""The table of docs/negative-kl.md: what scorers report for one token whose true distribution is known.

One position, V = 32000 ids. The reference's logits fall with the rank (Zipf's law); the policies are variations of it.
Every number is an expectation over the true sampler, summed over all ids in float64: nothing is sampled.
"""

from __future__ import annotations

import torch

from fastkl.kernels.operators import token_scores
from fastkl.kernels.support import keep_mask
from fastkl.kernels.types import Support

VOCAB = 32000


END = VOCAB - 1


def cases() -> list[tuple[str, torch.Tensor, torch.Tensor, Support]]:
    """(name, policy logits [V], reference logits [V], what the sampler allowed)."""
    ref = -torch.arange(1, VOCAB + 1, dtype=torch.float64).log()
    top_k, no_end = Support(top_k=50), Support(banned_ids=torch.tensor([END]))

    def ending_with(p: float) -> torch.Tensor:
        """The reference's distribution, but for the end of the text, which has probability p."""
        others = ref[:END].logsumexp(0)
        return torch.cat([ref[:END], (others + torch.tensor(p).double().logit())[None]])

    return [
        ("policy = reference, top_k 50", ref.clone(), ref, top_k),
        ("logits x 0.5, top_k 50", 0.5 * ref, ref, top_k),
        ("min_tokens, p(end) = 0.95", ending_with(0.95), ref, no_end),
        ("min_tokens, p(end) = 0.999", ending_with(0.999), ref, no_end),
    ]


def expectations(policy: torch.Tensor, ref: torch.Tensor, support: Support) -> list[float]:
    """[k1 naive, k3 naive, exact KL full, KL(pi_S, q), KL(pi_S, q_S)], nats."""
    keep = keep_mask(support, policy[None].clone())[0]
    drawn = keep.nonzero()[:, 0]
    chance = policy[drawn].softmax(0)
    log_p, log_q = policy.log_softmax(0)[drawn], ref.log_softmax(0)[drawn]
    k1 = log_p - log_q
    scores = token_scores(policy[None], ref[None], drawn[:1], support=support)
    values = [
        (chance * k1).sum(),
        (chance * (torch.expm1(-k1) + k1)).sum(),
        scores.kl[0],
        (chance * (chance.log() - log_q)).sum(),
        scores.kl_support[0],
    ]
    return [float(value) + 0.0 for value in values]


def table() -> str:
    """The table as Markdown."""
    head = ["case", "k1, naive", "k3, naive", "exact KL, all ids", "KL(pi_S, q)", "KL(pi_S, q_S)"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for name, policy, ref, support in cases():
        cells = [f"{value:.2f}".replace("-0.00", "0.00") for value in expectations(policy, ref, support)]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)
