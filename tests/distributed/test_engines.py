"""One vLLM engine in each process, in the processes' own group."""

from __future__ import annotations

import pytest
from several_processes import run_in
from test_processes import assert_alike, lines, story, trained

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


def test_two_engines_draw_the_samples_of_one_and_hold_the_policys_weights(tmp_path):
    """Every push, whose tensors are put together from the processes' pieces, is compared tensor by tensor, and every
    log-prob with the trainer's, in each process."""
    for name, size, shard in (("one", 1, "none"), ("two", 2, "full")):
        run_in(size, tmp_path / name, trained, story(tmp_path / name / "run", shard=shard, generator="vllm", steps=2))
    assert_alike(tmp_path / "one" / "run", tmp_path / "two" / "run")
    gaps = [step["mismatch/mean_abs_logprob"] for step in lines(tmp_path / "two" / "run")]
    assert len(gaps) == 2 and max(gaps) < 1e-4
    assert (tmp_path / "two" / "run" / "engine-1.log").is_file()
