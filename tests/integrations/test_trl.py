"""The switch for TRL's trainers: TRL's own weights without truncation, the right KL with it, nothing left behind."""

from __future__ import annotations

import importlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("trl_without_vllm", reason='TRL is not installed: pip install "trl==1.16.*"')

import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.generation import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastkl.audit.doctor import diagnose
from fastkl.errors import UserError
from fastkl.integrations.trl import fastkl_scoring
from fastkl.integrations.trl.checks import REPLACED
from fastkl.integrations.trl.sampling import GENERATION_CONFIG, sampling_of
from fastkl.integrations.trl.scorer import Scorer

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
VOCAB, EOS, PAD = 40, 1, 0
PROMPTS = ["w5 w6 w7", "w8", "w9 w10", "w11 w12 w13 w14"] * 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models with opinions and a word tokenizer, on disk: TRL loads the reference from the policy's path."""
    root = tmp_path_factory.mktemp("models")
    words = {"<pad>": PAD, "<eos>": EOS, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    ids = {"vocab_size": VOCAB, "eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": EOS}
    llama = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3, **ids
    )
    gpt2 = GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3, **ids,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    moe = Qwen3MoeConfig(
        hidden_size=16, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, num_experts=4, num_experts_per_tok=2, initializer_range=0.3, router_aux_loss_coef=0.5, **ids,
    )  # fmt: skip
    for name, kind, config in (
        ("llama", LlamaForCausalLM, llama),
        ("gpt2", GPT2LMHeadModel, gpt2),
        ("moe", Qwen3MoeForCausalLM, moe),
    ):
        torch.manual_seed(0)
        kind(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(i % 3 for i in ids) / 4 for ids in completion_ids]


def make_trainer(kind: str, path: Path, tmp_path: Path, *, peft_config: Any = None, flatten: float = 1.0, **settings):
    """A trainer of TRL's on the CPU; `flatten` divides the policy's logits, and not those of the reference."""
    config, trainer = (trl.RLOOConfig, trl.RLOOTrainer) if kind == "rloo" else (trl.GRPOConfig, trl.GRPOTrainer)
    defaults = {
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8, "max_steps": 5,
        "learning_rate": 0.05, "lr_scheduler_type": "constant", "optim": "sgd", "beta": 0.1, "max_grad_norm": 1.0,
        "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "logging_steps": 1, "seed": 3,
    }  # fmt: skip
    args = config(output_dir=str(tmp_path), **(defaults | settings))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompts = importlib.import_module("datasets").Dataset.from_dict({"prompt": PROMPTS})
    made = trainer(
        model=model,
        reward_funcs=reward,
        args=args,
        train_dataset=prompts,
        eval_dataset=prompts.select(range(4)),
        processing_class=PreTrainedTokenizerFast.from_pretrained(path, padding_side="left"),
        peft_config=peft_config,
    )
    if flatten != 1.0:  # the final norm's gain scales all logits
        with torch.no_grad():
            model.model.norm.weight.div_(flatten)
    made.remove_callback(next(c for c in made.callback_handler.callbacks if "Printer" in type(c).__name__))
    return made


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def metric(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def count_trunk_forwards(trainer: Any) -> dict[str, int]:
    """Counts the backbone's forwards of whole sequences (generation's are told by their cache)."""
    counts = {"policy": 0, "reference": 0}

    def counted(name: str):
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            counts[name] += not kwargs.get("use_cache", True)

        return hook

    for name, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
        if model is not None:
            model.base_model.register_forward_pre_hook(counted(name), with_kwargs=True)
    return counts


SAME = {
    "rloo": ("rloo", {}, None),
    "rloo, four micro-batches": (
        "rloo", {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4, "temperature": 0.7}, None,
    ),
    "rloo, kept forwards": ("rloo", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}, True),
    "rloo, no checkpointing": ("rloo", {"gradient_checkpointing": False}, None),
    "rloo, two iterations": ("rloo", {"num_iterations": 2}, None),
    "rloo, no reference": ("rloo", {"beta": 0.0}, None),
    "rloo, truncated ones masked": ("rloo", {"mask_truncated_completions": True}, None),
    "grpo": ("grpo", {}, None),
    "grpo, two iterations": ("grpo", {"num_iterations": 2, "loss_type": "dapo", "top_entropy_quantile": 0.5}, None),
    "grpo, micro-batches": (
        "grpo", {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "entropy_coef": 0.01}, None,
    ),
    "grpo, sequences": ("grpo", {"importance_sampling_level": "sequence", "loss_type": "bnpo"}, None),
}  # fmt: skip


