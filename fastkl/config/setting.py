"""All facts about a setting, and a dataclass of settings as a table: one `Setting` per field.

They come from the field's annotation, its default and the string below it (`table_of`); a `Heading` begins a block.
Command line, YAML and JSON give text or plain values, which `Setting.converted` turns into the field's type and
`Setting.check` then checks, the same way for all.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from inspect import get_annotations
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from fastkl.errors import UserError, nearest, short
from fastkl.sampling.params import Heading, Range

KINDS = {
    str: ("a text", "a list of names"),
    int: ("a whole number", "a list of whole numbers"),
    float: ("a number", "a list of numbers"),
    bool: ("true or false", ""),
}


LARGEST_WHOLE = (1 << 63) - 1  # what torch and the generators take


@dataclass(frozen=True, slots=True)
class Registry:
    """The setting names an entry of a table, a word besides, or, where `own`, a function of the user's."""

    entries: Mapping[str, Any]
    own: bool = False  # file.py:function
    besides: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Unset:
    """What stands for no value on the command line and in help pages; None in Python and YAML."""

    text: str = "none"


@dataclass(frozen=True, slots=True)
class Setting:
    """All facts about a field."""

    name: str
    config: type  # the dataclass that it is a field of
    type: type  # of the value, or of a list's items
    is_list: bool
    default: Any
    heading: str
    registry: Registry
    range: Range | None = None
    is_optional: bool = False  # `unset` on the command line, null in YAML, None in Python
    unset: Unset = Unset()

    @property
    def choices(self) -> tuple[str, ...]:
        """What it may be, the entries that its registry has by now; none where anything of its type will do."""
        return (*self.registry.besides, *self.registry.entries)

    @property
    def own(self) -> bool:
        """Whether it may also be a function of the user's."""
        return self.registry.own

    @property
    def option(self) -> str:
        """Its name on the command line."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def help(self) -> str:
        """The string below the field."""
        return help_texts(self.config)[self.name]

    @property
    def default_text(self) -> str:
        """The default as it is typed; "none" is the empty list, an empty text, or no value."""
        default = " ".join(map(str, self.default)) if self.is_list else str(self.default)
        return self.unset.text if self.default is None else default or "none"

    @property
    def takes(self) -> str:
        """What a value may be, for people: "reward, loss", "0 or more"."""
        own = ("FILE.py:FUNCTION",) if self.own else ()
        return ", ".join((*self.choices, *own)) or (self.range.text if self.range else "")

    def converted(self, given: Any) -> Any:
        """`given`, a text or a plain value, as this setting's type. UserError where it is something else."""
        try:
            if self.is_optional and given in (None, self.unset.text):
                return None
            if not self.is_list:
                return self._one(given)
            items = [given] if isinstance(given, str | int | float) else list(given or ())
            return () if items == ["none"] else tuple(map(self._one, items))
        except (ValueError, TypeError, OverflowError):
            shown = list(given) if isinstance(given, tuple) else given
            raise UserError(f"{self.name}: {short(shown)} is not {KINDS[self.type][self.is_list]}.") from None

    def _one(self, given: Any) -> Any:
        if isinstance(given, bool) != (self.type is bool) or (self.type is str and not isinstance(given, str)):
            raise TypeError
        if self.type is str:
            given.encode()  # UnicodeEncodeError, a ValueError: bytes of the command line that are no UTF-8
        return whole_number(given) if self.type is int else self.type(given)

    def check(self, value: Any) -> None:
        """UserError for a value that is out of range, or none of the choices."""
        for item in value if self.is_list else () if value is None and self.is_optional else (value,):
            if self.choices and item not in self.choices and not (self.own and (":" in item or item.endswith(".py"))):
                raise UserError(
                    f"{self.name}: unknown {short(item)}.{nearest(item, self.choices)} Choose from "
                    f"{', '.join(self.choices)}{' or FILE.py:FUNCTION' if self.own else ''}."
                )
            if wanted := self._wanted(item):
                raise UserError(f"{self.name}: {short(item)} is out of range; it must be {wanted}.")

    def _wanted(self, item: Any) -> str:
        """What a number must be and is not; empty where it is in order, and for a text."""
        if self.type is int and item > LARGEST_WHOLE:
            return "below 2^63"
        if (self.range and not self.range.fits(item)) or (self.type is float and not math.isfinite(item)):
            return self.range.text if self.range else "finite"
        return ""


def whole_number(given: Any) -> int:
    """12, "12", 12.0 or "1e3" as an int. ValueError or TypeError for anything else."""
    try:
        return int(given) if isinstance(given, str) else operator.index(given)
    except (ValueError, TypeError):
        if not float(given).is_integer():
            raise ValueError from None
        return int(float(given))


def table_of(config: type) -> dict[str, Setting]:
    """Every field of a dataclass of settings, by its name; blocks in the order of the headings of its own fields."""
    hints = get_type_hints(config, include_extras=True)
    own = get_annotations(config)  # without those of the classes it inherits from
    found: list[Setting] = []
    heading = ""
    for field in fields(config):
        hint, *notes = (
            get_args(hints[field.name]) if get_origin(hints[field.name]) is Annotated else [hints[field.name]]
        )
        about = {type(note): note for note in notes}
        heading = about[Heading].title if Heading in about else heading
        registry = about.get(Registry, Registry({}))
        is_list, is_optional = get_origin(hint) is tuple, get_origin(hint) is UnionType
        item = get_args(hint)[0] if is_list or is_optional else hint
        if get_origin(item) is Literal:
            item, registry = str, Registry({}, besides=get_args(item))
        found.append(
            Setting(
                *(field.name, config, item, is_list, field.default, heading, registry, about.get(Range), is_optional),
                about.get(Unset, Unset()),
            )
        )
    headings = list(dict.fromkeys(setting.heading for setting in found if setting.name in own))
    return {setting.name: setting for setting in sorted(found, key=lambda setting: headings.index(setting.heading))}


@cache
def help_texts(config: type) -> dict[str, str]:
    """The string below every field."""
    from docstring_parser import parse_from_object

    params = [
        param for cls in (*config.__bases__, config) if is_dataclass(cls) for param in parse_from_object(cls).params
    ]
    return {param.arg_name: " ".join((param.description or "").split()) for param in params}
