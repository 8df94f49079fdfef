"""Rewards: from one step's completions to a number for each.

A reward function has TRL's signature, so that one written for TRL works unchanged:

    def reward(prompts, completions, completion_ids, **columns) -> list[float | None]

The arguments are lists with one entry per completion: texts (for chat prompts the messages, and completions as
[{"role": "assistant", "content": ...}]), token ids, and the data set's other columns. A function gets the arguments it
names, all of them if it takes **kwargs; beside the lists there are `trainer_state` (global_step is the step, max_steps
the last), `log_metric(name, value)` and `log_extra(column, values)`. None means that the function does not apply to
that completion. Where functions come from is load.py's business, and how they are waited for that of waiting.py.
"""

from __future__ import annotations

import inspect
import math
import traceback
from collections import defaultdict
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch

from fastkl.distributed.world import ALONE, World
from fastkl.errors import UserError
from fastkl.plugins import summary
from fastkl.rewards.load import RewardFunction
from fastkl.rewards.prepared import PreparedReward
from fastkl.rewards.waiting import Call, TookTooLong, exits_raised, run_all
from fastkl.types import Completion, Prompt, RewardNotes


@dataclass(frozen=True, slots=True)
class Rewards:
    """One step's rewards."""

    total: torch.Tensor  # f32 [B, K], the weighted sum of the functions that apply; 0 where not valid
    valid: torch.Tensor  # bool [B, K]; False where no function applies
    logged: dict[str, list[float]]  # what log_metric got
    notes: RewardNotes

    @property
    def by_function(self) -> dict[str, float]:
        """Each function's mean over the completions that it applies to; and the mean of what log_metric got."""
        applying = {name: [v for v in values if v is not None] for name, values in self.notes.values.items()}
        return {name: fmean(numbers) for name, numbers in (self.logged | applying).items() if numbers}


@dataclass(frozen=True, slots=True)
class TrainerState:
    """What of transformers' TrainerState there is here."""

    global_step: int
    max_steps: int
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True


STANDARD_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")


