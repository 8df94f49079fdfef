"""A new sampling parameter is a field of SamplingSettings and its replay: two files, and everything else follows.

The test adds one, `max_token_id`, to a copy of the package, in which nothing else is changed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastkl

PACKAGE = Path(fastkl.__file__).parent

SAMPLING = "\n@dataclass(frozen=True, slots=True)\nclass Sampling(SamplingSettings):"
FIELD = '''
    max_token_id: Annotated[int, AT_LEAST_0, Rule(SUPPORT, "larger ids cannot be drawn", vllm="max_id")] = 0
    """No id above this one is sampled; 0 allows all."""

'''

IDS = "\n    def ids("
REPLAYED = """
    if sampling.max_token_id:
        excluded = sorted({*excluded, *range(sampling.max_token_id + 1, vocab)})
"""

PROGRAM = """
import json, sys
from pathlib import Path
import torch
import fastkl.cli
from fastkl.config.files import load_config, save_config
from fastkl.config.settings import TrainConfig, check_config
from fastkl.errors import UserError
from fastkl.rollout.transformers import sample
from fastkl.sampling.params import Sampling, truncating, vllm_arguments
from fastkl.sampling.replay import support_of
from fastkl.score_files.command import ScoreConfig, header
from fastkl.score_files.read import sampling_of

config = TrainConfig(max_token_id=3)
save_config(config, Path("c.yaml"))
sampling = sampling_of({"max_token_id": 3}, TrainConfig(), (1,))
support = support_of(sampling, torch.arange(500), 8)
drawn, logprobs = sample(torch.zeros(500, 8), 1.0, torch.rand(500, dtype=torch.float64), support)
try:
    check_config(TrainConfig(max_token_id=-1))
except UserError as mistake:
    refused = str(mistake)
print(json.dumps({
    "same": Sampling.of(config, (1,)).max_token_id == sampling.max_token_id == load_config(Path("c.yaml")).max_token_id,
    "engine": vllm_arguments(sampling, 8)["max_id"],
    "drawn": sorted(set(drawn.tolist())),
    "logprobs": sorted(set(round(x, 6) for x in logprobs.tolist())),
    "header": header(ScoreConfig("-", "m", shared=config), torch.float32)["max_token_id"],
    "refused": refused,
    "doctor": truncating({"max_token_id": 3, "top_k": -1, "top_p": 1, "min_p": 0.0, "temperature": 2}),
}))
for command in ("train", "score"):
    fastkl.cli.main([command, "--help"])
"""


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))


@pytest.mark.slow
def test_a_new_sampling_parameter_is_a_field_and_its_replay(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "fastkl", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    folder = tmp_path / "fastkl" / "sampling"
    replaced(folder / "params.py", SAMPLING, FIELD + SAMPLING)
    replaced(folder / "replay.py", IDS, REPLAYED + IDS)
    environment = {"PATH": "", "COLUMNS": "80", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, _, pages = done.stdout.partition("\n")
    assert json.loads(found) == {
        "same": True,
        "engine": 3,
        "drawn": [0, 1, 2, 3],
        "logprobs": [-1.386294],  # log 1/4
        "header": 3,
        "refused": "max_token_id: -1 is out of range; it must be 0 or more.",
        "doctor": ["max_token_id"],
    }
    assert " ".join(pages.split()).count("--max-token-id N No id above this one is sampled; 0 allows all. [0]") == 2
