"""The documentation as a site: it builds without a warning and asks no other machine for anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from pages import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material", reason="the site needs mkdocs-material (the extra dev)")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_in_the_site(site):
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages <= {path.name for path in site.iterdir()}
    assert (site / "index.html").is_file()


def test_nothing_is_fetched_from_elsewhere(site):
    fetched = re.compile(r"""<(?:script|img|link|iframe|source)\b[^>]*?(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""")
    in_css = re.compile(r"""(?:url\(|@import )["']?((?:https?:)?//[^"')]+)""")
    for path in site.rglob("*"):
        if path.suffix in (".html", ".css"):
            text = path.read_text(encoding="utf-8")
            assert not fetched.findall(text) + in_css.findall(text), path


def test_links_to_the_repositorys_files_are_not_left_dangling(site):
    for path in site.rglob("*.html"):
        inside = re.findall(r'href="((?:\.\./)*(?:fastkl|kernels|bench|tests|tools)/[^"]+)"', path.read_text())
        assert not inside, (path, inside)
