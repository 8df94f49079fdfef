"""A reward model: `--reward model:ID_OR_FOLDER?KEY=VALUE&...`, a sequence classifier of transformers.

In: the step's prompts and completions. Out: for each, the logit of a model with one label, or the probability of the
label named by the option `label`; normalised by the options, (score - mean) / std. Safetensors only, no remote code; a
model whose file lacks weights is refused. Texts are prompt and completion in one with the tokenizer's special tokens,
chats are rendered by the model's own template.

A score does not depend on what it is batched with: batches are padded on the right, where neither a causal model nor a
mask looks, with the id that the model itself skips when it looks for the last token. `prepare` tries it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch

from fastkl.address import check_options, name_and_options
from fastkl.errors import UserError
from fastkl.rewards.prepared import PreparedReward
from fastkl.scoring import models

CHOICES = {"device": ("auto", "cpu", "cuda"), "dtype": ("auto", "float32", "bfloat16")}
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""How much a score may differ, relative to 1 + |score|, between a batch and the text alone."""


@dataclass(frozen=True, slots=True)
class Options:
    """What stands after the ?."""

    label: str = ""  # of several
    batch: int = 16  # texts in a forward
    device: str = "auto"  # the trainer's
    dtype: str = "auto"  # bfloat16 on a GPU, float32 on a CPU
    mean: float = 0.0  # taken from a score
    std: float = 1.0  # what it is divided by then


class ModelReward(PreparedReward):
    """The reward function. The model is loaded by `prepare`."""

    def __init__(self, address: str) -> None:
        self.name, given = name_and_options("reward", address.removeprefix("model:"))
        if not self.name.strip():
            raise UserError(f"reward: {address!r} names no model; write model:FOLDER or model:HUB_ID.")
        self.options = options_of(address, given)
        self.__name__ = self.name.rstrip("/").rpartition("/")[2]

    def prepare(self, device: torch.device) -> None:
        """Loads the model, and sees that batches do not change its scores."""
        if self.options.device != "auto":
            device = torch.device(self.options.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"reward: device=cuda of model:{self.name}, but PyTorch sees no GPU; use device=cpu.")
        auto = "bfloat16" if device.type == "cuda" else "float32"
        dtype = getattr(torch, auto if self.options.dtype == "auto" else self.options.dtype)
        with blamed_on(self.name):
            source = models.resolve_model(self.name)
            config = models.load_config(source)
            check_architecture(self.name, config)
            self.label = label_index(self.name, config, self.options.label)
            self.tokenizer = models.load_tokenizer(source)
            self.model = load_classifier(source, dtype).to(device)
        lengths = [models.context_length(config) or 1 << 30, self.tokenizer.model_max_length]
        self.max_tokens = min(lengths)
        if self.options.batch > 1:
            self.check_batches(TOLERANCE[dtype])

    def check_batches(self, tolerance: float) -> None:
        """UserError where a text's score depends on the texts beside it."""
        ids = list(self.tokenizer("Once upon a time there was a small cat, and it sat.")["input_ids"])
        texts = [ids[: max(1, len(ids) // 3)], ids]
        together = self.logits(texts)
        alone = torch.cat([self.logits([text]) for text in texts])
        gap = float(((together - alone).abs() / (1 + alone.abs())).max())
        if not gap <= tolerance:
            raise UserError(
                f"reward: the scores of model:{self.name} depend on what is batched with them (by {gap:.2g}); add "
                "batch=1 to its options."
            )

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        encoded = [self.encoded(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        if (longest := max(map(len, encoded))) > self.max_tokens:
            raise UserError(
                f"reward: model:{self.name} takes {self.max_tokens} tokens, and a prompt with its completion has "
                f"{longest}; lower --max-new-tokens or shorten the prompts."
            )
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))  # little padding
        scores = [0.0] * len(encoded)
        for start in range(0, len(order), self.options.batch):
            part = order[start : start + self.options.batch]
            for i, score in zip(part, self.scores([encoded[i] for i in part]), strict=True):
                scores[i] = score
        return scores

    def encoded(self, prompt: Any, completion: Any) -> list[int]:
        """Token ids of prompt and completion as the model wants them."""
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt + completion)["input_ids"])
        if not getattr(self.tokenizer, "chat_template", None):
            raise UserError(
                f"reward: the prompts are chats, and the tokenizer of model:{self.name} has no chat template; use "
                "texts."
            )
        text = self.tokenizer.apply_chat_template(joined(prompt, completion), tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def scores(self, encoded: Sequence[Sequence[int]]) -> list[float]:
        """The rewards of one batch."""
        logits = self.logits(encoded)
        if self.label is None:
            found = logits[:, 0]
        else:
            many = self.model.config.problem_type == "multi_label_classification"
            found = (logits.sigmoid() if many else logits.softmax(dim=-1))[:, self.label]
        return ((found.double() - self.options.mean) / self.options.std).tolist()

    @torch.no_grad()
    def logits(self, encoded: Sequence[Sequence[int]]) -> torch.Tensor:
        """f32 [texts, labels], CPU."""
        config, width = models.text_config(self.model.config), max(map(len, encoded))
        own = getattr(config, "pad_token_id", None)
        pad = unused_as_last(encoded) if own is None else own
        ids = torch.tensor([[*text, *[pad] * (width - len(text))] for text in encoded])
        mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in encoded])
        try:
            config.pad_token_id = pad  # the model takes the last token that is another one
            device = self.model.device
            return self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float().cpu()
        finally:
            config.pad_token_id = own


