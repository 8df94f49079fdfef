"""What holds the policy near the reference over a run: the coefficient's controller, and the reference's renewal."""

from __future__ import annotations

import math

import torch
from torch import nn

GAIN = 0.2
"""Relative change of the coefficient per step at full error: at most 10 % a step."""


def adapted_coef(coef: float, kl: float, target: float) -> float:
    """The next step's beta: raised where the mean KL of a completion is above `target` (nats), else lowered.

    beta <- beta * (1 + GAIN * e), e = KL / target - 1 clipped to +-0.5 (the controller of Ziegler et al. 2019,
    "Fine-tuning language models from human preferences", made faster for short runs). Unchanged if kl is not finite.
    """
    if not math.isfinite(kl):
        return coef
    error = min(max(kl / target - 1.0, -0.5), 0.5)
    return coef * (1.0 + GAIN * error)


@torch.no_grad()
def renew_reference(reference: nn.Module, policy: nn.Module, share: float) -> None:
    """reference <- (1 - share) * reference + share * policy, parameter by parameter; share 1 copies."""
    for old, new in zip(reference.parameters(), policy.parameters(), strict=True):
        old.lerp_(new.detach().to(old.dtype), share)
