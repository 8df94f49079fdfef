"""TrainConfig <-> config.yaml, and docs/settings.md. PyYAML is loaded only when a file is read or written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from fastkl.config.settings import TrainConfig, settings
from fastkl.errors import UserError, nearest
from fastkl.sampling.rules import why_rejected
from fastkl.version import __version__

SINCE_0_1_0 = {"baseline": ("advantage", {"leave_one_out": "rloo"})}
"""Settings of version 0.1.0 that have another name today, and their values that do."""


def with_settings(base: TrainConfig, given: Mapping[str, Any]) -> TrainConfig:
    """`base` with these settings, texts of the command line or values of a file. UserError for one it does not know."""
    values = {}
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if name not in settings():
            raise UserError(f"there is no setting {str(key)!r}.{why_rejected(name) or nearest(name, settings())}")
        values[name] = settings()[name].converted(value)
    return replace(base, **values)


def load_config(path: Path, base: TrainConfig | None = None) -> TrainConfig:
    """The settings in a YAML file over `base` (the defaults). UserError: unreadable file, unknown setting."""
    import yaml

    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as failure:
        raise UserError(f"config: {str(path)!r} cannot be read ({failure.strerror}).") from failure
    except (yaml.YAMLError, UnicodeDecodeError) as failure:
        reason = " ".join(str(failure).split())
        raise UserError(f"config: {str(path)!r} is not a YAML file ({reason}).") from failure
    if not isinstance(given, dict | None):
        raise UserError(f"config: {str(path)!r} holds no settings; write one `name: value` per line.")
    try:
        return with_settings(base or TrainConfig(), dict(map(renamed, (given or {}).items())))
    except UserError as mistake:
        raise UserError(f"{path}: {mistake}") from None


def renamed(setting: tuple[str, Any]) -> tuple[str, Any]:
    """A setting as version 0.1.0 wrote it, under today's name."""
    name, value = setting
    now, values = SINCE_0_1_0.get(name, (name, {}))
    return now, values.get(value, value) if values else value


def save_config(config: TrainConfig, path: Path) -> None:
    """Writes every setting but `resume`, with its help as a comment, in one stroke (a rename). OSError if it fails."""
    lines = [f"# fastkl {__version__}; the same again: fastkl train --config THIS_FILE --output ANOTHER_FOLDER"]
    for heading, block in groupby(settings().values(), key=attrgetter("heading")):
        lines += ["", f"# {heading}"]
        lines += [f"{s.name}: {_as_yaml(getattr(config, s.name))}  # {s.help}" for s in block if s.name != "resume"]
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def _as_yaml(value: Any) -> str:
    """A setting's value on one line of YAML."""
    import yaml

    plain = list(value) if isinstance(value, tuple) else value
    for style in (None, '"'):  # quoted where the plain style would take several lines
        text = yaml.safe_dump(plain, default_flow_style=True, default_style=style, allow_unicode=True, width=10**9)
        text = text.removesuffix("\n").removesuffix("\n...")
        if "\n" not in text:
            break
    return text


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
