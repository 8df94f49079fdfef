"""Fingerprints: two numbers by which a tensor's bits are compared with another's, at the speed of memory."""

from __future__ import annotations

from functools import lru_cache

import torch

WORDS = 256
"""Words of 64 bits in a row; the sums over rows and over columns are weighted by position."""


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """Two sums of the tensor's bits in logical order: i64 [2], exact modulo 2^64, whatever the device adds first.

    The bits are taken as words w of 64 bits, laid out in rows r of WORDS columns c:

        sum_rc (c + 1) w_rc    and    sum_rc (r + 1) w_rc

    One changed bit changes both; exchanged numbers change the one or the other, since they change row or column. Two
    tensors of unlike bits have the same fingerprint by chance only, once in 2^64 for each of the sums.
    """
    words = _words(tensor.detach())
    whole = len(words) // WORDS * WORDS
    body, rest = words[:whole].view(-1, WORDS), words[whole:]
    sums = []  # what is not there is not summed: on a GPU every operation on a small tensor costs the same
    if len(body):
        sums.append(torch.stack([_weighted(body.sum(0)), _weighted(body.sum(1))]))
    if len(rest) or not len(body):
        sums.append(torch.stack([_weighted(rest), (len(body) + 1) * rest.sum()]))
    return sums[0] if len(sums) == 1 else sums[0] + sums[1]


def _weighted(words: torch.Tensor) -> torch.Tensor:
    """sum_i (i + 1) w_i."""
    return (words * _positions(len(words), words.device)).sum()


@lru_cache(maxsize=256)
def _positions(count: int, device: torch.device) -> torch.Tensor:
    """1, 2, ..., count."""
    return torch.arange(1, count + 1, device=device)


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """All bits as i64, without a copy where they lie side by side at a multiple of eight bytes."""
    flat = tensor.contiguous().view(-1)
    per_word = 8 // flat.element_size()
    if missing := -len(flat) % per_word:
        flat = torch.nn.functional.pad(flat, (0, missing))
    elif flat.storage_offset() % per_word:
        flat = flat.clone()
    return flat.view(torch.int64)
