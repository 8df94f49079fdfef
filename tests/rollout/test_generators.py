"""Both generators: the log-probs they record are the trainer's, samples follow the model, seeds decide them alone."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from toy import STOP, VOCAB, ToyTokenizer, draw, prompt, toy_model, toy_rollouts
from transformers import AutoConfig

from fastkl.evaluation.evaluate import sampling_as
from fastkl.rollout.agreement import AGREEMENT_NATS, StaleEngineError, check_agreement
from fastkl.rollout.generator import choose_generator
from fastkl.rollout.requests import sample_seed
from fastkl.rollout.transformers import TransformersGenerator, sample
from fastkl.rollout.vllm import VllmGenerator, head_dims, obstacle_on_cpu
from fastkl.rollout.weight_sync import _repack_tied_head, empty_cache
from fastkl.sampling.params import Sampling
from fastkl.types import Prompt

PROMPTS = (prompt(1, 2, 3), prompt(4), prompt(5, 6, 7, 8, 9))


def policy_logprobs(model, prompts, completions, temperature: float = 1.0) -> torch.Tensor:
    """One sequence at a time, in the model's dtype."""
    values = []
    for p, group in zip(prompts, completions, strict=True):
        for c in group:
            logits = model(input_ids=torch.tensor([p.token_ids + c.token_ids]), use_cache=False).logits[0].detach()
            table = (logits / temperature).log_softmax(-1)[len(p.token_ids) - 1 : -1]
            values.append(table.gather(1, torch.tensor(c.token_ids)[:, None])[:, 0])
    return torch.cat(values)


def recorded_logprobs(completions) -> torch.Tensor:
    return torch.tensor([value for group in completions for c in group for value in c.logprobs])


def gaps(model, prompts, completions, temperature: float = 1.0) -> torch.Tensor:
    return (policy_logprobs(model, prompts, completions, temperature) - recorded_logprobs(completions)).abs()


def token_ids(completions) -> list[list[tuple[int, ...]]]:
    return [[c.token_ids for c in group] for group in completions]


# ------------------------------------------------------------------------------------------------------- transformers


def test_transformers_generator_records_the_models_own_logprobs():
    model = toy_model()
    for temperature in (1.0, 0.6):
        sampling = Sampling(temperature, 8, stop_token_ids=(STOP,))
        generator = TransformersGenerator(model, ToyTokenizer(), sampling, max_rows=8)
        completions = draw(generator, PROMPTS, 4, seed=1, step=1)
        assert gaps(model, PROMPTS, completions, temperature).max() < 1e-5


@pytest.mark.slow
def test_transformers_generator_under_bfloat16_records_the_log_probs_of_a_bfloat16_trunk_and_a_float32_head():
    model = toy_model(dtype=torch.float32)
    sampling = Sampling(1.0, 8, stop_token_ids=(STOP,))
    generator = TransformersGenerator(model, ToyTokenizer(), sampling, dtype=torch.bfloat16)
    completions = draw(generator, PROMPTS, 32, seed=1, step=1)

    def mean_gap(bfloat16: bool) -> float:
        values = []
        for p, group in zip(PROMPTS, completions, strict=True):
            for c in group:
                with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
                    hidden = model.model(torch.tensor([p.token_ids + c.token_ids]), use_cache=False).last_hidden_state
                logits = hidden[0].float() @ model.lm_head.weight.detach().T
                table = logits.log_softmax(-1)[len(p.token_ids) - 1 : -1]
                values.append(table.gather(1, torch.tensor(c.token_ids)[:, None])[:, 0])
        return float((torch.cat(values) - recorded_logprobs(completions)).abs().mean())

    assert mean_gap(bfloat16=True) < 0.5 * mean_gap(bfloat16=False)


def test_completions_end_at_the_stop_token_or_at_the_limit():
    completions = toy_rollouts(toy_model(seed=3), PROMPTS, 16, max_new_tokens=10)
    reasons = set()
    decode = ToyTokenizer().decode
    for p, c in ((p, c) for p, group in zip(PROMPTS, completions, strict=True) for c in group):
        reasons.add(c.finish_reason)
        assert STOP not in c.token_ids[:-1]
        assert (c.token_ids[-1] == STOP) == (c.finish_reason == "stop")
        assert c.finish_reason == "stop" or len(c.token_ids) == 10
        assert len(c.logprobs) == len(c.token_ids)
        assert decode(p.token_ids) + c.text == decode(p.token_ids + c.token_ids)
    assert reasons == {"stop", "length"}


def test_a_sample_depends_on_its_own_seed_alone():
    """Not on the other prompts, the other samples, the decoding batch, or torch's global generator."""
    model = toy_model()
    torch.manual_seed(1)
    many = toy_rollouts(model, PROMPTS, 6)
    torch.manual_seed(2)
    assert token_ids(toy_rollouts(model, PROMPTS[:1], 3))[0] == token_ids(many)[0][:3]
    narrow = TransformersGenerator(model, ToyTokenizer(), Sampling(1.0, 6, stop_token_ids=(STOP,)), max_rows=6)
    assert token_ids(draw(narrow, PROMPTS, 6, seed=7, step=1)) == token_ids(many)
    assert token_ids(toy_rollouts(model, PROMPTS, 6, step=2)) != token_ids(many)


