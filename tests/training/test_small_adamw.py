"""AdamW in little memory against torch's in float64, and its roundings against their means."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from fastkl.training import small_adamw
from fastkl.training.small_adamw import CHUNK, SmallAdamW, compressed, expanded, rounded_at_random

SHAPES = ((130, 77), (3, 5000), (40,))  # blocks that do not fill up, and a small tensor


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=random).to(dtype)) for shape in SHAPES]


def gradients(step: int) -> list[torch.Tensor]:
    """Of magnitudes that differ by two decades within a block."""
    random = torch.Generator().manual_seed(step)
    return [
        torch.randn(shape, generator=random)
        * 10 ** (-2 * torch.rand(shape, generator=torch.Generator().manual_seed(9)))
        for shape in SHAPES
    ]


def stepped(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> list[torch.Tensor]:
    for step in steps:
        for parameter, gradient in zip(params, gradients(step), strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return [parameter.detach().clone() for parameter in params]


def reference(steps: int, **options) -> list[torch.Tensor]:
    """torch's AdamW in float64."""
    params = parameters(torch.float64)
    return stepped(params, torch.optim.AdamW(params, **options), range(steps))


def relative(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """|found - wanted| over |wanted - start|: the error as a share of the way."""
    ways = [w - start.detach().double() for w, start in zip(wanted, parameters(), strict=True)]
    errors = [f.double() - w for f, w in zip(found, wanted, strict=True)]
    return float(torch.cat([e.flatten() for e in errors]).norm() / torch.cat([w.flatten() for w in ways]).norm())


def test_with_float32_moments_it_is_torchs_adamw():
    options = {"lr": 1e-2, "weight_decay": 0.1}
    params = parameters()
    found = stepped(params, SmallAdamW(params, **options), range(20))
    torchs = parameters()
    theirs = stepped(torchs, torch.optim.AdamW(torchs, **options), range(20))
    wanted = reference(20, **options)
    assert relative(found, wanted) <= 3 * relative(theirs, wanted) + 1e-7


@pytest.mark.slow
def test_eight_bits_go_the_same_way_and_stay_by_it():
    params = parameters()
    found = stepped(params, SmallAdamW(params, lr=1e-2, eight_bit=True), range(60))
    assert relative(found, reference(60, lr=1e-2)) < 0.1


def test_eight_bits_take_two_bytes_per_number_and_small_tensors_keep_float32():
    params = parameters()
    optimizer = SmallAdamW(params, lr=1e-2, eight_bit=True)
    stepped(params, optimizer, range(1))
    large, _, small = (optimizer.state[p] for p in params)
    taken = sum(t.numel() * t.element_size() for name, t in large.items() if name != "step")
    assert taken / params[0].numel() < 2.05
    assert {t.dtype for t in small.values()} == {torch.float32}


@pytest.mark.slow
def test_the_second_moment_decays_where_gradients_get_smaller():
    """Rounding to the nearest code would keep it where it was: 0.9995 of a root is nearest to itself."""
    params = [nn.Parameter(torch.zeros(1, 4096))]
    optimizer = SmallAdamW(params, lr=0.0, eight_bit=True)
    size = torch.linspace(0.01, 1.0, 4096)[None]
    for step in range(1500):
        params[0].grad = size * (1.0 if step < 10 else 0.01)
        optimizer.step()
    state = optimizer.state[params[0]]
    root = expanded(state["exp_avg_sq"].view(-1), state["exp_avg_sq_scale"])
    v = 0.001 * 0.999**1490 * sum(0.999**i for i in range(10)) + 1e-4 * (1 - 0.999**1490)
    assert float((root / (size[0] * v**0.5)).mean()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_codes_are_right_on_average_and_as_near_as_their_neighbours(dtype):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(512, generator=random) * 10 ** (-3 * torch.rand(512, generator=random))
    x = x if dtype.is_signed else x.abs()
    drawn = []
    for _ in range(1500):
        codes, scale = compressed(x, torch.rand(512, generator=random), dtype)
        assert codes.dtype == dtype and scale.shape == (2,)
        drawn.append(expanded(codes, scale).double())
    values = torch.stack(drawn)
    error = values.std(dim=0) / 1500**0.5
    shown = x.abs() > 1e-4 * x.abs().max()
    assert ((values.mean(dim=0) - x).abs() <= 4.5 * error + 1e-6 * x.abs())[shown].all()
    largest, levels = scale.repeat_interleave(256).double(), small_adamw.LEVELS[dtype]
    code = (x.abs().double() / largest) ** (1 / 3) * levels
    spacing = largest * 3 * (code + 1) ** 2 / levels**3  # at least (c + 1)^3 - c^3
    assert ((values - x).abs() <= spacing)[:, shown].all()


def test_bfloat16_is_rounded_to_a_neighbour_and_right_on_average():
    random = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(200, generator=random), torch.tensor([0.0, 1.0, -2.0, 1e-30, 3e38])])
    drawn = torch.stack([rounded_at_random(x, torch.rand(len(x), generator=random)) for _ in range(4000)]).double()
    ulp = (x.bfloat16().float().abs() * 2**-7).double()
    assert ((drawn - x).abs() <= ulp).all()
    error = drawn.std(dim=0) / 4000**0.5
    assert ((drawn.mean(dim=0) - x).abs() <= 4.5 * error + 1e-12 * x.abs()).all()
    assert torch.equal(drawn[0][200:203], x[200:203].double())


