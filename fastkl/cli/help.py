"""Help pages in two columns, at most 100 characters wide and never wider than the terminal."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

INDENT = 26  # of the column of texts


class Page:
    """How Cyclopts renders a help page: plain text without boxes, which `less` and a log show as it is."""

    def __call__(self, console: Any, options: Any, panel: Any) -> None:
        """A heading and its options or commands."""
        if panel.entries:
            print(f"\n{panel.title}:")
        for entry in panel.entries:
            names = entry.positional_label or ", ".join(
                (*entry.positive_shorts, *entry.positive_names, *entry.negative_names)
            )
            value = "" if entry.positional_label or not entry.metavar else f" {entry.metavar}"
            print(two_columns(f"  {names}{value}", plain(entry.description)))

    def render_usage(self, console: Any, options: Any, usage: Any) -> None:
        """The first line."""
        print(f"{str(usage).strip()}\n")

    def render_description(self, console: Any, options: Any, description: Any) -> None:
        """What the command does: paragraphs are wrapped, indented lines stay as they are."""
        for number, paragraph in enumerate(plain(description).strip().split("\n\n")):
            kept = any(line.startswith(" ") for line in paragraph.splitlines())
            print(
                "\n" * (number > 0) + (paragraph if kept else textwrap.fill(paragraph, width(), break_on_hyphens=False))
            )


def plain(text: Any) -> str:
    """The text that Cyclopts has wrapped up for rich."""
    return str(getattr(getattr(text, "primary_renderable", text), "plain", text) or "")


def two_columns(label: str, text: str) -> str:
    """The text beside its label, or below one that is too long."""
    lines = textwrap.wrap(text, width() - INDENT, break_on_hyphens=False) or [""]
    if len(label) >= INDENT:
        return "\n".join([label, *(" " * INDENT + line for line in lines)])
    return "\n".join([label.ljust(INDENT) + lines[0], *(" " * INDENT + line for line in lines[1:])]).rstrip()


def width() -> int:
    """Columns of a page."""
    return min(shutil.get_terminal_size().columns, 100)