SHORT = ("rloo", "rloo, four micro-batches", "rloo, two iterations", "grpo, micro-batches")


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in SHORT else pytest.mark.long) for c in SAME])
def test_without_truncation_the_trained_weights_and_metrics_are_trls_own(case: str, folder: Path, tmp_path: Path):
    kind, settings, reuse = SAME[case]
    own = make_trainer(kind, folder / "llama", tmp_path, **settings)
    before = weights(own)
    own.train()
    ours = make_trainer(kind, folder / "llama", tmp_path, **settings)
    with fastkl_scoring(ours, reuse_forward=reuse):
        ours.train()
    for name, p in weights(own).items():
        moved = float((p - before[name]).abs().max())
        assert moved > 1e-4, f"{name} did not move: equality would prove nothing"
        torch.testing.assert_close(weights(ours)[name], p, rtol=1e-4, atol=1e-4 * moved + 1e-6, msg=name)
    for name in ("entropy", "reward", "loss", "grad_norm", *(["kl"] if own.beta else [])):
        assert metric(ours, name) == pytest.approx(metric(own, name), rel=1e-3, abs=2e-5), name


@pytest.mark.parametrize("reuse", [None, pytest.param(False, marks=pytest.mark.long)])
def test_a_mixture_of_experts_keeps_its_auxiliary_loss(reuse: bool | None, folder: Path, tmp_path: Path):
    own = make_trainer("rloo", folder / "moe", tmp_path, max_steps=3)
    before = weights(own)
    own.train()
    ours = make_trainer("rloo", folder / "moe", tmp_path, max_steps=3)
    with fastkl_scoring(ours, reuse_forward=reuse):
        ours.train()
    assert metric(ours, "aux_loss") == pytest.approx(metric(own, "aux_loss"), rel=1e-4)
    for name, p in weights(own).items():
        moved = float((p - before[name]).abs().max())
        torch.testing.assert_close(weights(ours)[name], p, rtol=1e-4, atol=1e-4 * moved + 1e-6, msg=name)


@pytest.mark.slow
def test_rloo_runs_two_forwards_where_trl_runs_three(folder: Path, tmp_path: Path):
    own = make_trainer("rloo", folder / "llama", tmp_path, max_steps=2)
    counts = count_trunk_forwards(own)
    own.train()
    assert counts == {"policy": 4, "reference": 2}
    for reuse, expected in ((None, 2), (False, 4)):
        ours = make_trainer("rloo", folder / "llama", tmp_path, max_steps=2)
        with fastkl_scoring(ours, reuse_forward=reuse):
            counts = count_trunk_forwards(ours)
            ours.train()
        assert counts == {"policy": expected, "reference": 2}


@pytest.mark.slow
@pytest.mark.long
def test_under_bfloat16_autocast_the_scores_are_trls_up_to_its_rounding(folder: Path, tmp_path: Path):
    for kind in ("rloo", "grpo"):
        found = []
        for switched in (False, True):
            trainer = make_trainer(kind, folder / "llama", tmp_path, bf16=True, max_steps=2, flatten=2.0)
            if switched:
                with fastkl_scoring(trainer):
                    trainer.train()
            else:
                trainer.train()
            found.append(trainer)
        for name in ("entropy", "kl", "reward"):
            assert metric(found[1], name)[:1] == pytest.approx(metric(found[0], name)[:1], rel=0.02, abs=0.01), name
        assert all(p.dtype == torch.float32 for p in found[1].model.parameters())


