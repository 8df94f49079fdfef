"""What each pass costs per logit, of which there are N * V: the floors under every measured time.

A product is one multiplication with a head, 2 H operations per logit. An access reads or writes one logit once, in the
dtype in which it is stored, so in float32 it moves 4 bytes. Left out: the heads and
hidden states themselves, and logits between products, which stay in registers (gpu/heads.py) or in a chunk's buffer.
"""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    """Per logit of one model."""

    products: int  # of 2 H operations
    accesses: int  # reads and writes of a logit


PASSES = {
    "head": Cost(1, 0),  # hidden states -> logits of one model, policy or reference
    "hidden gradient": Cost(1, 0),  # the logits' gradient @ weight
    "head gradient": Cost(1, 0),  # the logits' gradient^T @ hidden
    "score": Cost(0, 1),  # one model's logits are read
    "gradient": Cost(0, 2),  # the policy's logits are read again and overwritten by their gradient
    "gradient of the KL": Cost(0, 1),  # the reference's are read again, too
    "divergences": Cost(0, 1),  # forward KL and jsd: one model's logits are read again
    "copy": Cost(0, 2),
}


def cost(*passes: str) -> Cost:
    """Of several passes, one after the other."""
    return Cost(sum(PASSES[name].products for name in passes), sum(PASSES[name].accesses for name in passes))
