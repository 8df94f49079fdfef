"""Every limit that the audit judges by. Standard library only."""

SIGMAS = 4.0
"""A mean that is further than this many standard errors from zero is not chance."""


MIN_COMPLETIONS = 10
"""With fewer scored completions than this, there is no telling."""


WINDOW_STEPS = 8
"""Steps in a row that the alarm pools; with fewer than this, a spread over steps is too uncertain."""


NOISE = 1e-3
"""Two float32 computations of the same log-prob agree if they differ by less than this, nats per token."""


CLEAR_GAP = 0.1
"""Mean nats per token between sampler and trainer that bfloat16 does not explain."""


STALE_GAP = 0.05
"""Mean nats per token from which a sampler with higher log-probs is more likely stale than rounded."""


FRESH = 0.2
"""If the gap of the first step is below this share of the later ones, it has grown since."""


BOTH_SIGNS = 0.05
"""The gaps sampler - trainer have both signs if the rarer sign has more than this share of the tokens."""


ONE_SIGN = (0.02, 0.001)
"""Ids were kept from being drawn if more than the first share of the gaps is positive and less than the second is
negative."""


QUIET = (0.1, 0.01)
"""A ban has ended where all but the second share of the gaps are below the first share of the mean gap before."""


PADDED = 1e-4
"""More scored positions than tokens by this share are not explained by rounding."""


WEIGHTS_CUT = 0.05
"""If more than this share of a step's importance weights is cut at the cap, they no longer correct the mean."""
