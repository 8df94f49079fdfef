"""Prefixes: sequences that begin alike as a tree, so that no token is computed twice.

In: the token ids of a micro-batch's sequences. Out: the row of tokens to compute, and which scored tokens are the same.

A causal model's state at a token follows from the tokens up to it. Samples of one prompt share it and often their first
words; short answers come several times; prompts share what a chat template puts before them. All of it is computed
once, and since the gradients of equal tokens meet in one, the backward is as much shorter. Nothing is approximated.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import torch

from fastkl.types import Distinct, PrefixTree

Ids = tuple[int, ...]


def common(a: Ids, b: Ids) -> int:
    """With how many equal tokens both begin."""
    least, most = 0, min(len(a), len(b))
    while least < most:
        middle = (least + most + 1) // 2
        if a[least:middle] == b[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least


class Begun:
    """The beginnings of some sequences."""

    def __init__(self) -> None:
        self._sorted: list[Ids] = []

    def add(self, ids: Ids) -> int:
        """Adds a sequence, and returns how many of its tokens stand behind a beginning that none before it has."""
        at = bisect_left(self._sorted, ids)
        shared = max((common(ids, other) for other in self._sorted[max(0, at - 1) : at + 1]), default=0)
        self._sorted.insert(at, ids)
        return len(ids) - shared


def tree_of(sequences: Sequence[Ids], starts: Sequence[int], num_packed: int) -> PrefixTree:
    """The tree of sequences that stand at `starts` among num_packed packed tokens, without the last token of each,
    which predicts nothing that is scored.

    Sorted sequences are the tree's in depth-first order: each has all of its beginning in common with the one before it
    that it has in common with any.
    """
    place, end = np.full(num_packed, -1), np.zeros(num_packed, dtype=np.int64)
    row = np.zeros(max(map(len, sequences), default=0), dtype=np.int64)  # the last sequence's tokens in the row
    source, depth = [row[:0]], [row[:0]]
    begins: list[int] = []
    paths: list[torch.Tensor] = []
    last: Ids = ()
    computed = 0
    for ids, start in sorted((ids[:-1], start) for ids, start in zip(sequences, starts, strict=True)):
        shared, length = common(last, ids), len(ids)
        end[row[shared : len(last)]] = computed
        if length > shared:
            begins.append(computed)
            paths.append(torch.from_numpy(row[:shared].copy()))
            row[shared:length] = np.arange(computed, computed + length - shared)
            source.append(np.arange(start + shared, start + length))
            depth.append(np.arange(shared, length))
            computed += length - shared
        place[start : start + length] = row[:length]
        last = ids
    end[row[: len(last)]] = computed
    place[place < 0] = computed  # no state: to ask for one is an error
    numbers = np.concatenate(source), place, np.concatenate(depth), end[:computed].copy()
    found = [torch.from_numpy(values) for values in numbers]
    return PrefixTree(found[0], found[1], tuple(begins), tuple(paths), found[2], found[3])


def distinct_of(
    tree: PrefixTree, score_positions: torch.Tensor, target_ids: torch.Tensor, groups: torch.Tensor, num_groups: int
) -> Distinct | None:
    """Which of the scored tokens are the same, all i64 [N]; groups: that of each token, ascending. None where all
    differ."""
    if not len(target_ids):
        return None
    num_rows, num_ids = len(tree.source) + 1, int(target_ids.max()) + 1
    keys = (groups * num_rows + tree.place[score_positions]) * num_ids + target_ids
    kinds, copies = keys.unique(return_inverse=True)
    if len(kinds) == len(keys):
        return None
    rows = torch.full_like(kinds, len(keys)).scatter_reduce(0, copies, torch.arange(len(keys)), "amin")
    splits = torch.searchsorted(groups[rows], torch.arange(num_groups + 1))
    return Distinct(rows, copies, tuple(splits.tolist()))
