"""The split: by the prompt alone, disjoint, stable, and of the size that is asked for."""

from __future__ import annotations

import math
import random

import pytest

from fastkl.errors import UserError
from fastkl.evaluation.split import hold_out, in_both, key_of
from fastkl.types import Prompt


def prompt(raw, row: int = 0, token_ids: tuple[int, ...] = (1,)) -> Prompt:
    return Prompt(token_ids, str(raw), raw, row)


PROMPTS = [
    prompt(f"What is {a} + {b}?", row) for row, (a, b) in enumerate((a, b) for a in range(40) for b in range(40))
]


@pytest.mark.parametrize("share", [0.05, 0.3, 0.8])
def test_the_share_is_held_out_to_within_chance(share):
    train, held = hold_out(PROMPTS, share)
    assert len(train) + len(held) == len(PROMPTS)
    sigma = math.sqrt(share * (1 - share) * len(PROMPTS))
    assert abs(len(held) - share * len(PROMPTS)) < 4 * sigma


def test_a_prompt_is_never_on_both_sides_even_where_it_stands_in_several_rows():
    rows = [prompt(f"q{i % 50}", row=i) for i in range(200)]
    train, held = hold_out(rows, 0.4)
    assert train and held
    assert not {p.raw for p in train} & {p.raw for p in held}
    assert in_both(train, held) == 0
    assert in_both([*train, held[0]], held) == sum(p.raw == held[0].raw for p in held)  # the control


def test_the_side_depends_on_the_prompt_and_the_share_alone():
    _, held = hold_out(PROMPTS, 0.2)
    chosen = {p.raw for p in held}
    shuffled = random.Random(1).sample(PROMPTS, k=900)
    assert {p.raw for p in hold_out(shuffled, 0.2)[1]} == chosen & {p.raw for p in shuffled}
    other_tokens = [prompt(p.raw, row=7, token_ids=(2, 3)) for p in PROMPTS]
    assert {p.raw for p in hold_out(other_tokens, 0.2)[1]} == chosen
    assert chosen < {p.raw for p in hold_out(PROMPTS, 0.4)[1]}


def test_the_sides_of_these_prompts_are_what_they_were_when_this_test_was_written():
    """Another hash would move prompts from the training of old runs into the evaluation of new ones."""
    held = [p.raw for p in hold_out([prompt(f"q{i}") for i in range(12)], 0.3)[1]]
    assert held == ["q0", "q3", "q4", "q6", "q9", "q10"]


def test_a_system_prompt_and_a_chat_of_one_message_leave_a_prompt_what_it_is():
    asked = {"role": "user", "content": "2 + 2?"}
    system = {"role": "system", "content": "Think."}
    same = {key_of(prompt(raw)) for raw in ("2 + 2?", [asked], [system, asked])}
    assert len(same) == 1
    longer = [asked, {"role": "assistant", "content": "4"}, {"role": "user", "content": "And 3 + 3?"}]
    assert key_of(prompt(longer)) == key_of(prompt([system, *longer])) != key_of(prompt(longer[:2]))


@pytest.mark.parametrize(("share", "what"), [(1e-9, "none of the 3"), (1 - 1e-9, "all of the 3")])
def test_a_share_that_leaves_one_side_empty_is_refused(share, what):
    with pytest.raises(UserError, match=f"eval_prompts: the share .* holds out {what} prompts"):
        hold_out(PROMPTS[:3], share)
