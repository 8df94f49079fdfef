"""Agreement: the proof that the generator samples what the trainer scores.

The generator's log-probs of its own samples must equal the trainer's. Settings that the scorer replays wrongly show in
this comparison, and so does a forward pass that the two compute differently, and weights that differ by more than
rounding. Weights that differ by less are push_check.py's to find.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

AGREEMENT_NATS = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Mean |engine - trainer| log-prob over a step's tokens, in nats, up to which the two agree in the first steps, by the
engine's dtype. Measured for equal weights: 2e-6 in float32; in bfloat16 0.002 with transformers, 0.02 with vLLM."""

CALIBRATION_STEPS = 3
"""Steps after which the run's own gap is known. Their weights were compared when they were pushed."""

FACTOR = 8.0
"""How many times the gap of the first steps a later one may be.

Measured over 12 to 40 steps of 500 and more tokens, in bfloat16, with models of 2 and 135 million parameters: a later
gap is at most 1.1 times the largest of the first three (embedded model: vLLM 0.008 to 0.011 nats, transformers 0.0014
to 0.0020); in float32 1.4 times. At a learning rate of 3e-3 and 100 tokens a step, 6 times. Where rounding makes a
mixture choose another expert, single tokens differ by 0.3 nats, and means over 250 tokens by a factor of 2.
"""

SMALLEST_SHARE = 0.25
"""The limit never falls below this share of AGREEMENT_NATS: a gap near zero is as much chance as rounding."""


class StaleEngineError(RuntimeError):
    """The generator samples from other weights, or another distribution, than the trainer scores."""


def agreement_limit(widest: float, gaps: Sequence[float]) -> float:
    """The limit of the next step, nats: `widest` until the run's own gaps are known, then FACTOR times their largest.

    gaps: those of the run's first CALIBRATION_STEPS steps, or of as many as there were. An infinite `widest` stays.
    """
    if len(gaps) < CALIBRATION_STEPS or math.isinf(widest):
        return widest
    return min(widest, max(SMALLEST_SHARE * widest, FACTOR * max(gaps)))


def check_agreement(mean_gap: float, max_gap: float, limit: float, step: int) -> None:
    """Raises StaleEngineError when the mean gap between engine and trainer is more than rounding explains (nats)."""
    if mean_gap <= limit:
        return
    cause = (
        "the model's forward pass differs between generator and trainer"
        if step == 1
        else "the generator holds other weights than the trainer, or its forward pass has become another one"
    )
    raise StaleEngineError(
        f"step {step}: the generator's log-probs and the trainer's differ by {mean_gap:.2g} nats on average (at most "
        f"{max_gap:.2g}); rounding explains {limit:.2g}. The likely cause: {cause}. Nothing was trained on these "
        "samples; --generator transformers avoids a second copy of the weights."
    )
