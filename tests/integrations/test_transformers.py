"""The helper for hand-written loops: what it scores are each model's own log-probs, with the model's own gradients."""

from __future__ import annotations

import re
from collections.abc import Callable

import commands
import pytest
import torch
import transformers
from cases import slow
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from toy import STOP, norms_in_float64, toy_model

from fastkl import Support, TokenScores
from fastkl.errors import UserError
from fastkl.integrations import transformers as integration
from fastkl.integrations.transformers import backbone_and_head, completion_mask, head_scores, layout_of, score_tokens
from fastkl.scoring import score_tokens as score_tokens_module

VOCAB, PAD, TEMPERATURE = 29, 0, 0.7
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "eos_token_id": 1,
    "bos_token_id": 2, "pad_token_id": PAD,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3,
    "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
FAMILIES = {  # architecture and what is special about it
    "llama_tied": ("Llama", COMMON | {"tie_word_embeddings": True}),
    "llama_untied": ("Llama", COMMON | {"tie_word_embeddings": False}),
    "qwen2": ("Qwen2", COMMON | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", COMMON | {"head_dim": 8}),
    "gemma2": ("Gemma2", COMMON | {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3", COMMON | {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 5.0}),
    "gpt2": ("GPT2", GPT2 | {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
    "mistral": ("Mistral", COMMON | {"sliding_window": 3}),
    "cohere": ("Cohere", COMMON | {"logit_scale": 0.3}),
    "granite": ("Granite", COMMON | {"logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    "phi": ("Phi", COMMON),  # a head with a bias
}


def make_model(family: str, seed: int = 0) -> nn.Module:
    """A random float64 model in training mode, as a loop would have it."""
    torch.manual_seed(seed)
    name, settings = FAMILIES[family]
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(**settings)
    model = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config)
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias)  # zero as they are made, which would hide a bias that is left out
    return norms_in_float64(model.double()).train()


@pytest.fixture(scope="module")
def rows() -> tuple[Tensor, Tensor, Tensor]:
    """(ids, attention_mask, completion_mask): prompts padded on the left, completions on the right, one row whose
    completion has a gap (a tool's words), one without any completion; one comes twice, and one begins as that does."""
    g = torch.Generator().manual_seed(5)
    lengths = [(3, 9), (1, 5), (7, 1), (4, 6), (5, 0), (3, 9), (3, 5)]
    ids, exists, scored = [], [], []
    for prompt, completion in lengths:
        left = 7 - prompt
        row = torch.randint(3, VOCAB, (prompt + completion,), generator=g)
        ids.append(torch.cat([torch.full((left,), PAD), row]))
        exists.append(torch.cat([torch.zeros(left), torch.ones(prompt + completion)]).bool())
        scored.append(torch.cat([torch.zeros(7), torch.ones(completion)]).bool())
    ids[5], ids[6][: 7 + 2] = ids[0].clone(), ids[0][: 7 + 2]
    scored[3][8:10] = False
    return tuple(pad_sequence(x, batch_first=True) for x in (ids, exists, scored))


def log_probs(model: nn.Module, ids: Tensor) -> Tensor:
    """The model's own, for one sequence alone, in float64."""
    return (model(input_ids=ids[None], use_cache=False).logits[0] / TEMPERATURE).log_softmax(-1)


def own_scores(policy: nn.Module, reference: nn.Module, rows: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """TokenScores by definition: each row alone, unpadded, through the models' own forwards."""
    ids, exists, scored = rows
    found: dict[str, list[Tensor]] = {"policy_logprobs": [], "ref_logprobs": [], "entropy": [], "kl": []}
    for row in range(len(ids)):
        tokens, wanted = ids[row][exists[row]], scored[row][exists[row]].nonzero()[:, 0]
        p = log_probs(policy, tokens)[wanted - 1]
        with torch.no_grad():
            q = log_probs(reference, tokens)[wanted - 1]
        targets = tokens[wanted][:, None]
        found["policy_logprobs"].append(p.gather(1, targets)[:, 0])
        found["ref_logprobs"].append(q.gather(1, targets)[:, 0])
        found["entropy"].append(-(p.exp() * p).sum(1))
        found["kl"].append((p.exp() * (p - q)).sum(1))
    return {name: torch.cat(values) for name, values in found.items()}


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def weighted(scores: Callable[[str], Tensor]) -> Tensor:
    """A loss with a different weight for every score."""
    total = torch.zeros((), dtype=torch.float64)
    for name in ("policy_logprobs", "entropy", "kl"):
        values = scores(name)
        total = total + (values * torch.linspace(0.5, 1.5, len(values), dtype=torch.float64)).sum() * len(name)
    return total


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_gradients_are_those_of_the_models_own_logits(family, rows):
    policy, reference = make_model(family), make_model(family, seed=1).requires_grad_(False)
    ids, exists, scored = rows
    scores = score_tokens(policy, reference, ids, scored, attention_mask=exists, temperature=TEMPERATURE)
    assert policy.training and policy.config._attn_implementation == "sdpa"  # given back as it was

    expected = own_scores(policy.eval(), reference.eval(), rows)
    for name, values in expected.items():
        torch.testing.assert_close(getattr(scores, name)[scored], values, rtol=0, atol=1e-6, msg=name)
        assert bool((getattr(scores, name)[~scored] == 0).all())
    assert expected["kl"].mean() > 0.1 and scores.policy_logprobs_support is None

    ours = gradients(weighted(lambda name: getattr(scores, name)[scored]), policy)
    theirs = gradients(weighted(expected.__getitem__), policy)
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-6 * largest, msg=name)
    tied = policy.get_output_embeddings().weight is policy.get_input_embeddings().weight
    assert tied == policy.config.tie_word_embeddings


def test_what_rows_begin_with_alike_is_computed_once_and_equal_tokens_are_one_row_for_the_heads(rows, monkeypatch):
    """Unless they may have other temperatures or other ids to be chosen from."""
    model, (ids, exists, scored) = make_model("llama_tied"), rows
    sequences = [tuple(row[there].tolist()) for row, there in zip(ids, exists, strict=True)]
    sequences[4] = ()  # nothing of it is scored
    marks = [tuple(row[there].tolist()) for row, there in zip(scored, exists, strict=True)]
    beginnings = {ids[:end] for ids in sequences for end in range(1, len(ids))}
    kinds = {ids[: at + 1] for ids, mark in zip(sequences, marks, strict=True) for at, m in enumerate(mark) if m}
    layout_of(model)
    computed, heads, score = [], [], score_tokens_module.head_token_scores
    hook = model.model.register_forward_pre_hook(
        lambda m, a, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )

    def noted(hidden, *rest, **options):
        heads.append(len(hidden))
        return score(hidden, *rest, **options)

    monkeypatch.setattr(score_tokens_module, "head_token_scores", noted)
    for options in ({}, {"temperature": torch.ones(ids.shape)}, {"support": Support(top_k=5)}):
        score_tokens(model, None, ids, scored, attention_mask=exists, **options)
    hook.remove()
    num_scored = int(scored.sum())
    assert computed == [len(beginnings)] * 3 and len(beginnings) < sum(map(len, sequences)) - 7
    assert heads == [len(kinds), num_scored, num_scored] and len(kinds) == num_scored - 9 - 2


@pytest.mark.parametrize("family", ["llama_tied", "gemma2", *slow("gpt2", "cohere", "granite", "phi")])
def test_backbone_and_head_feed_the_operators(family, rows):
    """The long way round: [B, T, H] hidden states of left-padded rows, selected by hand."""
    policy, reference, close = make_model(family), make_model(family, seed=1), 1e-6
    if family == "gemma2":  # in float64 the mask of transformers' eager attention makes padded rows NaN
        policy, reference, close = policy.float(), reference.float(), 1e-5
    ids, exists, scored = rows
    sides = []
    for model in (policy, reference):
        hidden, head = backbone_and_head(model, ids, exists)
        sides += [hidden[:, :-1][scored[:, 1:]], head]
    scores = head_scores(*sides, ids[scored], temperature=TEMPERATURE)
    for name, values in own_scores(policy.eval(), reference.eval(), rows).items():
        torch.testing.assert_close(getattr(scores, name), values, rtol=0, atol=close, msg=name)


def test_softcapped_attention_of_the_eager_implementation_counts(rows):
    """Gemma-2's own attention caps its scores in the eager implementation only; the packed row must not drop that."""
    model = make_model("gemma2")
    model.set_attn_implementation("eager")
    model.config.attn_logit_softcapping = 0.05
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.05
    ids, exists, scored = rows
    expected = own_scores(model.eval(), model, rows)["policy_logprobs"]
    scores = score_tokens(model, None, ids, scored, attention_mask=exists, temperature=TEMPERATURE)
    torch.testing.assert_close(scores.policy_logprobs[scored], expected, rtol=0, atol=1e-6)
    assert scores.ref_logprobs is None and scores.kl is None
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    uncapped = own_scores(model, model, rows)["policy_logprobs"]
    assert (uncapped - expected).abs().max() > 0.01  # the control


def test_supports_are_those_of_each_scored_token(rows):
    """top_k, and a ban of id 9 from the first two tokens of each completion, by hand."""
    model, (ids, exists, scored) = make_model("llama_tied").eval(), rows
    early = (scored.long().cumsum(1) <= 2)[scored]
    support = Support(top_k=4, banned_ids=torch.tensor([9]), banned_rows=early)
    scores = score_tokens(
        model, model, ids, scored, attention_mask=exists, temperature=TEMPERATURE, support=support
    )  # fmt: skip
    expected = []
    for row in range(len(ids)):
        tokens, wanted = ids[row][exists[row]], scored[row][exists[row]].nonzero()[:, 0].tolist()
        for t, position in enumerate(wanted):
            p = log_probs(model, tokens)[position - 1].tolist()
            allowed = [v for v in range(VOCAB) if not (v == 9 and t < 2)]
            kept = {*sorted(allowed, key=lambda v: -p[v])[:4], int(tokens[position])}
            mass = torch.tensor([p[v] for v in kept]).logsumexp(0)
            expected.append(p[int(tokens[position])] - float(mass))
    ours = scores.policy_logprobs_support[scored]
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
    assert bool((scores.kl_support == 0).all()) and (ours - scores.policy_logprobs[scored]).min() > 0


def test_a_temperature_may_differ_from_row_to_row(rows):
    model, (ids, exists, scored) = make_model("llama_tied"), rows
    temperatures = torch.tensor([0.5, 0.7, 1.0, 1.5, 2.0, 0.8, 0.6])[:, None]
    mixed = score_tokens(model, None, ids, scored, attention_mask=exists, temperature=temperatures)
    for row, temperature in enumerate(temperatures[:, 0].tolist()):
        if not scored[row].any():
            continue
        one = slice(row, row + 1)
        alone = score_tokens(model, None, ids[one], scored[one], attention_mask=exists[one], temperature=temperature)
        torch.testing.assert_close(mixed.policy_logprobs[one], alone.policy_logprobs, rtol=0, atol=1e-12)


def test_gradient_checkpointing_changes_no_gradient(rows):
    ids, exists, scored = rows

    def gradient(model: nn.Module) -> dict[str, Tensor]:
        scores = score_tokens(model, None, ids, scored, attention_mask=exists)
        return gradients(scores.policy_logprobs.sum(), model)

    model = make_model("llama_tied")
    plain = gradient(model)
    assert layout_of(model) == "shared"
    model.gradient_checkpointing_enable()
    assert layout_of(model) == "padded"
    for name, values in gradient(model).items():
        torch.testing.assert_close(values, plain[name], rtol=0, atol=1e-10)

    noisy = make_model("gpt2")
    noisy.gradient_checkpointing_enable()
    with pytest.raises(UserError, match=r"dropout.*without_dropout"):
        score_tokens(noisy, None, ids, scored, attention_mask=exists)


def test_completion_mask_ends_with_the_first_stop_token():
    ids = torch.tensor([[STOP, 5, 6, STOP, 0, 7], [4, 5, 3, 2, STOP, 9], [4, STOP, 3, 8, 8, 8]])
    expected = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]).bool()
    assert torch.equal(completion_mask(ids, 2, STOP), expected)
    assert torch.equal(completion_mask(ids, 2, [STOP, 3]).sum(1), torch.tensor([2, 1, 1]))
    assert completion_mask(ids, 2).sum() == 12


def test_bfloat16_models_are_scored_from_their_own_hidden_states():
    torch.manual_seed(0)
    model = toy_model(dtype=torch.bfloat16)
    ids = torch.randint(0, 20, (3, 9))
    mask = completion_mask(ids, 4)
    scores = score_tokens(model, None, ids, mask)
    own = model(input_ids=ids).logits.double()[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    assert scores.policy_logprobs.dtype == torch.float32
    torch.testing.assert_close(scores.policy_logprobs[:, 1:][mask[:, 1:]].double(), own[mask[:, 1:]], rtol=0, atol=0.05)


# ------------------------------------------------------------------------------------------------------------ refusals


class Twice(nn.Module):
    """A head whose logits are no linear function of the weight that it shows."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, None

    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * nn.functional.linear(hidden, self.weight)


def test_models_that_would_be_mis_scored_are_refused():
    ids, mask = torch.randint(0, 20, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    mask[:, 0] = False
    odd = toy_model()
    odd.lm_head = Twice(odd.lm_head)
    with pytest.raises(UserError, match="its own logits and hidden states x head differ"):
        score_tokens(odd, None, ids, mask)
    with pytest.raises(UserError, match="LlamaModel is no causal language model"):
        backbone_and_head(toy_model().model, ids)
    with pytest.raises(UserError, match=r"shape is \[23, 8\] and the policy's \[23, 16\]"):
        score_tokens(toy_model(), toy_model(hidden_size=8, num_attention_heads=2), ids, mask)
    with pytest.raises(UserError, match=r"logit scale is 0.3 and the policy's 1.0"):
        score_tokens(toy_model(vocab_size=VOCAB), make_model("cohere"), ids, mask)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_ids": torch.zeros(6)}, r"input_ids must be an int64 tensor \[B, T\], not torch.float32 \[6\]"),
        ({"completion_mask": torch.ones(2, 5)}, r"shape of input_ids, \[2, 6\], not \[2, 5\]"),
        ({"completion_mask": torch.ones(2, 6)}, "marks the first token of a row"),
        ({"completion_mask": torch.zeros(2, 6)}, "marks no token"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]] * 2)}, "they must not overlap"),
        ({"attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)}, "marks the first token of a row"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, words):
    inputs = {"input_ids": torch.randint(0, 20, (2, 6)), "completion_mask": torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)}
    with pytest.raises(UserError, match=words):
        score_tokens(toy_model(), None, **(inputs | change))


# ------------------------------------------------------------------------------------------------------------ wrappers


def test_a_compiled_module_is_the_module():
    model, ids = toy_model(), torch.randint(0, 20, (2, 6))
    mask = completion_mask(ids, 2)
    compiled = torch.compile(model, backend="eager")
    plain = score_tokens(model, None, ids, mask).policy_logprobs
    assert torch.equal(score_tokens(compiled, None, ids, mask).policy_logprobs, plain)


def test_peft_adapters_count_and_get_the_gradient(rows):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    base, (ids, exists, scored) = make_model("llama_tied"), rows
    plain = own_scores(base.eval(), base, rows)["policy_logprobs"].detach()
    options = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "down_proj"]}
    model = peft.get_peft_model(base, peft.LoraConfig(**options)).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    scores = score_tokens(model, None, ids, scored, attention_mask=exists, temperature=TEMPERATURE)
    expected = own_scores(model.eval(), model, rows)["policy_logprobs"]
    torch.testing.assert_close(scores.policy_logprobs[scored], expected, rtol=0, atol=1e-6)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours, theirs = (torch.autograd.grad(x.square().sum(), trained) for x in (scores.policy_logprobs, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    with model.disable_adapter(), torch.no_grad():
        scores = score_tokens(model, None, ids, scored, attention_mask=exists, temperature=TEMPERATURE)
    torch.testing.assert_close(scores.policy_logprobs[scored], plain, rtol=0, atol=1e-6)

    options |= {"target_modules": ["lm_head"]}
    with pytest.raises(UserError, match="output head carries an adapter"):
        score_tokens(peft.get_peft_model(make_model("llama_untied"), peft.LoraConfig(**options)), None, ids, scored)


DISTRIBUTED = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from fastkl.errors import UserError
from fastkl.integrations.transformers import completion_mask, score_tokens
from toy import toy_model

rank = int(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)

{scored}

ids = torch.randint(0, 20, (4, 9), generator=torch.Generator().manual_seed(0))
mask, share = completion_mask(ids, 3), slice(2 * rank, 2 * rank + 2)
alone = toy_model()
(score_tokens(alone, None, ids, mask).policy_logprobs.sum() / 2).backward()

ddp = DistributedDataParallel(Scored(toy_model()))
sharded = Scored(toy_model())
for layer in sharded.policy.model.layers:
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
for model in (ddp, sharded):
    model(ids[share], mask[share]).policy_logprobs.sum().backward()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        grad = ours.grad.full_tensor() if model is sharded else ours.grad
        torch.testing.assert_close(grad, theirs.grad, rtol=0, atol=1e-12)

for model in (DistributedDataParallel(toy_model()), sharded.policy):
    try:
        score_tokens(model, None, ids, mask)
    except UserError:
        continue
    raise AssertionError("scored around its wrapper")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ddp_and_fsdp2_average_the_gradients_of_a_module_that_scores(tmp_path):
    """The module of the documentation, on two processes with half of the rows each, against one with all of them."""
    lines = integration.__doc__.splitlines()
    first = next(n for n, line in enumerate(lines) if "class Scored" in line)
    scored = "\n".join(line.removeprefix("    ") for line in lines[first:])
    script = DISTRIBUTED.replace("{scored}", scored)
    ranks = [commands.Running(str(n), str(tmp_path / "store"), script=script) for n in range(2)]
    ended = [process.done(timeout=120) for process in ranks]
    assert [process.returncode for process in ended] == [0, 0], "\n".join(process.stderr for process in ended)


# ------------------------------------------------------------------------------------------------------- documentation


@pytest.mark.slow
def test_the_loop_in_the_documentation_runs_and_trains(capsys):
    lines = integration.__doc__.splitlines()
    first = next(n for n, line in enumerate(lines) if line == "    import torch")
    last = next(n for n, line in enumerate(lines) if "print(f" in line)
    code = "\n".join(line.removeprefix("    ") for line in lines[first : last + 1])
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 20
    scope: dict[str, object] = {}
    torch.manual_seed(0)
    exec(code, scope)
    scores, mask = scope["scores"], scope["mask"]
    assert isinstance(scores, TokenScores) and scores.kl.shape == mask.shape == scope["ids"].shape
    printed = re.findall(r"step (\d): reward ([\d.]+), KL ([\d.]+) nats", capsys.readouterr().out)
    assert [step for step, *_ in printed] == ["0", "1", "2"]
    assert float(printed[0][2]) < 1e-4 < float(printed[2][2])  # policy and reference begin equal, and part
