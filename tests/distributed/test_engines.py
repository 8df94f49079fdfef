"""One vLLM engine in each process, in the processes' own group."""

from __future__ import annotations

import pytest
from several_processes import run_in
from test_processes import assert_alike, lines, story, trained

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


def test_two_engines_draw_the_samples_of_one_and_hold_the_policys_weights(tmp_path):
    """Every push is compared tensor by tensor, and every log-prob with the trainer's, in each process."""
    options = {"generator": "vllm", "steps": 2}
    for name, size, shard in (("one", 1, "none"), ("whole", 2, "none"), ("pieces", 2, "full")):
        run_in(size, tmp_path / name, trained, story(tmp_path / name / "run", shard=shard, **options))
    for name in ("whole", "pieces"):
        assert_alike(tmp_path / "one" / "run", tmp_path / name / "run")
        gaps = [step["mismatch/mean_abs_logprob"] for step in lines(tmp_path / name / "run")]
        assert len(gaps) == 2 and max(gaps) < 1e-4
        assert (tmp_path / name / "run" / "engine-1.log").is_file()
