"""Makes the storyteller: stories -> byte-level BPE tokenizer -> Llama -> a folder in Hugging Face format, with a card.

In: an output folder and a seed. Out: config.json, generation_config.json, model.safetensors (float16), tokenizer.json,
tokenizer_config.json and README.md, the card of measured numbers. Every training story is new (the generator never runs
dry), so there are no epochs and nothing to overfit; held-out stories come from seeds that training never uses. A
document is `<|endoftext|>` + story + `<|endoftext|>`; the tokenizer puts the first one in front of every text by
itself, so that a tokenised prompt is exactly a prefix that training saw. Hidden matrices are trained by Muon,
embeddings and norms by AdamW.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastkl.storyteller.grammar import story
from tools.storyteller.measure import cross_entropy, encode, evaluate, model_card, pad_rows

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"


SEEDS_PER_RUN = 1_000_000_000  # training seeds lie in [seed * 1e9, ...), held-out ones are negative


MUON_RATE, ADAMW_RATE = 5e-3, 5e-3


NUM_TOKENIZER_STORIES = 640


# Of 1.0, 1.12, 1.2, 1.3: 91.8, 94.2, 94.6, 95.6 % well formed, 222.6, 223.0, 223.9, 225.5 nats per held-out story.
SHARPNESS = 1.35


def make_storyteller(
    output: Path,
    *,
    seed: int = 0,
    steps: int = 1800,
    stories_per_step: int = 32,
    num_eval_samples: int = 512,
    vocab_size: int = 2048,
    hidden_size: int = 192,
    num_layers: int = 3,
    log: Callable[[str], None] = print,
) -> dict[str, float]:
    """Trains the storyteller and writes it into `output` (created if missing); same arguments, same weights.

    Returns the measured numbers that the card holds: held-out cross entropy and the generator's entropy (nats), the
    well-formed share of sampled sentences with its standard error, sizes, seconds. `hidden_size` is a multiple of 32.
    """
    import torch

    output.mkdir(parents=True, exist_ok=True)  # an unwritable place should fail now, not after training
    started = time.perf_counter()
    torch.manual_seed(seed)
    first_seed = seed * SEEDS_PER_RUN
    num_stories = steps * stories_per_step
    tokenizer = train_tokenizer([story(first_seed + i) for i in range(NUM_TOKENIZER_STORIES)], vocab_size)
    model = new_model(tokenizer, hidden_size, num_layers)
    log(f"tokenizer of {len(tokenizer)} tokens, model of {model.num_parameters():,} parameters")
    curve = train(model, tokenizer, batches(tokenizer, first_seed, steps, stories_per_step), steps, log)
    train_seconds = time.perf_counter() - started
    sharpen(model, SHARPNESS)
    model.half().float()  # what is measured is what is shipped
    facts = evaluate(model, tokenizer, num_samples=num_eval_samples, seed=seed)
    facts |= {"seed": seed, "steps": steps, "stories": num_stories, "train_seconds": train_seconds}
    facts |= {"sharpness": SHARPNESS, "temperature": 1 / SHARPNESS}
    model.half().save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "README.md").write_text(model_card(facts, curve))
    log(f"wrote {output}: {100 * facts['well_formed_share']:.1f} % of the sampled sentences are well formed")
    return facts


def sharpen(model: LlamaForCausalLM, factor: float) -> None:
    """Multiplies all logits by `factor`, in place, through the final norm: a built-in temperature of 1 / factor.

    A model this small leaves a little probability on words that do not fit; sharpening takes most of it away, at a
    slight cost in cross entropy that the card states.
    """
    model.model.norm.weight.data.mul_(factor)


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the end-of-text token (also the one that begins every text) and a padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT, PAD], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    begin = (END_OF_TEXT, bpe.token_to_id(END_OF_TEXT))
    bpe.post_processor = processors.TemplateProcessing(single=f"{END_OF_TEXT} $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PAD, model_max_length=512
    )


def new_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int) -> LlamaForCausalLM:
    """A Llama with head_dim 32 (vLLM's CPU attention takes 32 and more) and tied embeddings, float32.

    Its generation config samples at temperature 1 from the whole vocabulary.
    """
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

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
        storyteller=True,  # so that fastkl knows, wherever the folder lies, that this model's sentences can be checked
    )
    model = LlamaForCausalLM(config)
    special = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **special)
    return model


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: Iterator[list[list[int]]],
    steps: int,
    log: Callable[[str], None],
) -> list[tuple[int, float]]:
    """One update of the mean cross entropy per token for each batch, in place.

    Returns the curve, ten times (stories seen, nats per token): the mean loss since the last point, on batches that are
    new to the model when they are measured, so that it is a held-out cross entropy.
    """
    import torch

    optimizers = new_optimizers(model)
    curve: list[tuple[int, float]] = []
    losses: list[float] = []
    started, num_tokens, num_stories = time.perf_counter(), 0, 0
    for step, batch in enumerate(rows):
        ids = pad_rows(batch, tokenizer.pad_token_id)
        loss = cross_entropy(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * rate_share(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        num_tokens, num_stories = num_tokens + ids.numel(), num_stories + len(batch)
        if (step + 1) % max(1, steps // 10) == 0:
            seconds = time.perf_counter() - started
            curve.append((num_stories, sum(losses) / len(losses)))
            speed = f"{num_tokens / seconds:,.0f} tokens/s, {seconds:.0f} s"
            log(f"step {step + 1}/{steps}: {curve[-1][1]:.3f} nats per token on new stories, {speed}")
            losses.clear()
    return curve


def batches(tokenizer: PreTrainedTokenizerFast, first_seed: int, num: int, size: int) -> Iterator[list[list[int]]]:
    """`num` batches of `size` new stories as token ids, those of a batch of similar lengths (sorted over 8 batches)."""
    shuffler = random.Random(first_seed)
    for start in range(0, num, 8):
        seeds = range(first_seed + start * size, first_seed + min(start + 8, num) * size)
        rows = sorted(encode(tokenizer, [story(seed) for seed in seeds]), key=len)
        group = [rows[i : i + size] for i in range(0, len(rows), size)]
        shuffler.shuffle(group)
        yield from group


def rate_share(step: int, steps: int) -> float:
    """The share of the full rate at a step: up over the first 2 %, flat, linearly to zero over the last 60 %."""
    return min(1.0, (step + 1) / (0.02 * steps + 1), (steps - step) / (0.6 * steps))


def new_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings and norms; each group keeps its full rate as `full_lr`."""
    import torch

    from tools.storyteller.muon import Muon

    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    adamw = torch.optim.AdamW(others, lr=ADAMW_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    optimizers = [Muon(matrices, lr=MUON_RATE), adamw]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    return optimizers
