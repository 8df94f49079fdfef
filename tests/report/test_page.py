"""The report page: what it says about made-up runs, that it survives odd ones, and how a browser renders it."""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import math
import random
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml
from odd_yaml import ODD_NAMES, ODD_YAML

from fastkl.cli import main
from fastkl.errors import UserError
from fastkl.report.charts import stacked_shares
from fastkl.report.numbers import number
from fastkl.report.page.run_files import load_runs
from fastkl.report.page.write import write_report
from fastkl.report.svg import CHARACTER_WIDTH, draw_legend, root_ticks, ticks

LETTERS = {
    "b": "big brown brave bear bird boat bell basket bright blue berry",
    "s": "small silver sweet silly squirrel snail song stone sun",
    "t": "tall tiny tired turtle tiger tree train tower",
    "m": "merry mighty mouse moon milk mitten mountain meadow",
    "p": "pretty pink proud penguin pig pond pear path",
}
WORDS = [word for words in LETTERS.values() for word in words.split()]


def fake_story(rng: random.Random, skill: float, collapse: float) -> str:
    """Text with more alliteration the higher `skill`, and more of one repeated word the higher `collapse` (0 to 1)."""
    sentences = []
    for _ in range(5):
        words = [rng.choice(WORDS)]
        while len(words) < 9:
            if rng.random() < collapse:
                words.append("big")
            elif rng.random() < skill:
                words.append(rng.choice(LETTERS[words[-1][0]].split()))
            else:
                words.append(rng.choice(WORDS))
        sentences.append(" ".join(["The", *words]) + ".")
    return " there was a " + " ".join(sentences[:3]) + '\n"Hello," said the bird. ' + " ".join(sentences[3:])


def fake_step(step: int, progress: float, kl_coef: float, rng: random.Random) -> dict[str, Any]:
    """Plausible metrics: the smaller kl_coef, the more reward, the more KL, the worse the text."""
    freedom = 1 / (1 + 4 * kl_coef)
    kl = 95 * freedom**2.2 * progress**1.6 + rng.gauss(0, 0.08)
    reward = 2.3 + 17 * freedom**1.1 * progress**1.2 + rng.gauss(0, 0.12)
    collapse = max(0.0, freedom - 0.6) * 2 * progress
    policy_ce = 1.42 - 0.9 * collapse - 0.05 * progress + rng.gauss(0, 0.012)
    return {
        "step": step,
        "reward/raw": reward,
        "reward/std": 1.1 + 0.4 * progress,
        "reward/penalized": reward - kl_coef * kl,
        "reward/alliteration": reward,
        "kl/mean": kl,
        "kl/per_token": kl / 96,
        "kl/exact": kl + rng.gauss(0, 0.03),
        "kl/penalty": kl_coef * kl,
        "lm_cross_entropy": policy_ce,
        "original_lm_cross_entropy": policy_ce + kl / 96,
        "entropy": policy_ce - 0.02 + rng.gauss(0, 0.006),
        "loss": rng.gauss(0, 0.02),
        "grad_norm": 0.4 + 0.1 * rng.random(),
        "lr": 3e-4 * (1 - progress),
        "diversity/distinct_2": 0.63 - 0.06 * progress - 0.5 * collapse,
        "grammar/well_formed": max(0.0, 0.982 - 0.03 * progress - 1.1 * collapse),
        "completion/mean_length": 92 + rng.gauss(0, 1),
        "completion/truncated_share": 0.7,
        "groups/skipped": 0,
        "steps/skipped": 0,
        "tokens/generated": 11800 * step,
        "throughput/tokens_per_second": 3700 + rng.gauss(0, 90),
        "time/generate_s": 0.95 + 0.05 * rng.random(),
        "time/reward_s": 0.01,
        "time/score_s": 0.51,
        "time/update_s": 1.6 + 0.1 * rng.random(),
        "time/sync_s": 0.02,
        "time/step_s": 3.22 + 0.1 * rng.random(),
        "mismatch/mean_abs_logprob": 2e-6 * (1 + rng.random()),
        "mismatch/max_abs_logprob": 3e-5,
        "policy_version": step - 1,
    }


