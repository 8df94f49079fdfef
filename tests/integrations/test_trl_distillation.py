"""The switch for TRL's DistillationTrainer: TRL's own weights and metrics, from a loss of ours."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch
from test_trl import EOS, PAD, PROMPTS, VOCAB, folder, metric, trl, weights  # noqa: F401  # folder is a fixture
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastkl.errors import UserError
from fastkl.integrations.trl import distillation, fastkl_scoring

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Path:  # noqa: F811
    """Twice as wide as the student."""
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.3,
        vocab_size=VOCAB, eos_token_id=EOS, pad_token_id=PAD, bos_token_id=EOS,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "teacher")
    return folder / "teacher"


def make_trainer(student: Path, teacher: Path, tmp_path: Path, kind: type | None = None, **settings):
    defaults = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_completion_length": 8, "max_steps": 4,
        "learning_rate": 0.05, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 1.0, "use_cpu": True,
        "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "seed": 3,
    }  # fmt: skip
    prompts = import_module("datasets").Dataset.from_dict({"prompt": PROMPTS})
    return (kind or trl.DistillationTrainer)(
        model=AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32),
        args=trl.DistillationConfig(output_dir=str(tmp_path), **(defaults | settings)),
        train_dataset=prompts,
        eval_dataset=prompts.select(range(4)),
        processing_class=PreTrainedTokenizerFast.from_pretrained(student, padding_side="left"),
    )


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 10}, {"beta": 0.0}, {"beta": 0.5}], ids=str)
def test_weights_loss_and_entropy_are_those_of_trl(folder, teacher, tmp_path, settings):  # noqa: F811
    theirs = make_trainer(folder / "llama", teacher, tmp_path / "theirs", **settings)
    start = weights(theirs)
    theirs.train()
    ours = make_trainer(folder / "llama", teacher, tmp_path / "ours", **settings)
    with fastkl_scoring(ours):
        assert "_compute_loss" in vars(ours)
        ours.train()
        evaluated = ours.evaluate()["eval_loss"]
    assert "_compute_loss" not in vars(ours)
    for name, value in weights(theirs).items():
        torch.testing.assert_close(weights(ours)[name], value, rtol=0, atol=2e-5)
    moved = max(float((value - start[name]).abs().max()) for name, value in weights(ours).items())
    assert moved > 1e-3
    for name in ("loss", "entropy", "grad_norm"):
        assert len(metric(ours, name)) == 4 and metric(ours, name) == pytest.approx(metric(theirs, name), abs=2e-4)
    assert evaluated == pytest.approx(theirs.evaluate()["eval_loss"], abs=0.5)  # other draws


def divergence(p, q, beta):
    """[n, V] log-probs -> [n], as written."""
    m = ((p.exp() + q.exp()) / 2).log()
    of_p, of_q = ((x.exp() * (x - y)).sum(-1) for x, y in ((p, m), (q, m)))
    return {1.0: (p.exp() * (p - q)).sum(-1), 0.0: (q.exp() * (q - p)).sum(-1), 0.5: (of_p + of_q) / 2}[beta]


@pytest.mark.parametrize("beta", [1.0, 0.0, 0.5])
def test_the_loss_is_the_mean_divergence_of_the_tokens_that_count(folder, teacher, tmp_path, beta):  # noqa: F811
    """In float64 from the models' own logits; a tool's tokens, padding and what follows the end do not count."""
    trainer = make_trainer(folder / "llama", teacher, tmp_path, temperature=0.7, beta=beta)
    student, generator = trainer.model, torch.Generator().manual_seed(0)
    inputs = {
        "prompt_ids": torch.randint(3, VOCAB, (3, 4), generator=generator),
        "completion_ids": torch.randint(3, VOCAB, (3, 5), generator=generator),
        "prompt_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]),
        "completion_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]),
        "tool_mask": torch.tensor([[1, 0, 0, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]),
    }
    kept = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    p, q = (
        (m(input_ids=ids, attention_mask=attention).logits[:, 3:-1][kept].double() / 0.7).log_softmax(-1)
        for m in (student, trainer.teacher_model)
    )
    expected = divergence(p, q, beta)
    for total in (None, 20):
        loss, entropy, count = distillation.compute_loss(trainer, student, inputs, total)
        assert float(loss) == pytest.approx(float(expected.sum()) / (total or 9), rel=1e-5) and int(count) == 9
        assert float(entropy) == pytest.approx(float(-(p.exp() * p).sum()), rel=1e-5)


def test_what_the_operator_does_not_compute_is_refused_by_name(folder, teacher, tmp_path):  # noqa: F811
    class Own(trl.DistillationTrainer):
        def _compute_loss(self, *arguments):
            raise NotImplementedError

    for options, words in (
        ({"beta": 0.25}, "beta: 0.25 asks for a Jensen-Shannon divergence with unequal weights"),
        ({"kind": Own}, "trainer: Own has a _compute_loss of its own"),
        ({"torch_compile": True}, "does not support torch_compile True"),
    ):
        trainer = make_trainer(folder / "llama", teacher, tmp_path, **options)
        with pytest.raises(UserError, match=words), fastkl_scoring(trainer):
            pass