def test_evaluation_gives_trls_own_metrics(folder: Path, tmp_path: Path):
    for kind in ("rloo", "grpo"):
        found = []
        for switched in (False, True):
            trainer = make_trainer(kind, folder / "llama", tmp_path, per_device_eval_batch_size=4, flatten=2.0)
            torch.manual_seed(0)
            if switched:
                with fastkl_scoring(trainer):
                    found.append(trainer.evaluate())
            else:
                found.append(trainer.evaluate())
        for name in ("eval_loss", "eval_kl", "eval_entropy", "eval_reward"):
            assert found[1][name] == pytest.approx(found[0][name], rel=1e-4, abs=1e-6), name


@pytest.mark.slow
def test_a_lora_policy_is_scored_against_itself_without_the_adapter(folder: Path, tmp_path: Path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    for kind in ("rloo", "grpo"):
        trained = []
        for switched in (False, True):
            adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=True)
            trainer = make_trainer(kind, folder / "llama", tmp_path, peft_config=adapter, learning_rate=1.0)
            if switched:
                with fastkl_scoring(trainer):
                    trainer.train()
            else:
                trainer.train()
            trained.append((weights(trainer), metric(trainer, "kl")))
        assert trained[0][1][-1] > 1e-4
        assert trained[1][1] == pytest.approx(trained[0][1], rel=1e-2, abs=2e-5)
        for name, p in trained[0][0].items():
            torch.testing.assert_close(trained[1][0][name], p, rtol=1e-3, atol=2e-5, msg=name)


# Truncated sampling: the KL against an independent computation with transformers' own logits processors