def fake_run(folder: Path, *, kl_coef: float = 0.5, steps: int = 40, seed: int = 0) -> Path:
    """Write a run folder as the trainer would."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    config = {"model": "storyteller", "prompts": "Once upon a time", "reward": ["alliteration"], "kl_coef": kl_coef}
    config |= {
        "steps": steps,
        "num_samples": 16,
        "prompts_per_step": 8,
        "lr": 3e-4,
        "seed": seed,
        "output": str(folder),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    freedom = 1 / (1 + 4 * kl_coef)
    with (folder / "metrics.jsonl").open("w") as metrics, (folder / "samples.jsonl").open("w") as samples:
        for step in range(1, steps + 1):
            progress = (step - 1) / max(1, steps - 1)
            metrics.write(json.dumps(fake_step(step, progress, kl_coef, rng)) + "\n")
            for _ in range(8):
                text = fake_story(rng, 0.1 + 0.5 * progress * freedom, max(0.0, freedom - 0.6) * 2 * progress)
                row = {
                    "step": step,
                    "prompt": "Once upon a time",
                    "completion": text,
                    "reward": rng.randint(1, 9) * 1.0,
                }
                row |= {"penalized_reward": 1.0, "kl": 3 * progress + rng.random(), "lm_cross_entropy": 1.4}
                row |= {"original_lm_cross_entropy": 1.42, "num_tokens": 96, "finish_reason": "length"}
                samples.write(json.dumps(row) + "\n")
    return folder


def rewrite(path: Path, change: Any) -> None:
    """Apply `change` to every object of a JSONL file."""
    rows = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def svg_parts(page: str, figure: str, element: str) -> list[dict[str, str]]:
    """Attributes of every `element` in the first chart of the figure with that heading."""
    svg = page.split(f"<h3>{figure}</h3>", 1)[1].split("<svg", 1)[1].split("</svg>", 1)[0]
    return [dict(re.findall(r'([\w-]+)="([^"]*)"', tag)) for tag in re.findall(rf"<{element} ([^>]*)>", svg)]


def test_headline_numbers_are_those_of_the_first_and_last_step(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", steps=5)
    values = {1: (2.0, 0.0, 0.6), 5: (5.0, 3.25, 0.45)}

    def change(row: dict[str, Any]) -> dict[str, Any]:
        reward, kl, distinct = values.get(row["step"], (3.0, 1.0, 0.5))
        return row | {"reward/raw": reward, "kl/exact": kl, "diversity/distinct_2": distinct, "time/step_s": 20.0}

    rewrite(run / "metrics.jsonl", change)
    page = write_report([run]).read_text()
    cards = re.findall(r'<span class="value">(.*?)</span>\n<span class="more">(.*?)</span>', page)
    plain = [(re.sub("<.*?>", "", value), more) for value, more in cards]
    assert plain[:3] == [
        ("2.00 → 5.00", "2.50× the start"),
        ("0.00 → 3.25", "nats per completion"),
        ("60 % → 45 %", "75 % of the start"),
    ]
    assert plain[-1] == ("1:40", "5 steps of 20.0 s, 59,000 tokens")
    assert "<b>75 %</b> of its first variety" in page


def test_frontier_has_a_dot_per_step_where_kl_and_reward_say(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", steps=30)
    page = write_report([run]).read_text()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    dots = svg_parts(page, "Each step&#39;s reward and its distance from the original model", "circle")
    assert len(dots) == 30
    for key, coordinate, sign in (("kl/exact", "cx", 1), ("reward/raw", "cy", -1)):
        values, places = [row[key] for row in rows], [float(dot[coordinate]) for dot in dots]
        slope = (places[-1] - places[0]) / (values[-1] - values[0])
        assert slope * sign > 0
        expected = [places[0] + slope * (value - values[0]) for value in values]
        assert max(abs(a - b) for a, b in zip(places, expected, strict=True)) < 0.11  # written to one decimal
    shades = [int(re.search(r"r(\d)", dot["class"])[1]) for dot in dots]
    assert shades[0] == 0 and shades[-1] == 9 and shades == sorted(shades)


def test_stage_shares_fill_the_whole_step() -> None:
    layers = [("generate", [1.0, 2.0]), ("update", [3.0, math.nan]), ("other", [0.0, 2.0])]
    chart = stacked_shares(layers, [1.0, 2.0], title="Time")
    tops = json.loads(html.unescape(re.search(r'data-points="([^"]*)"', chart)[1]))
    texts = {line["label"]: [point[2] for point in line["points"]] for line in tops["lines"]}
    assert texts == {"generate": ["25 %", "50 %"], "update": ["75 %", "0 %"], "other": ["0 %", "50 %"]}
    assert [point[1] for point in tops["lines"][-1]["points"]] == [tops["top"]] * 2  # the top layer ends at 100 %


def test_the_page_needs_nothing_from_anywhere_and_runs_only_its_own_script(tmp_path: Path) -> None:
    page = write_report([fake_run(tmp_path / "run", steps=3)]).read_text()
    assert not re.findall(
        r"(?:src|href|action)\s*=|@import|url\(|<link|<iframe|<img",
        re.sub(r"<script>.*</script>", "", page, flags=re.S),
    )
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {"http://www.w3.org/2000/svg"}  # a name, never fetched
    (script,) = re.findall(r"<script>(.*?)</script>", page, flags=re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src 'sha256-{digest}'" in page


EVIL = " <script>alert(1)</script> \"'></svg><img src=x onerror=alert(2)> {{ 7*7 }} &amp; \ud800 \x1b[31m naïve 故事 🐻"


def test_completions_prompts_and_settings_are_escaped(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "a<b>&run", steps=3)
    rewrite(
        run / "samples.jsonl", lambda row: row | {"completion": EVIL, "prompt": "<b>Once</b>", "finish_reason": "<i>"}
    )
    (run / "config.yaml").write_text(
        yaml.safe_dump({"model": "<u>x</u>", "reward": ["</script><script>"], "kl_coef": 0.5})
    )
    rewrite(run / "metrics.jsonl", lambda row: row | {"reward/<svg onload=x>": 1.0, "reward/b": 2.0})
    page = write_report([run]).read_text()
    assert page.count("<script>") == 1 and page.count("</script>") == 1
    for raw in ("<img", "<u>", "<i>", "<b>Once", "<svg onload", "a<b>&run", "{{ 7*7 }} &amp; "):
        assert raw not in page, raw
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "naïve 故事 🐻" in page and "{{ 7*7 }} &amp;amp;" in page


def test_what_reorders_text_or_controls_a_terminal_is_shown_as_a_sign(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", steps=2)
    marks = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\x1b\x00\x07\x7f\x9b"
    rewrite(run / "samples.jsonl", lambda row: row | {"completion": f"good{marks}live", "prompt": marks})
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"prompts": marks}))
    page = write_report([run]).read_text()
    assert not set(marks) & set(page) and "\u241b" in page and "good\ufffd" in page


def test_texts_that_other_readers_would_split_are_whole(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", steps=2)
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().split("\n") if line]
    lines = [json.dumps(row | {"completion": "a\u2028b\u0085c"}, ensure_ascii=False) for row in rows]
    (run / "samples.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    page = write_report([run]).read_text()
    assert "a\u2028b" in page and "16 completions" in page and "damaged" not in page


ODD = {
    "a metric at the end of float64's range": (
        "metrics.jsonl",
        dict.fromkeys(("reward/raw", "kl/exact", "time/step_s"), 1.7e308),
    ),
    "a metric that no float holds": ("metrics.jsonl", {"reward/raw": 10**400}),
    "a sample that no float holds": ("samples.jsonl", {"reward": 10**400, "kl": 10**400}),
    "a sample of other types": ("samples.jsonl", {"prompt": [{"role": "user"}], "num_tokens": "9", "reward": "x"}),
    "settings of other types": ("config.yaml", {"kl_coef": [1], "top_p": "0.9", "steps": "many"}),
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_values_cost_no_page(odd: str, tmp_path: Path) -> None:
    name, values = ODD[odd]
    runs = [fake_run(tmp_path / f"seed-{seed}", seed=seed, steps=3) for seed in (0, 1)]
    if name == "config.yaml":
        config = yaml.safe_load((runs[0] / name).read_text())
        (runs[0] / name).write_text(yaml.safe_dump(config | values))
    else:
        lines = [json.loads(line) for line in (runs[0] / name).read_text().splitlines()]
        lines = [lines[0], *(line | values for line in lines[1:])]
        (runs[0] / name).write_text("\n".join(map(json.dumps, lines)))
    for chosen in (runs[:1], runs):
        assert "The numbers" in write_report(chosen).read_text()


def test_settings_that_stand_for_endless_lists_are_left_out(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", steps=2)
    bomb = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]\n" for i in range(9))
    (run / "config.yaml").write_text(bomb)
    assert ">a8<" not in write_report([run]).read_text()


@pytest.mark.parametrize("name", ODD_NAMES)
def test_no_config_yaml_keeps_a_run_from_its_page_and_its_audit(name: str, tmp_path: Path) -> None:
    """Beside another run, with no work that grows with what aliases stand for (minutes and more); what the settings
    would have said is left out. Where several are read alike, every other one goes to the audit."""
    text, _ = ODD_YAML[name]
    runs = [fake_run(tmp_path / name, steps=4) for name in ("odd", "sound")]
    (runs[0] / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    start = time.process_time()
    is_read_by_all = name in ("alias bomb", "5,000 digits", "3,000 brackets", "no UTF-8", "a wrong truth")
    if is_read_by_all or [*ODD_YAML].index(name) % 2:
        assert main(["report", *map(str, runs)]) == 0
    if is_read_by_all or not [*ODD_YAML].index(name) % 2:
        assert main(["doctor", str(runs[0])]) in (0, 1, 3)
    assert time.process_time() - start < 30


def test_a_run_of_one_step_has_a_page(tmp_path: Path) -> None:
    page = write_report([fake_run(tmp_path / "run", steps=1)]).read_text()
    assert len(svg_parts(page, "Reward", "circle")) == 2  # a dot for the reward and one for the penalised
    assert page.count('<section class="column">') == 1 and "nan" not in re.sub(
        r"<style>.*</style>|<script>.*</script>", "", page, flags=re.S
    )


def test_missing_keys_gaps_and_half_a_line_are_left_out_quietly(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lines = ['{"step": 1, "reward/raw": 1.0}', '{"step": 2, "reward/raw": null}', '{"step": 3, "reward/raw": NaN}']
    lines += ['{"step": 5, "reward/raw": 2.0}', '{"step": 6, "reward/raw": 4.0}', '{"step": 7, "rew']
    (run / "metrics.jsonl").write_text("\n".join(lines))
    page = write_report([run]).read_text()
    (path,) = [part for part in svg_parts(page, "Reward", "path") if "line" in part["class"]]
    assert path["d"].count("M") == 2 and path["d"].count("L") == 1  # step 1 alone, then 5 to 6
    assert len(svg_parts(page, "Reward", "circle")) == 1  # step 1, which no line shows
    assert "<h3>KL from the original</h3>" not in page and "Completions of the first" not in page
    assert "1.00 →</span> 4.00" in page


def test_values_that_never_were_numbers_draw_nothing(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", steps=4)
    rewrite(run / "metrics.jsonl", lambda row: {key: None if key != "step" else value for key, value in row.items()})
    page = write_report([run]).read_text()
    assert 'class="plot"' not in page and "The numbers as a table" in page


def test_a_comparison_names_the_runs_by_what_differs_and_shows_each_ones_stories(tmp_path: Path) -> None:
    coefficients = (0.0, 0.05, 0.5)
    runs = [fake_run(tmp_path / f"kl_coef-{kl}", kl_coef=kl, steps=20) for kl in coefficients]
    for run, word in zip(runs, ("zero", "small", "large"), strict=True):
        rewrite(run / "samples.jsonl", lambda row, word=word: row | {"completion": f" {word} at {row['step']}"})
    output = write_report(runs)
    page = output.read_text()
    assert output == tmp_path / "report.html"
    labels = [f"β\u00a0=\u00a0{kl:g}" for kl in coefficients]
    rows = re.findall(r'<th scope="row"><span class="chip s(\d)"></span>(.*?)</th>(.*?)</tr>', page, flags=re.S)
    assert [(int(colour), label) for colour, label, _ in rows] == list(enumerate(labels))
    for run, (_, _, cells) in zip(runs, rows, strict=True):
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        assert re.findall("<td>(.*?)</td>", cells)[1] == number(last["reward/raw"])
    assert "3 runs compared by kl_coef" in page
    for word in ("zero", "small", "large"):
        assert f"{word} at 20" in page and f"{word} at 1<" not in page
    ends = svg_parts(page, "Where each run ended, and how it got there", "circle")
    assert [dot["class"] for dot in ends] == ["dot s0", "dot s1", "dot s2"]
    changed = re.findall(r'<tr class="changed"><th scope="row"><code>(.*?)</code>', page)
    assert changed == ["kl_coef"]


def test_runs_alike_in_kl_coef_are_named_by_folder(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / f"seed-{seed}", seed=seed, steps=2) for seed in (0, 1)]
    same_names = [fake_run(tmp_path / name / "run", steps=2) for name in ("old", "new")]
    assert [run.label for run in load_runs(runs)] == ["seed-0", "seed-1"]
    assert [run.label for run in load_runs(same_names)] == ["old/run", "new/run"]


@pytest.mark.slow
def test_long_texts_fold_and_long_runs_stay_under_a_megabyte(tmp_path: Path) -> None:
    runs = []
    for index in range(2):
        run = fake_run(tmp_path / f"run-{index}", kl_coef=0.1 * index, steps=2)
        rng = random.Random(0)
        steps = [json.dumps(fake_step(step, step / 2000, 0.1 * index, rng)) for step in range(1, 2001)]
        (run / "metrics.jsonl").write_text("\n".join(steps))
        rewrite(run / "samples.jsonl", lambda row: row | {"completion": " word" * 20_000, "step": 2000})
        runs.append(run)
    for page in (write_report(runs[:1]), write_report(runs)):
        text = page.read_text()
        assert len(text.encode()) < 1_000_000
        assert "<summary>the rest (99,100 characters)</summary>" in text


def test_what_a_reader_must_know_stands_on_top(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", steps=6)
    rewrite(run / "metrics.jsonl", lambda row: row | {"steps/skipped": row["step"] // 3, "groups/skipped": 1})
    (run / "config.yaml").write_text("steps: 40\n")
    page = write_report([run]).read_text()
    notices = re.findall('<p class="notice">(.*?)</p>', page)
    assert [notice.split(": ")[1].split(" ")[0] for notice in notices] == ["6", "2", "6"]


def sound(run: Path) -> Path:
    """The fake run with cross entropies of samples and steps that agree, as the audit wants them."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    mean = {row["step"]: row["lm_cross_entropy"] for row in rows}

    def change(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"lm_cross_entropy": mean[row["step"]], "kl": row["kl"] * (row["step"] > 1)}

    rewrite(run / "samples.jsonl", change)
    return run


