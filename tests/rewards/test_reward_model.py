"""Reward models, tiny and random: their numbers are those of transformers' own pipeline, and batches change none."""

from __future__ import annotations

import json

import pytest
import torch
from test_rewards import rollouts

from fastkl.errors import UserError
from fastkl.rewards.call import compute_rewards
from fastkl.rewards.load import load_rewards, prepare_rewards
from fastkl.storyteller import model_path

TEXTS = [
    "a",
    " there was a small cat, and it sat",
    ".",
    " upon a hill there lived an old owl who knew it all. The end.",
]
CHAT = [{"role": "user", "content": "Tell me."}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
CPU = torch.device("cpu")


def tokenizer(template: str | None = None):
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(model_path())
    found.chat_template = template
    return found


def saved(folder, family: str, *, labels: int = 1, pad: int | None = None, template: str | None = None, **more) -> str:
    """A folder with a random classifier whose scores are of the order of 1."""
    import transformers

    tok = tokenizer(template)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tok), num_labels=labels, pad_token_id=pad, max_position_embeddings=64, **sizes, **more
    )
    model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


def ready(address: str):
    rewards = load_rewards([address], None)
    prepare_rewards(rewards, CPU)
    return rewards


def scores_of(address: str, raw="p ", texts=TEXTS) -> list[float]:
    return compute_rewards(ready(address), *rollouts([texts], raw=raw), step=1).total[0].tolist()


def by_the_pipeline(folder: str, texts: list[str], function: str, label: str | None = None) -> list[float]:
    from transformers import pipeline

    classify = pipeline("text-classification", model=folder, top_k=None, device="cpu", dtype=torch.float32)
    found = [classify([text], function_to_apply=function)[0] for text in texts]  # one by one
    return [next(e["score"] for e in entries if label in (None, e["label"])) for entries in found]


