"""The built-in rewards with options, each beside an independent count, and what is said of options that do not fit."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rewards import rollouts

from fastkl.errors import UserError
from fastkl.rewards.call import check_columns, compute_rewards
from fastkl.rewards.load import load_rewards


def rewards_of(address: str, texts: list[str], raw="p ", columns=None, lengths=()) -> list[float | None]:
    """What the reward gives to the completions of one prompt."""
    (reward,) = load_rewards([address], None)
    prompts, (completions,) = rollouts([texts], raw=raw, columns=columns)
    for completion, length in zip(completions, lengths, strict=False):
        object.__setattr__(completion, "token_ids", (7,) * length)
    result = compute_rewards([reward], prompts, [completions], step=1)
    return [float(r) if ok else None for r, ok in zip(result.total[0], result.valid[0], strict=True)]


CHAT = [{"role": "user", "content": "7"}]


@pytest.mark.parametrize("raw", ["p ", CHAT], ids=["text", "chat"])
def test_regex_finds_the_pattern_in_the_completion_alone(raw):
    assert rewards_of(r"regex?pattern=^\d+$", ["12", "a 12", "", "7"], raw) == [1.0, 0.0, 0.0, 1.0]
    assert rewards_of("regex?pattern=colou?r=a+", ["color=aa", "colour=", "color=a"], raw) == [1.0, 0.0, 1.0]
    assert rewards_of("regex?pattern=(?i)a%26b|50%25", ["x A&b", "50%", "a and b"], raw) == [1.0, 1.0, 0.0]


def test_length_is_the_distance_from_the_target_over_the_target():
    texts = ["one two  three", "", "a b"]
    assert rewards_of("length?target=2&unit=words", texts) == [-0.5, -1.0, 0.0]
    assert rewards_of("length?target=14&unit=characters", texts) == [0.0, -1.0, pytest.approx(-11 / 14)]
    assert rewards_of("length?target=4", texts, lengths=[4, 1, 6]) == [0.0, -0.75, -0.5]


@settings(max_examples=30)
@given(most=st.integers(1, 40), cache=st.integers(0, 40), lengths=st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_soft_overlong_is_equation_13_of_dapo(most, cache, lengths):
    cache = min(cache, most)

    def by_the_paper(n: int) -> float:
        if n <= most - cache:
            return 0.0
        if n <= most:
            return ((most - cache) - n) / cache
        return -1.0

    rewards = rewards_of(f"soft_overlong?max_tokens={most}&cache={cache}", [""] * len(lengths), lengths=lengths)
    assert rewards == pytest.approx([by_the_paper(n) for n in lengths], abs=1e-6)


@pytest.mark.slow
def test_math_verify_compares_values_and_leaves_out_what_is_no_mathematics():
    texts = ["so it is 0.5", r"\boxed{\frac{2}{4}}", "1/3", "no number"]
    assert rewards_of("math_verify", texts, columns=[{"answer": r"\frac{1}{2}"}]) == [1.0, 1.0, 0.0, 0.0]
    assert rewards_of("math_verify?answer=solution", ["$1+x^2$", "2"], columns=[{"solution": "x^2+1"}]) == [1.0, 0.0]
    assert rewards_of("math_verify", ["72", "#### 72", "7"], columns=[{"answer": "#### 72"}]) == [1.0, 1.0, 0.0]
    assert rewards_of("math_verify", ["3", "4"], CHAT, columns=[{"answer": 3}]) == [1.0, 0.0]
    assert rewards_of("math_verify", ["3"], columns=[{"answer": "the sky"}]) == [None]
    assert rewards_of("math_verify", ["None"], columns=[{"answer": None}]) == [None]


def test_math_verify_works_outside_of_the_main_thread_which_has_no_alarm(caplog):
    found = []
    worker = threading.Thread(
        target=lambda: found.append(rewards_of("math_verify", ["0.5"], columns=[{"answer": "1/2"}]))
    )
    worker.start()
    worker.join()
    assert found == [[1.0]] and not caplog.records


def test_each_has_its_own_name():
    names = [r"regex?pattern=a", "regex?pattern=b", "length?target=3"]
    assert [reward.name for reward in load_rewards(names, None)] == ["regex", "regex-2", "length"]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("regex", ["'regex' does not say its pattern", "write regex?pattern=..."]),
        ("regex?pattern=", ["pattern= ", "not empty"]),
        ("regex?pattern=(a", ["'(a' is no regular expression", "unterminated"]),
        ("regex?patern=a", ["has no option 'patern'", "Did you mean 'pattern'"]),
        ("regex?pattern", ["'pattern'", "is no option", "KEY=VALUE"]),
        ("length?target=four", ["target=four", "is not a number"]),
        ("length?target=0", ["target=0", "1 or more"]),
        ("length?target=4&target=5", ["'target' twice"]),
        ("length?target=4&unit=lines", ["unit=lines", "tokens, words, characters"]),
        ("soft_overlong?max_tokens=8", ["does not say its cache", "soft_overlong?max_tokens=8&cache=..."]),
        ("soft_overlong?max_tokens=8&cache=9", ["cache=9", "0 to max_tokens (8)"]),
        ("math_verify?answer=final answer", ["'final answer'", "without spaces"]),
        ("lenght?target=4", ["unknown 'lenght'", "Did you mean 'length'"]),
    ],
)
def test_options_that_do_not_fit_are_explained(address, words):
    with pytest.raises(UserError) as refused:
        load_rewards([address], None)
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert str(refused.value).startswith("reward: ") and "\n" not in str(refused.value)


def test_a_missing_answer_column_is_found_before_anything_is_generated():
    rewards = load_rewards(["math_verify?answer=solution"], None)
    with pytest.raises(UserError, match=r"math_verify asks for 'solution', .* \(they have answer\)"):
        check_columns(rewards, ["answer"])
    check_columns(rewards, ["answer", "solution"])