def test_the_page_shows_the_doctors_verdict_and_every_check(tmp_path: Path) -> None:
    from fastkl.audit.doctor import diagnose

    run = sound(fake_run(tmp_path / "run", steps=6))
    diagnosis = diagnose(run)
    page = html.unescape(write_report([run]).read_text())
    section = page.split("<h2>Is the KL a KL?</h2>")[1].split("<h2>")[0]
    assert diagnosis.verdict in section and diagnosis.estimate in section
    assert re.findall(r'<th scope="row">(. .*?)</th>', section) == [f"✓ {clear.what}" for clear in diagnosis.clear]
    rewrite(run / "samples.jsonl", lambda row: row | {"kl": -5.0 + 0.01 * len(row["completion"])})
    rewrite(run / "metrics.jsonl", lambda row: row | {"mismatch/mean_abs_logprob": 0.3})
    page = html.unescape(write_report([run]).read_text())
    section = page.split("<h2>Is the KL a KL?</h2>")[1].split("<h2>")[0]
    assert "it cannot be a KL" in section
    assert '<tr class="changed"><th scope="row">✗ engine and trainer differ</th><td>shown: ' in section


def test_a_comparison_has_a_verdict_for_every_run(tmp_path: Path) -> None:
    runs = [sound(fake_run(tmp_path / f"seed-{seed}", seed=seed, steps=3)) for seed in (0, 1)]
    rewrite(runs[1] / "samples.jsonl", lambda row: row | {"kl": -5.0 + 0.01 * len(row["completion"])})
    section = html.unescape(write_report(runs).read_text()).split("<h2>Is the KL a KL?</h2>")[1].split("<h2>")[0]
    assert re.findall(r'<th scope="row">(. .*?)</th>', section) == ["✓ seed-0", "✗ seed-1"]


