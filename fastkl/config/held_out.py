"""What the settings of held-out evaluation say: a share, the k of pass@k, the metric that the best checkpoint has.

Standard library only: mistakes in them are found before anything is loaded.
"""

from __future__ import annotations

import contextlib
import math
import re
from dataclasses import dataclass

from fastkl.errors import UserError, nearest

LOWER_IS_BETTER = ("eval/loss", "eval/kl", "eval/truncated_share")


def share_of(eval_prompts: str) -> float | None:
    """The share of the training prompts that is to be held out; None where `eval_prompts` names prompts of their own.

    UserError for a number that is no share.
    """
    share = None
    with contextlib.suppress(ValueError):
        share = float(eval_prompts)
    if share is not None and not 0 < share < 1:
        raise UserError(
            f"eval_prompts: {eval_prompts} is no share of the prompts; give a number above 0 and below 1, or a file."
        )
    return share


def pass_ks(num_samples: int) -> tuple[int, ...]:
    """The k of pass@k that n samples of a prompt give: 1, 2, 4, ... below n, and n."""
    return (*(2**power for power in range(num_samples.bit_length()) if 2**power < num_samples), num_samples)


def samples_of(num_samples: int, temperature: float | None) -> int:
    """Completions of each prompt: at temperature 0 they would all be the same."""
    return 1 if temperature == 0 else num_samples


@dataclass(frozen=True, slots=True)
class BestBy:
    """What the best checkpoint is best at."""

    key: str
    lower: bool  # whether less is better

    def improves(self, value: float, best: float) -> bool:
        """Whether `value` is better than `best`; NaN is worse than anything."""
        if math.isnan(value):
            return False
        return math.isnan(best) or (value < best if self.lower else value > best)


def best_by(text: str) -> BestBy:
    """ "eval/pass@1", "max:eval/length" or "min:eval/length"; without a word before it, less is better for losses."""
    way, colon, key = text.partition(":")
    if not colon:
        return BestBy(text, lower=text in LOWER_IS_BETTER)
    if way not in ("min", "max"):
        raise UserError(f"best: {text!r} begins with neither min: nor max:; write min:eval/loss or eval/pass@1.")
    return BestBy(key, lower=way == "min")


def check_evaluation(
    eval_prompts: str, eval_text: str, eval_reward: tuple[str, ...], num_samples: int, best: str, reference: bool = True
) -> None:
    """UserError for settings of the evaluation that do not fit together. reference: whether the run has one."""
    share_of(eval_prompts)
    if eval_reward and not eval_prompts:
        raise UserError("eval_reward: there are no held-out prompts to reward; add --eval-prompts.")
    if not all(name.strip() for name in eval_reward):
        raise UserError("eval_reward: names no function; leave it out for the training rewards.")
    if not best:
        return
    measured = ["eval/loss"] * bool(eval_text)
    if eval_prompts:
        measured += ["eval/reward", *(f"eval/pass@{k}" for k in pass_ks(num_samples))]
        measured += ["eval/length", "eval/truncated_share", *["eval/kl"] * reference]
    if not measured:
        raise UserError(f"best: {best!r} is not measured without held-out data; add --eval-prompts or --eval-text.")
    key = best_by(best).key
    if key not in measured and not (eval_prompts and re.fullmatch("eval/reward/.+", key)):
        raise UserError(f"best: {key!r} is not measured.{nearest(key, measured)} Choose from {', '.join(measured)}.")
