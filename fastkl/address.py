"""Addresses: NAME?KEY=VALUE&KEY=VALUE, the way in which one setting says where something is and which part is meant;
which hosts are this machine itself, and by what the others are trusted."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import unquote

from fastkl.errors import UserError, nearest

if TYPE_CHECKING:
    import ssl

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Hosts that nobody else reaches, and to which no proxy leads."""


@cache
def certificates() -> ssl.SSLContext:
    """What https addresses are trusted by; read once, since that takes longer than a request."""
    import httpx

    return httpx.create_ssl_context()


def name_and_options(setting: str, address: str) -> tuple[str, dict[str, str]]:
    """The name before the question mark and the options after it, %XX decoded; UserError begins with `setting`."""
    name, _, query = address.partition("?")
    options: dict[str, str] = {}
    for pair in query.split("&") if query else ():
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise UserError(f"{setting}: {pair!r} in {address!r} is no option; write NAME?KEY=VALUE&KEY=VALUE.")
        if key in options:
            raise UserError(f"{setting}: {address!r} gives {key!r} twice; give it once.")
        options[unquote(key)] = unquote(value)
    return name, options


def check_options(setting: str, address: str, options: Iterable[str], known: Iterable[str]) -> None:
    """UserError for the first option that is none of those known."""
    known = list(known)
    for name in options:
        if name not in known:
            raise UserError(
                f"{setting}: {address!r} has no option {name!r}.{nearest(name, known)} It has {', '.join(known)}."
            )
