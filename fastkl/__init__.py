"""fastkl: RL training of language models with a KL penalty that cannot be gamed, at the speed of the hardware.

The public names are loaded on first use. The scoring operators for other training loops (`token_scores`,
`linear_token_scores`, `linear_token_loss`) need torch alone; `train(TrainConfig(...))` needs `fastkl[train]`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastkl.config.settings import TrainConfig
    from fastkl.kernels.errors import UserError
    from fastkl.kernels.operators import (
        Support,
        TokenCoefficients,
        TokenScores,
        linear_token_loss,
        linear_token_scores,
        token_scores,
    )
    from fastkl.training.loop import train

from fastkl.version import __version__

__all__ = [
    "Support",
    "TokenCoefficients",
    "TokenScores",
    "TrainConfig",
    "UserError",
    "__version__",
    "linear_token_loss",
    "linear_token_scores",
    "token_scores",
    "train",
]

HOMES = {
    "TrainConfig": "fastkl.config.settings",
    "UserError": "fastkl.kernels.errors",
    "train": "fastkl.training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fastkl' has no attribute {name!r}")
    return getattr(import_module(HOMES.get(name, "fastkl.kernels.operators")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
