"""The README's two pictures, from real runs.

    python bench/training/pictures.py RUN SWEEP_FOLDER

docs/terminal.svg: the live view after the last step of RUN, replayed from its metrics.jsonl and samples.jsonl.
docs/frontier.png: the reward-against-KL chart of the sweep's report page, drawn by headless Chromium.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from bench.common import ROOT, read_lines
from fastkl.config.files import load_config
from fastkl.report.page.write import ASSETS, write_report
from fastkl.report.terminal import View

DOCS = ROOT / "docs"


def terminal(run: Path) -> None:
    """The live panel as it looked at the end of the run, 132 columns wide."""
    config = load_config(run / "config.yaml")
    console = Console(
        record=True, width=132, height=40, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    title = f"{config.model} → {', '.join(config.reward)}, β {config.kl_coef:g}"
    view = View(title, total_steps=config.steps, console=console)
    metrics, samples = read_lines(run / "metrics.jsonl"), read_lines(run / "samples.jsonl")
    for row in metrics:
        view.step(row)
    last = [sample for sample in samples if sample["step"] == metrics[-1]["step"]]
    view.samples(last)
    console.print(view._render())
    svg = console.export_svg(title="fastkl train")
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # the reader's own fonts: a picture asks no network
    (DOCS / "terminal.svg").write_text(svg)


def frontier(sweep: Path) -> None:
    """The first chart of the comparison page, as a PNG of its own."""
    page = write_report(sorted(path.parent for path in sweep.glob("*/metrics.jsonl"))).read_text()
    figure = re.search(r"<figure.*?</figure>", page, flags=re.DOTALL)
    if figure is None:
        sys.exit("the report holds no chart")
    screenshot(figure.group(), DOCS / "frontier.png", height=435)


def screenshot(figure: str, output: Path, *, height: int) -> None:
    """A figure of the report page as a PNG, 900 x `height` CSS pixels, two dots each; drawn by headless Chromium."""
    browser = shutil.which("chromium") or shutil.which("google-chrome") or sys.exit("needs chromium")
    style = (ASSETS / "style.css").read_text()
    with tempfile.TemporaryDirectory() as folder:
        html = Path(folder) / "chart.html"
        html.write_text(
            f"<!doctype html><meta charset=utf-8><style>{style}</style><body style='width:860px;margin:12px'>{figure}"
        )
        subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                f"--window-size=900,{height}", f"--user-data-dir={folder}/profile",
                "--disable-background-networking", "--force-device-scale-factor=2", f"--screenshot={output}",
                html.as_uri(),
            ],
            check=True, capture_output=True,
        )  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    DOCS.mkdir(exist_ok=True)
    terminal(Path(sys.argv[1]))
    frontier(Path(sys.argv[2]))
