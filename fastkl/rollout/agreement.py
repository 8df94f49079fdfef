"""Agreement: the proof that the generator samples what the trainer scores.

The generator's log-probs of its own samples must equal the trainer's. A weight sync that was forgotten, stopped
half-way or left a stale copy behind (weight_sync.py names the ways) shows in this comparison, and so do settings that
the scorer replays wrongly.
"""

from __future__ import annotations

import torch

AGREEMENT_NATS = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Mean |engine - trainer| log-prob over a step's tokens, in nats, up to which the two agree, by the engine's dtype.

Measured for equal weights: 2e-6 in float32, 0.02 in bfloat16; one stale optimizer step costs 1e-3 and more.
"""


class StaleEngineError(RuntimeError):
    """The generator samples from other weights, or another distribution, than the trainer scores."""


def check_agreement(mean_gap: float, max_gap: float, limit: float, step: int) -> None:
    """Raises StaleEngineError when the mean gap between engine and trainer is more than rounding explains (nats)."""
    if mean_gap <= limit:
        return
    cause = (
        "the model's forward pass differs between generator and trainer"
        if step == 1
        else "the engine still holds older weights, or only part of the new ones"
    )
    raise StaleEngineError(
        f"step {step}: the generator's log-probs and the trainer's differ by {mean_gap:.2g} nats on average (at most "
        f"{max_gap:.2g}); rounding explains {limit:g}. The likely cause: {cause}. Nothing was trained on these "
        "samples; --generator transformers avoids a second copy of the weights."
    )
