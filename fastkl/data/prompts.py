"""Prompts: from a text, a file or a data set to a list of `Prompt`, and from there in shuffled order to the steps.

`--prompts` takes, tried in this order:

    text:ANYTHING            the text itself
    hub:ORG/NAME             a data set on the Hugging Face hub
    gym:TASK?KEY=VALUE&...   questions of reasoning-gym, made here; their columns are what the reward `gym` needs
    a path that exists       a .jsonl, .json, .parquet or .csv file, or a folder of such, or of `save_to_disk`
    a name that looks like a path (ends like such a file, or begins with / ./ ../ or ~) and does not exist: an error
    ORG/NAME                 two words around one slash, without spaces: a data set on the hub
    anything else            the text itself

A data set has a column `prompt`, of texts or of chat messages; its other columns go to the reward functions. The split
is "train", or the only one there is. Nothing is executed: no loading scripts, no pickle.

A text becomes one user message where a system prompt precedes it, and where it is a question of reasoning-gym and the
tokenizer has a chat template.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastkl import gym
from fastkl.data.chat import has_template, is_chat, rendered
from fastkl.errors import UserError
from fastkl.types import Prompt

SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}  # and the datasets loader for each


HALF_CHARACTER = re.compile("[\ud800-\udfff]")


TOKENIZER_BATCH = 1024  # prompts tokenised at a time


Row = tuple[str, int, Mapping[str, Any]]  # where it stands (for messages), its number from 1, its columns


def load_prompts(source: str, tokenizer: Any, *, max_prompt_tokens: int, system_prompt: str = "") -> list[Prompt]:
    """Reads `source` (see above) and tokenises it. UserError on bad input, with the line or row.

    Texts are tokenised with the tokenizer's own special tokens; chat messages go through its chat template.
    max_prompt_tokens: what the model's context leaves for a prompt. system_prompt: the first message of every prompt
    that has no system message of its own; empty for none.
    """
    rows = list(read_rows(source))
    if not rows:
        raise UserError(f"prompts: {source!r} holds no prompts; give at least one.")
    if system_prompt:
        check_system_prompt(system_prompt, tokenizer)
    if system_prompt or (source.startswith("gym:") and has_template(tokenizer)):
        rows = [
            (where, number, {**columns, "prompt": as_chat(columns["prompt"], system_prompt)})
            for where, number, columns in rows
        ]
    prompts = []
    for start in range(0, len(rows), TOKENIZER_BATCH):
        prompts += _prompts(rows[start : start + TOKENIZER_BATCH], tokenizer)
    for (where, _, _), prompt in zip(rows, prompts, strict=True):
        if not prompt.token_ids:
            raise UserError(f"prompts: {where} is empty for this tokenizer; a prompt needs at least one token.")
        if len(prompt.token_ids) > max_prompt_tokens:
            raise UserError(
                f"prompts: {where} has {len(prompt.token_ids)} tokens, and the model's context leaves room for "
                f"{max_prompt_tokens}; shorten it or lower max_new_tokens."
            )
    return prompts


class PromptSource:
    """Prompts in an order that is shuffled anew in every epoch and depends on (seed, epoch) alone.

    The last prompts of an epoch and the first of the next may share a step; a single prompt is repeated.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int) -> None:
        self._prompts = tuple(prompts)
        self._seed = seed
        self._begin(epoch=0, position=0)

    def take(self, count: int) -> tuple[Prompt, ...]:
        """The next `count` prompts."""
        taken = []
        for _ in range(count):
            if self._position == len(self._prompts):
                self._begin(self._epoch + 1, position=0)
            taken.append(self._prompts[self._order[self._position]])
            self._position += 1
        return tuple(taken)

    def state(self) -> dict[str, int]:
        """What `load_state` needs to continue from here; can be written as JSON."""
        return {"epoch": self._epoch, "position": self._position, "num_prompts": len(self._prompts)}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Continues from where `state` was taken. UserError if the number of prompts has changed since."""
        before = state.get("num_prompts", len(self._prompts))
        if before != len(self._prompts):
            raise UserError(
                f"prompts: there were {before} when the run was saved and are {len(self._prompts)} now; resume with "
                "the same prompts."
            )
        self._begin(state["epoch"], state["position"])

    def _begin(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        self._order = list(range(len(self._prompts)))
        random.Random(f"prompts, seed {self._seed}, epoch {epoch}").shuffle(self._order)


def as_chat(prompt: str | list[dict[str, str]], system_prompt: str) -> list[dict[str, str]]:
    """The prompt as messages: a text is the user's, and the system prompt comes first unless there is one already."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not system_prompt or any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def check_system_prompt(text: str, tokenizer: Any) -> None:
    """UserError where the tokenizer's chat template is missing, refuses system messages, or leaves them out."""
    remedy = "put the instruction into the prompts, or use a model whose template takes one."
    if not has_template(tokenizer):
        raise UserError(f"system_prompt: the model's tokenizer has no chat template to put it in; {remedy}")
    user = [{"role": "user", "content": "?"}]
    try:
        with_it, without = (
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            for messages in (as_chat(user, text), user)
        )
    except Exception as failure:  # templates are programs and may raise anything
        raise UserError(f"system_prompt: the model's chat template refuses it ({failure}); {remedy}") from failure
    if with_it == without:
        raise UserError(f"system_prompt: the model's chat template leaves it out; {remedy}")


