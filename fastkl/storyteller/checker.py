"""The checker: which sentences of a text are sentences of the storyteller's language?

In: any text. Out: how many sentences it has, and how many of them are well formed. A sentence is well formed when some
expansion of some template (templates.py, the same that the generator tells) matches it word for word, every slot
holding a word of its category, and
- words that fill slots differ from each other ("tall, tall and tall" is no description), and so do the two names;
- pronouns agree with the name in the sentence; without one, with the character last named as a subject;
- "a" and "an" fit the next word; capital letters and punctuation stand where the language has them;
- the sentence has not been told before in the same text.
All templates are merged into one trie over words and slots, so a sentence costs a few dictionary look-ups per word.
Left out: whether the story makes sense as a whole (things that change owners, a turtle that becomes an owl).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache

from fastkl.storyteller.grammar import PRONOUNS, SHARED_SLOTS, Piece, article, expand, templates
from fastkl.storyteller.lexicon import GENDER, WORDS

_WRITTEN_WORD = re.compile(r'("?)([A-Za-z]+)(\S*)')
# No sentence of the language ends with a quotation: `said Tim` or the like always follows it.
_ENDS = (".", "!", "?")


@dataclass(frozen=True, slots=True)
class SentenceCheck:
    """What `check` found. A finished sentence ends with . ! or ?"""

    num_well_formed: int
    num_sentences: int


@dataclass(slots=True)
class _Node:
    edges: dict[tuple[str, str, str], _Node] = field(default_factory=dict)  # (prefix, symbol, suffix) -> next
    is_end: bool = False


@dataclass(frozen=True, slots=True)
class _Match:
    """What a partly matched sentence has bound: genders and names of A and B, and the words in slots so far."""

    gender_a: str = ""
    gender_b: str = ""
    names: tuple[str, str] = ("", "")
    used: frozenset[str] = frozenset()


def check(text: str) -> SentenceCheck:
    """Counts the sentences of a text (a whole one: prompt and completion) and the well-formed ones among them.

    An unfinished last sentence is not counted as long as it can still become a well-formed one, its last word left
    aside since it may be cut; one that cannot ("to the tall tall tall") counts as a malformed sentence.
    """
    *finished, tail = split_sentences(text) + ([[]] if text.rstrip().endswith(_ENDS) else [])
    gender, told, num_well_formed = "", set(), 0
    for words in finished:
        match = None if tuple(words) in told else _match_sentence(words, gender)
        told.add(tuple(words))
        if match is not None:
            num_well_formed += 1
            gender = match.gender_a or gender
    return SentenceCheck(num_well_formed, len(finished) + (not _can_begin(tail[:-1])))


def well_formed_share(texts: Iterable[str]) -> float:
    """Well-formed sentences over all sentences, pooled over the texts; 0.0 where there is no sentence at all."""
    checks = [check(text) for text in texts]
    num_sentences = sum(c.num_sentences for c in checks)
    return sum(c.num_well_formed for c in checks) / num_sentences if num_sentences else 0.0


def split_sentences(text: str) -> list[list[str]]:
    """The written words of each sentence. The last sentence may be unfinished, and is [] in an empty text.

    A mark that closes a quotation ends the sentence only if no small letter follows: `"Where is it?" asked Tim.`
    """
    words = text.split()
    sentences: list[list[str]] = [[]]
    for word, next_word in zip(words, [*words[1:], ""], strict=False):
        sentences[-1].append(word)
        if next_word and (word.endswith(_ENDS) or (word.rstrip('"').endswith(_ENDS) and not next_word[0].islower())):
            sentences.append([])
    return sentences


@cache
def _trie() -> _Node:
    root = _Node()
    for lines in templates().values():
        for template in lines:
            for sentence in expand(template):
                node = root
                for piece in sentence.pieces:
                    node = node.edges.setdefault((piece.prefix, _symbol(piece), piece.suffix), _Node())
                node.is_end = True
    return root


def _symbol(piece: Piece) -> str:
    return "=" + piece.literal if piece.literal else SHARED_SLOTS.get(piece.slot, piece.slot)


@cache
def _symbols_of_word() -> dict[str, tuple[str, ...]]:
    """Every word (names alone with a capital) -> the trie symbols that it may stand for, "=word" aside."""
    symbols: dict[str, tuple[str, ...]] = dict.fromkeys(GENDER, ("A", "B"))
    entries = [(word, category) for category, words in WORDS.items() for word in words]
    entries += [(word, slot) for slot, forms in PRONOUNS.items() for word in forms.values()]
    for word, symbol in [*entries, ("a", "a"), ("an", "a")]:
        symbols[word] = (*symbols.get(word, ()), symbol)
    return symbols


def _match_sentence(words: list[str], last_gender: str) -> _Match | None:
    """The first reading of a finished sentence that fits the gender last spoken of ("" if unknown), or None."""
    for node, match in _readings(words):
        if node.is_end and (match.names[0] or not last_gender or match.gender_a in ("", last_gender)):
            return match
    return None


def _can_begin(words: list[str]) -> bool:
    """Whether a sentence of the language begins with these words (a name may follow, so no gender is wrong yet)."""
    return next(iter(_readings(words)), None) is not None


def _readings(words: list[str]) -> Iterator[tuple[_Node, _Match]]:
    """All ways to walk from the root of the trie over these words, with what each has bound."""
    stack = [(_trie(), 0, _Match())]
    while stack:
        node, i, match = stack.pop()
        if i == len(words):
            yield node, match
            continue
        found = _WRITTEN_WORD.fullmatch(words[i])
        if found is None:
            continue
        prefix, core, suffix = found.groups()
        for word in _spellings(core, capital=i == 0 or prefix == '"'):
            for symbol in ("=" + word, *_symbols_of_word().get(word, ())):
                next_node = node.edges.get((prefix, symbol, suffix))
                if next_node is None or not _article_fits(symbol, word, words, i):
                    continue
                bound = _bind(match, symbol, word)
                if bound is not None:
                    stack.append((next_node, i + 1, bound))


def _spellings(core: str, capital: bool) -> tuple[str, ...]:
    """The word in the lexicon's spelling: where a capital letter is due, it may hide a small one."""
    if not capital:
        return (core,)
    return (core, core[0].lower() + core[1:]) if core[0].isupper() else ()


def _article_fits(symbol: str, word: str, words: list[str], i: int) -> bool:
    return symbol != "a" or i + 1 == len(words) or word == article(words[i + 1])


def _bind(match: _Match, symbol: str, word: str) -> _Match | None:
    """The bindings after one more word; None if the word contradicts them."""
    if symbol.startswith("=") or symbol == "a":
        return match
    if symbol in ("A", "B"):
        return _bind_name(match, symbol == "B", word)
    if symbol in PRONOUNS:
        gender = "m" if word == PRONOUNS[symbol]["m"] else "f"
        return _bind_gender(match, symbol.endswith("2"), gender)
    return None if word in match.used else replace(match, used=match.used | {word})


def _bind_name(match: _Match, is_b: bool, name: str) -> _Match | None:
    if match.names[is_b] not in ("", name) or match.names[not is_b] == name:
        return None
    names = (match.names[0], name) if is_b else (name, match.names[1])
    return _bind_gender(replace(match, names=names), is_b, GENDER[name])


def _bind_gender(match: _Match, is_b: bool, gender: str) -> _Match | None:
    if (match.gender_b if is_b else match.gender_a) not in ("", gender):
        return None
    return replace(match, gender_b=gender) if is_b else replace(match, gender_a=gender)