def compute_rewards(
    rewards: Sequence[RewardFunction],
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    *,
    step: int,
    max_steps: int = 0,
    timeout: float = 0.0,
    world: World = ALONE,
) -> Rewards:
    """Calls every function once on all B * K completions and adds up what applies. Where there are several processes,
    each calls it once on its share, a run of whole prompt groups, and those with `whole_step = True` are called by the
    first one alone, on all.

    rewards: from `load_rewards`. prompts: [B]. completions: [B][K]. max_steps: of the run, for functions that ask.
    timeout: seconds that a function may take; 0: any. Raises UserError, with function, step and completion, if a
    function raises, takes too long, or returns anything but one finite number or None per completion.
    """
    whole = [reward for reward in rewards if world.size > 1 and wants_whole_step(reward)]
    state, num_completions = TrainerState(step, max_steps), sum(map(len, completions))
    with world.together():
        shared = [reward for reward in rewards if reward not in whole]
        answers = ask(shared, world.share(prompts), world.share(completions), state, timeout)
    answers = joined([*world.everybodys(answers)])
    if whole:
        answers = beside(answers, world.once(lambda: ask(whole, prompts, completions, state, timeout)))
    values = [answers.values[reward.name] for reward in rewards]
    rows = list(zip(*values, strict=True))  # [B * K] of one value per function
    total = [
        sum(reward.weight * value for reward, value in zip(rewards, row, strict=True) if value is not None)
        for row in rows
    ]
    valid = [any(value is not None for value in row) for row in rows]
    shape = (len(prompts), num_completions // len(prompts))
    return Rewards(
        _in_float32(torch.tensor(total, dtype=torch.float64).view(shape), step),
        torch.tensor(valid).view(shape),
        answers.logged,
        RewardNotes(
            _columns({reward.name: answers.extra[reward.name] for reward in rewards}),
            {reward.name: answers.seconds[reward.name] for reward in rewards},
            {reward.name: answers.values[reward.name] for reward in rewards},
            answers.retried,
        ),
    )


def wants_whole_step(reward: RewardFunction) -> bool:
    """Whether a function is to see all completions of a step at once, by its attribute `whole_step`: where there are
    several processes, the first one alone calls it."""
    return bool(getattr(reward.function, "whole_step", False))


@dataclass(frozen=True, slots=True)
class Answers:
    """What functions said of some completions, by function; each list is one entry per completion."""

    num_completions: int
    values: dict[str, list[float | None]]
    extra: dict[str, dict[str, list[Any]]]  # what they gave to log_extra, by function and column
    seconds: dict[str, float]
    retried: dict[str, int]
    logged: dict[str, list[float]]  # what log_metric got, whoever called it


def ask(
    rewards: Sequence[RewardFunction],
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    state: TrainerState,
    timeout: float,
) -> Answers:
    """Calls every function once on all of these completions; none where there are no completions."""
    step, names = state.global_step, [reward.name for reward in rewards]
    extra: dict[str, dict[str, list[Any]]] = {name: defaultdict(list) for name in names}
    if not prompts or not rewards:
        return Answers(0, {name: [] for name in names}, dict.fromkeys(names, {}), dict.fromkeys(names, 0.0), {}, {})
    logged: dict[str, list[float]] = defaultdict(list)
    arguments = _arguments(prompts, completions, state, logged)
    calls = [
        Call(reward.name, partial(_call, reward, arguments | _log_extra(extra[reward.name]), step), _is_async(reward))
        for reward in rewards
    ]
    try:
        with exits_raised():
            results = run_all(calls, timeout)
    except TookTooLong as late:
        raise _late(late, timeout, step) from None
    flat = arguments["completions"]
    values = [_checked(reward, result.value, flat, step) for reward, result in zip(rewards, results, strict=True)]
    _check_extra(extra, len(flat), step)
    return Answers(
        len(flat),
        dict(zip(names, values, strict=True)),
        {name: dict(columns) for name, columns in extra.items()},
        {name: result.seconds for name, result in zip(names, results, strict=True)},
        _retried(rewards),
        dict(logged),
    )


def joined(parts: Sequence[Answers]) -> Answers:
    """The answers about the completions of several processes, one after another, by the same functions."""
    if len(parts) == 1:
        return parts[0]
    names = list(parts[0].values)

    def columns_of(name: str) -> dict[str, list[Any]]:
        found = dict.fromkeys(column for part in parts for column in part.extra[name])
        return {c: [v for p in parts for v in p.extra[name].get(c, [None] * p.num_completions)] for c in found}

    logged = dict.fromkeys(name for part in parts for name in part.logged)
    return Answers(
        sum(part.num_completions for part in parts),
        {name: [value for part in parts for value in part.values[name]] for name in names},
        {name: columns_of(name) for name in names},
        {name: max(part.seconds[name] for part in parts) for name in names},
        {
            name: sum(part.retried.get(name, 0) for part in parts)
            for name in names
            if any(name in p.retried for p in parts)
        },
        {name: [value for part in parts for value in part.logged.get(name, ())] for name in logged},
    )


def beside(one: Answers, other: Answers) -> Answers:
    """The answers of other functions about the same completions, too."""
    both = {name: [*one.logged.get(name, ()), *other.logged.get(name, ())] for name in (*one.logged, *other.logged)}
    return Answers(
        other.num_completions,
        one.values | other.values,
        one.extra | other.extra,
        one.seconds | other.seconds,
        one.retried | other.retried,
        both,
    )


def with_groups(old: Rewards, places: Sequence[int], new: Rewards) -> Rewards:
    """`old` with the groups at `places` of its B taken from `new`; what was logged and counted is that of both."""
    total, valid, num_samples = old.total.clone(), old.valid.clone(), old.total.shape[1]
    total[list(places)], valid[list(places)] = new.total, new.valid

    def placed(before: Mapping[str, Sequence[Any]], fresh: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        lists = {name: list(before.get(name, [None] * old.total.numel())) for name in (*before, *fresh)}
        for name, values in lists.items():
            ours = fresh.get(name, [None] * new.total.numel())
            for g, place in enumerate(places):
                values[place * num_samples : (place + 1) * num_samples] = ours[g * num_samples : (g + 1) * num_samples]
        return lists

    def added(before: Mapping[str, Any], fresh: Mapping[str, Any]) -> dict[str, Any]:
        return {name: before.get(name, 0) + fresh.get(name, 0) for name in (*before, *fresh)}

    a, b = old.notes, new.notes
    logged = {name: [*old.logged.get(name, ()), *new.logged.get(name, ())] for name in (*old.logged, *new.logged)}
    return Rewards(
        total,
        valid,
        logged,
        RewardNotes(
            placed(a.columns, b.columns),
            added(a.seconds, b.seconds),
            placed(a.values, b.values),
            added(a.retried, b.retried),
        ),
    )


def _retried(rewards: Sequence[RewardFunction]) -> dict[str, int]:
    """The attempts that were repeated in the last call, by function; of those only that repeat any."""
    found: dict[str, int] = {}
    for reward in rewards:
        if isinstance(reward.function, PreparedReward) and reward.function.retried is not None:
            found[reward.name] = reward.function.retried
    return found


def _log_extra(columns: dict[str, list[Any]]) -> dict[str, Any]:
    """TRL's `log_extra` for one function: values of several calls follow one another."""
    return {"log_extra": lambda column, values: columns[column].extend(values)}


def _columns(extra: Mapping[str, Mapping[str, list[Any]]]) -> dict[str, list[Any]]:
    """What the functions gave to log_extra, by column; a name that two of them use has the second function's before
    it."""
    found: dict[str, list[Any]] = {}
    for name, columns in extra.items():
        for column, values in columns.items():
            found[f"{name}/{column}" if column in found else column] = values
    return found


def _check_extra(extra: Mapping[str, Mapping[str, list[Any]]], num_completions: int, step: int) -> None:
    """UserError unless log_extra got one value per completion."""
    for name, columns in extra.items():
        for column, values in columns.items():
            if len(values) != num_completions:
                raise UserError(
                    f"reward: {name} at step {step} gave log_extra({column!r}) {len(values)} values for "
                    f"{num_completions} completions; give one for each."
                )


def _in_float32(total: torch.Tensor, step: int) -> torch.Tensor:
    """The rewards f64 [B, K] as f32. UserError where that makes one infinite, or two of a group equal that were not:
    what the samples of a prompt are worth beside each other is all that an update learns from.
    """
    rounded = total.float()
    if not bool(rounded.isfinite().all()):
        worst = float(total.abs().max())
        raise UserError(f"reward: {worst:.3g} at step {step} is beyond float32 (3.4e38); scale the rewards down.")
    exact, kept = (x.sort(dim=1).values.diff(dim=1) != 0 for x in (total, rounded))
    if bool((exact & ~kept).any()):
        group = int((exact & ~kept).any(dim=1).nonzero()[0])
        low, high = float(total[group].min()), float(total[group].max())
        raise UserError(
            f"reward: {low!r} and {high!r} at step {step}, of one prompt's samples, cannot be told apart in float32; "
            "take a constant off the rewards, or scale them."
        )
    return rounded


def _arguments(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    state: TrainerState,
    logged: dict[str, list[float]],
) -> dict[str, Any]:
    """Everything that all reward functions may ask for, by keyword."""
    pairs = [(prompt, completion) for prompt, group in zip(prompts, completions, strict=True) for completion in group]
    columns = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return {name: [prompt.columns.get(name) for prompt, _ in pairs] for name in columns} | {
        "prompts": [deepcopy(prompt.raw) for prompt, _ in pairs],  # whose messages a function may well change
        "completions": [
            completion.text if isinstance(prompt.raw, str) else [{"role": "assistant", "content": completion.text}]
            for prompt, completion in pairs
        ],
        "completion_ids": [list(completion.token_ids) for _, completion in pairs],
        "trainer_state": state,
        "log_metric": lambda name, value: logged[name].append(float(value)),
    }


def _call(reward: RewardFunction, arguments: dict[str, Any], step: int) -> Any:
    """The function's result; for an async function its awaitable."""
    accepted = _accepted(reward, arguments)
    grad_enabled, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    try:
        result = reward.function(**accepted)
    except UserError:  # has its sentence
        raise
    except (Exception, SystemExit) as failure:
        raise _failed(reward, failure, arguments["completions"], step) from failure
    finally:  # what it has switched for itself is no business of the update's
        torch.set_grad_enabled(grad_enabled)
        torch.set_default_dtype(dtype)
    return _guarded(result, reward, arguments["completions"], step) if inspect.isawaitable(result) else result


def check_columns(rewards: Iterable[RewardFunction], columns: Iterable[str]) -> None:
    """UserError for a function that needs more than the standard arguments and the prompts' columns."""
    for reward in rewards:
        _accepted(reward, dict.fromkeys((*columns, *STANDARD_ARGUMENTS)))


def _accepted(reward: RewardFunction, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the function takes. UserError if it needs one that there is not."""
    try:
        parameters = list(inspect.signature(reward.function).parameters.values())
    except (TypeError, ValueError):  # some callables written in C have none
        return arguments
    for p in parameters:
        required = p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        if required and p.name not in arguments:
            columns = [name for name in arguments if name not in STANDARD_ARGUMENTS]
            raise UserError(
                f"reward: {reward.name} asks for {p.name!r}, and the prompts have no such column (they have "
                f"{', '.join(columns) or 'none but the prompt'})."
            )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return arguments
    return {p.name: arguments[p.name] for p in parameters if p.name in arguments}


async def _guarded(result: Awaitable[Any], reward: RewardFunction, completions: list[Any], step: int) -> Any:
    try:
        return await result
    except UserError:
        raise
    except (Exception, SystemExit) as failure:
        raise _failed(reward, failure, completions, step) from failure


def _is_async(reward: RewardFunction) -> bool:
    """Whether calling the function does nothing yet but give something to wait for."""
    function = reward.function
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _late(late: TookTooLong, timeout: float, step: int) -> UserError:
    return UserError(
        f"reward: {late.name} had not returned after {timeout:g} s at step {step}; mend it, or give it longer with "
        f"--reward-timeout.{f' {late.aftermath}' if late.aftermath else ''}"
    )


def _checked(reward: RewardFunction, result: Any, completions: list[Any], step: int) -> list[float | None]:
    """The function's result as one finite number or None per completion."""
    where = f"reward: {reward.name} at step {step}"
    try:
        values = list(result)
    except TypeError:
        kind = type(result).__name__
        raise UserError(f"{where} returned {kind}, not a list with one number per completion.") from None
    if len(values) != len(completions):
        raise UserError(
            f"{where} returned {len(values)} rewards for {len(completions)} completions, the first of which is "
            f"{_short(completions[0])}; return one for each, None where it does not apply."
        )
    checked: list[float | None] = []
    for value, completion in zip(values, completions, strict=True):
        try:
            number = None if value is None else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if number is not None and not math.isfinite(number):
            raise UserError(
                f"{where} returned {repr(value)[:60]} for {_short(completion)}; return a finite number or None."
            )
        checked.append(number)
    return checked


def _failed(reward: RewardFunction, failure: BaseException, completions: list[Any], step: int) -> UserError:
    culprit = _culprit(failure, completions)
    on = f"on {_short(culprit)}" if culprit is not None else f"on a batch that begins with {_short(completions[0])}"
    return UserError(f"reward: {reward.name} failed at step {step} {on} ({summary(failure)}).")


def _culprit(failure: BaseException, completions: list[Any]) -> Any | None:
    """The completion that a variable of the failing function held, innermost call first."""
    known = {id(completion): completion for completion in completions}
    for frame, _ in reversed(list(traceback.walk_tb(failure.__traceback__))):
        for value in frame.f_locals.values():
            if id(value) in known:
                return value
    return None


def _short(completion: Any) -> str:
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    return repr(text if len(text) <= 60 else text[:57] + "...")
