"""Rows: from an address (a text, a file, a folder, a data set, a task) to rows with a checked prompt.

`--prompts` takes, tried in this order:

    text:ANYTHING            the text itself
    hub:ORG/NAME             a data set on the Hugging Face hub
    gym:TASK?KEY=VALUE&...   questions of reasoning-gym, made here; their columns are what the reward `gym` needs
    a path that exists       a .jsonl, .json, .parquet or .csv file, or a folder of such, or of `save_to_disk`
    a name that looks like a path (ends like such a file, or begins with / ./ ../ or ~) and does not exist: an error
    ORG/NAME                 two words around one slash, without spaces: a data set on the hub
    anything else            the text itself

A data set of the hub takes ?config=NAME&split=NAME after its name, a folder ?split=NAME; without it the split is
"train", or the only one there is. In a folder of files, a split's files are those with its name as a word in theirs
(test.jsonl, data/test-00000.parquet). Nothing is executed: no loading scripts, no pickle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastkl import gym
from fastkl.address import check_options, name_and_options
from fastkl.data.chat import is_chat
from fastkl.errors import UserError, nearest

SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}  # and the datasets loader for each
HUB_OPTIONS = ("config", "split")

Row = tuple[str, int, Mapping[str, Any]]  # where it stands (for messages), its number from 1, its columns


def read_rows(source: Any, column: str = "prompt") -> Iterator[Row]:
    """The rows of `source`, each with a checked `prompt`, which stands in `column`. UserError for what cannot be read.

    source: an address, or the rows themselves: a list or a data set of texts, of lists of messages, or of columns.

    Where there is no `prompt`, a column `messages` takes its place: whole conversations, without the assistant's last
    message.
    """
    if not isinstance(source, str):
        return checked(_from_objects(source, column), column)
    if source.startswith("gym:"):
        return _from_gym(source.removeprefix("gym:"))
    place = place_of(source)
    if isinstance(place, Path):
        return checked(_from_path(place, **_split_of(source, place)), column)
    if place == "hub":
        return checked(_from_hub(source.removeprefix("hub:")), column)
    return iter([("the text", 1, {"prompt": source.removeprefix("text:")})])


def _from_objects(rows: Any, column: str) -> Iterator[Row]:
    """Rows that a caller in Python has."""
    if isinstance(rows, Mapping):
        have = ", ".join(map(str, rows))
        raise UserError(f"prompts: a {type(rows).__name__} has several parts ({have}); give one of them.")
    if not isinstance(rows, Iterable):
        raise UserError(f"prompts: {type(rows).__name__} holds no rows; give an address, a list or a data set.")
    for number, row in enumerate(rows, start=1):
        yield f"row {number} of the prompts", number, dict(row) if isinstance(row, Mapping) else {column: row}


def place_of(source: str) -> Path | str:
    """The file or folder that `source` names, without its options; or "text", "hub" or "gym". UserError for a file that
    does not exist. Reads nothing.
    """
    for kind in ("text", "hub", "gym"):
        if source.startswith(f"{kind}:"):
            return kind if kind != "hub" else _hub(source)
    named = Path(source).expanduser()
    before = Path(source.partition("?")[0]).expanduser()
    for path in (named, before) if re.search(r"\?\w+=", source) else (named,):
        if _exists(path):
            return path
    if before.suffix in SUFFIXES or source.startswith(("/", "./", "../", "~")):
        raise UserError(f"prompts: there is no file {source!r}; if it is the prompt itself, write text:{source}")
    return _hub(source) if re.fullmatch(r"[\w.-]+/[\w.-]+(\?\w+=\S*)?", source) else "text"


def _hub(source: str) -> str:
    """ "hub", if the options of the data set's address are known ones. UserError if not."""
    name, options = name_and_options("prompts", source.removeprefix("hub:"))
    check_options("prompts", name, options, HUB_OPTIONS)
    return "hub"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a path, or with characters that no path has
        return False


def _split_of(source: str, path: Path) -> dict[str, str]:
    """The options of a folder's address, checked; a file has none."""
    options = {} if Path(source).expanduser() == path else name_and_options("prompts", source)[1]
    if options and not path.is_dir():
        raise UserError(f"prompts: {str(path)!r} is a file, which has no splits; leave out what follows the ?.")
    check_options("prompts", str(path), options, ["split"])
    return options


