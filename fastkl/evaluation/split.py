"""The split: a share of the prompts is held out of the training, by a hash of each prompt.

Whether a prompt is held out depends on the prompt and the share alone: not on its place in the file, on the other
prompts, on the seed, the tokenizer or the system prompt. So it stays on its side when rows are added, and a prompt that
stands in several rows is never on both sides. A larger share holds out the prompts of a smaller one, and more.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b

from fastkl.errors import UserError
from fastkl.types import Prompt


def key_of(prompt: Prompt) -> str:
    """What makes two prompts the same: the text, or the chat without its system messages.

    A text is the same prompt as a chat of this one message.
    """
    if isinstance(prompt.raw, str):
        return prompt.raw
    asked = [message for message in prompt.raw if message["role"] != "system"]
    if len(asked) == 1:
        return asked[0]["content"]
    return json.dumps([(message["role"], message["content"]) for message in asked])


def place_of(prompt: Prompt) -> float:
    """The prompt's place in [0, 1), uniform over prompts: held out below the share."""
    digest = blake2b(key_of(prompt).encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def hold_out(prompts: Sequence[Prompt], share: float) -> tuple[list[Prompt], list[Prompt]]:
    """(prompts to train on, prompts held out), both in the order of the file. UserError where one would be empty."""
    train = [prompt for prompt in prompts if place_of(prompt) >= share]
    held = [prompt for prompt in prompts if place_of(prompt) < share]
    if not train or not held:
        what = "all of" if held else "none of"
        raise UserError(
            f"eval_prompts: the share {share:g} holds out {what} the {len(prompts)} prompts; give another share, or "
            "name prompts of their own."
        )
    return train, held


def in_both(train: Sequence[Prompt], held: Sequence[Prompt]) -> int:
    """How many held-out prompts are trained on, too."""
    trained = {key_of(prompt) for prompt in train}
    return sum(key_of(prompt) in trained for prompt in held)