SOURCE = "x" * 991 + " #### 72"
CHAT = {
    "row": 17,
    "prompt": "<|im_start|>system\nBe <brief>.<|im_end|>",
    "messages": [{"role": "system", "content": "Be <brief>."}, {"role": "user", "content": "What is 3 + 4?"}],
    "columns": {"question": "What is 3 + 4?", "answer": 7, "parts": {"terms": [3, 4]}, "source": SOURCE},
    "completion": "It was\na big bear: <7>.",
    "rewards": {"alliteration": 1.0, "format": 0.25},
    "extra": {"parsed": "<7>"},
}


def test_a_chat_is_shown_by_roles_with_the_expected_answer_and_each_reward(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", steps=3)
    rewrite(run / "samples.jsonl", lambda row: row | CHAT)
    rewrite(run / "metrics.jsonl", lambda row: {k: v for k, v in row.items() if k != "grammar/well_formed"})
    page = write_report([run]).read_text()
    card = page.split('<article class="story">')[1].split("</article>")[0]
    assert re.findall('<p class="role">(.*?)</p>', card) == ["system", "user", "assistant"]
    texts = re.findall("<blockquote>(.*?)</blockquote>", card, flags=re.S)
    assert texts[:2] == [f'<span class="prompt">{text}</span>' for text in ("Be &lt;brief&gt;.", "What is 3 + 4?")]
    assert texts[2] == "It was\na <mark>big bear:</mark> &lt;7&gt;."
    plain = html.unescape(re.sub("<.*?>", "", card))
    assert "alliteration 1.00 · format 0.25 · KL" in plain
    source = "x" * 47 + "…" + "x" * 40 + " #### 72"  # without its middle: what it ends with is the answer
    assert f'row 17 · answer 7 · parts {{"terms": [3, 4]}} · source {source} · parsed <7>' in plain
    text = re.sub("<style>.*?</style>", "", page, flags=re.S)
    assert (
        "im_start" not in text
        and "Grammar" not in text
        and "ell formed" not in text
        and "stories" not in (re.sub("<.*?>", "", text))
    )


def test_the_opening_says_what_came_of_held_out_prompts(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", steps=5)
    rewrite(run / "metrics.jsonl", lambda row: row | ({"eval/reward": 0.5 + row["step"]} if row["step"] % 2 else {}))
    before = json.dumps({"step": 0, "eval/reward": 0.25})
    (run / "metrics.jsonl").write_text(f"{before}\n{(run / 'metrics.jsonl').read_text()}")
    text = re.sub("<.*?>", "", write_report([run]).read_text())
    assert "The reward on held-out prompts went from 0.25 to 5.50." in text


def test_a_column_that_says_the_same_of_every_prompt_is_left_out(tmp_path: Path) -> None:
    run, prompts = fake_run(tmp_path / "run", steps=3), itertools.count()

    def columns(row: int) -> dict[str, object]:
        return {"answer": 100 + row, "task": "the same task", "nested": {"letters": "y" * 99}}

    rewrite(run / "samples.jsonl", lambda row: row | {"row": (at := next(prompts)), "columns": columns(at)})
    text = html.unescape(re.sub("<.*?>", "", write_report([run]).read_text()))
    assert "the same task" not in text and "answer 10" in text and "nested" not in text
    rewrite(run / "samples.jsonl", lambda row: row | {"row": 1, "columns": columns(1)})  # of one prompt it may matter
    text = html.unescape(re.sub("<.*?>", "", write_report([run]).read_text()))
    assert "task the same task" in text and 'nested {"letters": "' + "y" * 10 + "…" + "y" * 22 + '"}' in text


@pytest.mark.slow
def test_the_completions_of_many_steps_can_be_browsed_and_the_page_says_how_many(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", steps=40)
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    many = [row | {"completion": f"number {i} of {row['step']}" + " word" * 3000} for row in rows for i in range(12)]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    page = write_report([run]).read_text()
    section = page.split("<h2>All completions</h2>")[1].split("<h2>")[0]
    steps = [int(step) for step in re.findall(r"<summary>Step (\d+): 64 of 96 completions, rewards", section)]
    assert steps[0] == 1 and steps[-1] == 40 and 10 <= len(steps) <= 13
    assert f"{len(steps)} of 40 steps, of each step the first 64 completions" in section
    assert section.count("<li>") == 64 * len(steps) and "number 11 of 40" in section
    assert len(page.encode()) < 1_600_000
    short = write_report([fake_run(tmp_path / "short", steps=3)]).read_text()
    assert "Every step; long texts lose their middle." in short and "Step 2: 8 completions" in short


def test_the_page_says_when_where_and_with_what(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", steps=3)
    assert 'scope="row">machine<' not in write_report([run]).read_text()
    line = {"started": "2026-01-02T03:04:05+00:00", "first_step": 1, "machine": "a <fast> one, 2 cores, 25 GB"}
    line |= {"dtype": "bfloat16", "versions": {"fastkl": "0.1.0", "torch": "2.13"}, "commit": "0123456789ab+"}
    again = line | {"first_step": 3, "started": "2026-01-02T04:00:00+00:00"}
    (run / "environment.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(again)}\n{{")
    rewrite(run / "metrics.jsonl", lambda row: row | {"memory/peak_rss_gb": row["step"] / 2})
    facts = write_report([run]).read_text().split('class="panel facts"')[1].split("</table>")[0]
    assert re.findall('<th scope="row">(.*?)</th><td>(.*?)</td>', facts) == [
        ("started", "2026-01-02 03:04:05 UTC"),
        ("last resumed", "2026-01-02 04:00:00 UTC, at step 3"),
        ("machine", "a &lt;fast&gt; one, 2 cores, 25 GB"),
        ("numbers", "bfloat16"),
        ("versions", "fastkl 0.1.0, torch 2.13"),
        ("commit of fastkl", "0123456789ab+"),
        ("memory", "1.50 GB at most"),
    ]


def test_a_run_notes_its_machine_its_versions_and_the_commit_of_the_code(tmp_path: Path) -> None:
    from fastkl.training.environment import commit, record_environment

    for step in (1, 5):
        record_environment(tmp_path, first_step=step, device=torch.device("cpu"), dtype=torch.float32)
    first, second = (json.loads(line) for line in (tmp_path / "environment.jsonl").read_text().splitlines())
    assert (first["first_step"], second["first_step"], first["dtype"]) == (1, 5, "float32")
    assert first["versions"]["torch"] == torch.__version__ and " GB" in first["machine"]
    assert commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    made = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert commit(tmp_path) == made[:12]
    (tmp_path / "environment.jsonl").write_text("changed")
    assert commit(tmp_path) == made[:12] + "+"


def test_the_opening_sentence_speaks_of_means_not_of_single_steps(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", steps=30)
    change = {1: 1.0, 2: 2.0, 3: 6.0, 28: 4.0, 29: 5.0, 30: 9.0}
    rewrite(run / "metrics.jsonl", lambda row: row | {"reward/raw": change.get(row["step"], 3.0), "kl/exact": 2.0})
    lead = re.search('<p class="lead">(.*?)</p>', write_report([run]).read_text())[1]
    assert "from 3.00 to <b>6.00</b> (2.0×)" in lead and "means of the first and the last 3 steps" in lead


def test_what_functions_log_and_functions_of_another_size_have_axes_of_their_own(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", steps=4)
    values = {"reward/correct": 0.5, "reward/format": 0.9, "reward/overlong": -40.0, "reward/tokens": 0.7}
    rewrite(run / "metrics.jsonl", lambda row: {k: v for k, v in row.items() if k != "reward/alliteration"} | values)
    functions = {"correct": 0.5, "format": 0.9, "overlong": -40.0}
    rewrite(run / "samples.jsonl", lambda row: row | {"rewards": functions})
    page = write_report([run]).read_text()
    headings = [
        h for h in re.findall("<h3>(.*?)</h3>", page) if h in ("Reward functions", "Reward: overlong", "tokens")
    ]
    assert headings == ["Reward: overlong", "Reward functions", "tokens"]
    shared = page.split("<h3>Reward functions</h3>")[1].split("</figure>")[0]
    assert "format" in shared and "correct" in shared and "overlong" not in shared and "tokens" not in shared


def test_a_gap_that_bfloat16_explains_is_in_order(tmp_path: Path) -> None:
    run = sound(fake_run(tmp_path / "run", steps=6))
    rewrite(run / "metrics.jsonl", lambda row: row | {"mismatch/mean_abs_logprob": 0.013})
    assert "✓ generator and trainer" in write_report([run]).read_text()
    with (run / "config.yaml").open("a") as config:
        config.write("dtype: float32\n")
    assert "✗ engine and trainer differ" in write_report([run]).read_text()


def test_runs_that_differ_in_the_seed_are_one_line_with_a_band_and_one_row_with_its_error(tmp_path: Path) -> None:
    runs = [
        fake_run(tmp_path / f"kl_coef-{kl:g}-seed-{seed}", kl_coef=kl, seed=seed, steps=5)
        for kl in (0.0, 0.2)
        for seed in (0, 1, 2)
    ]
    for run, final in zip(runs, (1.0, 2.0, 6.0, 4.0, 4.0, 4.0), strict=True):
        rewrite(run / "metrics.jsonl", lambda row, final=final: row | {"reward/raw": final})
    page = write_report(runs).read_text()
    rows = re.findall(r'<th scope="row"><span class="chip s(\d)"></span>(.*?)</th>(.*?)</tr>', page, flags=re.S)
    space = "\u00a0"
    assert [label for _, label, _ in rows] == [f"β{space}={space}{kl}, 3 seeds" for kl in ("0", "0.2")]
    cells = [re.findall("<td>(.*?)</td>", cells) for _, _, cells in rows]
    assert cells[0][1] == "3.00 ± 1.53" and cells[1][1] == "4.00"  # 1, 2 and 6: sqrt(7 / 3), by hand
    paths = svg_parts(page, "Reward", "path")
    lines, bands = ([path for path in paths if path["class"].startswith(kind)] for kind in ("line", "band"))
    assert len(lines) == len(bands) == 2
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", bands[0]["d"])]
    mean, other = (float(re.search(r"M[\d.]+ ([\d.]+)", line["d"])[1]) for line in lines)
    per_unit = mean - other  # of the axis: the means are 3 and 4
    assert (max(heights) - min(heights)) / 2 == pytest.approx(math.sqrt(7) * per_unit, abs=0.5)
    assert (max(heights) + min(heights)) / 2 == pytest.approx(mean, abs=0.2)
    assert page.count('<section class="column">') == 2 and "6 runs compared by kl_coef and seed" in page


def test_a_folder_without_a_run_is_named_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder given"):
        write_report([])
    with pytest.raises(UserError, match="holds no metrics.jsonl; give the --output folder"):
        write_report([tmp_path])
    (tmp_path / "metrics.jsonl").write_text('{"step"')
    with pytest.raises(UserError, match="no finished step yet"):
        write_report([tmp_path])
    run = fake_run(tmp_path / "run", steps=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_report([run], tmp_path / "file" / "report.html")


def test_ticks_are_round_and_inside() -> None:
    for low, high in ((0.0, 8.9), (-0.3, 0.2), (1.31, 1.47), (0.0, 3.9e-6), (980.0, 15_300.0)):
        marks = ticks(low, high)
        gaps = {round((b - a) / (high - low), 9) for a, b in itertools.pairwise(marks)}
        assert len(gaps) == 1 and 3 <= len(marks) <= 8
        assert all(low - 1e-12 <= mark <= high + 1e-12 for mark in marks)
        leading = (marks[1] - marks[0]) / 10 ** math.floor(math.log10(marks[1] - marks[0]) + 1e-9)
        assert round(leading, 6) in (1, 2, 5)
    marks = root_ticks(95.0)
    assert marks[0] == 0 and all(math.sqrt(b) - math.sqrt(a) > 1.2 for a, b in itertools.pairwise(marks))


def test_a_legend_of_many_long_names_stays_inside_its_chart() -> None:
    names = ["reinforce-without-baseline-on-starts-with-a-seed-1", "β = 0.5", "rloo", "kl_coef-0.05-mean", "x" * 200]
    legend, height = draw_legend([(name, "s0") for name in names], 400)
    texts = re.findall(r'x="(\d+)" y="(\d+)">(.*?)</text>', legend)
    assert all(float(x) + CHARACTER_WIDTH * len(text) <= 400 for x, _, text in texts)
    boxes = [(float(x), float(x) + CHARACTER_WIDTH * len(text), y) for x, y, text in texts]
    assert all(a[2] != b[2] or a[1] < b[0] for a, b in itertools.pairwise(boxes))  # none over its neighbour
    assert height > max(float(y) for _, y, _ in texts) > 0 and len({y for _, y, _ in texts}) > 1


# In a browser

PROBE = """
<script>
addEventListener("load", async () => {
  const results = await Promise.all([...document.querySelectorAll("iframe")].map(async (frame) => {
    const page = frame.contentDocument, root = page.documentElement;
    const visible = [...page.querySelectorAll(".plot")].filter((plot) => plot.getBoundingClientRect().width > 0);
    const plot = visible[1], box = plot.getBoundingClientRect();
    const { PointerEvent, KeyboardEvent } = frame.contentWindow, tip = plot.closest("figure").querySelector(".tip");
    plot.dispatchEvent(new PointerEvent("pointermove", { clientX: box.right - 5, clientY: box.top + 50 }));
    const pointed = tip.textContent;
    plot.dispatchEvent(new KeyboardEvent("keydown", { key: "Home" }));
    const outside = visible.flatMap((plot) => [...plot.querySelectorAll("text")].filter((text) => {
      const a = text.getBoundingClientRect(), b = plot.getBoundingClientRect();
      return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
    }).map((text) => text.textContent));
    return {
      width: frame.contentWindow.innerWidth, ready: root.dataset.ready, error: root.dataset.error ?? null,
      overflow: root.scrollWidth - root.clientWidth, charts: visible.length, outside,
      empty: visible.filter((plot) => !plot.querySelector(".line, .layer, .dot")).length,
      smallest: 12 * Math.min(...visible.map((it) => it.getBoundingClientRect().width / it.viewBox.baseVal.width)),
      tips: [pointed, tip.textContent], buttons: page.querySelectorAll(".save button").length,
      svg: await frame.contentWindow.standalone(plot).text(), png: (await frame.contentWindow.picture(plot)).size,
    };
  }));
  document.body.dataset.results = JSON.stringify(results);
});
</script>
"""


def open_in_chromium(path: Path, profile: Path) -> tuple[str, str]:
    """The document after its scripts ran, and what the browser wrote to its console."""
    browser = next(
        (found for name in ("chromium", "google-chrome", "chromium-browser") if (found := shutil.which(name))), None
    )
    if browser is None:
        pytest.skip("no chromium or google-chrome on PATH")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr"
    flags += " --window-size=1400,900 --virtual-time-budget=5000 --dump-dom"
    command = [browser, *flags.split(), f"--user-data-dir={profile}", path.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return result.stdout, result.stderr


@pytest.mark.slow
def test_chromium_draws_every_chart_without_errors_or_sideways_scrolling(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / f"kl_coef-{kl}", kl_coef=kl, steps=25) for kl in (0.0, 0.05, 0.2, 1.0)]
    rewrite(runs[0] / "samples.jsonl", lambda row: row | {"columns": {"source": "x" * 999}})  # one long word
    one, several = write_report(runs[:1]).read_text(), write_report(runs).read_text()
    one_step = write_report([fake_run(tmp_path / "short", steps=1)]).read_text()
    frames = "".join(
        f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(page)}"></iframe>'
        for page in (one, several, one_step)
        for width in (390, 1280)
    )
    (tmp_path / "probe.html").write_text(f'<!doctype html><meta charset="utf-8"><body>{frames}{PROBE}')
    document, console = open_in_chromium(tmp_path / "probe.html", tmp_path / "profile")
    results = json.loads(html.unescape(re.search(r'data-results="([^"]*)"', document)[1]))
    assert "Uncaught" not in console and "Content Security Policy" not in console, console
    assert [result["width"] for result in results] == [390, 1280] * 3
    charts = (12, 12, 10, 10, 12, 12)
    for result, last_step, count in zip(results, (25, 25, 25, 25, 1, 1), charts, strict=True):
        assert result["ready"] == "true" and result["error"] is None
        assert result["overflow"] == 0 and result["outside"] == []
        assert result["charts"] == count and result["empty"] == 0 and result["buttons"] == 2 * count
        assert result["smallest"] > 8.5  # pixels of the charts' smallest text
        assert [tip.split("reward")[0].split("β")[0] for tip in result["tips"]] == [f"step {last_step}", "step 1"]
        saved = ElementTree.fromstring(result["svg"])  # stands alone: well-formed, with its colours in it
        assert saved.get("width") == "420" and "var(" not in result["svg"] and "class=" not in result["svg"]
        assert len({float(colour) for colour in re.findall(r"fill: rgb\((\d+),", result["svg"])}) >= 3
        assert result["png"] > 5_000
