"""Token ids and seeds that a model or a generator cannot take are refused by name, before any weight is read."""

from __future__ import annotations

import json

import pytest
import torch
from toy import STOP, VOCAB, prompt
from transformers import LlamaConfig

from fastkl.config.settings import TrainConfig, check_config
from fastkl.errors import UserError
from fastkl.rollout.requests import sample_seed
from fastkl.sampling.params import Sampling, check_ids
from fastkl.scoring.models import stop_token_ids
from fastkl.training.inputs import check_inputs, check_vocabulary


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"allowed_token_ids": (3, 999)}, "allowed_token_ids: the id 999 is not in the model's vocabulary, 0 to 22"),
        ({"banned_token_ids": (VOCAB,)}, "banned_token_ids: the id 23 is not in the model's vocabulary"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids: the id -1 is not in the model's vocabulary"),
        ({"stop_token_ids": (STOP, 99), "min_tokens": 2}, "stop_token_ids: the id 99 is not in"),
        ({"banned_token_ids": tuple(range(VOCAB))}, "banned_token_ids: every id of the vocabulary is banned"),
        ({"allowed_token_ids": (1, 2), "banned_token_ids": (2, 1)}, "allowed_token_ids: every id"),
        ({"allowed_token_ids": (STOP,), "stop_token_ids": (STOP,), "min_tokens": 1}, "min_tokens: only ids that end"),
    ],
)  # fmt: skip
def test_ids_outside_of_the_vocabulary_and_bans_of_all_ids_are_refused_by_name(given, words):
    with pytest.raises(UserError, match=f"^{words}"):
        check_ids(Sampling(**given), VOCAB)


def test_ids_at_the_vocabularys_ends_are_taken():
    check_ids(Sampling(banned_token_ids=(0, VOCAB - 1), stop_token_ids=(VOCAB - 1,), min_tokens=3), VOCAB)
    check_ids(Sampling(allowed_token_ids=(0, VOCAB - 1)), VOCAB)
    check_vocabulary(VOCAB, [prompt(0, VOCAB - 1)], Sampling())


def test_a_run_refuses_such_ids_before_it_makes_its_folder(tmp_path):
    config = TrainConfig(output=str(tmp_path / "run"), allowed_token_ids=(999_999,), device="cpu", report_to=())
    with pytest.raises(UserError, match="^allowed_token_ids: the id 999999 is not in"):
        check_inputs(config)
    assert not (tmp_path / "run").exists()


def test_a_prompt_with_a_token_that_the_model_was_not_resized_for_is_named():
    with pytest.raises(UserError, match="^prompts: row 0 has the token id 23, which is not in the model's vocabulary"):
        check_vocabulary(VOCAB, [prompt(1, 2), prompt(1, VOCAB)], Sampling())


def test_an_end_of_text_outside_of_the_vocabulary_ends_nothing_and_is_refused_where_it_is_the_only_one(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [STOP, 50256]}))
    assert stop_token_ids(LlamaConfig(vocab_size=VOCAB, eos_token_id=-1), str(tmp_path), None) == (STOP,)
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(UserError, match="^model: its end of text has the id 50256, which is not in its vocabulary"):
        stop_token_ids(LlamaConfig(vocab_size=VOCAB, eos_token_id=50256), str(tmp_path), None)
    assert stop_token_ids(LlamaConfig(vocab_size=VOCAB, eos_token_id=None), str(tmp_path), None) == ()


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
def test_a_seed_that_is_no_63_bit_number_is_refused_and_the_largest_one_works(seed):
    with pytest.raises(UserError, match=f"^seed: .*{abs(seed)}"):
        check_config(TrainConfig(seed=seed))
    check_config(TrainConfig(seed=2**63 - 1))
    assert 0 <= sample_seed(2**63 - 1, 1, 0, 0) < 2**63
    torch.Generator().manual_seed(2**63 - 1)
