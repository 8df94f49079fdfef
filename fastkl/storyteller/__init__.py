"""The embedded default model: a small storyteller, the language it speaks, and a checker of that language's sentences.

`story(seed)` tells a story, `check(text)` says how many sentences of a text are well formed, `model_path()` is the
folder of the shipped model, which tools/storyteller/ of a checkout makes. Importing this package needs the standard
library only.

Reading order: lexicon.py (words) -> templates.py (sentences and plots) -> grammar.py (the generator) -> checker.py (the
recogniser of the same templates).
"""

from __future__ import annotations

from pathlib import Path

from fastkl.storyteller.checker import SentenceCheck, check, well_formed_share
from fastkl.storyteller.grammar import story, story_nats

__all__ = ["SentenceCheck", "check", "model_path", "story", "story_nats", "well_formed_share"]


def model_path() -> Path:
    """The folder of the shipped model and its tokenizer, in Hugging Face format."""
    return Path(__file__).resolve().parent / "model"
