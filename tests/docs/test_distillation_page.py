"""docs/distillation.md: its loop computes the KL that the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "distillation.md").read_text()


@pytest.mark.slow
def test_the_loop_on_given_completions_lowers_the_exact_reverse_kl_of_their_tokens():
    """The first loss, from whole logits in float64."""
    (loop,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict = {}
    exec(loop, names)
    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_config(names["half"], dtype=torch.float32).double()
    teacher, kls = names["teacher"].double(), []
    for ids, first in names["texts"]:
        p, q = (model(ids).logits[0, first - 1 : -1].log_softmax(-1) for model in (student, teacher))
        kls.append((p.exp() * (p - q)).sum(-1))
    assert float(torch.cat(kls).mean()) == pytest.approx(names["losses"][0], abs=1e-5)
    assert names["losses"][-1] < 0.9 * names["losses"][0]
