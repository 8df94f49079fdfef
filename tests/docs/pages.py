"""README.md and docs/*.md taken apart: their snippets, commands and links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))

FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[a-z ]+) -->\n)?(?P<indent> *)```(?P<info>[^\n]*)\n(?P<text>.*?)^ *```$", re.M | re.S
)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMANDS = ("fastkl", "make", "mkdocs", "pip", "pre-commit", "python", "python3", "uv")


@dataclass(frozen=True, slots=True)
class Snippet:
    """A fenced block. A mark, as "slow", stands in a comment above it."""

    page: Path
    line: int
    language: str
    title: str | None  # the file that the block is
    mark: str | None
    text: str

    @property
    def place(self) -> str:
        """PAGE:LINE."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def snippets(page: Path) -> list[Snippet]:
    """The fenced blocks of a page, in order."""
    text, found = page.read_text(encoding="utf-8"), []
    for fence in FENCE.finditer(text):
        language, _, rest = fence["info"].partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        lines = [line.removeprefix(fence["indent"]) for line in fence["text"].splitlines(keepends=True)]
        line = text.count("\n", 0, fence.start("info")) + 1
        found.append(Snippet(page, line, language, title and title[1], fence["mark"], "".join(lines)))
    return found


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def commands(page: Path) -> Iterator[str]:
    """Every shell command of a page, one line each: those of its sh blocks, and those between backticks in its text."""
    for snippet in snippets(page):
        if snippet.language == "sh":
            yield from shell_lines(snippet.text)
    for code in INLINE.findall(prose(page)):
        if code.partition(" ")[0] in COMMANDS and " " in code:
            yield code


def shell_lines(text: str) -> Iterator[str]:
    """The commands of a shell script, without comments, continued lines joined."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield line.strip()


def links(page: Path) -> list[str]:
    """Targets of the page's links and pictures."""
    return LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in re.findall(r"^#+ (.+)$", prose(page), re.M))
    return {heading.strip().replace(" ", "-") for heading in headings}
