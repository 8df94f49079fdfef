"""TrainConfig <-> config.yaml, and docs/settings.md. PyYAML is loaded only when a file is read or written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from fastkl.config.settings import TrainConfig, settings
from fastkl.errors import UserError, nearest, short
from fastkl.sampling.rules import why_rejected
from fastkl.version import __version__

SINCE_0_1_0 = {"baseline": ("advantage", {"leave_one_out": "rloo"})}
"""Settings of version 0.1.0 that have another name today, and their values that do."""


MAX_DEPTH = 20  # of brackets in brackets; settings need one

LARGEST_NUMBER = 10**300  # beyond, Python makes no float of it, and in the end no text


def with_settings(base: TrainConfig, given: Mapping[str, Any]) -> TrainConfig:
    """`base` with these settings, texts of the command line or values of a file. UserError for one it does not know."""
    values = {}
    for key, value in given.items():
        name = key[:200].replace("-", "_") if isinstance(key, str) else short(key)
        if name not in settings():
            raise UserError(f"there is no setting {short(key)}.{why_rejected(name) or nearest(name, settings())}")
        values[name] = settings()[name].converted(value)
    return replace(base, **values)


def plain(config: TrainConfig) -> TrainConfig:
    """The settings with every value as its setting's type: paths, single texts and lists are taken where they make
    sense. UserError for a value that is none of these."""

    def as_text(value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    values = {name: getattr(config, name) for name in settings()}
    return with_settings(
        TrainConfig(),
        {
            name: tuple(map(as_text, value)) if isinstance(value, list | tuple) else as_text(value)
            for name, value in values.items()
        },
    )


def load_config(path: Path, base: TrainConfig | None = None) -> TrainConfig:
    """The settings in a YAML file over `base` (the defaults). UserError: unreadable file, unknown setting."""
    try:
        given = read_yaml(path)
    except OSError as failure:
        raise UserError(f"config: {str(path)!r} cannot be read ({failure.strerror}).") from failure
    except ValueError as failure:
        raise UserError(f"config: {str(path)!r} is not a YAML file ({failure}).") from failure
    if not isinstance(given, dict | None):
        raise UserError(f"config: {str(path)!r} holds no settings; write one `name: value` per line.")
    try:
        return with_settings(base or TrainConfig(), dict(map(renamed, (given or {}).items())))
    except UserError as mistake:
        raise UserError(f"{path}: {mistake}") from None


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. OSError where it cannot be read; ValueError, in one line, where it is no YAML of plain
    values: aliases, in which a few lines can stand for billions, are not taken.
    """
    import yaml

    class PlainLoader(yaml.SafeLoader):
        def fetch_flow_collection_start(self, token_class: Any) -> None:
            if self.flow_level > MAX_DEPTH:
                raise ValueError("it is nested too deeply")
            super().fetch_flow_collection_start(token_class)

        def construct_yaml_int(self, node: Any) -> int:
            number: int = super().construct_yaml_int(node)
            if abs(number) > LARGEST_NUMBER:
                raise ValueError("a number of hundreds of digits")
            return number

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError(f"line {self.peek_event().start_mark.line + 1} has an alias; write the value out")
            return super().compose_node(parent, index)

    PlainLoader.add_constructor("tag:yaml.org,2002:int", PlainLoader.construct_yaml_int)
    text = path.read_bytes()
    try:
        return yaml.load(text.decode("utf-8-sig"), PlainLoader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as failure:  # PyYAML lets the constructors' errors through: of numbers, dates and bytes
        known = isinstance(failure, ValueError | yaml.YAMLError)
        reason = " ".join(str(failure).split())[:300] if known else "a value that does not fit its tag"
        raise ValueError(reason) from failure


def renamed(setting: tuple[str, Any]) -> tuple[str, Any]:
    """A setting as version 0.1.0 wrote it, under today's name."""
    name, value = setting
    now, values = SINCE_0_1_0.get(name, (name, {}))
    return now, values.get(value, value) if values else value


def save_config(config: TrainConfig, path: Path) -> None:
    """Writes every setting but `resume`, with its help as a comment, in one stroke (a rename). OSError if it fails.

    The last line is a checksum of the settings, by which `load_own_config` sees that they are still those.
    """
    lines = [f"# fastkl {__version__}; the same again: fastkl train --config THIS_FILE --output ANOTHER_FOLDER"]
    for heading, block in groupby(settings().values(), key=attrgetter("heading")):
        lines += ["", f"# {heading}"]
        lines += [f"{s.name}: {_as_yaml(getattr(config, s.name))}  # {s.help}" for s in block if s.name != "resume"]
    lines += ["", f"# checksum of the settings above: {_checksum(config)}"]
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def load_own_config(path: Path) -> TrainConfig:
    """The settings that `save_config` wrote. UserError where they are not those any more: edited or damaged since."""
    config = load_config(path)
    for name, setting in settings().items():
        setting.check(getattr(config, name))
    found = re.search(r"^# checksum of the settings above: (\w+)$", path.read_text(encoding="utf-8-sig"), re.M)
    if not found or found[1] != _checksum(config):
        raise UserError(
            f"resume: {str(path)!r} is not as the run wrote it, and there is no checkpoint that knows its settings; "
            f"delete {str(path.parent)!r}, or choose another --output, and start without --resume."
        )
    return config


def _checksum(config: TrainConfig) -> str:
    values = dataclasses.asdict(config) | {"resume": False}
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()


def _as_yaml(value: Any) -> str:
    """A setting's value on one line of YAML."""
    import yaml

    plain = list(value) if isinstance(value, tuple) else value
    for style, readable in ((None, True), ('"', True), ('"', False)):  # escaped where it would not come back otherwise
        text = yaml.safe_dump(plain, default_flow_style=True, default_style=style, allow_unicode=readable, width=10**9)
        text = text.removesuffix("\n").removesuffix("\n...")
        if "\n" not in text and _comes_back(text, plain):
            break
    return text


def _comes_back(text: str, value: Any) -> bool:
    """Whether YAML reads the text as this value; of some line separators it makes blanks."""
    import yaml

    try:
        return bool(yaml.safe_load(text) == value)
    except yaml.YAMLError:
        return False


def as_markdown() -> str:
    """docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "Every setting of `fastkl train` and `fastkl sweep`, of config.yaml, and of `fastkl.TrainConfig` in Python.",
        "Made from the fields of `fastkl/config/settings.py` by `python -m fastkl.config.files > docs/settings.md`.",
    ]
    for heading, block in groupby(settings().values(), key=attrgetter("heading")):
        lines += ["", f"## {heading}", "", "| setting | type | default | values | |", "|---|---|---|---|---|"]
        for setting in block:
            kind = f"list of {setting.type.__name__}" if setting.is_list else setting.type.__name__
            cells = f"`{setting.option}`", kind, f"`{setting.default_text}`", setting.takes, setting.help
            lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(as_markdown(), end="")
