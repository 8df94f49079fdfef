"""A sample's prompt as people read it: chat messages as roles with their texts, not as the tokens of a chat template.

In: a record of samples.jsonl. Out: turns, (role, text). A plain text is one turn without a role. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Turn = tuple[str, str]  # role, empty for a plain text; text

Sample = Mapping[str, Any]  # a record of samples.jsonl


ANSWERS = "assistant"  # the role whose words the completion is


def prompt_turns(sample: Sample) -> list[Turn]:
    """The messages of a chat; else the whole prompt, as the model saw it."""
    messages = sample.get("messages")
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages) and messages:
        return [(str(message.get("role") or "?"), str(message.get("content") or "")) for message in messages]
    return [("", str(sample.get("prompt") or ""))]


def is_chat(sample: Sample) -> bool:
    """Whether its prompt is a list of messages."""
    return bool(prompt_turns(sample)[0][0])


def completion_text(sample: Sample) -> str:
    """What the model wrote."""
    return str(sample.get("completion") or "")


def continues(sample: Sample) -> bool:
    """Whether the completion goes on in the prompt's last turn: a plain text, or an answer that was begun."""
    return prompt_turns(sample)[-1][0] in ("", ANSWERS)


def prompt_text(sample: Sample) -> str:
    """The prompt on its own: "user: Why?", a paragraph per turn; a plain text as it is."""
    return "\n\n".join(f"{role}: {text}" if role else text for role, text in prompt_turns(sample))


def rewarded_texts(sample: Sample) -> tuple[str, str]:
    """(prompt, completion) as built-in reward functions see them: of a chat, the assistant's words alone."""
    return ("" if is_chat(sample) else prompt_turns(sample)[0][1], completion_text(sample))
