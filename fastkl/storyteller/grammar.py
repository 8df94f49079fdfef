"""The generator: plots -> templates -> words. In: a seed. Out: one story, the same on every machine and Python version.

A story is a list of sections (templates.PLOTS); each section is told by one template, each template by one of its
expansions (its choices made), each slot by a word. Every choice is uniform or has its weight written in templates.py,
and its cost -log p is added up, so that the entropy of the language is known: the mean of `story_nats` is what a
perfect model would reach (a little less at most: few texts can be derived in two ways).
Left out: meaning. A plot keeps its characters, things and places, but nobody checks that a yak fits into a teapot.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from functools import cache

from fastkl.storyteller.lexicon import GENDER, WORDS
from fastkl.storyteller.templates import MACROS, PLOTS, SECTIONS, SHARE_ONCE

# Slots that keep one word for the whole story, and the category of each.
SHARED_SLOTS = {"X": "thing", "F": "food", "P": "place", "home": "place", "K": "skill"} | {
    "kindA": "kind",
    "kindB": "kind",
}
# Slots of A's and B's pronouns, by gender.
PRONOUNS = {
    slot + role: {"m": male, "f": female}
    for slot, male, female in (("he", "he", "she"), ("him", "him", "her"), ("his", "his", "her"))
    for role in ("", "2")
}
_INNERMOST_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_PIECE = re.compile(r'("?)(?:\{(\w+)\}|([A-Za-z]+))(\S*)')


@dataclass(frozen=True, slots=True)
class Piece:
    """One written word of an expanded template: a slot or a literal word, and the marks before and after it."""

    prefix: str  # an opening quotation mark or ""
    slot: str  # "" for a literal word
    literal: str  # "" for a slot; in lower case, but for "I"
    suffix: str


@dataclass(frozen=True, slots=True)
class Sentence:
    """One expansion of a template, ready to be told or to be recognised."""

    pieces: tuple[Piece, ...]
    weight: float  # share of this expansion among those of its template
    names_subject: bool
    points_back: bool  # speaks of A without the name, so that A must be the one last spoken of


@dataclass(frozen=True, slots=True)
class Character:
    name: str
    kind: str

    @property
    def gender(self) -> str:
        return GENDER[self.name]


@cache
def templates() -> dict[str, tuple[str, ...]]:
    """The templates of every section, one line each."""
    return {section: tuple(line.strip() for line in text.strip().splitlines()) for section, text in SECTIONS.items()}


@cache
def expand(template: str) -> tuple[Sentence, ...]:
    """All sentences of one template, their choices made; the weights add up to 1."""
    text = template.removeprefix("~")
    for name, macro in MACROS.items():
        text = text.replace(name, macro)
    return tuple(_sentence(flat, weight) for flat, weight in _choices(text).items())


def _choices(text: str) -> dict[str, float]:
    found = _INNERMOST_CHOICE.search(text)
    if found is None:
        return {text: 1.0}
    options = [option.partition("*") for option in found[1].split("|")]
    weights = [float(weight or 1) for _, _, weight in options]
    result: dict[str, float] = {}
    for (option, _, _), weight in zip(options, weights, strict=True):
        for flat, share in _choices(text[: found.start()] + option + text[found.end() :]).items():
            result[flat] = result.get(flat, 0.0) + share * weight / sum(weights)
    return result


def _sentence(flat: str, weight: float) -> Sentence:
    pieces = tuple(_piece(word) for word in flat.split())
    slots = {piece.slot for piece in pieces}
    names_subject = "A" in slots
    points_back = not names_subject and bool(slots & {"he", "him", "his", "kindA"})
    return Sentence(pieces, weight, names_subject, points_back)


def _piece(word: str) -> Piece:
    found = _PIECE.fullmatch(word)
    assert found is not None, f"cannot read {word!r} in a template"
    prefix, slot, literal, suffix = found.groups(default="")
    return Piece(prefix, slot, literal if literal == "I" else literal.lower(), suffix)


def article(next_word: str) -> str:
    """ "a" or "an", by spelling (the lexicon holds no word that sounds otherwise)."""
    return "an" if next_word[0].lower() in "aeiou" else "a"


def write(pieces: tuple[Piece, ...], words: list[str]) -> str:
    """The sentence as text: marks around the words, a capital letter at its start and at the start of a quotation."""
    written = []
    for i, (piece, word) in enumerate(zip(pieces, words, strict=True)):
        starts = i == 0 or piece.prefix
        written.append(piece.prefix + (word[0].upper() + word[1:] if starts else word) + piece.suffix)
    return " ".join(written)


class _Teller:
    """Tells one story. Holds who and what it is about, who was last spoken of, and the cost of the choices so far."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.nats = 0.0
        names, kinds = sorted(GENDER), WORDS["kind"]
        hero = Character(self._pick(names), self._pick(kinds))
        others = [name for name in names if name != hero.name]
        friend = Character(self._pick(others), self._pick([kind for kind in kinds if kind != hero.kind]))
        self.characters = (hero, friend)
        self.last_named: Character | None = None
        self.shared: dict[str, str] = {}
        self.told: list[str] = []
        self.used_templates: set[str] = set()

    def tell(self) -> str:
        plot = self._pick(list(PLOTS.values()))
        for section in plot.split():
            name, _, share = section.partition(":")
            if name == "opening":
                name = "once" if self._happens(SHARE_ONCE) else "opening"
            if not share or self._happens(float(share)):
                self.told.append(self._say(name))
        return " ".join(self.told)

    def _pick(self, options: list[str] | tuple[str, ...]) -> str:
        self.nats += math.log(len(options))
        return options[int(self.rng.random() * len(options))]

    def _happens(self, share: float) -> bool:
        happens = self.rng.random() < share
        self.nats -= math.log(share if happens else 1.0 - share)
        return happens

    def _say(self, section: str) -> str:
        template = self._pick([template for template in templates()[section] if self._sentences(template)])
        subject, other = self._roles(template)
        sentence = self._choose(self._sentences(template))
        self.used_templates.add(template)
        if sentence.names_subject:
            self.last_named = subject
        if "{both}" in template:
            self.last_named = None  # "he" after "they" could be either
        return self._fill(sentence, subject, other)

    def _roles(self, template: str) -> tuple[Character, Character]:
        hero, friend = self.characters
        return (friend, hero) if template.startswith("~") else (hero, friend)

    def _sentences(self, template: str) -> tuple[Sentence, ...]:
        """The sentences of a template that fit here: no template twice, and "he" only for the one last spoken of."""
        if template in self.used_templates:
            return ()
        sentences = expand(template)
        if self.last_named == self._roles(template)[0]:
            return sentences
        return tuple(sentence for sentence in sentences if not sentence.points_back)

    def _choose(self, sentences: tuple[Sentence, ...]) -> Sentence:
        total = sum(sentence.weight for sentence in sentences)
        mark = self.rng.random() * total
        for sentence in sentences:
            mark -= sentence.weight
            if mark < 0:
                break
        self.nats -= math.log(sentence.weight / total)
        return sentence

    def _fill(self, sentence: Sentence, subject: Character, other: Character) -> str:
        words: list[str] = []
        used = {self.shared.get(piece.slot, "") for piece in sentence.pieces} | {c.kind for c in self.characters}
        for piece in sentence.pieces:
            words.append(piece.literal or self._word(piece.slot, subject, other, used))
        words = [article(words[i + 1]) if piece.slot == "a" else words[i] for i, piece in enumerate(sentence.pieces)]
        return write(sentence.pieces, words)

    def _word(self, slot: str, subject: Character, other: Character, used: set[str]) -> str:
        if slot in ("A", "B"):
            return (subject if slot == "A" else other).name
        if slot in PRONOUNS:
            return PRONOUNS[slot][(other if slot.endswith("2") else subject).gender]
        if slot in ("kindA", "kindB"):
            return (subject if slot == "kindA" else other).kind
        if slot == "a":
            return "a"
        if slot in self.shared:
            return self.shared[slot]
        word = self._pick([word for word in WORDS[SHARED_SLOTS.get(slot, slot)] if word not in used])
        used.add(word)
        if slot in SHARED_SLOTS:
            self.shared[slot] = word
        return word


def story(seed: int) -> str:
    """One story: plain text, sentences joined by single blanks, 7 to 13 sentences."""
    return _Teller(seed).tell()


def story_nats(seed: int) -> float:
    """-log of the probability (nats) with which the generator makes the choices of this story."""
    teller = _Teller(seed)
    teller.tell()
    return teller.nats
