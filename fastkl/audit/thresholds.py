"""Every limit that the audit judges by. Standard library only."""

SIGMAS = 4.0
"""Standard errors from which a mean is not chance."""


WINDOW_STEPS = 8
"""Steps in a row that the alarm pools, and the fewest from which a spread over steps is known well enough."""


NOISE = 1e-3
"""Nats per token below which two float32 computations of the same log-prob agree."""


CLEAR_GAP = 0.1
"""Mean nats per token between sampler and trainer that bfloat16 does not explain."""


STALE_GAP = 0.05
"""Mean nats per token from which a sampler with higher log-probs is more likely stale than rounded."""


FRESH = 0.2
"""A gap that was below this share of the later ones in the first step has grown since."""


BOTH_SIGNS = 0.05
"""Share of tokens with the less likely sign of sampler - trainer from which the gaps have both signs."""


ONE_SIGN = (0.02, 0.001)
"""Ids were kept from being drawn where more than the first share of the gaps is positive, less than the second not."""


QUIET = (0.1, 0.01)
"""A ban has ended where all but the second share of the gaps are below the first share of the mean gap before."""


PADDED = 1e-4
"""Share of positions beyond the completions' tokens that rounding does not explain."""


WEIGHTS_CUT = 0.05
"""Share of a step's importance weights, cut at the cap, from which they no longer correct the mean."""
