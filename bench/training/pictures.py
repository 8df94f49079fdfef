"""The documentation's pictures of real runs.

    python bench/training/pictures.py terminal RUN docs/terminal.svg
    python bench/training/pictures.py page RUN docs/report.png
    python bench/training/pictures.py frontier SWEEP_FOLDER docs/frontier.png

terminal: the live view after the run's last step, replayed from its metrics.jsonl and samples.jsonl. page: the top of
its report. frontier: the reward-against-KL chart of the sweep's report. The last two are drawn by headless Chromium.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from bench.common import read_lines
from fastkl.config.files import load_config
from fastkl.report.page.write import ASSETS, write_report
from fastkl.report.terminal import View


def terminal(run: Path, output: Path) -> None:
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
    output.write_text(svg)


def page(run: Path, output: Path) -> None:
    """The top of the report, 1280 x 1000 CSS pixels."""
    browse(write_report([run]), output, width=1280, height=1000)


def frontier(sweep: Path, output: Path) -> None:
    """The first chart of the comparison page, as a PNG of its own."""
    page = write_report(sorted(path.parent for path in sweep.glob("*/metrics.jsonl"))).read_text()
    figure = re.search(r"<figure.*?</figure>", page, flags=re.DOTALL)
    if figure is None:
        sys.exit("the report holds no chart")
    screenshot(figure.group(), output, height=435)


def screenshot(figure: str, output: Path, *, height: int) -> None:
    """A figure of the report page as a PNG, 900 x `height` CSS pixels, two dots each."""
    style = (ASSETS / "style.css").read_text()
    with tempfile.TemporaryDirectory() as folder:
        html = Path(folder) / "chart.html"
        html.write_text(
            f"<!doctype html><meta charset=utf-8><style>{style}</style><body style='width:860px;margin:12px'>{figure}"
        )
        browse(html, output, width=900, height=height, dots=2)


def browse(html: Path, output: Path, *, width: int, height: int, dots: int = 1) -> None:
    """A page as headless Chromium shows it, as a PNG."""
    browser = shutil.which("chromium") or shutil.which("google-chrome") or sys.exit("needs chromium")
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                f"--window-size={width},{height}", f"--user-data-dir={profile}", "--disable-background-networking",
                f"--force-device-scale-factor={dots}", f"--screenshot={output}", html.resolve().as_uri(),
            ],
            check=True, capture_output=True,
        )  # fmt: skip


PICTURES: dict[str, Callable[[Path, Path], None]] = {"terminal": terminal, "page": page, "frontier": frontier}

if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in PICTURES:
        sys.exit(__doc__)
    PICTURES[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
