"""One entry of the table of metrics feeds files, terminal, page and documentation, and nothing else does."""

from __future__ import annotations

import ast
import dataclasses
import io
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from toy import toy_batch, toy_config, toy_model
from toy_step import step_gradient

from fastkl.report import metrics
from fastkl.report.loggers import to_json
from fastkl.report.metrics import METRICS, Metric, metrics_of
from fastkl.report.numbers import percent
from fastkl.report.page.write import write_report
from fastkl.report.step_metrics import FinishedStep, StepReport
from fastkl.report.terminal import View
from fastkl.training.memory import peak_rss_bytes
from fastkl.types import RewardNotes

ROOT = Path(__file__).parents[2]
SECONDS = {"generate": 1.5, "update": 2.0}


@pytest.fixture(scope="module")
def report() -> StepReport:
    """A toy step's report after its update."""
    policy, config = toy_model(0), toy_config()
    batch = toy_batch(policy)
    _, outcome = step_gradient(policy, toy_model(1).requires_grad_(False), batch, config)
    return StepReport(1, batch, {}, config.kl_coef, outcome)


def test_one_entry_is_all_that_a_new_metric_takes(report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = Metric(
        "completion/longest", "Longest completion", "Tokens of the longest.", "tokens", "max_i T_i",
        lambda s: int(s.lengths.max()),
        label="longest", panel=True, card=True, plain="  longest {text}", chart="Extremes",
    )  # fmt: skip
    monkeypatch.setattr(metrics, "METRICS", (*METRICS, longest))
    line = metrics_of(FinishedStep(report, 1e-3, SECONDS))
    expected = max(len(completion.token_ids) for group in report.batch.completions for completion in group)
    assert line["completion/longest"] == expected

    view = View("run", total_steps=2, console=Console(file=io.StringIO(), width=100))
    view.step(line)
    assert f"longest {expected}.00" in view._console.file.getvalue()
    view._console.print(view._numbers(100))
    assert re.search(rf"longest +{expected}\.00 +{expected}\.00 +tokens", view._console.file.getvalue())

    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        steps = [line | {"step": step, "completion/longest": 7 * step} for step in (1, 2)]
        (tmp_path / run / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)))
    page = write_report([tmp_path / "one"]).read_text()
    assert '<span class="what">Longest completion</span>' in page and "7.00 →</span> 14.0" in page
    assert "<h3>Extremes</h3><p>Tokens of the longest.</p>" in page
    assert '<th scope="col">longest, tokens</th>' in page
    both = write_report([tmp_path / "one", tmp_path / "two"]).read_text()
    assert "<h3>Longest completion</h3>" in both and both.count("<td>14.0</td>") == 4  # twice in each run's tables
    assert "| `completion/longest` | **Longest completion.** Tokens of the longest. | tokens | max_i T_i |" in (
        metrics.markdown()
    )


def test_a_sample_holds_its_row_the_data_sets_columns_its_messages_and_each_reward(report) -> None:
    chat = [{"role": "user", "content": "What is 3 + 4?"}]
    prompts = [
        dataclasses.replace(prompt, row=row, raw=chat if row == 11 else "p", columns={"answer": str(row) * 1500})
        for row, prompt in enumerate(report.batch.prompts, start=11)
    ]
    shape = report.batch.rewards.shape
    values = {"right": [float(i) for i in range(shape.numel())], "short": [None] * shape.numel()}
    batch = dataclasses.replace(report.batch, prompts=tuple(prompts))
    samples = dataclasses.replace(report, batch=batch, reward_notes=RewardNotes(values=values)).samples()
    for b, k in itertools.product(range(shape[0]), range(shape[1])):
        sample = samples[b * shape[1] + k]
        assert sample["row"] == 11 + b and sample["rewards"] == {"right": float(b * shape[1] + k), "short": None}
        assert sample["columns"] == {"answer": (str(11 + b) * 1500)[:2000] + "…"}
        assert ("messages" in sample) == (b == 0)
    assert samples[0]["messages"] == chat and "columns" not in report.samples()[0]


def test_peak_memory_counts_the_processes_that_a_run_has_started() -> None:
    before = peak_rss_bytes()
    assert before > 50e6
    hold = "x = bytearray(300 << 20); x[::4096] = b'1' * len(x[::4096]); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        with_child = peak_rss_bytes()
        child.stdin.close()
    assert 300 << 20 < with_child - before < 400 << 20
    assert peak_rss_bytes() - before < 20 << 20


def test_the_documentation_is_the_table() -> None:
    remedy = "run: python -m fastkl.report.metrics > docs/metrics.md"
    assert (ROOT / "docs" / "metrics.md").read_text() == metrics.markdown(), remedy