def test_seeds_of_neighbouring_samples_are_all_different():
    seeds = {sample_seed(s, t, b, k) for s in range(3) for t in range(10) for b in range(8) for k in range(8)}
    assert len(seeds) == 3 * 10 * 8 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_sampled_tokens_follow_the_tempered_softmax():
    """Chi-square over 40,000 draws; the 1e-4 quantile of 22 degrees of freedom is 55."""
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)) * 2
    uniforms = torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens, logprobs = sample(logits.expand(40_000, -1), 0.8, uniforms)
    expected = (logits.double() / 0.8).softmax(-1)
    counts = torch.bincount(tokens, minlength=VOCAB)
    chi_square = ((counts - 40_000 * expected) ** 2 / (40_000 * expected)).sum()
    assert chi_square < 55
    torch.testing.assert_close(logprobs.double(), expected.log()[tokens], rtol=0, atol=1e-5)


def test_sampling_never_draws_an_impossible_token_at_the_ends_of_the_unit_interval():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, -1)
    tokens, _ = sample(logits, 1.0, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert tokens.tolist() == [1, 2]


# --------------------------------------------------------------------------------------------------------------- vLLM


def tied_model(seed: int = 0, **options):
    """Large enough for vLLM's CPU kernels (head size 32), with tied embeddings, where weight sync has its trap."""
    return toy_model(
        seed, torch.float32, hidden_size=64, num_attention_heads=2, num_key_value_heads=2, initializer_range=0.1,
        **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    tied_model(max_position_embeddings=1024).save_pretrained(folder)
    generator = VllmGenerator(
        str(folder), ToyTokenizer(), Sampling(1.0, 12, stop_token_ids=(STOP,)), dtype="float32", max_model_len=512,
        gpu_memory_utilization=0.2, log=folder / "engine.log",
    )  # fmt: skip
    yield generator
    generator.close()


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_records_the_trainers_logprobs_before_and_after_a_sync(engine):
    for seed in (0, 1, 2):
        model = tied_model(seed)
        engine.sync(model)
        completions = draw(engine, PROMPTS, 8, seed=3, step=seed)
        worst = gaps(model, PROMPTS, completions)
        assert worst.max() < 1e-4
        check_agreement(float(worst.mean()), float(worst.max()), AGREEMENT_NATS[torch.float32], step=seed + 1)


@pytest.mark.vllm
def test_vllm_without_the_tied_heads_cure_is_stale_and_is_caught(engine):
    """The control: the plain reload leaves the packed head behind; `check_agreement` must stop the run."""
    engine.sync(tied_model(0))
    moved = tied_model(0)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    weights = iter(moved.named_parameters())
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    stale = gaps(moved, PROMPTS, draw(engine, PROMPTS, 8, seed=3, step=1))
    assert stale.max() > 1e-3, "the trap has gone: vLLM renews the packed head by itself now"
    with pytest.raises(StaleEngineError):
        check_agreement(float(stale.mean()), float(stale.max()), AGREEMENT_NATS[torch.float32], step=2)
    engine.llm.apply_model(_repack_tied_head)
    assert gaps(moved, PROMPTS, draw(engine, PROMPTS, 8, seed=3, step=1)).max() < 1e-4


def long_prompt(engine, seed: int, more: int = 3) -> Prompt:
    """Two whole blocks of the prefix cache and some tokens more."""
    length = 2 * engine.llm.llm_engine.vllm_config.cache_config.block_size + more
    return prompt(*torch.randint(STOP, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


@pytest.fixture
def cached_tokens(engine, monkeypatch):
    """How many prompt tokens each request of the last call took from the cache."""
    found: list[int] = []
    generate = engine.llm.generate

    def looked_at(*arguments, **options):
        outputs = generate(*arguments, **options)
        found[:] = [out.num_cached_tokens for out in outputs]
        return outputs

    monkeypatch.setattr(engine.llm, "generate", looked_at)
    return found


@pytest.mark.vllm
@pytest.mark.slow
def test_a_cached_prompt_gives_the_trainers_logprobs_over_three_pushes(engine, cached_tokens):
    prompts = (long_prompt(engine, 1), long_prompt(engine, 2))
    block = engine.llm.llm_engine.vllm_config.cache_config.block_size
    for step in range(3):
        model = tied_model(step, max_position_embeddings=1024)
        engine.sync(model)
        worst = gaps(model, prompts, draw(engine, prompts, 4, seed=3, step=step))
        assert cached_tokens == [0, 2 * block, 2 * block, 2 * block] * 2  # each prompt was computed once, and anew
        assert worst.max() < 1e-4


@pytest.mark.vllm
def test_old_keys_and_values_that_outlive_a_push_are_caught(engine, monkeypatch):
    """The control: without the reset the completions are those of a mixture of two models."""
    prompts = (long_prompt(engine, 1),)
    engine.sync(tied_model(0, max_position_embeddings=1024))
    draw(engine, prompts, 2, seed=3, step=1)
    model = tied_model(1, max_position_embeddings=1024)
    with monkeypatch.context() as patch:
        patch.setattr(engine.llm, "reset_prefix_cache", lambda: True)
        engine.sync(model)
        stale = gaps(model, prompts, draw(engine, prompts, 2, seed=3, step=2))
    assert stale.max() > 1e-3
    with pytest.raises(StaleEngineError):
        check_agreement(float(stale.mean()), float(stale.max()), AGREEMENT_NATS[torch.float32], step=2)


@pytest.mark.vllm
def test_a_vllm_completion_is_the_same_to_the_last_bit_whatever_was_drawn_before(engine, cached_tokens):
    """So a run with evaluation is the run without."""
    engine.sync(tied_model(0, max_position_embeddings=1024))
    prompts = (long_prompt(engine, 1), long_prompt(engine, 1, more=9))
    alone = draw(engine, prompts, 3, seed=7, step=1)
    draw(engine, prompts[1:], 2, seed=8, step=1)
    after = draw(engine, prompts, 3, seed=7, step=1)
    assert cached_tokens[0] == 0
    assert after == alone


def test_an_engine_that_keeps_its_cache_stops_the_run():
    with pytest.raises(StaleEngineError, match="could not empty its prefix cache"):
        empty_cache(SimpleNamespace(reset_prefix_cache=lambda: False))


@pytest.mark.vllm
def test_a_vllm_sample_depends_on_its_own_seed_alone(engine):
    engine.sync(tied_model(0))
    many = draw(engine, PROMPTS, 6, seed=7, step=1)
    torch.manual_seed(99)
    assert token_ids(draw(engine, PROMPTS[:1], 3, seed=7, step=1))[0] == token_ids(many)[0][:3]
    long = [c.token_ids for group in many for c in group if len(c.token_ids) > 3]
    assert len(set(long)) == len(long) >= 8
    assert token_ids(draw(engine, PROMPTS, 6, seed=8, step=1)) != token_ids(many)


@pytest.mark.vllm
def test_vllm_takes_the_likeliest_tokens_at_temperature_0_as_the_other_generator_does(engine):
    policy = tied_model(0)
    engine.sync(policy)
    found = []
    for generator in (engine, TransformersGenerator(policy, ToyTokenizer(), engine.sampling)):
        with sampling_as(generator, replace(generator.sampling, temperature=0.0)):
            found.append(token_ids(draw(generator, PROMPTS, 2, seed=1, step=1)))
    assert found[0] == found[1] and len({ids for group in found[0] for ids in group}) == len(PROMPTS)


@pytest.mark.vllm
def test_a_run_does_not_wait_until_ranks_that_nobody_reads_are_compiled(engine):
    from vllm.v1.sample import sampler

    assert not hasattr(sampler.batched_count_greater_than, "_torchdynamo_orig_callable")


@pytest.mark.vllm
def test_vllm_completions_end_at_the_stop_token_or_at_the_limit(engine):
    engine.sync(tied_model(0))
    flat = [c for group in draw(engine, PROMPTS, 32, seed=1, step=1) for c in group]
    assert {c.finish_reason for c in flat} == {"stop", "length"}
    for c in flat:
        assert STOP not in c.token_ids[:-1]
        assert (c.token_ids[-1] == STOP) == (c.finish_reason == "stop")
        assert c.finish_reason == "stop" or len(c.token_ids) == 12


@pytest.mark.vllm
@pytest.mark.slow
def test_auto_takes_vllm_where_it_can_run_the_model_and_says_why_not_elsewhere():
    cpu = torch.device("cpu")
    suitable, unsuitable = tied_model().config, toy_model().config
    suitable.architectures = unsuitable.architectures = ["LlamaForCausalLM"]
    assert choose_generator("auto", suitable, cpu)[0] == "vllm"
    name, why = choose_generator("auto", unsuitable, cpu)
    assert name == "transformers"
    assert "head sizes" in why
    with pytest.raises(Exception, match="asked for, but vLLM's CPU attention"):
        choose_generator("vllm", unsuitable, cpu)
    suitable.architectures = ["GPTNeoForCausalLM"]
    assert "no implementation of GPTNeoForCausalLM" in choose_generator("auto", suitable, cpu)[1]


@pytest.mark.vllm
def test_head_sizes_that_differ_between_layers_are_all_read():
    """Gemma-4's configuration refuses to name one."""
    text = AutoConfig.for_model("gemma4_text")
    assert head_dims(text) == {layer.head_dim for layer in text.per_layer_config} == {256, 512}
    assert obstacle_on_cpu(text) is None