def read_rows(source: str) -> Iterator[Row]:
    """The rows of `source`, each with a checked `prompt`. UserError for what cannot be read."""
    if source.startswith("text:"):
        return iter([("the text", 1, {"prompt": source.removeprefix("text:")})])
    if source.startswith("hub:"):
        return _checked(_from_hub(source.removeprefix("hub:")))
    if source.startswith("gym:"):
        return _from_gym(source.removeprefix("gym:"))
    path = Path(source).expanduser()
    if _exists(path):
        return _checked(_from_path(path))
    if path.suffix in SUFFIXES or source.startswith(("/", "./", "../", "~")):
        raise UserError(f"prompts: there is no file {source!r}; if it is the prompt itself, write text:{source}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return _checked(_from_hub(source))
    return iter([("the text", 1, {"prompt": source})])


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a path, or with characters that no path has
        return False


def _from_path(path: Path) -> Iterator[Row]:
    if path.is_dir():
        return _from_folder(path)
    if path.suffix == ".jsonl":
        return _from_jsonl(path)
    if path.suffix in SUFFIXES:
        return _from_datasets(str(path), SUFFIXES[path.suffix], data_files=[str(path)])
    raise UserError(
        f"prompts: the file {str(path)!r} is of no known kind; use {', '.join(SUFFIXES)}, or write text:{path} if that "
        "is the prompt itself."
    )


def _from_jsonl(path: Path) -> Iterator[Row]:
    """One JSON object per line; empty lines are skipped."""
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parsed(line, f"line {number} of {str(path)!r}", number)
    except OSError as failure:
        raise UserError(f"prompts: {str(path)!r} cannot be read ({failure.strerror}).") from failure
    except UnicodeDecodeError as failure:
        raise UserError(f"prompts: {str(path)!r} is not UTF-8 text ({failure}).") from failure


def _parsed(line: str, where: str, number: int) -> Row:
    try:
        columns = json.loads(line)
    except (ValueError, RecursionError) as failure:
        raise UserError(f"prompts: {where} is not JSON ({failure}); write one object per line.") from failure
    if not isinstance(columns, dict):
        raise UserError(f'prompts: {where} is not a JSON object; write {{"prompt": ...}}.')
    return where, number, columns


def _from_folder(path: Path) -> Iterator[Row]:
    """A data set saved with `save_to_disk`, or a folder of files of one kind."""
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _from_datasets(str(path), None)
    for suffix, kind in SUFFIXES.items():
        files = sorted(path.rglob(f"*{suffix}"))
        if files and suffix == ".jsonl":
            return (row for file in files for row in _from_jsonl(file))
        if files:
            return _from_datasets(str(path), kind, data_files=[str(file) for file in files])
    raise UserError(
        f"prompts: the folder {str(path)!r} holds no data set ({', '.join(SUFFIXES)} files, or what save_to_disk "
        f"writes); if it is the prompt itself, write text:{path}"
    )


def _from_gym(address: str) -> Iterator[Row]:
    """The entries of a task (see fastkl/gym.py), with what its scorer needs: question, answer, metadata, task."""
    for number, entry in enumerate(gym.entries(address), start=1):
        columns = {name: entry[name] for name in ("question", "answer", "metadata")}
        yield f"question {number} of 'gym:{address}'", number, {"prompt": entry["question"], **columns, "task": address}


def _from_hub(name: str) -> Iterator[Row]:
    return _from_datasets(name, name)


def _from_datasets(name: str, kind: str | None, **options: Any) -> Iterator[Row]:
    """Rows through Hugging Face datasets; kind: what load_dataset is given, None for load_from_disk."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if kind == "csv":  # "NA" and "None" are texts; an empty cell is none
            options |= {"keep_default_na": False, "na_values": [""]}
        data = datasets.load_from_disk(name) if kind is None else datasets.load_dataset(kind, **options)
    except Exception as failure:  # datasets raises many types; all mean that there is nothing to read
        reason = " ".join(str(failure).split())[:300]
        hint = f"; if it is the prompt itself, write text:{name}" if kind == name else ""
        raise UserError(f"prompts: the data set {name!r} could not be loaded ({reason}){hint}") from failure
    if isinstance(data, datasets.DatasetDict):
        split = "train" if "train" in data else next(iter(data)) if len(data) == 1 else None
        if split is None:
            raise UserError(f"prompts: the data set {name!r} has no split 'train' (it has {', '.join(data)}).")
        data = data[split]
    return ((f"row {number} of {name!r}", number, row) for number, row in enumerate(data, start=1))


def _checked(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, each with a `prompt` that is a text or a list of chat messages, and no reserved column."""
    for where, number, columns in rows:
        if "prompt" not in columns:
            have = ", ".join(map(repr, columns)) or "none"
            raise UserError(f"prompts: {where} has no column 'prompt' (its columns: {have}).")
        if not isinstance(columns["prompt"], str) and not is_chat(columns["prompt"]):
            raise UserError(
                f"prompts: the 'prompt' in {where} is neither a text nor a list of messages with 'role' and 'content'."
            )
        for reserved in ("prompts", "completions"):
            if reserved in columns:
                raise UserError(
                    f"prompts: {where} has a column {reserved!r}, a name that reward functions use; rename it."
                )
        yield where, number, columns


def _prompts(rows: Sequence[Row], tokenizer: Any) -> list[Prompt]:
    """The rows tokenised together: texts with special tokens, rendered chats (which bring their own) without."""
    raws = [columns["prompt"] for _, _, columns in rows]
    texts = [
        raw if isinstance(raw, str) else rendered(raw, where, tokenizer)
        for raw, (where, _, _) in zip(raws, rows, strict=True)
    ]
    for text, (where, _, _) in zip(texts, rows, strict=True):
        if HALF_CHARACTER.search(text):
            raise UserError(
                f"prompts: {where} holds half of a surrogate pair, or a byte that is not UTF-8: no character; mend it."
            )
    ids: list[Sequence[int]] = [()] * len(rows)
    for is_text in (True, False):
        chosen = [i for i, raw in enumerate(raws) if isinstance(raw, str) == is_text]
        if chosen:
            encoded = tokenizer([texts[i] for i in chosen], add_special_tokens=is_text)["input_ids"]
            for i, token_ids in zip(chosen, encoded, strict=True):
                ids[i] = as_beginning(token_ids, texts[i], tokenizer)
    return [
        Prompt(tuple(token_ids), text, raw, number, {k: v for k, v in columns.items() if k != "prompt"})
        for token_ids, text, raw, (_, number, columns) in zip(ids, texts, raws, rows, strict=True)
    ]


def as_beginning(token_ids: Sequence[int], text: str, tokenizer: Any) -> Sequence[int]:
    """The ids of a text that is to be continued: without an end that the tokenizer has put after it, which the model
    would write on from, and without the second of two beginnings, one of them written in the text.
    """
    end, begin = (getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "bos"))
    if end is not None and token_ids and token_ids[-1] == end and not text.rstrip().endswith(tokenizer.eos_token):
        token_ids = token_ids[:-1]
    if begin is not None and list(token_ids[:2]) == [begin] * 2 and not text.startswith(tokenizer.bos_token * 2):
        token_ids = token_ids[1:]
    return token_ids
