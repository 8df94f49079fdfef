"""The sweep over all architectures: some of each kind, and what it does with those that crash or get worse."""

from __future__ import annotations

import os
import re
from dataclasses import replace

import pytest
import torch

from tools.models import __main__ as sweep_command
from tools.models.page import PAGE, page, rows_of, worse
from tools.models.tiny import kinds
from tools.models.trial import TOLERANCE, Row, attempt

SAME = Row("llama", "LlamaForCausalLM", "trains", "shared", "shared", 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "layout", "decoding"),
    [
        ("hyperclovax", "shared", "shared"),  # its logits are multiplied by what divides Granite's
        ("falcon_h1", "padded", "shared"),  # lm_head_multiplier; attention beside a state space
        ("modernbert-decoder", "shared", "shared"),  # its head has two layers
        # a padding token takes no place
        pytest.param("roberta", "padded", "anew", marks=pytest.mark.long),
        # the text part, saved by itself, is no model type that transformers can choose
        pytest.param("emu3", "shared", "shared", marks=pytest.mark.long),
        # its configuration has no number of layers
        pytest.param("blt", "padded", "anew", marks=pytest.mark.long),
    ],
)
def test_architectures_score_like_their_own_logits_and_train(kind, layout, decoding):
    row = attempt(kind)
    assert (row.outcome, row.layout, row.decoding) == ("trains", layout, decoding), row.sentence
    assert row.error <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("prophetnet", "looks ahead"),
        pytest.param("gemma4_assistant", "gives no logits for .* token ids alone", marks=pytest.mark.long),
        pytest.param("reformer", "cannot be trained", marks=pytest.mark.long),
    ],
)
def test_what_has_no_next_token_logits_of_its_own_is_refused_in_one_sentence(kind, words):
    row = attempt(kind)
    assert row.outcome == "refused", row.sentence
    assert re.search(words, row.sentence), row.sentence
    assert "\n" not in row.sentence


@pytest.mark.slow
def test_an_architecture_that_crashes_or_hangs_is_a_row(monkeypatch):
    def attempt(kind):
        if kind == "gpt2":
            os._exit(9)
        return SAME if kind == "llama" else os.read(os.pipe()[0], 1)

    monkeypatch.setattr(sweep_command, "attempt", attempt)
    rows = {row.kind: row for row in sweep_command.sweep(["gpt2", "llama", "opt"], workers=2, limit=2)}
    assert rows["llama"] == SAME
    assert (rows["gpt2"].outcome, rows["gpt2"].sentence) == ("fails", "the process ended with 9")
    assert (rows["opt"].outcome, rows["opt"].sentence) == ("fails", "took longer than 2 s")


def test_a_page_holds_its_rows_and_a_row_that_does_worse_is_found():
    refused = Row("reformer", "ReformerModelWithLMHead", "refused", sentence="model: a | b\nc <d>.")
    failed = Row("blt", "BltForCausalLM", "fails", sentence="TypeError: x")
    text = page([SAME, refused, failed])
    shown = replace(refused, sentence="model: a / b c &lt;d>."), replace(failed, sentence="**fails**: TypeError: x")
    assert rows_of(text) == [SAME, *shown]
    better_first = [SAME, replace(SAME, decoding="alike"), replace(SAME, layout="padded"), refused, failed]
    assert not any(worse(row, row) for row in better_first)
    assert all(worse(later, SAME) and not worse(SAME, later) for later in better_first[1:])
    assert worse(failed, refused)
    assert not worse(refused, failed)
    assert [worse(row, None) for row in (SAME, refused, failed)] == [False, False, True]


def test_the_page_is_rewritten_unless_something_does_worse(monkeypatch, tmp_path, capsys):
    place, slower = tmp_path / "models.md", replace(SAME, decoding="anew")
    place.write_text(page([SAME]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(sweep_command, "PAGE", place)
    monkeypatch.setattr(sweep_command, "sweep", lambda *arguments: [slower])
    for options, code, found in (([], 1, SAME), (["--accept"], 0, slower), ([], 0, slower)):
        monkeypatch.setattr("sys.argv", ["models", *options])
        assert sweep_command.main() == code
        assert rows_of(place.read_text()) == [found]
        assert (": llama." in capsys.readouterr().err) == (code == 1)


def test_the_page_has_a_row_for_every_architecture_and_none_fails():
    rows = rows_of(PAGE.read_text())
    assert {row.kind for row in rows} == set(kinds())
    assert not [row.kind for row in rows if row.outcome == "fails"]