@dataclass
class Pass:
    """One call of Scorer.score: what went in, the policy's weights then, and what came out."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    num_tokens: int
    policy: dict[str, torch.Tensor]
    scores: Any


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Pass]:
    found: list[Pass] = []
    score = Scorer.score

    def recorded(self: Scorer, model: Any, input_ids: Any, attention_mask: Any, num_tokens: int, **options: Any):
        scores = score(self, model, input_ids, attention_mask, num_tokens, **options)
        state = {name: x.clone() for name, x in self.trainer.model.state_dict().items()}
        found.append(Pass(input_ids, attention_mask, num_tokens, state, scores))
        return scores

    monkeypatch.setattr(Scorer, "score", recorded)
    return found


TRUNCATED = {
    "top_k": ({"top_k": 5}, lambda n: [TopKLogitsWarper(5)]),
    "top_p": ({"top_p": 0.7}, lambda n: [TopPLogitsWarper(0.7)]),
    "min_p": ({"min_p": 0.2}, lambda n: [MinPLogitsWarper(0.2)]),
    "min_new_tokens": (
        {"generation_kwargs": {"min_new_tokens": 6}},
        lambda n: [MinNewTokensLengthLogitsProcessor(n, 6, [EOS])],
    ),
    "all but min_p": (
        {
            "top_k": 12, "top_p": 0.8, "temperature": 1.3,
            "generation_kwargs": {"min_new_tokens": 3, "suppress_tokens": [7, 8]},
        },
        lambda n: [
            MinNewTokensLengthLogitsProcessor(n, 3, [EOS]), SuppressTokensLogitsProcessor([7, 8]),
            TemperatureLogitsWarper(1.3), TopKLogitsWarper(12), TopPLogitsWarper(0.8),
        ],
    ),
}  # fmt: skip


def brute_force(
    sampler: torch.nn.Module, scored: list[torch.nn.Module], found: Pass, processors: Any
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """log p(y) on the sampler's support, f64 [N], of each model in `scored`: row by row without padding.

    The support is what transformers' own processors leave of the sampler's logits; temperature is among them.
    """
    logprobs: list[list[torch.Tensor]] = [[] for _ in scored]
    prompt_width = found.input_ids.shape[1] - found.num_tokens
    for ids, mask in zip(found.input_ids, found.attention_mask.bool(), strict=True):
        row, num_prompt = ids[mask][None], int(mask[:prompt_width].sum())
        processed, plain = [], []
        for model in (sampler, *scored):
            with torch.no_grad():
                logits = model.double()(input_ids=row).logits[0]
            plain.append(logits)
        process = LogitsProcessorList(processors(num_prompt))
        scale = next((p.temperature for p in process if isinstance(p, TemperatureLogitsWarper)), 1.0)
        for t in range(num_prompt, row.shape[1]):
            processed = process(row[:, :t], plain[0][t - 1 : t])[0]
            keep = processed > -torch.inf
            assert keep[row[0, t]], "the sampled token is not in the support: the comparison would be void"
            for values, logits in zip(logprobs, plain[1:], strict=True):
                values.append((logits[t - 1] / scale).masked_fill(~keep, -torch.inf).log_softmax(0)[row[0, t]])
    return [torch.stack(values) for values in logprobs]


def model_with(path: Path, state: dict[str, torch.Tensor] | None = None) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if state is not None:
        model.load_state_dict(state)
    return model.double()


@pytest.mark.parametrize("case", TRUNCATED)
@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_truncated_sampling_is_scored_on_the_samplers_support(
    kind: str, case: str, folder: Path, tmp_path: Path, passes: list[Pass]
):
    settings, processors = TRUNCATED[case]
    path = folder / "llama"
    trainer = make_trainer(kind, path, tmp_path, max_steps=1, learning_rate=0.0, flatten=3.0, **settings)
    with fastkl_scoring(trainer):
        trainer.train()
    (found,) = passes
    policy, ref = brute_force(
        model_with(path, found.policy), [model_with(path, found.policy), model_with(path)], found, processors
    )
    mask = found.scores.mask
    torch.testing.assert_close(found.scores.policy[mask].double(), policy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.scores.ref[mask].double(), ref, rtol=1e-5, atol=1e-5)
    k = policy - ref
    expected = k.mean() if kind == "rloo" else (torch.expm1(-k) + k).mean()
    assert metric(trainer, "kl") == [pytest.approx(float(expected), abs=2e-4)]  # logs are rounded


def test_absolute_positions_count_from_the_first_token_as_in_generation(
    folder: Path, tmp_path: Path, passes: list[Pass]
):
    path = folder / "gpt2"
    trainer = make_trainer("rloo", path, tmp_path, max_steps=1, learning_rate=0.0, top_k=5)
    with fastkl_scoring(trainer):
        trainer.train()
    (policy,) = brute_force(model_with(path), [model_with(path)], passes[0], lambda n: [TopKLogitsWarper(5)])
    scores = passes[0].scores
    torch.testing.assert_close(scores.policy[scores.mask].double(), policy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["rloo", pytest.param("grpo", marks=pytest.mark.long)])
def test_a_flattened_policy_is_paid_by_trls_kl_and_not_by_ours(kind: str, folder: Path, tmp_path: Path):
    settings = {"top_k": 5, "max_steps": 4, "learning_rate": 0.0, "flatten": 3.0, "per_device_train_batch_size": 32}
    own = make_trainer(kind, folder / "llama", tmp_path, **settings)
    own.train()
    ours = make_trainer(kind, folder / "llama", tmp_path, **settings)
    with fastkl_scoring(ours):
        ours.train()
    exact = metric(ours, "kl_exact")
    if kind == "rloo":  # k1: unbiased on the support, below zero without it
        assert max(metric(own, "kl")) < -0.1
        assert min(metric(ours, "kl")) > 0.01
    else:  # k3 is never below zero: on the wrong distribution it explodes instead
        assert min(metric(own, "kl")) > 3 * max(metric(ours, "kl"))
    assert min(exact) > 0.1


def test_an_unchanged_policy_has_no_kl_under_truncation(folder: Path, tmp_path: Path):
    for kind in ("rloo", "grpo"):
        trainer = make_trainer(
            kind, folder / "llama", tmp_path, max_steps=1, learning_rate=0.0, top_p=0.7, min_p=None,
            generation_kwargs={"min_new_tokens": 5},
        )  # fmt: skip
        with fastkl_scoring(trainer):
            trainer.train()
        assert metric(trainer, "kl") == [pytest.approx(0.0, abs=1e-5)]
        assert metric(trainer, "kl_exact") == [pytest.approx(0.0, abs=1e-5)]


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_a_second_iteration_is_scored_on_the_support_of_the_policy_that_sampled(
    kind: str, folder: Path, tmp_path: Path, passes: list[Pass]
):
    path = folder / "llama"
    trainer = make_trainer(
        kind, path, tmp_path, max_steps=2, num_iterations=2, learning_rate=2.0, top_k=5, max_grad_norm=5.0
    )
    with fastkl_scoring(trainer):
        trainer.train()
    at_rollout, first, second = passes
    sampler = model_with(path, at_rollout.policy)
    assert not torch.equal(first.policy["model.norm.weight"], second.policy["model.norm.weight"])
    for found in (first, second):
        (policy,) = brute_force(sampler, [model_with(path, found.policy)], found, lambda n: [TopKLogitsWarper(5)])
        torch.testing.assert_close(
            found.scores.policy[found.scores.mask].detach().double(), policy, rtol=1e-4, atol=1e-4
        )
    (own_set,) = brute_force_own_support(path, second)
    assert (own_set - policy).abs().max() > 0.01, "the policy's own set would have done as well"


def brute_force_own_support(path: Path, found: Pass) -> list[torch.Tensor]:
    """log p(y) on the top five of the policy itself, the sampled token always kept."""
    model, values = model_with(path, found.policy), []
    width = found.input_ids.shape[1] - found.num_tokens
    for ids, mask in zip(found.input_ids, found.attention_mask.bool(), strict=True):
        row, first = ids[mask][None], int(mask[:width].sum())
        with torch.no_grad():
            logits = model(input_ids=row).logits[0]
        for t in range(first, row.shape[1]):
            keep = TopKLogitsWarper(5)(row, logits[t - 1 : t])[0] > -torch.inf
            keep[row[0, t]] = True
            values.append(logits[t - 1].masked_fill(~keep, -torch.inf).log_softmax(0)[row[0, t]])
    return [torch.stack(values)]


# Refusals and borders


REFUSED = {
    "repetition_penalty": {"repetition_penalty": 1.2},
    "typical_p": {"generation_kwargs": {"typical_p": 0.5}},
    "no_repeat_ngram_size": {"generation_kwargs": {"no_repeat_ngram_size": 2}},
    "num_beams": {"generation_kwargs": {"num_beams": 2}},
    "do_sample": {"generation_kwargs": {"do_sample": False}},
    "min_length": {"generation_kwargs": {"min_length": 4}},
    "bad_words_ids": {"generation_kwargs": {"bad_words_ids": [[5]]}},
    "top_p 0.9 with min_p 0.1": {"top_p": 0.9, "min_p": 0.1},
    "torch_compile": {"torch_compile": True},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_replayed_is_refused_by_name_before_training(name: str, folder: Path, tmp_path: Path):
    trainer = make_trainer("rloo", folder / "llama", tmp_path, **REFUSED[name])
    with pytest.raises(UserError, match=name), fastkl_scoring(trainer):
        pytest.fail("the block ran")
    assert not any(key in vars(trainer) for key in REPLACED)


def test_the_models_own_generation_config_counts(folder: Path, tmp_path: Path):
    trainer = make_trainer("grpo", folder / "llama", tmp_path)
    trainer.model.generation_config.min_p = 0.25  # TRL leaves min_p to the model
    assert sampling_of(trainer).min_p == 0.25
    trainer.model.generation_config.no_repeat_ngram_size = 3
    with pytest.raises(UserError, match="no_repeat_ngram_size"):
        sampling_of(trainer)


def test_every_field_of_generation_config_is_classified():
    assert set(vars(GenerationConfig())) - set(GENERATION_CONFIG) == set()


def test_vllm_parameters_are_read_by_vllms_table():
    args = SimpleNamespace(
        generation_kwargs={"min_tokens": 3, "stop_token_ids": [9], "allowed_token_ids": [1, 2, 9]},
        vllm_structured_outputs_regex=None,
    )
    trainer = SimpleNamespace(
        use_vllm=True, args=args, repetition_penalty=1.0, temperature=0.8, top_p=0.9, top_k=-1, min_p=None,
        eos_token_ids=[1], max_completion_length=7,
    )  # fmt: skip
    sampling = sampling_of(trainer)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.8, 0.9, 0, 0.0)
    assert (sampling.min_tokens, sampling.stop_token_ids, sampling.allowed_token_ids) == (3, (1, 9), (1, 2, 9))
    args.vllm_structured_outputs_regex = "a+"
    with pytest.raises(UserError, match="structured_outputs"):
        sampling_of(trainer)


def test_dropout_and_other_trainers_are_refused(folder: Path, tmp_path: Path):
    trainer = make_trainer("rloo", folder / "llama", tmp_path)
    trainer.model.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(UserError, match="attention_dropout is 0.1"), fastkl_scoring(trainer):
        pytest.fail("the block ran")
    with pytest.raises(UserError, match="object is none of TRL.s RLOOTrainer, GRPOTrainer"), fastkl_scoring(object()):
        pytest.fail("the block ran")

    class OwnLoss(trl.RLOOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            return super()._compute_loss(model, inputs)

    trainer.__class__ = OwnLoss
    with pytest.raises(UserError, match="_compute_loss of its own"), fastkl_scoring(trainer):
        pytest.fail("the block ran")


def test_an_unknown_head_is_refused(folder: Path, tmp_path: Path):
    trainer = make_trainer("grpo", folder / "llama", tmp_path)
    trainer.model.lm_head.register_forward_hook(lambda module, args, logits: logits * 1.5)
    with pytest.raises(UserError, match="does not know"), fastkl_scoring(trainer):
        pytest.fail("the block ran")


def test_the_recipe_of_the_docs_dumps_rollouts_that_the_doctor_reads(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()
    for title, code in re.findall(r'```python title="(\w+\.py)"\n(.*?)```', page, re.S):
        (tmp_path / title).write_text(code)
        compile(code, title, "exec")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trl, "RLOOTrainer", importlib.import_module("recorded_trl").Recorded)
    try:
        trainer = make_trainer("rloo", folder / "llama", tmp_path)
        trainer.train()
    finally:
        for name in ("record", "recorded_trl"):
            sys.modules.pop(name, None)
    found = diagnose(tmp_path / "trl.jsonl")
    assert found.num_completions == 40 and found.exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "trl.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [step for step in range(1, 6) for _ in range(8)]
    for step, kl in enumerate(metric(trainer, "kl"), start=1):
        of_step = [row for row in rows if row["step"] == step]
        nats = sum(sum(row["logprobs"]) - sum(row["ref_logprobs"]) for row in of_step)
        assert nats / sum(len(row["logprobs"]) for row in of_step) == pytest.approx(kl, abs=1e-4), step
    assert abs(metric(trainer, "kl")[-1]) > 1e-3, "the policy has moved"


def test_the_trainer_is_given_back_as_it_was_whatever_ends_the_block(folder: Path, tmp_path: Path):
    trainer = make_trainer("rloo", folder / "llama", tmp_path, max_steps=1)
    forwards = trainer.model.forward, trainer.ref_model.forward
    with pytest.raises(KeyError), fastkl_scoring(trainer):
        with pytest.raises(UserError, match="on for this trainer already"), fastkl_scoring(trainer):
            pytest.fail("the inner block ran")
        trainer.train()
        raise KeyError
    assert not any(name in vars(trainer) for name in REPLACED)
    assert (trainer.model.forward, trainer.ref_model.forward) == forwards
    trainer.train()
    assert "kl_exact" not in trainer.state.log_history[-2]