FAMILIES = [
    pytest.param("Llama", {"num_key_value_heads": 2}, id="causal without a padding id"),
    pytest.param("Llama", {"num_key_value_heads": 2, "pad": 2}, id="causal that pads with its end of text"),
    pytest.param("Bert", {"pad": 0}, id="bidirectional"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_one_label_gives_the_pipelines_logit_whatever_the_batch(tmp_path, family, options):
    folder = saved(tmp_path / "rm", family, **options)
    expected = by_the_pipeline(folder, [f"p {text}" for text in TEXTS], "none")
    assert max(expected) - min(expected) > 0.1, "the texts are told apart"
    for batch in (1, 3, 16):
        assert scores_of(f"model:{folder}?batch={batch}") == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_a_label_gives_its_probability(tmp_path):
    folder = saved(tmp_path / "three", "Llama", labels=3, id2label={0: "bad", 1: "fair", 2: "good"})
    for label in ("bad", "good"):
        expected = by_the_pipeline(folder, [f"p {text}" for text in TEXTS], "softmax", label)
        assert scores_of(f"model:{folder}?label={label}") == pytest.approx(expected, abs=1e-5)
    config = json.loads((tmp_path / "three" / "config.json").read_text()) | {
        "problem_type": "multi_label_classification"
    }
    (tmp_path / "three" / "config.json").write_text(json.dumps(config))
    expected = by_the_pipeline(folder, [f"p {text}" for text in TEXTS], "sigmoid", "good")
    assert scores_of(f"model:{folder}?label=good") == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_scores_are_normalised_by_the_numbers_that_are_given(tmp_path):
    folder = saved(tmp_path / "rm", "Llama")
    plain = scores_of(f"model:{folder}")
    expected = [(score - -0.25) / 2.0 for score in plain]
    assert scores_of(f"model:{folder}?mean=-0.25&std=2") == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_chats_are_rendered_by_the_reward_models_own_template(tmp_path):
    folder = saved(tmp_path / "rm", "Llama", template=TEMPLATE)
    model, tok = ready(f"model:{folder}")[0].function.model, tokenizer()

    def alone(text: str) -> float:
        ids = tok(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return float(model(input_ids=ids).logits)

    expected = [alone(f"<user>Tell me.</user><assistant>{text}</assistant>") for text in TEXTS]
    assert scores_of(f"model:{folder}", CHAT) == pytest.approx(expected, abs=1e-5)
    begun = [*CHAT, {"role": "assistant", "content": "It"}]
    expected = [alone(f"<user>Tell me.</user><assistant>It{text}</assistant>") for text in TEXTS]
    assert scores_of(f"model:{folder}", begun) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UserError, match="prompts are chats, and the tokenizer of .* has no chat template"):
        scores_of(f"model:{saved(tmp_path / 'plain', 'Llama')}", CHAT)


@pytest.mark.slow
def test_models_that_cannot_score_are_refused_before_a_policy_is_loaded(tmp_path):
    folder = saved(tmp_path / "rm", "Llama")
    three = saved(tmp_path / "three", "Llama", labels=3)
    from safetensors.torch import load_file, save_file

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((tmp_path / "rm" / "config.json").read_text())
    torch.save(load_file(tmp_path / "rm" / "model.safetensors"), pickled / "pytorch_model.bin")
    lacking, headless = saved(tmp_path / "lacking", "Llama"), saved(tmp_path / "headless", "Llama")
    for folder_of, part in ((lacking, "layers.1.mlp"), (headless, "score")):
        tensors = load_file(f"{folder_of}/model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if part not in name}
        save_file(kept, f"{folder_of}/model.safetensors", {"format": "pt"})
    for address, words in (
        (f"model:{model_path()}", "is no reward model but a LlamaForCausalLM"),
        (f"model:{headless}", "is no reward model, since its file lacks score.weight"),
        (f"model:{tmp_path / 'nowhere'}", "there is no model folder"),
        (f"model:{pickled}", "holds no .safetensors weights"),
        (f"model:{lacking}", "lacks model.layers.1.mlp.down_proj.weight"),
        (f"model:{folder}?label=good", "has no label 'good'; it has LABEL_0"),
        (f"model:{three}", "has 3 labels, LABEL_0, LABEL_1, LABEL_2; add .label=LABEL_2"),
    ):
        with pytest.raises(UserError, match=words) as refused:
            ready(address)
        assert str(refused.value).startswith("reward: model:") and "\n" not in str(refused.value)


@pytest.mark.slow
def test_a_text_that_is_too_long_is_refused_by_its_length(tmp_path):
    with pytest.raises(UserError, match=r"takes 64 tokens, and a prompt with its completion has \d+; lower --max-new"):
        scores_of(f"model:{saved(tmp_path / 'rm', 'Llama')}", texts=["a", "one two three " * 40])


@pytest.mark.slow
def test_a_model_whose_scores_depend_on_the_batch_is_refused_unless_it_scores_one_by_one(tmp_path, monkeypatch):
    folder = saved(tmp_path / "rm", "Bert", pad=0)
    rewards = load_rewards([f"model:{folder}", f"model:{folder}?batch=1"], None)
    from transformers import BertForSequenceClassification

    forward = BertForSequenceClassification.forward

    def unmasked(self, input_ids, attention_mask):
        return forward(self, input_ids)

    monkeypatch.setattr(BertForSequenceClassification, "forward", unmasked)
    with pytest.raises(UserError, match=r"depend on what is batched with them \(by .*\); add batch=1"):
        prepare_rewards(rewards[:1], CPU)
    prepare_rewards(rewards[1:], CPU)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("model:", ["names no model"]),
        ("model:m?std=0", ["std=0", "above 0"]),
        ("model:m?std=wide", ["std=wide", "must be a number"]),
        ("model:m?mean=inf", ["mean=inf", "must be a number"]),
        ("model:x?batch=0", ["batch=0", "1 or more"]),
        ("model:x?batch=many", ["batch=many", "1 or more"]),
        ("model:x?device=gpu", ["device=gpu", "auto, cpu, cuda"]),
        ("model:x?dtype=int8", ["dtype=int8", "auto, float32, bfloat16"]),
        ("model:x?lable=good", ["no option 'lable'", "Did you mean 'label'"]),
    ],
)
def test_options_that_do_not_fit_are_explained(address, words):
    with pytest.raises(UserError) as refused:
        load_rewards([address], None)
    assert all(word in str(refused.value) for word in words) and "\n" not in str(refused.value)
