"""The operators inside torch.compile, autocast, DistributedDataParallel and FSDP2, on the CPU: the numbers are those of
plain calls, or of one process on the whole batch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import commands
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastkl import TokenCoefficients, TokenScores, linear_token_loss, linear_token_scores, token_scores

V, H = 37, 8
WORKER = Path(__file__).with_name("two_processes.py")
SHARDED = {  # FSDP2 shows the operator a DTensor here: the head is a unit of its own, or was freed after the forward
    "shard_layer_and_head-scores-inside", "shard_layer_and_head-fused-inside", "shard_layer_and_head-scores-outside",
    "shard_root_and_free-scores-outside-tied", "shard_root_and_free-fused-outside",
}  # fmt: skip
WHOLE = {
    "DistributedDataParallel-scores-inside", "DistributedDataParallel-fused-inside-tied",
    "DistributedDataParallel-of_logits-inside", "DistributedDataParallel-scores-outside",
    "DistributedDataParallel-fused-outside-tied", "shard_root-scores-inside", "shard_root-fused-inside-tied",
    "shard_root-of_logits-inside", "shard_root-scores-outside", "shard_layer-fused-outside-tied",
    "shard_layer_and_head-of_logits-inside", "shard_root_and_free-scores-inside",
}  # fmt: skip


# Several processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> dict:
    """What two gloo processes found, all cases in one start."""
    folder = tmp_path_factory.mktemp("gloo")
    output = folder / "results.json"
    workers = [
        commands.Running(str(rank), str(folder / "store"), str(output), script=WORKER.read_text()) for rank in range(2)
    ]
    ended = [worker.done() for worker in workers]
    assert [worker.returncode for worker in ended] == [0, 0], "\n".join(worker.stderr[-2000:] for worker in ended)
    return json.loads(output.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(SHARDED | WHOLE))
def test_gradients_of_two_processes_equal_those_of_one_on_the_whole_batch(two_processes, case):
    found = two_processes[case]
    assert found["difference"] < 1e-13
    assert found["head_was_sharded"] == (case in SHARDED)


@pytest.mark.slow
def test_a_sharded_head_shared_with_the_reference_is_scored_like_a_whole_one(two_processes):
    assert two_processes["shared-frozen-head"] < 1e-13


@pytest.mark.slow
def test_a_process_without_rows_takes_part(two_processes):
    assert two_processes["no-rows"] < 1e-13


@pytest.mark.slow
def test_sharded_hidden_states_are_refused_in_a_sentence(two_processes):
    assert two_processes["refusal"].startswith("policy_hidden is a DTensor")
    assert two_processes["refusal"].endswith("pass policy_hidden.to_local().")


def test_wrappers_find_the_tensors_of_scores_that_a_module_returns():
    scores = TokenScores(torch.ones(2), entropy=torch.zeros(2))
    leaves, spec = pytree.tree_flatten(scores)
    names = [field.name for field in dataclasses.fields(TokenScores)]
    present = [name for name, leaf in zip(names, leaves, strict=True) if leaf is not None]
    assert present == ["policy_logprobs", "entropy"]
    doubled = pytree.tree_map(lambda x: None if x is None else 2 * x, scores)
    assert isinstance(pytree.tree_unflatten(leaves, spec), TokenScores)
    assert doubled.policy_logprobs.tolist() == [2, 2]


# torch.compile


def heads(num_rows: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Leaves hidden [N, H] and weight [V, H]; reference hidden and weight; targets."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight, ref_hidden, ref_weight = (torch.randn(n, H, generator=g) for n in (num_rows, V, num_rows, V))
    targets = torch.randint(0, V, (num_rows,), generator=g)
    return hidden.requires_grad_(), weight.requires_grad_(), ref_hidden, ref_weight, targets


def step_token_scores(hidden, weight, ref_hidden, ref_weight, targets):
    scores = token_scores((hidden.sin() @ weight.t()), ref_hidden @ ref_weight.t(), targets, temperature=0.7)
    return (targets * scores.policy_logprobs.exp() + 0.1 * scores.kl).sum()


def step_linear_token_scores(hidden, weight, ref_hidden, ref_weight, targets):
    scores = linear_token_scores(hidden.sin(), weight.tanh(), ref_hidden, ref_weight, targets, chunk_tokens=4)
    return (targets * scores.policy_logprobs.exp() + 0.1 * scores.kl).sum()


def step_linear_token_loss(hidden, weight, ref_hidden, ref_weight, targets):
    def coefficients(rows, scores):
        return TokenCoefficients(policy_logprobs=scores.kl, kl=torch.ones_like(scores.kl))

    loss, scores = linear_token_loss(hidden.sin(), weight.tanh(), ref_hidden, ref_weight, targets, coefficients)
    return loss.cos() + scores.kl.sum()


STEPS = (step_token_scores, step_linear_token_scores, step_linear_token_loss)


def with_gradients(step, num_rows: int, seed: int) -> list[Tensor]:
    inputs = heads(num_rows, seed)
    value = step(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs[:2])]


@pytest.fixture
def graphs():
    """A backend that runs what it is given, and the list of the graphs that torch.compile made."""
    torch.compiler.reset()
    made = []

    def backend(graph, example_inputs):
        made.append(graph)
        return graph.forward

    yield backend, made
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_compiled_step_equals_the_plain_one_and_is_not_compiled_again(graphs, step):
    backend, made = graphs
    compiled = torch.compile(step, backend=backend)
    counts = []
    for i, num_rows in enumerate((11, 11, 13, 11, 16, 9, 21)):
        for found, expected in zip(
            with_gradients(compiled, num_rows, i), with_gradients(step, num_rows, i), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        counts.append(len(made))
    assert counts[0] == 2  # before the operator and after it: one clean break
    assert counts[2:] == [counts[2]] * 5  # the second number of rows made them dynamic; nothing after that


@pytest.mark.slow
def test_nothing_of_the_operators_gets_into_a_graph(graphs):
    backend, made = graphs
    with_gradients(torch.compile(step_linear_token_scores, backend=backend), 11, 0)
    called = {getattr(n.target, "__name__", n.target) for g in made for n in g.graph.nodes if n.op.startswith("call")}
    assert called == {"sin", "tanh", "exp", "mul", "add", "sum"}  # of the step itself


@pytest.mark.slow
def test_one_graph_without_breaks_is_refused_with_the_reason(graphs):
    compiled = torch.compile(step_linear_token_scores, backend=graphs[0], fullgraph=True)
    with pytest.raises(Exception, match="fastkl's scoring operators loop over chunks of rows"):
        compiled(*heads(11))


# autocast


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(H, H), nn.Linear(H, V, bias=False)
        self.head.weight.data.mul_(20)  # logits in the tens, which bfloat16 rounds by hundredths

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("operator", [token_scores, linear_token_scores, linear_token_loss])
def test_autocast_changes_the_hidden_states_but_not_the_arithmetic_of_the_scores(operator):
    """Under autocast the backbone gives bfloat16; scores and gradients are those of a float64 computation from these
    very hidden states (or logits), where an autocast head would round every logit."""
    g = torch.Generator().manual_seed(3)
    x, targets = torch.randn(19, H, generator=g), torch.randint(0, V, (19,), generator=g)
    model = Backbone()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(x)
        rounded = model.head(hidden)
        assert hidden.dtype == rounded.dtype == torch.bfloat16
        leaf = (rounded if operator is token_scores else hidden).detach().requires_grad_()
        if operator is token_scores:
            scores = token_scores(leaf, None, targets)
        else:
            scores = linear_token_scores(leaf, model.head.weight, None, None, targets)
        loss = scores.policy_logprobs.sum()
        if operator is linear_token_loss:
            factors = TokenCoefficients(policy_logprobs=torch.ones(19))
            loss, scores = linear_token_loss(leaf, model.head.weight, None, None, targets, factors)
        loss.backward()
    exact, weight = (x.detach().double().requires_grad_() for x in (leaf, model.head.weight))
    logits = exact if operator is token_scores else exact @ weight.t()
    logprobs = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    logprobs.sum().backward()
    assert scores.policy_logprobs.dtype == scores.entropy.dtype == torch.float32
    assert float((scores.policy_logprobs.detach() - logprobs.detach()).abs().max()) < 1e-4
    assert leaf.grad.dtype == torch.bfloat16
    assert float((leaf.grad - exact.grad).abs().max()) <= 2.0**-8 * float(exact.grad.abs().max())
    if operator is not token_scores:
        assert float((model.head.weight.grad - weight.grad).abs().max()) < 1e-5
        by_autocast = rounded.detach().double().log_softmax(1).gather(1, targets[:, None])[:, 0]
        assert float((by_autocast - logprobs.detach()).abs().max()) > 1e-2  # what the operators spare the caller
