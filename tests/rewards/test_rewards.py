"""Rewards: the built-in ones count what they say, the user's own are found, called as TRL calls them, and checked."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import time

import pytest
import torch

from fastkl.errors import UserError
from fastkl.report.metrics import taken_reward_names
from fastkl.rewards.built_in import alliteration, starts_with_a
from fastkl.rewards.call import compute_rewards
from fastkl.rewards.load import RewardFunction, load_rewards
from fastkl.types import Completion, Prompt


def rollouts(texts: list[list[str]], raw="p ", columns=None) -> tuple[list[Prompt], list[list[Completion]]]:
    columns = columns or [{}] * len(texts)
    prompts = [Prompt((1,), "p ", raw, row, c) for row, c in enumerate(columns)]
    return prompts, [[Completion((5, len(t)), (-1.0, -1.0), "stop", t) for t in group] for group in texts]


def rewards_of(function, texts: list[list[str]], *, max_steps=0, **options):
    rewards = [RewardFunction("f", function)]
    return compute_rewards(rewards, *rollouts(texts, **options), step=3, max_steps=max_steps)


@pytest.mark.parametrize(
    ("prompt", "completion", "pairs", "words_with_a"),
    [
        ("", "", 0, 0),
        ("", "tall", 0, 0),
        ("", "Tall trees", 1, 0),
        ("tall ", "tall tall", 2, 0),
        ("Big bears ", "ate All apples", 3, 3),
        ("Once upon a ti", "me to Tim", 2, 1),
        ("", "a\tb\n b  B c", 2, 1),
        ("", "1 1 - - a", 0, 1),
        ("Élan ", "élu à", 1, 0),
    ],
)
def test_built_in_rewards_count_by_hand(prompt, completion, pairs, words_with_a):
    assert alliteration([prompt], [completion]) == [pairs]
    assert starts_with_a([prompt], [completion]) == [words_with_a]


def test_built_in_rewards_of_a_chat_look_at_the_assistants_words():
    prompt = [{"role": "user", "content": "an apple"}]
    completion = [{"role": "assistant", "content": "big bad wolf"}]
    assert alliteration([prompt], [completion]) == [1.0]
    assert starts_with_a([prompt], [completion]) == [0.0]


def test_function_gets_all_lists_in_trls_form():
    seen = {}

    def reward(prompts, completions, completion_ids, answer, trainer_state, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions, ids=completion_ids, answer=answer)
        seen["step"], seen["last"] = trainer_state.global_step, trainer_state.max_steps
        return [1.0, 2.0, 3.0, 4.0]

    columns = [{"answer": "x", "level": 1}, {"answer": "y"}]
    result = rewards_of(reward, [["a", "bb"], ["ccc", ""]], columns=columns, max_steps=9)
    assert seen.pop("log_metric") and seen.pop("log_extra")
    assert seen == {
        "prompts": ["p "] * 4,
        "completions": ["a", "bb", "ccc", ""],
        "ids": [[5, 1], [5, 2], [5, 3], [5, 0]],
        "answer": ["x", "x", "y", "y"],
        "level": [1, 1, None, None],
        "step": 3,
        "last": 9,
    }
    assert result.total.tolist() == [[1.0, 2.0], [3.0, 4.0]] and result.total.dtype == torch.float32
    assert result.valid.all() and result.by_function == {"f": 2.5}


def test_chat_prompts_get_chat_completions():
    messages = [{"role": "user", "content": "hi"}]

    def reward(prompts, completions):
        assert prompts == [messages] * 2
        return [float(len(completion[0]["content"])) for completion in completions]

    assert rewards_of(reward, [["a", "bbb"]], raw=messages).total.tolist() == [[1.0, 3.0]]


def test_weights_multiply_and_none_leaves_out():
    def lengths(completions):
        return [float(len(text)) for text in completions]

    def long_only(completions):
        return [10.0 if len(text) > 1 else None for text in completions]

    def never(completions):
        return [None] * len(completions)

    prompts, completions = rollouts([["a", "bb"], ["ccc", ""]])
    functions = [RewardFunction("l", lengths, 2.0), RewardFunction("o", long_only, -1.0), RewardFunction("n", never)]
    result = compute_rewards(functions, prompts, completions, step=1)
    assert result.total.tolist() == [[2.0, 4.0 - 10.0], [6.0 - 10.0, 0.0]]
    assert result.valid.all() and result.by_function == {"l": 1.5, "o": 10.0}
    result = compute_rewards(functions[1:], prompts, completions, step=1)
    assert result.valid.tolist() == [[False, True], [True, False]]
    assert result.total.tolist() == [[0.0, -10.0], [-10.0, 0.0]]


def test_async_functions_run_concurrently_in_one_lasting_loop():
    loops, began, ended = [], [], []

    def sleeper(value):
        async def reward(completions):
            loops.append(asyncio.get_running_loop())
            began.append(time.perf_counter())
            await asyncio.sleep(0.2)
            ended.append(time.perf_counter())
            return [value] * len(completions)

        return RewardFunction(f"f{value}", reward)

    for _ in range(2):
        result = compute_rewards([sleeper(1.0), sleeper(2.0), sleeper(3.0)], *rollouts([["a", "b"]]), step=1)
        assert result.total.tolist() == [[6.0, 6.0]]
    assert all(max(began[i : i + 3]) < min(ended[i : i + 3]) for i in (0, 3))
    assert len(set(map(id, loops))) == 1


def test_async_function_that_raises_is_named():
    async def broken(completions):
        raise RuntimeError("no answer")

    with pytest.raises(UserError, match="f failed at step 3 .*RuntimeError: no answer"):
        rewards_of(broken, [["a"]])


def test_what_log_metric_gets_is_averaged():
    def reward(completions, log_metric):
        for text in completions:
            log_metric("length", len(text))
        return [0.0] * len(completions)

    assert rewards_of(reward, [["a", "bbb"]]).by_function == {"f": 0.0, "length": 2.0}


def test_what_log_extra_gets_stands_beside_each_completion():
    def one(completions, log_extra):
        log_extra("upper", [text.upper() for text in completions])
        for text in completions:
            log_extra("length", [len(text)])
        return [0.0] * len(completions)

    async def two(completions, **kwargs):
        kwargs["log_extra"]("length", torch.tensor([1.5, float("nan")]))
        return [0.0] * len(completions)

    functions = [RewardFunction("one", one), RewardFunction("two", two)]
    notes = compute_rewards(functions, *rollouts([["a", "bbb"]]), step=1).notes
    upper, length, other = notes.columns.values()
    assert list(notes.columns) == ["upper", "length", "two/length"]
    assert (upper, length, float(other[0])) == (["A", "BBB"], [1, 3], 1.5)


def test_log_extra_wants_one_value_per_completion():
    def f(completions, log_extra):
        log_extra("parsed", ["x"])
        return [0.0] * len(completions)

    with pytest.raises(UserError, match=r"f at step 3 gave log_extra\('parsed'\) 1 values for 2 completions"):
        rewards_of(f, [["a", "b"]])


def test_the_wall_time_of_each_function_is_noted():
    def slow(completions):
        time.sleep(0.3)
        return [0.0] * len(completions)

    async def waits(completions):
        await asyncio.sleep(0.1)
        return [0.0] * len(completions)

    quick = RewardFunction("quick", lambda completions: [0.0] * len(completions))
    functions = [RewardFunction("waits", waits), RewardFunction("slow", slow), quick]
    seconds = compute_rewards(functions, *rollouts([["a", "b"]]), step=1).notes.seconds
    assert list(seconds) == ["waits", "slow", "quick"]
    assert seconds["quick"] < 0.1 <= seconds["waits"] and seconds["slow"] >= 0.3


THOUGHTS = ["<think>\nIt is 3.\n</think>\nThe answer is $\\boxed{3}$.", "\\boxed{\\frac{6}{2}}", "$\\boxed{4}$", "none"]


@pytest.mark.slow
def test_trls_own_rewards_run_unchanged(tmp_path, monkeypatch):
    (tmp_path / "made.py").write_text(
        "from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment\n"
        "overlong = get_soft_overlong_punishment(max_completion_len=4, soft_punish_cache=2)\n"
        "repetition = get_repetition_penalty_reward(ngram_size=1)\n"
    )
    monkeypatch.chdir(tmp_path)
    own = [f"trl.rewards:{name}" for name in ("think_format_reward", "accuracy_reward", "reasoning_accuracy_reward")]
    functions = load_rewards([*own, "made.py:overlong", "made.py:repetition"], None)
    chat = [{"role": "user", "content": "1 + 2?"}]
    prompts, completions = rollouts([THOUGHTS], raw=chat, columns=[{"solution": "$3$"}])
    longer = [dataclasses.replace(c, token_ids=(7,) * (2 + k)) for k, c in enumerate(completions[0])]
    for timeout in (0.0, 60.0):
        result = compute_rewards(functions, prompts, [longer], step=1, timeout=timeout)
        assert result.by_function == {
            "think_format_reward": 0.25,
            "accuracy_reward": 0.5,
            "reasoning_accuracy_reward": 0.25,
            "soft_overlong_punishment_reward": (0 - 1 / 2 - 1 - 1) / 4,
            "repetition_penalty_reward": -(1 / 2 + 2 / 3 + 3 / 4 + 4 / 5) / 4,
        }
        assert result.notes.columns["gold_parsed"] == ["[3, '3']"] * 4
        assert result.notes.columns["reasoning_accuracy_reward/solution"] == ["$3$"] * 4


def test_tensors_and_numpy_numbers_are_rewards():
    assert rewards_of(lambda completions: torch.tensor([1.5, 2.5]), [["a", "b"]]).total.tolist() == [[1.5, 2.5]]


def raises_on_bad(completions):
    for text in completions:
        if "bad" in text:
            raise KeyError(text[:3])
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (raises_on_bad, ["f failed at step 3", "'bad " + "x" * 53 + "...'", "KeyError", "test_rewards.py line"]),
        (lambda completions: [1.0], ["f at step 3", "returned 1 rewards for 2 completions", "'good'"]),
        (lambda completions: [0.0, float("nan")], ["f at step 3", "returned nan", "'bad x"]),
        (lambda completions: [float("-inf"), 0.0], ["f at step 3", "returned -inf", "'good'"]),
        (lambda completions: ["1x", 0.0], ["returned '1x'", "'good'"]),
        (lambda completions: None, ["returned NoneType, not a list"]),
        (lambda completions: 1.0, ["returned float, not a list"]),
        (lambda completions, missing: [0.0], ["asks for 'missing'", "no such column", "answer"]),
    ],
)
def test_a_failing_reward_is_named_with_step_and_completion(function, words):
    with pytest.raises(UserError) as refused:
        rewards_of(function, [["good", "bad " + "x" * 200]], columns=[{"answer": 1}])
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 250


def test_names_lead_to_functions(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.py").write_text(
        "from beside_mine import FACTOR\n"
        "def reward(completions): return [FACTOR * len(c) for c in completions]\n"
        "class Judge:\n    def score(self, completions): return [1.0] * len(completions)\n"
        "judge = Judge()\n"
    )
    (tmp_path / "folder" / "beside_mine.py").write_text("FACTOR = 2.0\n")
    (tmp_path / "module_in_current_folder.py").write_text("def reward(completions): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])  # what is appended goes with the test
    file = "folder/mine.py"
    names = [
        "alliteration",
        "starts_with_a",
        f"{file}:reward",
        "module_in_current_folder:reward",
        f"{file}:judge.score",
    ]
    rewards = load_rewards(names, [1, 2, 3, 4, 5])
    assert [r.name for r in rewards] == ["alliteration", "starts_with_a", "reward", "reward-2", "score"]
    assert [r.weight for r in rewards] == [1, 2, 3, 4, 5]
    assert rewards[2].function(completions=["abc"]) == [6.0]
    assert load_rewards(names[:2], None)[1].weight == 1.0


def test_a_function_called_like_a_metric_of_the_trainer_gets_another_name(tmp_path):
    (tmp_path / "named.py").write_text("def raw(completions): return [0.0] * len(completions)\n")
    assert load_rewards([f"{tmp_path}/named.py:raw"], None, taken_reward_names())[0].name == "raw-2"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("aliteration", ["unknown 'aliteration'", "Did you mean 'alliteration'", "file.py:function"]),
        ("nowhere.py:f", ["no file 'nowhere.py'"]),
        ("mine.py:rewrd", ["no function 'rewrd'", "Did you mean 'reward'", "It has reward, other."]),
        ("mine.py:CONSTANT", ["'CONSTANT' in 'mine.py' is no function but int"]),
        ("mine.py:", ["unknown 'mine.py:'"]),
        ("broken.py:f", ["'broken.py' cannot be imported", "ZeroDivisionError", "broken.py line 2"]),
        ("wrong_syntax.py:f", ["'wrong_syntax.py' cannot be imported", "SyntaxError"]),
        ("leaves.py:f", ["'leaves.py' cannot be imported", "SystemExit"]),
        ("needs_more.py:f", ["cannot be imported", "No module named 'absent_package'"]),
        ("absent_package.rewards:f", ["no module 'absent_package'"]),
    ],
)
def test_a_reward_that_cannot_be_found_is_explained(tmp_path, monkeypatch, name, words):
    (tmp_path / "mine.py").write_text("import os\nCONSTANT = 1\ndef reward(c): ...\ndef other(c): ...\n")
    (tmp_path / "broken.py").write_text("x = 1\n1 / 0\n")
    (tmp_path / "wrong_syntax.py").write_text("def f(:\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "needs_more.py").write_text("import absent_package\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        load_rewards([name], None)
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1e39, 0.0], "reward: 1e+39 at step 3 is beyond float32"),
        ([1e9 + 1, 1e9 + 2], "1000000001.0 and 1000000002.0 at step 3, .* cannot be told apart in float32"),
        ([1e18, -1e300], "beyond float32"),
        ([10**400, 0], "f at step 3 returned 1000.* return a finite number"),
    ],
)
def test_rewards_that_float32_cannot_hold_are_refused_by_value(values, words):
    def f(completions):
        return values

    with pytest.raises(UserError, match=words.replace("+", r"\+")):
        rewards_of(f, [["a", "b"]])


def test_rewards_that_differ_from_prompt_to_prompt_only_are_no_mistake():
    def f(completions):
        return [1e9, 1e9, 1e9 + 1, 1e9 + 1]

    assert rewards_of(f, [["a", "b"], ["c", "d"]]).total.shape == (2, 2)


def test_a_reward_cannot_change_the_prompts_of_later_steps_nor_the_state_of_torch():
    chat = [{"role": "user", "content": "hi"}]
    prompt = Prompt((1,), "hi", chat, 1)

    def f(prompts, completions):
        prompts[0].append({"role": "user", "content": "more"})
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        return [0.0, 1.0]

    completions = ((Completion((1,), (0.0,), "stop", "a"), Completion((2,), (0.0,), "stop", "b")),)
    compute_rewards((RewardFunction("f", f),), (prompt,), completions, step=1)
    assert chat == [{"role": "user", "content": "hi"}]
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32


def test_a_reward_that_ends_the_process_is_named():
    def f(completions):
        sys.exit(3)

    with pytest.raises(UserError, match="reward: f failed at step 3 .*SystemExit: 3"):
        rewards_of(f, [["a", "b"]])
