"""Makes the storyteller: stories -> byte-level BPE tokenizer -> Llama -> a folder in Hugging Face format, with a card of measured numbers.

In: an output folder and a seed. Out: config.json, generation_config.json, model.safetensors (float16), tokenizer.json, tokenizer_config.json and
README.md. Every training story is new (the generator never runs dry), so there are no epochs and nothing to overfit; the held-out stories come
from seeds that training never uses. One document is `<|endoftext|>` + story + `<|endoftext|>`; the tokenizer puts the first one in front of every
text by itself, so a tokenised prompt is exactly a prefix that training saw. Hidden matrices are trained by Muon (Jordan et al. 2024, as in
torch.optim), embeddings and norms by AdamW; the rates warm up, stay, and fall linearly to zero.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastkl.storyteller.checker import check
from fastkl.storyteller.grammar import story, story_nats

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
IGNORED = -100  # the label that cross entropy skips
NUM_HELD_OUT = 512
SEEDS_PER_RUN = 1_000_000_000  # training seeds lie in [seed * 1e9, ...), held-out ones are negative


def make_storyteller(
    output: Path,
    *,
    seed: int = 0,
    steps: int = 2400,
    stories_per_step: int = 32,
    num_eval_samples: int = 256,
    vocab_size: int = 2048,
    hidden_size: int = 192,
    num_layers: int = 3,
    log: Callable[[str], None] = print,
) -> dict[str, float]:
    """Trains the storyteller and writes it into `output` (created if missing). The same arguments give the same weights on the same machine.

    Returns the measured numbers that the card holds: held-out cross entropies in nats, the well-formed share of sampled sentences with its
    standard error, sizes and seconds.
    """
    import torch

    started = time.perf_counter()
    torch.manual_seed(seed)
    tokenizer = train_tokenizer([story(seed * SEEDS_PER_RUN + i) for i in range(20 * stories_per_step)], vocab_size)
    log(f"tokenizer: {len(tokenizer)} tokens")
    model = new_model(tokenizer, hidden_size, num_layers)
    train(model, tokenizer, seed=seed, steps=steps, stories_per_step=stories_per_step, log=log)
    train_seconds = time.perf_counter() - started
    model = model.to(torch.float16).float()  # evaluate what is shipped
    facts = evaluate(model, tokenizer, num_samples=num_eval_samples, seed=seed)
    facts |= {"seed": seed, "steps": steps, "stories": steps * stories_per_step, "train_seconds": train_seconds}
    save(model, tokenizer, facts, output)
    log(f"wrote {output}: {100 * facts['well_formed_share']:.1f} % of sampled sentences are well formed")
    return facts


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the end-of-text token (also the one that begins every text) and a padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT, PAD], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    end_id = bpe.token_to_id(END_OF_TEXT)
    bpe.post_processor = processors.TemplateProcessing(single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, end_id)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PAD, model_max_length=512, clean_up_tokenization_spaces=False
    )


def new_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int) -> LlamaForCausalLM:
    """A Llama with head_dim 32 (what vLLM's CPU attention takes), tied embeddings, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, seed: int, steps: int, stories_per_step: int, log: Callable[[str], None]
) -> None:
    """`steps` updates of the mean cross entropy per token, in place."""
    import torch

    optimizers = _optimizers(model)
    model.train()
    started, num_tokens = time.perf_counter(), 0
    for step, ids in enumerate(batches(tokenizer, seed * SEEDS_PER_RUN, steps, stories_per_step)):
        loss = cross_entropy(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * learning_rate_share(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        num_tokens += ids.numel()
        if step % max(1, steps // 40) == 0 or step == steps - 1:
            seconds = time.perf_counter() - started
            log(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {num_tokens / seconds:,.0f} tokens/s  {seconds:.0f} s")
    model.eval()


def batches(tokenizer: PreTrainedTokenizerFast, first_seed: int, num: int, stories_per_step: int) -> Iterator[torch.Tensor]:
    """Batches of new stories, one per row: int64 [stories, longest], padded on the right. Sorted by length over 8 batches to pad little."""
    import random

    group = 8 * stories_per_step
    shuffler = random.Random(first_seed)
    for start in range(0, num * stories_per_step, group):
        seeds = range(first_seed + start, first_seed + min(start + group, num * stories_per_step))
        rows = sorted(encode(tokenizer, [story(s) for s in seeds]), key=len)
        chunks = [rows[i : i + stories_per_step] for i in range(0, len(rows), stories_per_step)]
        shuffler.shuffle(chunks)
        for chunk in chunks:
            yield pad(chunk, tokenizer.pad_token_id)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Whole documents: end-of-text, story, end-of-text."""
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]


def pad(rows: list[list[int]], pad_id: int) -> torch.Tensor:
    """int64 [rows, longest]; causal attention keeps padding on the right out of every story."""
    import torch

    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad_id)


def cross_entropy(model: LlamaForCausalLM, ids: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Next-token cross entropy in nats (f32) over the tokens of `ids` int64 [rows, length] that are not padding, the first of each row aside."""
    import torch

    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets = ids[:, 1:]
    keep = targets != model.config.pad_token_id
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[keep]).float(), targets[keep], reduction=reduction)


def learning_rate_share(step: int, steps: int) -> float:
    """The share of the full rate at a step: up over the first 2 %, flat, then linearly down to zero over the last 60 %."""
    return min(1.0, (step + 1) / (0.02 * steps + 1), (steps - step) / (0.6 * steps))


def _optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    import torch

    from fastkl.storyteller.muon import Muon

    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = [Muon(matrices, lr=MUON_LR), torch.optim.AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.98), weight_decay=0.0)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


MUON_LR, ADAMW_LR = 5e-3, 5e-3


def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, num_samples: int, seed: int) -> dict[str, float]:
    """Held-out cross entropies (nats per token, per story), the generator's own entropy beside them, and how well formed samples are."""
    import torch

    seeds = [-1 - i for i in range(NUM_HELD_OUT)]
    rows = sorted(encode(tokenizer, [story(s) for s in seeds]), key=len)
    num_tokens = sum(len(row) - 1 for row in rows)
    with torch.no_grad():
        nats = sum(cross_entropy(model, pad(rows[i : i + 32], tokenizer.pad_token_id), "sum").item() for i in range(0, len(rows), 32))
    texts = sample(model, tokenizer, "", num_samples, max_new_tokens=250, seed=seed)
    checks = [check(text) for text in texts]
    num_sentences = sum(c.num_sentences for c in checks)
    share = sum(c.num_well_formed for c in checks) / max(1, num_sentences)
    return {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "held_out_nats_per_token": nats / num_tokens,
        "held_out_nats_per_story": nats / len(rows),
        "generator_nats_per_story": sum(map(story_nats, seeds)) / len(seeds),
        "tokens_per_story": num_tokens / len(rows),
        "num_sampled_sentences": num_sentences,
        "well_formed_share": share,
        "well_formed_standard_error": math.sqrt(share * (1 - share) / max(1, num_sentences)),
    }


def sample(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, num: int, *, max_new_tokens: int, seed: int, rows: int = 64
) -> list[str]:
    """`num` texts (prompt and completion) sampled at temperature 1 from the whole vocabulary."""
    import torch

    torch.manual_seed(seed)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    texts: list[str] = []
    while len(texts) < num:
        size = min(rows, num - len(texts))
        inputs = ids.expand(size, -1)
        tokens = model.generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=True, top_k=0, max_new_tokens=max_new_tokens)
        texts += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return texts


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, facts: dict[str, float], output: Path) -> None:
    """Writes the folder: weights as float16 safetensors, tokenizer, and the card."""
    import torch

    output.mkdir(parents=True, exist_ok=True)
    model.to(torch.float16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "README.md").write_text("\n".join(f"{k}: {v}" for k, v in facts.items()))
