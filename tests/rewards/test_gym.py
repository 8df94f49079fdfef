"""The reward gym: the answer in a completion is found as documented, and scored as reasoning-gym scores it."""

from __future__ import annotations

import dataclasses
import json
import random
import typing
from importlib.util import find_spec

import pytest

from fastkl.config.settings import TrainConfig
from fastkl.data.rows import read_rows
from fastkl.errors import UserError
from fastkl.evaluation.plan import shared_note
from fastkl.gym import _tasks, _value, entries, first_seed_beyond, task_of
from fastkl.rewards.call import compute_rewards
from fastkl.rewards.gym import answer_in, gym
from fastkl.rewards.load import load_rewards
from fastkl.types import Completion, Prompt

pytestmark = pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")

SUM = "chain_sum?size=5&seed=1&min_terms=2&max_terms=2&max_digits=2"


@pytest.mark.parametrize(
    ("text", "oracle", "answer"),
    [
        ("<answer>4</answer> or <answer> 5\n</answer>, not 6", "5", "5"),
        ("<answer>4</answer> a stray </answer> 7", "5", "4"),
        ("<answer>4 <answer>5</answer>", "5", "5"),
        ("<answer></answer> 5", "5", ""),
        ("<answer>5", "5", "5"),
        ("7 - 12 = -5", "5", "-5"),
        ("so 3-5", "5", "5"),
        ("(-5)", "5", "-5"),
        ("minus: \N{MINUS SIGN}5.", "-5", "-5"),
        ("It is 1,234.50.", "1,234.5", "1,234.50"),
        ("1,2,3", "3", "3"),
        ("**.5**", "0.5", ".5"),
        ("12 apples, 1e3 pears.", "1e3", "1e3"),
        ("no number", "5", "no number"),
        (" the 5 of us \n", "the 5 of us", "the 5 of us"),
        (" 3/4 ", "3/4", "3/4"),
        (" anything 3 ", None, "anything 3"),
    ],
)
def test_the_answer_is_the_last_tagged_one_else_the_last_number_else_the_text(text, oracle, answer):
    assert answer_in(text, oracle) == answer


def columns_of(address: str, count: int) -> dict[str, list]:
    rows = [columns for _, _, columns in read_rows(f"gym:{address}")][:count]
    return {name: [row[name] for row in rows] for name in ("question", "answer", "metadata", "task")}


def test_scores_are_the_tasks_own_with_its_own_options():
    import reasoning_gym

    kwargs = {"size": 3, "seed": 3, "max_value": 4}
    theirs = reasoning_gym.create_dataset("puzzle24", **kwargs)
    columns = columns_of("puzzle24?" + "&".join(f"{name}={value}" for name, value in kwargs.items()), 3)
    answers = [theirs[0]["answer"], "6 * 2 + 6 + 6", ""]  # the second is right where numbers may be larger than 4
    expected = [theirs.score_answer(answer, theirs[i]) for i, answer in enumerate(answers)]
    logged: list = []
    scores = gym([f"<answer>{a}</answer>" for a in answers], **columns, log_metric=lambda *pair: logged.append(pair))
    assert scores == expected == [1.0, 0.01, 0.01] and not logged


def test_partial_credit_and_chats_reach_the_trainer_as_they_are():
    import reasoning_gym

    theirs = reasoning_gym.create_dataset("chain_sum", size=5, seed=1, min_terms=2, max_terms=2, max_digits=2)
    (_, row, columns), *_ = read_rows(f"gym:{SUM}")
    raw = [{"role": "user", "content": columns.pop("prompt")}]
    right = theirs[0]["answer"]
    texts = [f"It is {right}.", f"<answer>= {right}</answer>", "no idea"]
    completions = [[Completion((5,), (-1.0,), "stop", text) for text in texts]]
    prompts = [Prompt((1,), "p", raw, row, columns)]
    total = compute_rewards(load_rewards(["gym"], None), prompts, completions, step=1).total
    partial = theirs.score_answer(f"= {right}", theirs[0])
    assert 0 < partial < 1
    assert total.tolist() == [[1.0, pytest.approx(partial), 0.0]]


def test_a_scorer_that_raises_scores_nothing_and_is_counted():
    columns = columns_of("prime_factorization?size=2", 2)
    logged: list = []
    right = str(columns["answer"][1])
    assert gym(["foo", right], **columns, log_metric=lambda *pair: logged.append(pair)) == [0.0, 1.0]
    assert logged == [("gym_unreadable", 0.5)]


def test_rows_are_jsonable_and_the_same_every_time_for_tasks_that_draw_globally_too():
    for address in (SUM, "list_functions?size=60", "graph_color?size=2", "arc_1d?size=2"):
        state = random.getstate()
        first = list(entries(address))
        assert random.getstate() == state
        task_of.cache_clear()
        random.seed(99)
        assert list(entries(address)) == first
        rows = list(read_rows(f"gym:{address}"))
        assert json.loads(json.dumps(rows)) and [number for _, number, _ in rows] == [*range(1, len(first) + 1)]
        assert {*rows[0][2]} == {"prompt", "question", "answer", "metadata", "task"}


