"""The table of costs against what torch counts while the operators run."""

from __future__ import annotations

import pytest
import torch
from matrix import make_case
from torch.utils.flop_counter import FlopCounterMode

from fastkl.kernels import operators
from fastkl.kernels.costs import cost


@pytest.mark.parametrize("frozen", [False, True])
def test_the_loss_takes_the_products_of_the_table_and_no_more(frozen):
    case = make_case(num_rows=64, hidden=8, vocab=37).to(torch.float32)
    case.policy_hidden.requires_grad_()
    case.policy_weight.requires_grad_(not frozen)
    with FlopCounterMode(display=False) as counter:
        loss, _ = operators.linear_token_loss(*case.args(), operators.TokenCoefficients(kl=torch.ones(64)))
        loss.backward()
    passes = ["head", "head", "hidden gradient", *([] if frozen else ["head gradient"])]
    assert counter.get_total_flops() == cost(*passes).products * 2 * 64 * 8 * 37


def test_scores_take_one_product_per_model():
    case = make_case(num_rows=64, hidden=8, vocab=37).to(torch.float32)
    with FlopCounterMode(display=False) as counter:
        operators.linear_token_scores(*case.args())
    assert counter.get_total_flops() == cost("head", "head").products * 2 * 64 * 8 * 37