def load_classifier(source: str, dtype: torch.dtype) -> Any:
    """A sequence classifier, dropout off. UserError when it cannot be loaded, or when its file lacks weights."""
    from transformers import AutoModelForSequenceClassification

    options = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(source, output_loading_info=True, **options)
    except Exception as failure:  # transformers raises many types
        reason = models.first_line(failure)
        raise UserError(f"model: {source!r} could not be loaded as a classifier ({reason}); name another.") from failure
    heads = [name for name in loading["missing_keys"] if name.startswith(("score", "classif"))]
    if heads:
        raise UserError(
            f"model: {source!r} is no reward model, since its file lacks {heads[0]}; name one with a head that scores."
        )
    models.check_weights(source, loading["missing_keys"], loading["unexpected_keys"])
    return models.without_dropout(model).requires_grad_(False)


def check_architecture(name: str, config: Any) -> None:
    """UserError for a model of another kind, before its weights are read."""
    kinds = getattr(config, "architectures", None) or ["SequenceClassification"]
    if not any("SequenceClassification" in kind for kind in kinds):
        raise UserError(f"model: {name!r} is no reward model but a {kinds[0]}; name a sequence classifier.")


def label_index(name: str, config: Any, label: str) -> int | None:
    """The index of the label; None for a model with one. UserError where the option is needed or unknown."""
    labels = [config.id2label[i] for i in sorted(config.id2label)]
    if label and label not in labels:
        raise UserError(f"model: {name!r} has no label {label!r}; it has {', '.join(labels)}.")
    if len(labels) == 1:
        return None
    if not label:
        raise UserError(
            f"model: {name!r} has {len(labels)} labels, {', '.join(labels)}; add ?label={labels[-1]} or so."
        )
    return labels.index(label)


def joined(prompt: Sequence[dict[str, str]], completion: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The chat with its answer; an answer that the prompt has begun is one message."""
    if prompt[-1]["role"] != completion[0]["role"]:
        return [*prompt, *completion]
    begun = {**prompt[-1], "content": prompt[-1]["content"] + completion[0]["content"]}
    return [*prompt[:-1], begun, *completion[1:]]


def unused_as_last(encoded: Sequence[Sequence[int]]) -> int:
    """An id that no text ends with."""
    last = {text[-1] for text in encoded}
    return next(i for i in range(len(last) + 1) if i not in last)


@contextmanager
def blamed_on(name: str) -> Iterator[None]:
    """Mistakes that are the reward model's are the reward's."""
    try:
        yield
    except UserError as mistake:
        raise UserError(f"reward: model:{name}: {str(mistake).removeprefix('model: ')}") from mistake


def options_of(address: str, given: dict[str, str]) -> Options:
    """The options. UserError for one that is unknown or out of range."""
    check_options("reward", address, given, [field.name for field in fields(Options)])
    for name, value in given.items():
        if value not in CHOICES.get(name, (value,)):
            raise UserError(f"reward: {name}={value} in {address!r} must be one of {', '.join(CHOICES[name])}.")
    batch = given.get("batch", "16")
    if not batch.isdecimal() or int(batch) < 1:
        raise UserError(f"reward: batch={batch} in {address!r} must be a whole number, 1 or more.")
    numbers: dict[str, float] = {
        name: finite_number(address, name, given[name]) for name in ("mean", "std") if name in given
    }
    if numbers.get("std", 1.0) <= 0:
        raise UserError(f"reward: std={given['std']} in {address!r} must be above 0.")
    values: dict[str, Any] = {**given, **numbers, "batch": int(batch)}
    return Options(**values)


def finite_number(address: str, name: str, text: str) -> float:
    """The option's value. UserError for what is no number, or not a finite one."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"reward: {name}={text} in {address!r} must be a number.")
    return value
