"""How many packed tokens fit into a micro-batch: what a token's activations take is measured, not estimated.

In: a ScoredModel. Out: the bytes that autograd keeps per token for the backward through the backbone. The head keeps
none: the operator takes its gradient while the logits of a chunk are at hand.
"""

from __future__ import annotations

import torch

from fastkl.scoring.backbone import probe_of
from fastkl.scoring.models import context_length
from fastkl.scoring.scored_model import ScoredModel

MOST_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Packed tokens of a micro-batch at most, by device.

On a CPU smaller micro-batches are faster, since a large tensor gets new memory every time and touching its pages takes
time: 12,700 tokens through a backbone of 2.6 million parameters took 2.54 s in one micro-batch and 2.28 s in four (a
forward without gradients and one with its backward).
"""

CPU_BYTES = 2 << 30
"""What a micro-batch's activations may take on a CPU.

Every micro-batch reads all weights and adds to all gradients: a step of SmolLM2-135M with some 750 tokens in its rows
(bench/real/against_trl.py, medians of five steps, twice in turn) took 10.2 s in one and 10.8 s in two, and the same
memory, whose peak is elsewhere."""

GPU_SHARE = 1 / 8
"""The share of a GPU's memory that they may take."""

PROBED_TOKENS = 128
"""Less where the model's context is shorter."""


def micro_batch_tokens(policy: ScoredModel) -> int:
    """The packed tokens whose activations fit (see above): at least one, at most MOST_TOKENS."""
    device = policy.device
    budget = CPU_BYTES
    if device.type == "cuda":
        budget = int(GPU_SHARE * torch.cuda.get_device_properties(device).total_memory)
    return max(1, min(MOST_TOKENS[device.type], budget // activation_bytes_per_token(policy)))


def activation_bytes_per_token(policy: ScoredModel) -> int:
    """Bytes that autograd keeps for the backbone's backward, per packed token; with gradient checkpointing it is on.

    Of two lengths, since what is kept grows with the tokens from a part that does not: autocast's copies of the
    weights.
    """
    longest = min(PROBED_TOKENS, context_length(policy.model.config) or PROBED_TOKENS)
    few, many = (_kept_bytes(policy, length) for length in (longest // 2, longest))
    return max(1, (many - few) // (longest - longest // 2))


def _kept_bytes(policy: ScoredModel, length: int) -> int:
    """Bytes of the tensors that a forward over one sequence keeps, parameters included."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # held by autograd, so no address is used twice; the tensor itself would hold its graph

    with policy.scoring(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = policy.hidden(probe_of(policy.model, (length,))).states
    del states
    return sum(kept.values())
