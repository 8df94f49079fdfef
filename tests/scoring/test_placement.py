"""A reference that is elsewhere: which of its tensors are where, and that nothing it scores changes.

The device "meta" holds shapes and no numbers: enough to see where a tensor is sent, on any machine.
"""

from __future__ import annotations

import pytest
import torch
from toy import toy_batch, toy_config, toy_model
from toy_step import step_gradient, toy_objective

from fastkl.objective.kl_control import renew_reference
from fastkl.sampling.params import Sampling
from fastkl.scoring import backbone
from fastkl.scoring.head import head_of
from fastkl.scoring.pack import pack
from fastkl.scoring.placement import HeadCopy, fetched, moved, put_away
from fastkl.scoring.scored_model import ScoredModel
from fastkl.training.loop import update
from fastkl.training.ready_models import send_to
from fastkl.training.setup import limits_of
from fastkl.training.stopwatch import Stopwatch

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")


@pytest.fixture(autouse=True)
def packed_attention():
    backbone.register_packed_attention()


def micro_batch(device: torch.device = CPU):
    ((_, micro),) = pack(toy_batch(toy_model()), [0, 1, 2], 1 << 30, device, once=True)
    return micro


def tensors_of(model) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def test_a_reference_forwards_where_it_is_and_sends_hidden_states_and_head_to_the_policy():
    reference = ScoredModel(toy_model(1, hidden_size=48), "shared")
    send_to(reference, ELSEWHERE)
    with reference.scoring(), torch.no_grad():
        sent = reference.hidden(micro_batch())
        again = reference.hidden(micro_batch())
    assert {x.device for x in tensors_of(reference.model)} == {CPU}
    assert sent.states.device == sent.head.weight.device == ELSEWHERE
    assert sent.states.shape == (len(micro_batch().state_positions), 48) and sent.head.weight.shape == (23, 48)
    assert again.head.weight is sent.head.weight, "the head is copied once"


def test_a_batch_goes_to_where_the_reference_is_whole():
    micro = micro_batch()
    there = moved(micro, ELSEWHERE)
    kinds = {name: getattr(there, name) for name in there.__slots__}
    held = {name: x for name, x in kinds.items() if isinstance(x, torch.Tensor)}
    assert {x.device for x in held.values()} == {ELSEWHERE} and len(held) >= 10
    assert {there.tree.source.device, there.tree.place.device, there.distinct.rows.device} == {ELSEWHERE}
    assert there.distinct.copies.device == ELSEWHERE and there.tree.end.device == CPU, "attention is laid out here"
    assert there.lengths == micro.lengths and moved(micro, CPU) is micro


def test_a_reference_on_the_policys_device_is_sent_nowhere():
    reference = ScoredModel(toy_model(1), "shared")
    send_to(reference, CPU)
    assert reference.head_copy is None
    with reference.scoring(), torch.no_grad():
        assert reference.hidden(micro_batch()).head.weight is reference.model.get_output_embeddings().weight


def test_a_renewed_reference_sends_its_new_head():
    old, new = toy_model(1), toy_model(2)
    copy = HeadCopy(CPU)
    before = copy.of(head_of(old)).weight.clone()
    renew_reference(old, new, 0.5)
    expected = (before + new.get_output_embeddings().weight.detach()) / 2
    torch.testing.assert_close(copy.of(head_of(old)).weight, expected, rtol=0, atol=1e-12)


def test_a_model_that_waits_is_fetched_while_it_scores_and_is_the_same_afterwards():
    """Tied weights stay tied, since both names are of one parameter."""
    reference = ScoredModel(toy_model(1), "shared")
    put_away(reference.model)
    before = [(x.data_ptr(), x.clone()) for x in tensors_of(reference.model)]
    assert any(True for _ in reference.model.buffers()), "the rotary frequencies are to be fetched, too"
    reference.scores_on = ELSEWHERE
    with reference.scoring():
        assert {x.device for x in tensors_of(reference.model)} == {ELSEWHERE} and reference.device == ELSEWHERE
        assert len(tensors_of(reference.model)) == len(before)
        assert head_of(reference.model).weight is reference.model.get_input_embeddings().weight
    for x, (place, value) in zip(tensors_of(reference.model), before, strict=True):
        assert x.device == CPU and x.data_ptr() == place and torch.equal(x, value)


def test_a_model_is_given_back_where_its_forward_fails():
    model = toy_model(1)
    with pytest.raises(KeyError), fetched(model, ELSEWHERE):
        raise KeyError
    assert {x.device for x in tensors_of(model)} == {CPU}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("way", ["apart", "away"])
def test_the_gradient_of_a_step_is_that_with_a_reference_beside_the_policy(device, way):
    """In float64. On a CPU the copies are of the same kind; on a GPU the reference is on the CPU meanwhile."""
    config = toy_config(kl_estimator="exact", kl_placement="loss")
    policy, reference = toy_model(0), toy_model(1, hidden_size=48).requires_grad_(False)
    batch = toy_batch(policy)
    expected, _ = step_gradient(policy, reference, batch, config)
    policy, scored = policy.to(device), ScoredModel(reference, "shared")
    if way == "apart":
        scored.head_copy = HeadCopy(policy.device)
    else:
        put_away(reference)
        scored.scores_on = policy.device
    gradients = {}

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            gradients.update((name, p.grad.cpu()) for name, p in policy.named_parameters())

    optimizer, trained = Recorder(policy.parameters(), lr=1.0), ScoredModel(policy)
    limits = limits_of(config, trained)
    update(trained, scored, optimizer, batch, toy_objective(config), limits, Stopwatch(policy.device), step=1)
    assert {x.device for x in tensors_of(reference)} == {CPU}
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=0, atol=1e-10)
    with scored.scoring(), torch.no_grad():
        micro = micro_batch(policy.device)
        assert trained(micro, scored.hidden(micro), sampling=Sampling()).scores.kl.device == policy.device
