"""Random models of known shapes with a tokenizer and prompts of their own: nothing is downloaded.

The weights are normal numbers of deviation 0.02, made on the device and written in bfloat16. The tokenizer has one
token per letter.
"""

from __future__ import annotations

import json
import random
import string
import sys
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "1.5B": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 512, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Those of Qwen2.5, and one to try the script with."""

CONTEXT = 4352
DEVIATION = 0.02


def num_parameters(shape: str) -> int:
    """How many numbers a model of this shape has; a tied head counts once."""
    s = SHAPES[shape]
    hidden, kv = s["hidden_size"], s["hidden_size"] // s["num_attention_heads"] * s["num_key_value_heads"]
    attention = 2 * hidden * hidden + 2 * hidden * kv + hidden + 2 * kv
    layer = attention + 3 * hidden * s["intermediate_size"] + 2 * hidden
    heads = 1 if s["tie_word_embeddings"] else 2
    return s["num_hidden_layers"] * layer + heads * s["vocab_size"] * hidden + hidden


def write_model(shape: str, folder: str) -> None:
    """A model folder that transformers and vLLM load."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        **SHAPES[shape], max_position_embeddings=CONTEXT, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        dtype=torch.bfloat16, architectures=["Qwen2ForCausalLM"],
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device("meta"):
        empty = Qwen2ForCausalLM(config)
    weights = {}
    for name, parameter in empty.named_parameters():  # a tied head is not among them
        made = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        if name.endswith("norm.weight"):
            made.fill_(1)
        elif name.endswith("bias"):
            made.zero_()
        else:
            made.normal_(0, DEVIATION)
        weights[name] = made.cpu()
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(weights, Path(folder, "model.safetensors"), metadata={"format": "pt"})
    config.save_pretrained(folder)
    write_tokenizer(SHAPES[shape]["vocab_size"], folder)


def write_tokenizer(vocab: int, folder: str) -> None:
    """Bytes without merges, since transformers reads such a model's tokenizer in its own way; other ids are "x300".

    It adds an end of text, too, which is the last id; nothing ends with it unless told to.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    words += [f"x{n}" for n in range(len(words), vocab - 1)] + ["<|endoftext|>"]
    made = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)


def prompts_of(count: int, tokens: int) -> list[str]:
    """Random prompts of exactly so many tokens, always the same."""
    draw = random.Random(0)
    return ["".join(draw.choices(string.ascii_lowercase, k=tokens)) for _ in range(count)]


def matmul_flops(seconds: float = 0.5, size: int = 8192) -> float:
    """The rate of bfloat16 products of two size x size matrices of random numbers, FLOP/s."""
    import time

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = size if device == "cuda" else 512
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for _ in range(3):
        a @ b
    start, done = now(), 0
    while now() - start < seconds:
        for _ in range(10):
            a @ b
        done += 10
    return done * 2.0 * size**3 / (now() - start)


if __name__ == "__main__":  # FOLDER SHAPE...: writes the models, prints the rate
    root, *shapes = sys.argv[1:]
    rate = matmul_flops()
    for one in shapes:
        write_model(one, str(Path(root, one)))
    print("\n" + json.dumps({"matmul_flops": rate}))
