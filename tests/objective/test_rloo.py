"""RLOO's parts by hand; its expected gradient is in test_objective.py."""

from __future__ import annotations

import torch

from fastkl.objective.advantages import ADVANTAGES
from fastkl.objective.sequences import sequence_sums


def test_sequence_sums_equal_a_loop_and_skip_empty_sequences():
    values = torch.randn(9, dtype=torch.float64, requires_grad=True)
    cu = torch.tensor([0, 4, 4, 5, 9], dtype=torch.int32)
    sums = sequence_sums(values, cu)
    assert torch.equal(sums[1], torch.zeros((), dtype=torch.float64))
    for i in range(4):
        torch.testing.assert_close(sums[i], values[cu[i] : cu[i + 1]].sum(), rtol=0, atol=1e-15)
    (grad,) = torch.autograd.grad((sums * torch.tensor([1.0, 2, 3, 4])).sum(), values)
    assert grad.tolist() == [1, 1, 1, 1, 3, 4, 4, 4, 4]


def test_leave_one_out_advantage_is_reward_minus_mean_of_the_other_valid_samples():
    rewards = torch.tensor([[1.0, 4.0, 7.0, 100.0], [5.0, 0.0, 0.0, 0.0]])
    valid = torch.tensor([[True, True, True, False], [True, False, False, False]])
    expected = [[1 - 5.5, 4 - 4.0, 7 - 2.5, 0.0], [0.0, 0.0, 0.0, 0.0]]
    assert ADVANTAGES["rloo"].function(rewards, valid).tolist() == expected
    assert ADVANTAGES["none"].function(rewards, valid).tolist() == [[1.0, 4.0, 7.0, 0.0], [5.0, 0.0, 0.0, 0.0]]