def _from_path(path: Path, split: str = "") -> Iterator[Row]:
    if path.is_dir():
        return _from_folder(path, split)
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


def _from_folder(path: Path, split: str) -> Iterator[Row]:
    """A data set saved with `save_to_disk`, or a folder of files of one kind."""
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _from_datasets(str(path), None, split=split)
    for suffix, kind in SUFFIXES.items():
        files = sorted(path.rglob(f"*{suffix}"))
        chosen = [file for file in files if not split or split in re.split(r"[\W_]+", str(file.relative_to(path)))]
        if files and not chosen:
            names = ", ".join(file.name for file in files[:5])
            raise UserError(f"prompts: no file in {str(path)!r} has the split {split!r} in its name (it has {names}).")
        if files and suffix == ".jsonl":
            return (row for file in chosen for row in _from_jsonl(file))
        if files:
            return _from_datasets(str(path), kind, data_files=[str(file) for file in chosen])
    raise UserError(
        f"prompts: the folder {str(path)!r} holds no data set ({', '.join(SUFFIXES)} files, or what save_to_disk "
        f"writes); if it is the prompt itself, write text:{path}"
    )


def _from_gym(address: str) -> Iterator[Row]:
    """The entries of a task (see fastkl/gym.py), with what its scorer needs: question, answer, metadata, task."""
    for number, entry in enumerate(gym.entries(address), start=1):
        columns = {name: entry[name] for name in ("question", "answer", "metadata")}
        yield f"question {number} of 'gym:{address}'", number, {"prompt": entry["question"], **columns, "task": address}


def _from_hub(address: str) -> Iterator[Row]:
    name, options = name_and_options("prompts", address)
    config = {"name": options["config"]} if "config" in options else {}
    return _from_datasets(name, name, split=options.get("split", ""), **config)


def _from_datasets(name: str, kind: str | None, /, *, split: str = "", **options: Any) -> Iterator[Row]:
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
        data = data[_chosen_split(name, list(data), split)]
    elif split:
        raise UserError(f"prompts: the data set {name!r} has no splits; name it without ?split={split}.")
    return ((f"row {number} of {name!r}", number, row) for number, row in enumerate(data, start=1))


def _chosen_split(name: str, splits: list[str], split: str) -> str:
    """The split that is asked for; else "train", or the only one."""
    chosen = split or ("train" if "train" in splits or len(splits) > 1 else splits[0])
    if chosen not in splits:
        raise UserError(
            f"prompts: the data set {name!r} has no split {chosen!r} (it has {', '.join(splits)}); choose one with "
            f"{name}?split=NAME."
        )
    return chosen


def checked(rows: Iterable[Row], column: str = "prompt") -> Iterator[Row]:
    """The rows, each with a `prompt` that is a text or a list of chat messages, and no reserved column."""
    for where, number, columns in rows:
        name = "messages" if column == "prompt" not in columns and "messages" in columns else column
        if name not in columns:
            have = ", ".join(map(repr, columns)) or "none"
            remedy = " Name it with --prompt-column." if column == "prompt" and columns else nearest(column, columns)
            raise UserError(f"prompts: {where} has no column {name!r} (its columns: {have}).{remedy}")
        prompt = columns[name]
        if not isinstance(prompt, str) and not is_chat(prompt):
            raise UserError(
                f"prompts: the {name!r} in {where} is neither a text nor a list of messages with 'role' and 'content'."
            )
        if name == "messages" and not isinstance(prompt, str):
            prompt = _without_answer(prompt, where)
        for reserved in ("prompts", "completions"):
            if reserved in columns:
                raise UserError(
                    f"prompts: {where} has a column {reserved!r}, a name that reward functions use; rename it."
                )
        yield where, number, {**columns, "prompt": prompt}


def _without_answer(messages: list[dict[str, str]], where: str) -> list[dict[str, str]]:
    """A conversation up to the assistant's last message, where that ends it."""
    kept = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not kept:
        raise UserError(f"prompts: the 'messages' in {where} hold nothing but an answer; there is nothing to ask.")
    return kept
