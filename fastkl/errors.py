"""What a user may meet: `UserError` for a mistake (its home is the operators, which need nothing else of fastkl)."""

from fastkl.kernels.errors import UserError

__all__ = ["UserError"]
