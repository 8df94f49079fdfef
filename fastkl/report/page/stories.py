"""The completions that the report shows: which ones, and how their text is marked.

In: a step's lines of samples.jsonl. Out: columns of stories (completions with their prompts) for page.html. They are
not hand-picked: those with the highest, the median and the lowest reward of the step. All text is escaped here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterable, Sequence
from itertools import groupby
from typing import Any

from markupsafe import Markup, escape

from fastkl.audit.json_lines import is_number
from fastkl.report import conversation
from fastkl.report.numbers import number
from fastkl.report.page.run_files import BROWSED_SAMPLES, RunFiles
from fastkl.report.svg import shortened
from fastkl.rewards.built_in import Span, reward_spans

SHOWN_CHARACTERS = 900  # the rest unfolds
MOST_CHARACTERS = 6000
PROMPT_CHARACTERS = 300  # the end of a longer prompt, of each message of a chat
COLUMN_CHARACTERS = 96  # of a data set's column, such as the expected answer, which ends many solutions
NESTED_CHARACTERS = 48  # of one that is not a text


def pieces(text: str, spans: Iterable[Span]) -> list[tuple[str, bool]]:
    """Cut `text` at the spans: (piece, whether it is highlighted), nothing empty, together the text again."""
    cut: list[tuple[str, bool]] = []
    position = 0
    for start, end in spans:
        cut += [(text[position:start], False), (text[start:end], True)]
        position = end
    return [(piece, marked) for piece, marked in [*cut, (text[position:], False)] if piece]


def marked_text(prompt: str, completion: str, reward_names: Sequence[str]) -> Markup:
    """Prompt and completion as HTML, with what earned the reward in <mark>."""
    text = prompt + completion
    html, position = Markup(""), 0
    for piece, marked in pieces(text, reward_spans(reward_names, text)):
        border = max(0, len(prompt) - position)
        inside = Markup('<span class="prompt">{}</span>').format(piece[:border]) if piece[:border] else Markup("")
        inside += escape(piece[border:])
        html += Markup("<mark>{}</mark>").format(inside) if marked else inside
        position += len(piece)
    return html


def story(sample: dict[str, Any], rank: str, reward_names: Sequence[str], untold: Container[str]) -> dict[str, Any]:
    """One completion for the page, with its prompt; a long one is folded after SHOWN_CHARACTERS. untold:
    columns to leave out."""
    completion = conversation.completion_text(sample)
    head, rest = completion[:SHOWN_CHARACTERS], completion[SHOWN_CHARACTERS:]
    if len(rest) < 100:
        head, rest = completion, ""
    return {
        "turns": turns(sample, head, reward_names, more=bool(rest)),
        "rest": marked_text("", rest[:MOST_CHARACTERS], reward_names) + ("…" if len(rest) > MOST_CHARACTERS else ""),
        "rest_title": f"the rest ({len(rest):,} characters)",
        "rank": rank,
        "columns": [*columns_of(sample, untold), *extra_of(sample)],
        "numbers": numbers_of(sample),
        "cut": sample.get("finish_reason") == "length",
    }


def turns(sample: dict[str, Any], completion: str, reward_names: Sequence[str], *, more: bool) -> list[dict[str, Any]]:
    """The messages of the prompt and the completion, each with its role; a plain text and what continues it are one."""
    *before, (role, last) = [(role, _end_of(text)) for role, text in conversation.prompt_turns(sample)]
    if not conversation.continues(sample):
        before, role, last = [*before, (role, last)], conversation.ANSWERS, ""
    if conversation.is_chat(sample):  # whose reward functions see the completion alone
        said = Markup('<span class="prompt">{}</span>').format(last) if last else Markup("")
        said += marked_text("", completion, reward_names)
    else:
        said = marked_text(last, completion, reward_names)
    asked = [{"role": role, "text": Markup('<span class="prompt">{}</span>').format(text)} for role, text in before]
    return [*asked, {"role": role, "text": said + ("…" if more else "")}]


def _end_of(prompt: str) -> str:
    return prompt if len(prompt) <= PROMPT_CHARACTERS else f"… {prompt[-PROMPT_CHARACTERS:]}"


def numbers_of(sample: dict[str, Any]) -> list[tuple[str, str]]:
    """Reward, that of each function where there are several, KL and length, with their names."""
    given = sample.get("rewards")
    each = list(given.items()) if isinstance(given, dict) and len(given) > 1 else []
    values = [("reward", sample.get("reward")), *each, ("KL", sample.get("kl")), ("tokens", sample.get("num_tokens"))]
    return [(str(name), _written(value)) for name, value in values if is_number(value)]


def columns_of(sample: dict[str, Any], untold: Container[str]) -> list[tuple[str, str]]:
    """The row in the prompt file, and what the data set says of it beyond the prompt, where it says something."""
    shown = [text for _, text in conversation.prompt_turns(sample)]
    columns = _in_short({k: v for k, v in _given(sample).items() if v not in shown and k not in untold})
    row = [("row", str(sample["row"]))] if columns and is_number(sample.get("row")) else []
    return [*row, *columns]


def same_everywhere(run: RunFiles) -> set[str]:
    """Columns that say the same of every prompt in the first and the last step, and so nothing of one of them."""
    of_rows = {sample.get("row"): _given(sample) for sample in (*run.first_samples, *run.last_samples)}
    first, *others = of_rows.values() or [{}]
    return {name for name, value in first.items() if others and all(row.get(name) == value for row in others)}


def _given(sample: dict[str, Any]) -> dict[str, Any]:
    columns = sample.get("columns")
    return columns if isinstance(columns, dict) else {}


def extra_of(sample: dict[str, Any]) -> list[tuple[str, str]]:
    """What the reward functions gave to log_extra for this completion."""
    return _in_short(sample.get("extra"))


def _in_short(values: Any) -> list[tuple[str, str]]:
    """Names and texts, without their middle where they are long."""
    named = values.items() if isinstance(values, dict) else ()
    return [(str(name), _short(value)) for name, value in named]


def _short(value: Any) -> str:
    if isinstance(value, str):
        return shortened(value, COLUMN_CHARACTERS)
    return shortened(json.dumps(value, ensure_ascii=False), NESTED_CHARACTERS)


def _written(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else number(value)


def column(
    run: RunFiles, samples: Sequence[dict[str, Any]], title: str, ranks: Sequence[str], colour: int | None
) -> dict[str, Any]:
    """One step's stories, by rank of their reward: "highest", "median", "lowest"."""
    ranked = sorted(samples, key=_reward, reverse=True)
    places = {"highest": 0, "median": len(ranked) // 2, "lowest": len(ranked) - 1}
    chosen = {places[rank]: rank for rank in reversed(ranks)}  # with few samples one may hold several ranks
    texts = {(str(sample.get("prompt")), str(sample.get("completion"))) for sample in samples}
    untold = same_everywhere(run)
    return {
        "title": title,
        "colour": colour,
        "more": f"{len(samples)} completions, {len(texts)} of them different",
        "stories": [
            story(ranked[place], f"{rank.capitalize()} reward", run.reward_names, untold)
            for place, rank in sorted(chosen.items())
        ],
    }


def _reward(sample: dict[str, Any]) -> float:
    reward = sample.get("reward")
    return reward if is_number(reward) else -math.inf


def browse(run: RunFiles) -> list[dict[str, Any]]:
    """Steps with their completions, under the prompts that they answer, in the order of the file."""
    steps, untold = [], same_everywhere(run)
    for number_of_step, step in run.browsed.items():
        rewards = [sample["reward"] for sample in step.samples if is_number(sample.get("reward"))]
        span = f", rewards {number(min(rewards))} to {number(max(rewards))}" if rewards else ""
        shown = len(step.samples)
        count = f"{shown} completions" if shown == step.num_samples else f"{shown} of {step.num_samples} completions"
        asked = [_prompt_group(run, list(group), untold) for _, group in groupby(step.samples, key=_prompt_of)]
        steps.append({"title": f"Step {number_of_step}: {count}{span}", "prompts": asked})
    return steps


def browse_intro(run: RunFiles) -> str:
    """How much of samples.jsonl the page holds."""
    steps = f"{len(run.browsed)} of {len(run.steps)} steps" if len(run.browsed) < len(run.steps) else "Every step"
    whole = all(len(step.samples) == step.num_samples for step in run.browsed.values())
    first = "" if whole else f", of each step the first {BROWSED_SAMPLES} completions"
    return f"{steps}{first}; long texts lose their middle. samples.jsonl in the run's folder holds them all."


def _prompt_of(sample: dict[str, Any]) -> tuple[str, str]:
    return str(sample.get("row")), conversation.prompt_text(sample)


def _prompt_group(run: RunFiles, samples: list[dict[str, Any]], untold: Container[str]) -> dict[str, Any]:
    asked = [(role, _end_of(text)) for role, text in conversation.prompt_turns(samples[0])]
    answers = [
        {
            "text": marked_text("", conversation.completion_text(sample), run.reward_names),
            "numbers": [*numbers_of(sample), *extra_of(sample)],
            "cut": sample.get("finish_reason") == "length",
        }
        for sample in samples
    ]
    return {"turns": asked, "columns": columns_of(samples[0], untold), "answers": answers}


def first_and_last(run: RunFiles) -> list[dict[str, Any]]:
    """The stories of one run's first and last step, side by side."""
    ends = {samples[0]["step"]: samples for samples in (run.first_samples, run.last_samples) if samples}
    ranks = ("highest", "median", "lowest")
    return [column(run, samples, f"Step {step}", ranks, None) for step, samples in ends.items()]


def last_of_each(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """The last step's stories of several runs."""
    return [
        column(run, run.last_samples, f"{run.label}, step {run.last_samples[0]['step']}", ("highest", "median"), index)
        for index, run in enumerate(runs)
        if run.last_samples
    ]
