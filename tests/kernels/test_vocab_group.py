"""Heads and logits that several processes hold in slices of the vocabulary, against the definition over all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
REFUSED = {
    "support": "support is given, but the ranks of vocab_group do not tell one another which ids a sampler allowed: "
    "leave the support out, or gather the head and leave vocab_group out.",
    "targets": "sum_of_target_ids is 155 on rank 0 of vocab_group and 164 on rank 1: all ranks must make the same "
    "call, each with its own slice of the vocabulary.",
    "temperature": "temperature is 1 on rank 0 of vocab_group and 0.5 on rank 1: all ranks must make the same call, "
    "each with its own slice of the vocabulary.",
    "temperatures": "temperature is 9 on rank 0 of vocab_group and 4.5 on rank 1: all ranks must make the same "
    "call, each with its own slice of the vocabulary.",
    "no ids left": "Rank 2 of vocab_group holds none of the 22 ids: make the group of those ranks that do.",
    "too many ids": "valid_vocab is 38, expected 1 to 37, the number of logits per row.",
    "cut apart": "The ranks of vocab_group hold [20, 5, 12] ids of the policy and [7, 7, 7] of the reference: cut both "
    "at the same ids (beyond valid_vocab they may differ).",
    "no group": "vocab_group is 'tp', expected a torch.distributed.ProcessGroup that this process belongs to; of a "
    "DeviceMesh, pass mesh.get_group().",
    "DTensor": "policy_weight is a DTensor, but rows are scored where they are: pass policy_weight.to_local().",
    "target beyond all": "target_ids has the id 73, but the vocabulary is 0 to 36: check the tokenizer and "
    "valid_vocab, and mask the rows without a target (or give them the target -100).",
}


def start(folder: Path, kind: str, **environment: str) -> dict:
    """What ranks.py finds."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), str(HERE)]), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(HERE / "ranks.py"), str(folder), kind]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    return start(tmp_path_factory.mktemp("ranks"), "cpu")


def test_slices_give_the_scores_and_gradients_of_the_whole_vocabulary_and_all_ranks_the_same_bits(results):
    """28 cases of three ranks and 5 of two in float64; where bits differ, the error is infinite."""
    errors = {name: error for name, error in results.items() if name != "refusals" and "float32" not in name}
    assert len(errors) == 33
    assert max(errors.values()) < 1e-9, errors
    assert errors["plain, 3 ranks"] < 1e-14


def test_slices_are_as_good_as_the_plain_line_in_float32(results):
    """ranks.py fails otherwise."""
    assert sum("float32" in name for name in results) == 3


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_the_ranks_cannot_do_together_is_refused_on_all_of_them(results, case):
    assert results["refusals"][case] == [REFUSED[case]] * 3


def test_a_mistake_of_one_rank_ends_the_call_on_all_of_them(results):
    others = "Rank 1 of vocab_group has refused its inputs: its own message says why."
    its_own = "policy_weight has shape [5, 3], expected [any, 8]."
    assert results["refusals"]["one rank alone"] == [others, its_own, others]


@pytest.mark.kernels
def test_the_gpus_kernels_give_the_same_under_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    results = start(tmp_path, "interpreter", TRITON_INTERPRET="1")
    assert len(results) == 12
    assert max(results.values()) < 1e-4, results
