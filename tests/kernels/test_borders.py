"""Mistakes are named at the border; masked rows are free, exactly zero and may hold anything; rows are independent."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix import EVERY_OUTPUT, make_case, run

from fastkl.errors import UserError
from fastkl.kernels import operators
from fastkl.kernels.operators import Head, Support, TokenCoefficients

Z = torch.zeros(3, 5)
T = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: operators.token_scores(Z, None, T[:2]), r"target_ids has shape \[2\], expected \[3\]"),
        (lambda: operators.token_scores(Z, None, T.int()), "target_ids has dtype torch.int32"),
        (lambda: operators.token_scores(Z, Z[:, :4], T), r"ref_logits has shape \[3, 4\], expected \[3, 5\]"),
        (lambda: operators.token_scores(Z.long(), None, T), "policy_logits has dtype"),
        (lambda: operators.token_scores(Z, None, T + 5), "target_ids has the id 5, but the vocabulary is 0 to 4"),
        (lambda: operators.token_scores(Z, None, T - 1), "target_ids has the id -1"),
        (lambda: operators.token_scores(Z, None, T + 4, valid_vocab=4), "vocabulary is 0 to 3"),
        (lambda: operators.token_scores(Z, None, T, valid_vocab=6), "valid_vocab is 6, expected 1 to 5"),
        (lambda: operators.token_scores(Z, None, T, temperature=0.0), "temperature is 0.0"),
        (lambda: operators.token_scores(Z, None, T, temperature=Z[:, 0]), "temperature has an entry"),
        (lambda: operators.token_scores(Z, None, T, temperature=torch.ones(2)), r"temperature has shape \[2\]"),
        (lambda: operators.token_scores(Z, None, T, mask=torch.ones(3)), "mask has dtype"),
        (lambda: operators.token_scores(Z, None, T, outputs=("kll",)), "outputs has"),
        (lambda: operators.token_scores(Z, None, T, chunk_tokens=0), "chunk_tokens is 0"),
        (lambda: operators.token_scores(Z + torch.nan, None, T), "policy_logprobs is NaN in 3 of 3"),
        (lambda: operators.token_scores(Z, Z + torch.inf, T), "ref_logprobs is NaN"),
        (lambda: operators.linear_token_scores(Z, Z.t(), None, None, T), r"policy_weight has shape \[5, 3\]"),
        (lambda: operators.linear_token_scores(Z, Z, Z, None, T), "ref_hidden and ref_weight belong together"),
        (lambda: operators.linear_token_scores(Z, Z, None, None, T, logits_dtype="float16"), "logits_dtype"),
        (lambda: operators.linear_token_scores(Z, Z, None, None, T, gradient_dtype="half"), "gradient_dtype is .half."),
        (lambda: operators.linear_token_scores(Z, Z, None, None, T, softcap=0.0), "softcap is 0.0"),
        (lambda: operators.linear_token_scores(Z, Z, None, None, T, logit_scale=0.0), "logit_scale is 0.0"),
        (lambda: operators.linear_token_scores(Z, Z, None, None, T, policy_bias=Z[0]), r"policy_bias has shape \[5\]"),
        (lambda: operators.head_token_scores(Z, Head(Z.t()), None, None, T), r"policy_weight has shape \[5, 3\]"),
        (
            lambda: operators.head_token_scores(Z, Head(Z, softcap=30.0), Z, Head(Z), T),
            "softcap is 30.0 in policy_head and None in ref_head: the heads must share it",
        ),
        (
            lambda: operators.head_token_loss(Z, Head(Z), Z, Head(Z, logit_scale=0.5), T, TokenCoefficients()),
            "logit_scale is 1.0 in policy_head and 0.5 in ref_head",
        ),
        (lambda: operators.token_scores(Z, None, T, support=Support(kept_ids=T)), "kept_offsets belong together"),
        (
            lambda: operators.token_scores(Z, None, T, support=Support(T, torch.tensor([0, 1, 2, 9]))),
            "must ascend from 0 to 3",
        ),
        (lambda: operators.token_scores(Z, None, T, support=Support(banned_rows=T > 0)), "pass support.banned_ids too"),
        (lambda: operators.token_scores(Z.to("meta"), None, T), "target_ids is on cpu, the policy is on meta"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_what_was_expected(call, words):
    with pytest.raises(UserError, match=words):
        call()


@pytest.mark.parametrize("reference", [True, False])
def test_heads_score_like_their_weights_and_biases_and_like_their_own_logits(reference):
    case = make_case(mask="some", bias=True, softcap=4.0, logit_scale=0.5, reference=reference, temperature=0.7)
    options = {k: case.options[k] for k in ("mask", "temperature")}
    bias, ref_bias = case.options["policy_bias"], case.options["ref_bias"]
    policy = Head(case.policy_weight, bias, 4.0, 0.5)
    ref = Head(case.ref_weight, ref_bias, 4.0, 0.5) if reference else None
    flat, flat_grads = run(operators.linear_token_scores, case)
    got, grads = run(
        lambda h, w, rh, rw, t, policy_bias, **_: operators.head_token_scores(
            h, Head(w, policy_bias, 4.0, 0.5), rh, ref, t, **options
        ),
        case,
    )
    r = ref.logits(case.ref_hidden) if reference else None
    by_logits = operators.token_scores(policy.logits(case.policy_hidden), r, case.target_ids, **options)
    for name in got.__slots__:
        assert (getattr(got, name) is None) == (getattr(flat, name) is None), name
        if getattr(got, name) is not None:
            assert torch.equal(getattr(got, name), getattr(flat, name)), name
            torch.testing.assert_close(getattr(got, name), getattr(by_logits, name), rtol=1e-9, atol=1e-9)
    assert all(torch.equal(grads[name], flat_grads[name]) for name in grads)

    coefficients = TokenCoefficients(policy_logprobs=torch.rand(9, dtype=torch.float64))
    args = case.policy_hidden, policy, case.ref_hidden, ref, case.target_ids
    loss, _ = operators.head_token_loss(*args, coefficients, **options)
    torch.testing.assert_close(loss, (coefficients.policy_logprobs * got.policy_logprobs.detach()).sum())


def test_masked_rows_may_hold_anything_and_come_back_exactly_zero():
    options = {"mask": "some", "per_row_temperature": True, "support": Support(top_k=4), "outputs": EVERY_OUTPUT}
    case = make_case(num_rows=12, **options).to(torch.float32)
    off = ~case.options["mask"]
    clean, clean_grads = run(operators.linear_token_scores, case)
    for x in (case.policy_hidden, case.ref_hidden, case.options["temperature"]):
        x[off] = torch.nan
    case.target_ids[off] = -100
    poisoned, grads = run(operators.linear_token_scores, case)
    for name in clean.__slots__:
        assert torch.equal(getattr(poisoned, name), getattr(clean, name)), name
        assert torch.equal(getattr(poisoned, name)[off], torch.zeros(int(off.sum())))
    assert torch.equal(grads["weight"], clean_grads["weight"])
    assert torch.equal(grads["hidden"], clean_grads["hidden"])
    assert torch.equal(grads["hidden"][off], torch.zeros(int(off.sum()), 8))


def test_uninitialised_memory_never_reaches_a_result(monkeypatch):
    options = {"mask": "some", "support": Support(top_p=0.7), "softcap": 4.0, "outputs": EVERY_OUTPUT}
    case = make_case(num_rows=21, **options).to(torch.float32)
    clean, clean_grads = run(operators.linear_token_scores, case)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    poisoned, grads = run(lambda *a, **k: operators.linear_token_scores(*a, chunk_tokens=7, **k), case)
    for name in clean.__slots__:
        assert torch.equal(getattr(poisoned, name), getattr(clean, name)), name
    assert torch.equal(grads["hidden"], clean_grads["hidden"])


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.integers(0, 39), min_size=1, max_size=60), chunk_tokens=st.integers(1, 50))
def test_a_rows_scores_do_not_depend_on_its_neighbours_bit_for_bit(rows, chunk_tokens):
    case = make_case(num_rows=40, hidden=33, vocab=301, support=Support(top_p=0.9)).to(torch.float32)
    everything = operators.linear_token_scores(*case.args(), support=case.options["support"], outputs=EVERY_OUTPUT)
    index = torch.tensor(rows)
    some = operators.linear_token_scores(
        case.policy_hidden[index], case.policy_weight, case.ref_hidden[index], case.ref_weight, case.target_ids[index],
        support=case.options["support"], chunk_tokens=chunk_tokens, outputs=EVERY_OUTPUT,
    )  # fmt: skip
    for name in some.__slots__:
        assert torch.equal(getattr(some, name), getattr(everything, name)[index]), name


def test_unwanted_outputs_come_back_as_none_and_the_rest_unchanged():
    case = make_case().to(torch.float32)
    full = operators.linear_token_scores(*case.args())
    lean = operators.linear_token_scores(*case.args(), outputs=())
    assert lean.entropy is None and lean.kl is None
    assert torch.equal(lean.policy_logprobs, full.policy_logprobs)
    assert torch.equal(lean.ref_logprobs, full.ref_logprobs)


def test_the_reference_gets_no_gradient():
    case = make_case()
    ref_hidden, ref_weight = case.ref_hidden.requires_grad_(), case.ref_weight.requires_grad_()
    hidden = case.policy_hidden.requires_grad_()
    scores = operators.linear_token_scores(hidden, case.policy_weight, ref_hidden, ref_weight, case.target_ids)
    assert not scores.ref_logprobs.requires_grad
    scores.kl.sum().backward()
    assert ref_hidden.grad is None and ref_weight.grad is None


@pytest.mark.slow
def test_the_operators_load_neither_the_compiler_nor_transformers():
    code = (
        "import sys, torch\nfrom fastkl.kernels.operators import linear_token_scores, token_scores\n"
        "z, w, t = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5), torch.tensor([0, 2, 4])\n"
        "scores = token_scores(z, z.detach(), t), linear_token_scores(z, w, None, None, t)\n"
        "(scores[0].kl + scores[1].entropy).sum().backward()\n"
        "print([name for name in ('torch', 'torch._dynamo', 'transformers', 'triton') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['torch']\n"


MEMORY_PROBE = """
import resource, sys, torch
from fastkl.kernels import operators
names = sys.argv[1:]
score = lambda *a, **k: sum(getattr(operators.linear_token_scores(*a, outputs=names, **k), n).sum() for n in names)
g = torch.Generator().manual_seed(0)
num_rows, hidden, vocab = 8192, 16, 8192
h = torch.randn(num_rows, hidden, generator=g).requires_grad_()
w = torch.randn(vocab, hidden, generator=g).requires_grad_()
t = torch.zeros(num_rows, dtype=torch.int64)
score(h[:64], w, h[:64].detach(), w.detach() * 2, t[:64]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
score(h, w, h.detach(), w.detach() * 2, t, chunk_tokens=256).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param("kl", marks=pytest.mark.long), pytest.param("forward_kl", marks=pytest.mark.long), "jsd"]
)
def test_peak_memory_is_that_of_a_chunk_not_of_all_logits(name):
    """All logits of one model would be 268 MB; a chunk of 256 rows is 8 MB."""
    out = subprocess.run([sys.executable, "-c", MEMORY_PROBE, name], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 64 << 20
