"""How good is a storyteller? Held-out cross entropy against the generator's own entropy, the share of well-formed
sentences, and the card.

In: a causal language model and its tokenizer. Out: numbers (nats, shares, counts) and the text of the model card.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fastkl.storyteller.checker import check
from fastkl.storyteller.grammar import SHARED_SLOTS, expand, story, story_nats, templates
from fastkl.storyteller.lexicon import GENDER, WORDS
from fastkl.storyteller.templates import PLOTS

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


NUM_HELD_OUT = 512


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Whole documents as token ids: end-of-text (the tokenizer's doing), story, end-of-text."""
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]


def pad_rows(rows: list[list[int]], pad_id: int) -> torch.Tensor:
    """int64 [rows, longest]; padding is on the right, where causal attention keeps it out of every story."""
    import torch

    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad_id)


def cross_entropy(model: LlamaForCausalLM, ids: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Next-token cross entropy (nats, f32 scalar) of ids int64 [rows, length], but of padding and of first tokens."""
    import torch

    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets = ids[:, 1:]
    keep = targets != model.config.pad_token_id
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[keep]).float(), targets[keep], reduction=reduction)


def held_out_stories(num: int) -> list[str]:
    """Stories that no training sees: those of negative seeds."""
    return [story(-1 - i) for i in range(num)]


def held_out_nats_per_story(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, num: int) -> float:
    """Mean of -log p(story, end-of-text) over the first `num` held-out stories."""
    import torch

    rows = sorted(encode(tokenizer, held_out_stories(num)), key=len)
    with torch.no_grad():
        parts = [
            cross_entropy(model, pad_rows(rows[i : i + 32], tokenizer.pad_token_id), "sum").item()
            for i in range(0, num, 32)
        ]
    return sum(parts) / num


def sample(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    num: int,
    *,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> list[str]:
    """`num` texts (prompt and completion) sampled at temperature 1 from the whole vocabulary, 64 at a time."""
    import torch

    torch.manual_seed(seed)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    texts: list[str] = []
    while len(texts) < num:
        inputs = ids.expand(min(64, num - len(texts)), -1)
        tokens = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
        )
        texts += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return texts


def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, num_samples: int, seed: int = 0
) -> dict[str, float]:
    """The numbers of the card. The standard error takes whole texts, not sentences, as independent."""
    checks = [check(text) for text in sample(model, tokenizer, "Once upon a time", num_samples, seed=seed)]
    num_sentences = sum(c.num_sentences for c in checks)
    share = sum(c.num_well_formed for c in checks) / max(1, num_sentences)
    squares = sum((c.num_well_formed - share * c.num_sentences) ** 2 for c in checks)
    texts = held_out_stories(NUM_HELD_OUT)
    return {
        "num_parameters": model.num_parameters(),
        "vocab_size": len(tokenizer),
        "tokens_per_story": sum(len(ids) - 1 for ids in encode(tokenizer, texts)) / len(texts),
        "held_out_nats_per_story": held_out_nats_per_story(model, tokenizer, NUM_HELD_OUT),
        "generator_nats_per_story": sum(story_nats(-1 - i) for i in range(NUM_HELD_OUT)) / NUM_HELD_OUT,
        "num_sampled_sentences": num_sentences,
        "well_formed_share": share,
        "well_formed_standard_error": math.sqrt(squares) / max(1, num_sentences),
    }


def num_stories_at_least() -> int:
    """A lower bound of the number of distinct stories.

    Fix one plot and one sentence for each of its sections; then different words give different texts. A slot counts the
    words of its category less all that the sentence and the characters could have used up, a shared slot counts once.
    """
    count, shared = len(GENDER) * (len(GENDER) - 1), {"kindA", "kindB"}
    count *= len(WORDS["kind"]) * (len(WORDS["kind"]) - 1)
    for section in ("once", *(name for name in PLOTS["wish"].split()[1:] if ":" not in name)):
        pieces = expand(templates()[section][0])[0].pieces
        for piece in pieces:
            category = SHARED_SLOTS.get(piece.slot, piece.slot)
            if category in WORDS and piece.slot not in shared:
                count *= len(WORDS[category]) - len(pieces) - 2
            if piece.slot in SHARED_SLOTS:
                shared.add(piece.slot)
    return count


def model_card(facts: dict[str, float], curve: list[tuple[int, float]]) -> str:
    """The README.md of the model's folder, from what `evaluate` measured and the curve (stories, nats per token)."""
    per_token = facts["held_out_nats_per_story"] / facts["tokens_per_story"]
    return _CARD.format(
        **facts,
        num_held_out=NUM_HELD_OUT,
        magnitude=math.floor(math.log10(num_stories_at_least())),
        per_token=per_token,
        gain=1 - facts["generator_nats_per_story"] / facts["held_out_nats_per_story"],
        curve="\n".join(f"| {stories:,} | {nats:.3f} |" for stories, nats in curve),
    )


_CARD = """---
library_name: transformers
language: en
---
# The storyteller

A Llama with {num_parameters:,.0f} parameters (tied embeddings, head size 32, byte-level BPE of {vocab_size:,.0f}
tokens, float16) that tells small children's stories. It is the default model of fastkl: small enough to be trained by
reinforcement learning on two processor cores within minutes, and good enough that one sees when it forgets how to
write.

Its language is synthetic: `fastkl/storyteller/` holds the generator (at least 10^{magnitude} distinct stories) and a
checker that recognises the language's sentences. Every text begins with `<|endoftext|>`, which the tokenizer adds by
itself, and ends with it.

## How good it is
| | |
|---|---|
| cross entropy on {num_held_out} held-out stories | {held_out_nats_per_story:.1f} nats per story, \
{per_token:.3f} per token |
| entropy of the generator's choices for the same stories | {generator_nats_per_story:.1f} nats per story |
| so more training could gain at most about | {gain:.1%} |
| well-formed sentences among {num_sampled_sentences:,.0f}, sampled at temperature 1 after "Once upon a time" | \
{well_formed_share:.1%} (standard error {well_formed_standard_error:.1%}) |

Cross entropy during training, each story measured before the model learns from it (the learning rates fall to zero over
the last 60 %):

| stories seen | nats per token |
|---|---|
{curve}

## How it was made
Its logits are sharpened by {sharpness:g} after training (through the final norm's weight), a built-in sampling
temperature of {temperature:.2f}: fewer words that do not fit, for a slightly higher cross entropy (the one above).

`fastkl storyteller --output DIR` (seed {seed:.0f}): {steps:,.0f} steps, {stories:,.0f} stories, each seen once,
{train_seconds:,.0f} s. All text that it saw comes from the generator, whose words and templates were written for it.

## What it is not
It knows no facts and no English outside its templates; its stories keep names and things mostly, not always, straight.
"""
