"""For MkDocs: links from a page to a file of the repository that is not part of the site.

In a checkout and on a code host such a link, say [rloo.py](../fastkl/objective/rloo.py), leads to the file. On the site
it leads to `extra.repository` (mkdocs.yml), and becomes the file's path where that is not set.
"""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """The page's Markdown with its links out of docs/ rewritten."""
    repository = config.extra.get("repository")

    def rewritten(link: re.Match[str]) -> str:
        text, path, anchor = link[1], link[2].rstrip("/"), link[3] or ""
        if repository:
            return f"[{text}]({repository}/blob/main/{path}{anchor})"
        return f"`{path}`" if path.endswith(text.strip("`/")) else f"{text} (`{path}`)"

    return OUTSIDE.sub(rewritten, markdown)
