"""Settings as text: help texts out of config.py, values out of strings and YAML, config.yaml and back.

In: the command line's strings, or a YAML file. Out: a TrainConfig whose values have their fields' types; whether they
make sense is `check_config`'s business. PyYAML is loaded only when a file is read or written.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from fastkl.config.settings import TrainConfig
from fastkl.errors import UserError, nearest
from fastkl.version import __version__


@dataclass(frozen=True, slots=True)
class FieldHelp:
    """How a field of TrainConfig is explained to people."""

    text: str
    group: str  # title of the block of fields it stands in


@cache
def field_help() -> dict[str, FieldHelp]:
    """The help of every field, in order, out of config.py: the string below the field, the comment above its block."""
    source = Path(__file__).with_name("settings.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    body = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "TrainConfig").body
    found: dict[str, FieldHelp] = {}
    group = ""
    for node, below in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        above = lines[node.lineno - 2].strip()
        group = above.removeprefix("# ") if above.startswith("# ") else group
        text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
        found[node.target.id] = FieldHelp(" ".join(str(text).split()), group)
    return found


@cache
def field_types() -> dict[str, Any]:
    """The type of every field."""
    return {name: get_type_hints(TrainConfig)[name] for name in field_help()}


def with_settings(base: TrainConfig, settings: Mapping[str, Any], where: str = "") -> TrainConfig:
    """`base` with the settings of a YAML mapping or of the command line; `where` (a file) begins the error messages."""
    known = field_types()
    values = {}
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UserError(f"{where}there is no setting {str(key)!r}.{why_not(name) or nearest(name, known)}")
        try:
            values[name] = converted(name, value)
        except (ValueError, TypeError, OverflowError):
            kind = KINDS[known[name]]
            raise UserError(f"{where}{name}: {value!r} is not {kind}.") from None
    return replace(base, **values)


def why_not(name: str) -> str:
    """Why the sampling contract rejects the parameter `name` (begins with a space), or nothing."""
    from fastkl.sampling.rules import REJECTED, VLLM

    rule = VLLM.get(name)
    return f" It cannot be scored: {rule.why}." if rule and rule.kind == REJECTED else ""


OPTIONAL_FLOATS = tuple[float, ...] | None


KINDS = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    tuple[str, ...]: "a list of names",
    tuple[int, ...]: "a list of whole numbers",
    OPTIONAL_FLOATS: "a list of numbers",
}


def converted(name: str, value: Any) -> Any:
    """`value` as the type of the field `name`. Raises ValueError or TypeError where it is something else."""
    kind = field_types()[name]
    if kind is str:
        return _text(value)
    if kind is bool:
        return _truth(value)
    if kind is int:
        return _whole_number(value)
    if kind is float:
        return _number(value)
    items = [value] if isinstance(value, str | int | float) else [] if value is None else list(value)
    if kind == OPTIONAL_FLOATS:
        return None if value is None or items == ["none"] else tuple(_number(item) for item in items)
    if kind == tuple[int, ...]:
        return () if items == ["none"] else tuple(_whole_number(item) for item in items)
    return () if name == "report_to" and items == ["none"] else tuple(_text(item) for item in items)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)  # a text too: YAML reads 3e-4 as one


def _whole_number(value: Any) -> int:
    number = _number(value)
    if number != int(number):
        raise ValueError
    return int(value) if not isinstance(value, str) or value.strip("+- _0123456789") == "" else int(number)


def load_config(path: Path, base: TrainConfig | None = None) -> TrainConfig:
    """The settings in a YAML file over `base` (the defaults). UserError: unreadable file, unknown setting."""
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as failure:
        raise UserError(f"config: {str(path)!r} cannot be read ({failure.strerror}).") from failure
    except (yaml.YAMLError, UnicodeDecodeError) as failure:
        reason = " ".join(str(failure).split())
        raise UserError(f"config: {str(path)!r} is not a YAML file ({reason}).") from failure
    if not isinstance(settings, dict | None):
        raise UserError(f"config: {str(path)!r} holds no settings; write one `name: value` per line.")
    return with_settings(base or TrainConfig(), settings or {}, where=f"{path}: ")


def save_config(config: TrainConfig, path: Path) -> None:
    """Writes every setting but `resume`, with its help as a comment, in one stroke (a rename). OSError if it fails."""
    settings = asdict(config)
    lines = [f"# fastkl {__version__}; the same again: fastkl train --config THIS_FILE --output ANOTHER_FOLDER"]
    group = None
    for name, help_ in field_help().items():
        if name == "resume":
            continue
        if help_.group != group:
            group = help_.group
            lines += ["", f"# {group}"]
        lines += [f"{name}: {_as_yaml(settings[name])}  # {help_.text}"]
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
