"""YAML that no one writes on purpose, and what the message about it holds, where it is taken for settings of a run."""

from __future__ import annotations

from cases import slow_where

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefg", "bcdefgh", strict=True)
)
ODD_YAML = {
    "alias bomb": (BOMB, "line 2 has an alias"),
    "merged alias": ("a: &a {lr: 1}\n<<: *a", "line 2 has an alias"),
    "5,000 digits": (f"steps: {'9' * 5000}", "is not a YAML file"),
    "5,000 hexadecimal digits": (f"steps: 0x{'f' * 5000}", "a number of hundreds of digits"),
    "5,000 digits below zero": (f"seed: -0x{'f' * 5000}", "a number of hundreds of digits"),
    "400 digits": (f"kl_coef: {'9' * 400}", "a number of hundreds of digits"),
    "40 digits": (f"steps: {'9' * 40}", "is out of range; it must be below 2^63"),
    "400 digits as text": (f"steps: '{'9' * 400}'", "is out of range; it must be below 2^63"),
    "3,000 brackets": (f"steps: {'[' * 3000}", "nested too deeply"),
    "3,000 pairs of brackets": (f"steps: {'[' * 3000}{']' * 3000}", "nested too deeply"),
    "a list for a number": ("kl_coef: [0.1, 0.2]", "kl_coef: [0.1, 0.2] is not a number"),
    "a long list for a number": (f"lr: {list(range(999))}", "..."),
    "a mapping for a number": ("steps: {a: 1}", "is not a whole number"),
    "nothing for a number": ("steps:", "steps: None is not a whole number"),
    "a date": ("model: 2020-01-01", "is not a text"),
    "bytes": ("model: !!binary aGVsbG8=", "is not a text"),
    "a wrong truth": ("resume: !!bool perhaps", "a value that does not fit its tag"),
    "a wrong date": ("model: !!timestamp soon", "a value that does not fit its tag"),
    "no digits": ("steps: !!int ''", "a value that does not fit its tag"),
    "an object": ("model: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    "a number for a name": ("? 0x" + "f" * 5000 + "\n: 1", "a number of hundreds of digits"),
    "a long name": ("? " + "k" * 5000 + "\n: 1", "there is no setting 'kkk"),
    "a list for a name": ("? [a]\n: 1", "is not a YAML file"),
    "no UTF-8": (b"model: \xff\xfe", "is not a YAML file"),
}
READ_BY_ALL = ("alias bomb", "5,000 digits", "3,000 brackets", "no UTF-8", "a wrong truth")
"""One of each kind; the others are read like one of these."""
ODD_NAMES = slow_where(lambda name: name not in READ_BY_ALL, ODD_YAML)
