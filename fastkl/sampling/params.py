"""Sampling: how completions are drawn. `SamplingSettings` is the only list of sampling parameters.

A field holds everything about its parameter but the replay. From its type, default, range and help come the options,
config.yaml and docs/settings.md; from its `Rule` the parameters that go to vLLM, those that `fastkl score` and the
doctor read from a file, and the tables of rules.py. How it is replayed on the logits stands in replay.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, get_type_hints

from fastkl.errors import UserError

NEUTRAL, TRANSFORM, SUPPORT, REJECTED = "neutral", "transform", "support", "rejected"


@dataclass(frozen=True, slots=True)
class Rule:
    """What a sampling parameter is to the scorer, and why. A rejected one may still have a value in `off`."""

    kind: str
    why: str
    off: tuple[Any, ...] = (None,)
    vllm: str | None = ""  # its name in vllm.SamplingParams: "" is the field's own, None is none


@dataclass(frozen=True, slots=True)
class Heading:
    """Begins a block of settings under this title."""

    title: str


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers that a setting takes; the text stands in help pages and in messages."""

    text: str
    fits: Callable[[float], bool]


AT_LEAST_0 = Range("0 or more", lambda x: x >= 0)
AT_LEAST_1 = Range("1 or more", lambda x: x >= 1)
ABOVE_0 = Range("above 0", lambda x: x > 0)
SHARE = Range("above 0 and at most 1", lambda x: 0 < x <= 1)
BELOW_1 = Range("0 or more and below 1", lambda x: 0 <= x < 1)
SEEDS = Range("0 to 2^63 - 1", lambda x: 0 <= x < 1 << 63)

NOT_DRAWN = "ids that cannot be drawn"
ENDS_BY_TEXT = Rule(NEUTRAL, "ends a completion by a rule on its text")
RECOMPUTED = Rule(SUPPORT, "recomputed from the policy's logits")


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """What a user may set; the defaults leave the policy's distribution whole.

    The order is vLLM's: banned and allowed ids, min_tokens, temperature, min_p, top_k, top_p.
    """

    temperature: Annotated[
        float, Heading("Sampling"), ABOVE_0, Rule(TRANSFORM, "divides the logits of policy and reference")
    ] = 1.0
    """Sampling temperature; scores use the same."""
    max_new_tokens: Annotated[int, AT_LEAST_1, Rule(NEUTRAL, ENDS_BY_TEXT.why, vllm="max_tokens")] = 96
    """Completions are cut at this many tokens."""
    top_k: Annotated[int, AT_LEAST_0, RECOMPUTED] = 0
    """Keep only the k likeliest tokens; 0 keeps all."""
    top_p: Annotated[float, SHARE, RECOMPUTED] = 1.0
    """Nucleus sampling; 1 keeps all."""
    min_p: Annotated[float, BELOW_1, RECOMPUTED] = 0.0
    """Keep tokens with at least this fraction of the likeliest one's probability; 0 keeps all."""
    min_tokens: Annotated[int, AT_LEAST_0, Rule(SUPPORT, "bans every stop id in the first tokens of a completion")] = 0
    """No end-of-sequence before this many tokens."""
    banned_token_ids: Annotated[tuple[int, ...], AT_LEAST_0, Rule(SUPPORT, NOT_DRAWN, vllm=None)] = ()
    """Token ids that are never sampled; none for no ban."""
    allowed_token_ids: Annotated[
        tuple[int, ...], AT_LEAST_0, Rule(SUPPORT, f"all others are {NOT_DRAWN}", vllm=None)
    ] = ()
    """The only token ids that are sampled; none allows all."""
    stop: Annotated[tuple[str, ...], ENDS_BY_TEXT] = ()
    """Texts that end a completion, with the token that completes one of them; none for no such text."""


@dataclass(frozen=True, slots=True)
class Sampling(SamplingSettings):
    """How completions are drawn: what the user has set, and the ids that end a completion of this model."""

    stop_token_ids: Annotated[tuple[int, ...], ENDS_BY_TEXT] = ()

    @classmethod
    def of(cls, settings: SamplingSettings, stop_token_ids: tuple[int, ...]) -> Sampling:
        """The sampling parameters among `settings` (a TrainConfig has them, too), for a model with these stop ids."""
        chosen = {field.name: getattr(settings, field.name) for field in fields(SamplingSettings)}
        return cls(**chosen, stop_token_ids=stop_token_ids)

    def excluded_ids(self, vocab: int) -> list[int]:
        """The ids that can never be drawn, in order."""
        allowed = set(self.allowed_token_ids or range(vocab)) - set(self.banned_token_ids)
        return [v for v in range(vocab) if v not in allowed]

    @property
    def follows_logits(self) -> str | None:
        """The name of a setting by which the ids that can be drawn are others under another policy; None: the same."""
        return next((name for name in ("top_k", "top_p", "min_p") if getattr(self, name) not in (0, 1)), None)

    @property
    def truncates(self) -> bool:
        """Whether some ids cannot be drawn at some positions."""
        return any(getattr(self, name) != DEFAULTS[name] for name, rule in rules().items() if rule.kind == SUPPORT)


DEFAULTS = {field.name: field.default for field in fields(Sampling)}


@cache
def rules() -> dict[str, Rule]:
    """The rule of every field of Sampling."""
    hints = get_type_hints(Sampling, include_extras=True)
    return {name: next(m for m in hints[name].__metadata__ if isinstance(m, Rule)) for name in DEFAULTS}


def replayed_names() -> tuple[str, ...]:
    """The parameters that change what is drawn: those that the scorer must know."""
    return tuple(name for name, rule in rules().items() if rule.kind in (TRANSFORM, SUPPORT))


def truncating(settings: Mapping[str, Any]) -> list[str]:
    """The names of those `settings` (of a run, or of a file) that keep ids from being drawn at any token."""
    names = [name for name, rule in rules().items() if rule.kind == SUPPORT and name != "min_tokens"]
    return [name for name in names if settings.get(name) not in (None, 0, -1, [], (), DEFAULTS[name])]


def check_ids(sampling: Sampling, vocab: int) -> None:
    """UserError for ids outside of the model's vocabulary, and where no id is left to be drawn."""
    for name in ("banned_token_ids", "allowed_token_ids", "stop_token_ids"):
        wrong = next((i for i in getattr(sampling, name) if not 0 <= i < vocab), None)
        if wrong is not None:
            raise UserError(f"{name}: the id {wrong} is not in the model's vocabulary, 0 to {vocab - 1}.")
    left = set(sampling.allowed_token_ids or range(vocab)) - set(sampling.banned_token_ids)
    if not left:
        name = "allowed_token_ids" if sampling.allowed_token_ids else "banned_token_ids"
        raise UserError(f"{name}: every id of the vocabulary is banned; leave one to be sampled.")
    if sampling.min_tokens and left <= set(sampling.stop_token_ids):
        raise UserError(
            "min_tokens: only ids that end a completion may be sampled, and none of them before min_tokens; allow "
            "another id, or set min_tokens to 0."
        )


def vllm_arguments(sampling: Sampling, vocab: int) -> dict[str, Any]:
    """What vllm.SamplingParams is told so that it draws as `sampling` says from `vocab` logits."""
    values = {rule.vllm or name: getattr(sampling, name) for name, rule in rules().items() if rule.vllm is not None}
    arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    if sampling.banned_token_ids or sampling.allowed_token_ids:  # it takes no list of banned ids
        excluded = set(sampling.excluded_ids(vocab))
        arguments["allowed_token_ids"] = [v for v in range(vocab) if v not in excluded]
    return arguments
