"""The measured bytes per token are those that a process takes, and micro-batches follow them."""

from __future__ import annotations

import gc
import weakref

import commands
import pytest
from toy import toy_model
from transformers import GPT2Config, GPT2LMHeadModel

from fastkl.scoring import backbone, memory
from fastkl.scoring.scored_model import ScoredModel

PEAK = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from fastkl.scoring import backbone, memory
from fastkl.scoring.scored_model import ScoredModel
torch.set_num_threads(1)
backbone.register_packed_attention()
config = LlamaConfig(vocab_size=101, hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4)
policy = ScoredModel(LlamaForCausalLM(config).eval(), "shared")
measured = memory.activation_bytes_per_token(policy)
def peak():
    # not ru_maxrss, which begins at the parent's
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
with policy.scoring():
    policy.hidden(backbone.probe_of(policy.model, (64,)))
    before = peak()
    states = policy.hidden(backbone.probe_of(policy.model, (512,) * 8)).states
print(measured * (512 * 8), peak() - before)
"""


@pytest.mark.slow
def test_a_forward_takes_the_memory_that_was_measured_on_short_ones():
    done = commands.run(script=PEAK)
    assert done.returncode == 0, done.stderr
    expected, taken = map(int, done.stdout.split())
    assert expected > 200 << 20
    assert 0.8 * expected < taken < 1.4 * expected  # longer sequences have their keys copied for more blocks


@pytest.fixture
def scored():
    backbone.register_packed_attention()
    return lambda **options: ScoredModel(toy_model(**options), "shared")


def test_twice_the_layers_keep_twice_as_much_and_checkpointing_keeps_little(scored):
    shallow, deep, deeper = (
        memory.activation_bytes_per_token(scored(num_hidden_layers=layers)) for layers in (2, 4, 6)
    )
    assert deeper - deep == deep - shallow > 0
    frugal = scored(num_hidden_layers=6)
    frugal.model.gradient_checkpointing_enable()
    assert memory.activation_bytes_per_token(frugal) < deeper / 4


def test_measuring_leaves_no_graph_behind(scored):
    policy, witnesses = scored(num_hidden_layers=2), []

    def bear_witness(module, arguments, output):
        class Witness:
            def __call__(self, gradient):
                return None

        witness = Witness()
        output.register_hook(witness)  # held by the graph
        witnesses.append(weakref.ref(witness))

    for layer in policy.model.model.layers:
        layer.mlp.register_forward_hook(bear_witness)
    memory.activation_bytes_per_token(policy)
    gc.collect()
    assert len(witnesses) == 4 and all(witness() is None for witness in witnesses)


def test_micro_batches_hold_what_the_budget_holds(scored, monkeypatch):
    policy = scored()
    each = memory.activation_bytes_per_token(policy)
    assert memory.micro_batch_tokens(policy) == memory.MOST_TOKENS["cpu"]
    monkeypatch.setattr(memory, "CPU_BYTES", 10 * each)
    assert memory.micro_batch_tokens(policy) == 10
    monkeypatch.setattr(memory, "CPU_BYTES", each // 2)
    assert memory.micro_batch_tokens(policy) == 1


def test_a_model_with_a_short_context_is_measured_within_it():
    """Its table of positions ends there."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=23, n_embd=16, n_layer=2, n_head=2, n_positions=40)).eval()
    backbone.register_packed_attention()
    short = memory.activation_bytes_per_token(ScoredModel(model, "packed"))
    long = memory.activation_bytes_per_token(
        ScoredModel(GPT2LMHeadModel(GPT2Config(vocab_size=23, n_embd=16, n_layer=2, n_head=2)).eval(), "packed")
    )
    assert 0.5 * long < short < 2 * long