@pytest.mark.slow
def test_updates_below_half_a_unit_in_the_last_place_add_up_in_bfloat16():
    params = [nn.Parameter(torch.ones(100, 100, dtype=torch.bfloat16))]
    optimizer = SmallAdamW(params, lr=1e-4, eight_bit=True)
    for _ in range(200):
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
    assert float(params[0].detach().float().mean()) == pytest.approx(
        1 - 200 * 1e-4, abs=1e-3
    )  # half an ulp below 1 is 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_on_from_its_state_bit_for_bit(dtype):
    options = {"lr": 1e-2, "eight_bit": True, "seed": 3}
    whole = parameters(dtype)
    wanted = stepped(whole, SmallAdamW(whole, **options), range(6))
    first = parameters(dtype)
    optimizer = SmallAdamW(first, **options)
    stepped(first, optimizer, range(3))
    second = SmallAdamW(first, **options)
    for parameter in first:
        second.state[parameter] = deepcopy(optimizer.state[parameter])
    torch.manual_seed(99)
    found = stepped(first, second, range(3, 6))
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))
    other = parameters(dtype)
    assert not torch.equal(stepped(other, SmallAdamW(other, **options | {"seed": 4}), range(6))[0], wanted[0])


def test_a_tensor_of_several_chunks_is_updated_like_one(monkeypatch):
    found = []
    for chunk in (CHUNK, 256):
        monkeypatch.setattr(small_adamw, "CHUNK", chunk)
        params = parameters()
        found.append(stepped(params, SmallAdamW(params, lr=1e-2, weight_decay=0.1), range(5)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_moments_that_wait_elsewhere_are_fetched_and_put_back_and_change_nothing(monkeypatch):
    """The copies between host and GPU, with a stand-in that makes real copies on the CPU."""
    moved = {"fetched": 0, "put back": 0}

    def fetched(stored, device):
        moved["fetched"] += stored.numel()
        return stored.clone()

    def put_back(stored, value):
        moved["put back"] += value.numel()
        stored.copy_(value.clone())

    params = parameters()
    wanted = stepped(params, SmallAdamW(params, lr=1e-2, eight_bit=True), range(4))
    monkeypatch.setattr(small_adamw, "fetched", fetched)
    monkeypatch.setattr(small_adamw, "put_back", put_back)
    params = parameters()
    optimizer = SmallAdamW(params, lr=1e-2, eight_bit=True, home=torch.device("cpu"))
    found = stepped(params, optimizer, range(4))
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))
    state = sum(t.numel() for p in params for name, t in optimizer.state[p].items() if name != "step")
    assert moved == {"fetched": 4 * state, "put back": 4 * state}