def test_options_reach_the_task():
    import reasoning_gym

    rows = list(read_rows(f"gym:{SUM}"))
    theirs = reasoning_gym.create_dataset("chain_sum", size=5, seed=1, min_terms=2, max_terms=2, max_digits=2)
    assert [row["prompt"] for _, _, row in rows] == [entry["question"] for entry in theirs]
    assert len(list(read_rows("gym:chain_sum?size=3&allow_negation=true"))) == 3
    assert task_of("needle_haystack?size=1").config.seed == 0
    sums = entries('basic_arithmetic?operators=["+"]&size=20&max_terms=2&allow_parentheses=false')
    assert all("+" in entry["question"] for entry in sums)


def test_every_list_that_a_task_takes_is_read_from_json():
    """Each task's own default, written down and read again."""
    found = 0
    for name, (_, config) in _tasks("").items():
        hints = typing.get_type_hints(config)
        for option in dataclasses.fields(config):
            default = option.default_factory() if option.default_factory is not dataclasses.MISSING else option.default
            if isinstance(default, list | tuple) and all(isinstance(item, str | int | float) for item in default):
                assert _value(name, option.name, json.dumps(default), hints[option.name]) == list(default)
                found += 1
    assert found > 20


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("chain_summ", ["no task 'chain_summ'", "Did you mean 'chain_sum'"]),
        ("", ["no task ''"]),
        (
            "chain_sum?min_term=2",
            ["'gym:chain_sum' has no option 'min_term'", "Did you mean 'min_terms'", "max_digits"],
        ),
        ("chain_sum?size=many", ["size of gym:chain_sum is a whole number, not 'many'"]),
        ("chain_sum?size=2.5", ["size of gym:chain_sum is a whole number"]),
        ("chain_sum?allow_negation=1", ["allow_negation of gym:chain_sum is true or false, not '1'"]),
        (
            "basic_arithmetic?operators=+",
            ["operators of gym:basic_arithmetic is a list, written as JSON", "not '+'"],
        ),
        (
            "basic_arithmetic?format_style=fancy",
            ["format_style of gym:basic_arithmetic is one of simple, natural, not"],
        ),
        ("chain_sum?size=0", ["cannot be made (size must be positive)"]),
        ("chain_sum?min_terms=3&max_terms=2", ["max_terms must be >= min_terms"]),
        ("chain_sum?size", ["'size' in 'chain_sum?size' is no option; write NAME?KEY=VALUE&KEY=VALUE"]),
        ("chain_sum?size=1&size=2", ["gives 'size' twice"]),
        ("composite", ["cannot be made (Must specify at least one dataset)"]),
    ],
)
def test_unknown_tasks_and_options_are_refused_in_one_sentence(address, words):
    with pytest.raises(UserError) as refused:
        list(read_rows(f"gym:{address}"))
    assert str(refused.value).startswith("prompts: ") and "\n" not in str(refused.value)
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_without_the_library_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    task_of.cache_clear()
    with pytest.raises(UserError, match=r"gym:chain_sum needs reasoning_gym.*pip install 'fastkl\[gym\]'"):
        list(read_rows("gym:chain_sum"))


def questions_of(address: str) -> set[str]:
    return {entry["question"] for entry in entries(address)}


@pytest.mark.parametrize("seed", [0, 4, 5, 10, 11, 30])
def test_the_first_seed_beyond_shares_no_question_where_the_named_one_does(seed):
    ours, theirs = "chain_sum?size=10&seed=1&min_digits=6&max_digits=6", "chain_sum?size=5&min_digits=6&max_digits=6"
    beyond = first_seed_beyond(ours, f"{theirs}&seed={seed}")
    assert (beyond is None) == questions_of(ours).isdisjoint(questions_of(f"{theirs}&seed={seed}"))
    assert beyond in (None, 11)
    assert questions_of(ours).isdisjoint(questions_of(f"{theirs}&seed=11"))


def test_held_out_questions_that_are_trained_on_are_counted_with_the_seed_that_has_others():
    ours, theirs = "gym:chain_sum?size=10&seed=1", "gym:chain_sum?size=5&seed=3"
    rows = {source: [Prompt((1,), "", text, 0) for text in questions_of(source[4:])] for source in (ours, theirs)}
    config = TrainConfig(prompts=ours, eval_prompts=theirs)
    assert shared_note(config, rows[ours], rows[theirs]) == (
        "eval_prompts: 5 of the 5 are trained on, too: question n of a gym comes from seed + n; "
        "give them seed=11 or more"
    )
    assert shared_note(TrainConfig(), rows[ours], rows[theirs]) == "eval_prompts: 5 of the 5 are trained on, too"
    assert shared_note(config, [], rows[theirs]) == ""
