"""fastkl: RL training of language models with a KL penalty that cannot be gamed, at the speed of the hardware.

The scoring operators for other training loops (`token_scores`, `linear_token_scores`, `linear_token_loss`) need torch
alone and are loaded on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastkl.kernels.operators import (
        Support,
        TokenCoefficients,
        TokenScores,
        linear_token_loss,
        linear_token_scores,
        token_scores,
    )

from fastkl.version import __version__

__all__ = [
    "Support",
    "TokenCoefficients",
    "TokenScores",
    "__version__",
    "linear_token_loss",
    "linear_token_scores",
    "token_scores",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from fastkl.kernels import operators

        return getattr(operators, name)
    raise AttributeError(f"module 'fastkl' has no attribute {name!r}")