def keys_named_in(path: Path) -> set[str]:
    """Strings of a module that look like keys of metrics.jsonl, f-strings with N for what they fill in."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            found.add("".join(part.value if isinstance(part, ast.Constant) else "N" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    prefixes = {metric.key.split("/")[0] for metric in METRICS if "/" in metric.key}
    return {text for text in found if re.fullmatch(rf"(?:{'|'.join(prefixes)})/\w+", text)}


def test_every_key_that_report_and_audit_read_is_in_the_table() -> None:
    own = {metric.key for metric in METRICS}
    paths = [*(ROOT / "fastkl" / "report").rglob("*.py"), *(ROOT / "fastkl" / "audit").rglob("*.py")]
    named = {path: keys_named_in(path) for path in paths}
    assert "kl/exact" in set().union(*named.values()), "the search finds keys"
    for path, keys in named.items():
        unknown = {key for key in keys - own if not any(m.is_family and m.labels([key]) for m in METRICS)}
        assert not unknown, path


def test_keys_are_unique_and_name_each_other_correctly() -> None:
    own = [metric.key for metric in METRICS]
    assert len(set(own)) == len(own)
    named = {key for m in METRICS for key in (m.band, m.area_to, m.exact, m.whole) if key}
    assert {key for key in named if not any(m.is_family and m.labels([key]) for m in METRICS)} <= set(own)
    shared = {heading for heading, group in itertools.groupby(sorted(m.chart for m in METRICS)) if len([*group]) > 1}
    assert shared - {""} <= set(metrics.CAPTIONS)


def test_the_step_is_described_by_hand_made_numbers(report) -> None:
    """Those metrics that are not scores; tests/training/test_update.py has the scores."""
    line = metrics_of(FinishedStep(report, 1e-3, SECONDS, lambda texts: len(texts) / 100, 3, 50))
    completions = [completion for group in report.batch.completions for completion in group]
    lengths = [len(completion.token_ids) for completion in completions]
    rewards = [r for r, ok in zip(report.batch.rewards.flatten(), report.batch.valid.flatten(), strict=True) if ok]
    mean = float(sum(rewards)) / len(rewards)
    assert line["reward/raw"] == pytest.approx(mean)
    assert line["reward/std"] == pytest.approx((sum((float(r) - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5)
    assert line["completion/mean_length"] == pytest.approx(sum(lengths) / len(lengths))
    assert line["completion/truncated_share"] == sum(c.finish_reason == "length" for c in completions) / len(lengths)
    assert line["throughput/tokens_per_second"] == pytest.approx(sum(lengths) / 3.5)
    times = {key: value for key, value in line.items() if key.startswith("time/")}
    assert times == {
        "time/generate_s": 1.5, "time/reward_s": 0.0, "time/score_s": 0.0, "time/update_s": 2.0, "time/sync_s": 0.0,
        "time/step_s": 3.5,
    }  # fmt: skip
    assert line["grammar/well_formed"] == len(lengths) / 100
    assert "grammar/well_formed" not in metrics_of(FinishedStep(report, 1e-3, SECONDS))
    assert (line["steps/skipped"], line["tokens/generated"], line["kl/alarm"], line["lr"]) == (3, 50, 0, 1e-3)
    assert metrics_of(FinishedStep(report, 1e-3, SECONDS, kl_alarm=True))["kl/alarm"] == 1
    assert line["groups/skipped"] == int((~torch.isfinite(report.outcome.total.sums[..., 0]).any(dim=1)).sum())


def test_a_family_finds_its_members_but_not_the_entries_of_the_table() -> None:
    keys = ["step", "reward/raw", "reward/brevity", "reward/std", "time/score_s", "time/step_s", "reward/a/b"]
    assert metrics.reward_names(keys) == ["brevity", "a/b"]
    (stage,) = [metric for metric in METRICS if metric.whole]
    assert stage.labels(keys) == {"time/score_s": "score"}
    keys += ["time/reward/brevity", "time/reward/in_s"]  # the second looks like a stage's
    (functions,) = [metric for metric in METRICS if metric.key == "time/reward/NAME"]
    assert functions.labels(keys) == {"time/reward/brevity": "brevity", "time/reward/in_s": "in_s"}
    assert stage.labels(keys) == {"time/score_s": "score"} and metrics.reward_names(keys) == ["brevity", "a/b"]


def test_what_reward_functions_leave_beside_their_rewards_is_written(report) -> None:
    num_completions = report.batch.rewards.numel()
    parsed = [None, math.nan, torch.tensor(2.5), *([["3"]] * (num_completions - 3))]
    notes = RewardNotes({"parsed": parsed}, {"judge": 1.5})
    noted = dataclasses.replace(report, reward_notes=notes)
    written = [json.loads(to_json(sample))["extra"]["parsed"] for sample in noted.samples()]
    assert written[:4] == [None, None, 2.5, ["3"]]
    assert all("extra" not in sample for sample in report.samples())
    assert metrics_of(FinishedStep(noted, 1e-3, SECONDS))["time/reward/judge"] == 1.5


def test_shares_are_written_in_percent_without_a_unit_in_the_heading() -> None:
    share = Metric("a/b", "Title", "", "of words", "", lambda s: 0.5, write=percent)
    count = Metric("a/c", "Title", "", "tokens", "", lambda s: 5, label="short")
    assert (share.heading, share.is_share, count.heading, count.is_share) == ("Title", True, "short, tokens", False)
