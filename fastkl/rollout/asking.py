"""Asking: one question to a server over HTTP, and what becomes of it.

A server that cannot be reached is lost, and one that answers that it has failed is there: whoever asks tells the two
apart, or takes both alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fastkl.address import LOOPBACK, certificates

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS = 5.0


class NoAnswer(Exception):
    """A server that does not do what it is asked to."""


class Unreached(NoAnswer):
    """It cannot be reached, or does not answer in time."""


class Failed(NoAnswer):
    """It is there, and says that it has failed."""


def client_of(url: str, seconds: float | None = None) -> httpx.AsyncClient:
    """Connections to a server, as many as are wanted. seconds: for each answer; None: somebody else watches."""
    import httpx

    return httpx.AsyncClient(
        timeout=httpx.Timeout(seconds, connect=CONNECT_SECONDS, pool=None),
        limits=httpx.Limits(max_connections=None),
        trust_env=urlsplit(url).hostname not in LOOPBACK,  # no proxy leads to this machine
        verify=certificates(),
    )


async def ask(url: str, path: str, body: Mapping[str, Any], seconds: float | None = None) -> httpx.Response:
    """The answer to one question; see `client_of` and `post`."""
    async with client_of(url, seconds) as client:
        return await post(client, url, path, body)


async def post(client: httpx.AsyncClient, url: str, path: str, body: Mapping[str, Any]) -> httpx.Response:
    """The answer of the server at this address, unless its status says that it has failed; other statuses are the
    caller's."""
    import httpx

    try:
        answer = await client.post(f"{url}/{path}", json=body)
    except httpx.RequestError as failure:
        raise Unreached(f"{type(failure).__name__}: {str(failure).rstrip('.')}") from None
    if answer.status_code >= 500:
        raise Failed(f"{path.partition('?')[0]} answered with status {answer.status_code}")
    return answer


def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of an async function, whether or not this thread runs an event loop already."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(function(*arguments))).result()
