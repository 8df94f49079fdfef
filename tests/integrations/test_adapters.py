"""The functions with verl's and OpenRLHF's signatures: the documented formula in float64 always, and those projects'
own functions where they are installed."""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest
import torch
from others import function_module
from torch import Tensor
from toy import VOCAB, toy_model

from fastkl.errors import UserError
from fastkl.integrations import openrlhf, verl

B, T, H, V = 3, 5, 8, 37


def inputs(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [B, T, H], head [V, H], labels [B, T], the last id among them."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, V, (B, T), generator=g)
    labels[0, 0] = V - 1
    return torch.randn(B, T, H, generator=g).to(dtype), torch.randn(V, H, generator=g).to(dtype), labels


def formula(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax(z)[label] and -sum softmax(z) log softmax(z), of float64 logits."""
    logp = logits.log_softmax(-1)
    return logp.gather(-1, labels[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


def factors(shape: torch.Size, seed: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g), torch.randn(shape, generator=g)


def scores_and_gradients(function, *leaves: Tensor) -> list[Tensor]:
    """Log-probs and entropy from function(*leaves), and the gradients of a random linear combination of them."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    logprobs, entropy = function(*leaves)
    a, b = factors(entropy.shape)
    (a * logprobs + b * entropy).sum().backward()
    return [logprobs.detach(), entropy.detach(), *(x.grad for x in leaves)]


def assert_equal(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y.double().view(x.shape), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("temperature", [1.0, 0.7, "per token"])
def test_verls_heads_give_the_formula_and_its_gradients(temperature):
    hidden, weight, labels = inputs()
    if temperature == "per token":
        temperature = torch.linspace(0.5, 2, B * T).view(B, T)
    tau = torch.as_tensor(temperature, dtype=torch.float64).expand(B, T)[..., None]
    exact = scores_and_gradients(lambda h, w: formula(h @ w.t() / tau, labels), hidden.double(), weight.double())
    fused = verl.FusedLinearForPPO(chunk_size=4)
    assert_equal(scores_and_gradients(lambda h, w: fused(h, w, labels, temperature), hidden, weight), exact, 2e-6)

    def flat(h, w):
        logprobs, entropy = verl.linear_cross_entropy(h, w, labels, temperature)
        assert logprobs.shape == entropy.shape == (B * T,)  # verl's Triton head flattens
        return logprobs.view(B, T), entropy.view(B, T)

    assert_equal(scores_and_gradients(flat, hidden, weight), exact, 2e-6)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_verls_reduction_is_that_of_the_log_probs_and_not_of_their_negatives(reduction):
    hidden, weight, labels = inputs()
    logprobs, entropy = verl.linear_cross_entropy(hidden, weight, labels, 1.0, reduction)
    expected, _ = formula(hidden.double() @ weight.double().t(), labels)
    assert logprobs.shape == () and entropy.shape == (B * T,)
    assert float(logprobs) == pytest.approx(float(getattr(expected, reduction)()), rel=1e-6)
    assert float(logprobs) < 0


def test_verls_head_refuses_what_it_does_not_do():
    hidden, weight, labels = inputs()
    with pytest.raises(UserError, match="tensor-parallel"):
        verl.linear_cross_entropy(hidden, weight, labels, dist_process_group=object())
    with pytest.raises(UserError, match="reduction is 'batchmean'"):
        verl.linear_cross_entropy(hidden, weight, labels, reduction="batchmean")


def test_functions_of_logits_give_the_formula_and_its_gradients():
    hidden, weight, labels = inputs()
    logits = hidden @ weight.t()
    exact = scores_and_gradients(lambda z: formula(z, labels), logits.double())
    for logprobs, entropy in (
        (lambda z: verl.logprobs_from_logits(z, labels, inplace_backward=False), verl.entropy_from_logits),
        (
            lambda z: verl.logprobs_from_logits(z, labels, inplace_backward=False),
            lambda z: verl.entropy_from_logits_with_chunking(z, 2),
        ),
        (lambda z: openrlhf.log_probs_from_logits(z, labels), openrlhf.compute_entropy),
    ):
        assert_equal(scores_and_gradients(lambda z, f=logprobs, g=entropy: (f(z), g(z)), logits), exact, 2e-6)


def test_overwritten_logits_cannot_give_a_wrong_entropy_gradient():
    hidden, weight, labels = inputs()
    logits = (hidden @ weight.t()).requires_grad_()
    twice = 1.0 * logits
    entropy = verl.entropy_from_logits(twice)
    verl.logprobs_from_logits(twice, labels).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        entropy.sum().backward()


def test_openrlhfs_logits_stay_as_they_are_under_a_temperature():
    hidden, weight, labels = inputs()
    logits = hidden @ weight.t()
    before = logits.clone()
    found = openrlhf.log_probs_from_logits(logits, labels, temperature=0.5)
    torch.testing.assert_close(found.double(), formula(before.double() / 0.5, labels)[0], rtol=2e-6, atol=2e-6)
    assert torch.equal(logits, before)


# Against the projects' own functions


def own_module(name: str, stand_ins: tuple[str, ...] = ()) -> ModuleType:
    """The project's module; skips the test where it cannot be imported."""
    try:
        return function_module(name, stand_ins)
    except ModuleNotFoundError as error:
        pytest.skip(f"{name}: {error.name} is not installed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verls_own_fused_head_gives_the_same(dtype):
    theirs = own_module("verl.utils.experimental.torch_functional").FusedLinearForPPO
    hidden, weight, labels = inputs(dtype)
    heads = verl.FusedLinearForPPO(chunk_size=4), theirs(chunk_size=4)
    found, expected = (scores_and_gradients(lambda h, w, f=f: f(h, w, labels, 0.7), hidden, weight) for f in heads)
    if dtype == torch.float32:
        assert_equal(found, expected, 1e-5)
        return
    exact = scores_and_gradients(lambda h, w: formula(h @ w.t() / 0.7, labels), hidden.double(), weight.double())
    errors = [
        [float((x.double() - y).abs().max()) for x, y in zip(results, exact, strict=True)]
        for results in (found, expected)
    ]
    for ours, peers in zip(*errors, strict=True):
        assert ours < peers < 0.2  # theirs rounds logits, and the entropy, to bfloat16
    assert max(errors[0][:2]) < 1e-5


def test_verls_own_functions_of_logits_give_the_same():
    theirs = own_module("verl.utils.torch_functional")
    hidden, weight, labels = inputs()
    logits = hidden @ weight.t()
    for module in (verl, theirs):
        assert list(inspect.signature(module.logprobs_from_logits).parameters) == [
            "logits", "labels", "inplace_backward",
        ]  # fmt: skip
    found, expected = (
        scores_and_gradients(
            lambda z, m=m: (m.logprobs_from_logits(z, labels, False), m.entropy_from_logits(z)), logits
        )
        for m in (verl, theirs)
    )
    assert_equal(found, expected, 1e-5)
    flat = logits.flatten(0, 1)
    torch.testing.assert_close(
        verl.entropy_from_logits_with_chunking(flat, 4), theirs.entropy_from_logits_with_chunking(flat, 4)
    )


def test_signature_of_verls_triton_head():
    """Its kernels need a GPU; what can be compared here is how it is called."""
    theirs = own_module("verl.utils.kernel.linear_cross_entropy").LinearCrossEntropy.forward
    parameters = list(inspect.signature(theirs).parameters.values())[1:]  # without ctx
    ours = list(inspect.signature(verl.linear_cross_entropy).parameters.values())
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in parameters]


def test_openrlhfs_own_functions_give_the_same():
    theirs = own_module("openrlhf.models.utils", stand_ins=("deepspeed",))
    hidden, weight, labels = inputs()
    logits = hidden @ weight.t()
    uncompiled_entropy = theirs.compute_entropy._torchdynamo_orig_callable
    found = scores_and_gradients(
        lambda z: (openrlhf.log_probs_from_logits(z, labels), openrlhf.compute_entropy(z)), logits
    )
    expected = scores_and_gradients(lambda z: (theirs.log_probs_from_logits(z, labels), uncompiled_entropy(z)), logits)
    assert_equal(found, expected, 1e-5)
    warm = theirs.log_probs_from_logits(logits.clone(), labels, 0.7)
    torch.testing.assert_close(openrlhf.log_probs_from_logits(logits, labels, 0.7), warm)
    base = theirs.log_probs_from_logits(1.1 * logits, labels)
    for estimator in ("k1", "k2", "k3"):
        kl = [
            theirs.compute_approx_kl(m.log_probs_from_logits(logits, labels), base, kl_estimator=estimator)
            for m in (openrlhf, theirs)
        ]
        torch.testing.assert_close(*kl)


def rollouts() -> tuple[Tensor, Tensor, Tensor]:
    """Sequences [4, 9] padded on the left, the mask of their last 5 tokens, and the attention mask."""
    g = torch.Generator().manual_seed(2)
    sequences = torch.randint(1, VOCAB, (4, 9), generator=g)
    attention, actions = torch.ones(4, 9, dtype=torch.long), torch.ones(4, 5, dtype=torch.long)
    for row, (pads, ended) in enumerate(((0, 0), (2, 1), (3, 3), (1, 0))):
        attention[row, :pads] = 0
        actions[row, 5 - ended :] = 0
        attention[row, 9 - ended :] = 0
    return sequences * attention, actions, attention


def test_action_scores_are_those_of_each_sequence_alone():
    policy, reference = toy_model(0), toy_model(1)
    sequences, actions, attention = rollouts()
    scores = openrlhf.action_scores(policy, reference, sequences, actions, attention, temperature=0.8)
    for row in range(4):
        ids = sequences[row][attention[row].bool()][None]
        n = int(actions[row].sum())
        logps = [m(ids).logits[0, -n - 1 : -1].div(0.8).log_softmax(1) for m in (policy, reference)]
        kl = (logps[0].exp() * (logps[0] - logps[1])).sum(1)
        for found, expected in (
            (scores.policy_logprobs, logps[0].gather(1, ids[0, -n:, None])[:, 0]),
            (scores.ref_logprobs, logps[1].gather(1, ids[0, -n:, None])[:, 0]),
            (scores.entropy, -(logps[0].exp() * logps[0]).sum(1)),
            (scores.kl, kl),
        ):
            torch.testing.assert_close(found[row, :n], expected, rtol=1e-9, atol=1e-9)
            assert (found[row, n:] == 0).all()


def test_openrlhfs_own_actor_gives_the_same_log_probs_and_gradients():
    theirs = own_module(
        "openrlhf.models.actor",
        stand_ins=(
            "deepspeed",
            "flash_attn",
            "flash_attn.bert_padding",
            "flash_attn.utils",
            "flash_attn.utils.distributed",
        ),
    ).Actor
    sequences, actions, attention = rollouts()
    gradients, logprobs = [], []
    for own in (True, False):
        actor = theirs(toy_model(0, torch.float32), temperature=0.8)
        actor.packing_samples = False
        if own:
            found = actor(sequences, actions, attention)
        else:
            found = openrlhf.action_scores(actor, None, sequences, actions, attention, temperature=0.8).policy_logprobs
        (factors(found.shape)[0] * found).sum().backward()
        logprobs.append(found.detach())
        gradients.append([p.grad for p in actor.parameters()])
    assert_equal([logprobs[1], *gradients[1]], [logprobs[0], *gradients[0]], 2e-5)


def test_a_sequence_of_actions_alone_is_refused():
    with pytest.raises(UserError, match="at least one token must come before the first action"):
        openrlhf.action_scores(toy_model(), None, torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5))
