"""Mistakes in the settings of an evaluation: one line each, before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import slow_rows

from fastkl.cli import main
from fastkl.scoring import models


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "three.jsonl").write_text("".join(f'{{"prompt": "q{i}"}}\n' for i in range(3)))
    (tmp_path / "broken.jsonl").write_text('{"question": "q"}\n')
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_text(" \n")
    return tmp_path


HELD = "--eval-prompts text:Once "


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--eval-prompts 1.5", "eval_prompts: 1.5 is no share of the prompts; give a number above 0 and below 1"),
        ("--prompts three.jsonl --eval-prompts 0.00001", "eval_prompts: the share 1e-05 holds out none of the 3"),
        ("--eval-prompts missing.jsonl", "eval_prompts: there is no file 'missing.jsonl'"),
        ("--eval-prompts broken.jsonl", "eval_prompts: line 1 of 'broken.jsonl' has no column 'prompt'"),
        (HELD + "--eval-samples 0", "eval_samples: 0 is out of range; it must be 1 or more."),
        (HELD + "--eval-reward nonsense", "eval_reward: unknown 'nonsense'"),
        ("--eval-reward alliteration", "eval_reward: there are no held-out prompts to reward; add --eval-prompts."),
        ("--eval-text missing.txt", "eval_text: 'missing.txt' cannot be read (No such file or directory)"),
        ("--best eval/pass@1", "best: 'eval/pass@1' is not measured without held-out data"),
        (HELD + "--best eval/pass@3", "best: 'eval/pass@3' is not measured. Did you mean 'eval/pass@"),
        *slow_rows(
            ("--eval-prompts 0", "eval_prompts: 0 is no share"),
            ("--eval-prompts 0.5", "eval_prompts: the share 0.5 holds out n"),  # of one prompt
            (HELD + "--eval-temperature -1", "eval_temperature: -1.0 is out of range; it must be 0 or more."),
            (HELD + "--eval-temperature warm", "eval_temperature: 'warm' is not a number."),
            (HELD + "--eval-pass nan", "eval_pass: nan is out of range"),
            ("--eval-text bytes.txt", "eval_text: 'bytes.txt' is not UTF-8 text"),
            ("--eval-text empty.txt", "eval_text: 'empty.txt' is empty"),
            (HELD + "--best eval/loss", "best: 'eval/loss' is not measured."),
            (HELD + "--best most:eval/reward", "best: 'most:eval/reward' begins with neither min: nor max:"),
        ),
    ],
)
def test_a_mistake_is_one_line_and_no_model_is_loaded(files, capsys, options, message):
    assert main(["train", "--generator", "transformers", *options.split()]) == 2
    output, error = capsys.readouterr()
    assert output == "" and error.count("\n") == 1
    assert error.startswith(f"fastkl: {message}"), error
