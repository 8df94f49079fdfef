"""A reward that a server computes: `--reward http://HOST:PORT/PATH`, with options for this side after a #.

In: the step's prompts, completions and columns. Out: their rewards. The server gets POST requests with JSON

    {"step": 3, "prompts": [...], "completions": [...], "columns": {"answer": [...], ...}}

lists of equal length, with prompts and completions as a reward function gets them (texts, or lists of messages), and
answers {"rewards": [0.5, null, ...]}: for each completion, in order, a number, or null where the reward does not apply.

Requests go out in batches, several at a time. What was asked once is not asked again: answers are kept by prompt,
completion and columns. A request that fails (no connection, no answer in time, status 429 or 5xx) is repeated after
0.5, 1, 2, ... seconds; any other answer that is none ends the run. Redirections are not followed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from fastkl.address import LOOPBACK, certificates, check_options, name_and_options
from fastkl.errors import UserError
from fastkl.rewards.prepared import PreparedReward

if TYPE_CHECKING:
    import httpx
    import torch

MAX_PAUSE_SECONDS = 8.0


@dataclass(frozen=True, slots=True)
class Options:
    """What stands after the #."""

    timeout: float = 60.0  # seconds for one request
    retries: int = 4  # attempts after the first
    concurrency: int = 8  # requests at a time
    batch: int = 32  # completions in a request
    cache: str = "on"  # "on": kept while the process lives; "off"; or a file, which other runs may read
    token: str = ""  # the environment variable with a bearer token


@dataclass(frozen=True, slots=True)
class Item:
    """One completion to be scored."""

    prompt: Any
    completion: Any
    columns: Mapping[str, Any]

    def key(self, url: str) -> str:
        """The same for what is the same to the server."""
        text = json.dumps([url, self.prompt, self.completion, self.columns], sort_keys=True, default=str)
        return blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()


class NoAnswer(Exception):
    """An attempt that may be repeated."""


class RemoteReward(PreparedReward):
    """The reward function; see above for the protocol."""

    def __init__(self, address: str) -> None:
        self.url, _, options = address.partition("#")
        self.options = options_of(address, options)
        self.host, self.port = place_of(self.url)
        self.__name__ = Path(urlsplit(self.url).path).name or self.host
        self.known = Answers(self.options.cache)

    def prepare(self, device: torch.device) -> None:
        """Sees that somebody listens; behind a proxy only the first request can tell."""
        if self.host not in LOOPBACK and getproxies():
            return
        try:
            socket.create_connection((self.host, self.port), timeout=5).close()
        except OSError as failure:
            raise UserError(f"reward: nothing listens at {self.url} ({failure}); start the server first.") from failure

    async def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Any = None,
        trainer_state: Any = None,
        log_metric: Any = None,
        log_extra: Any = None,
        **columns: Sequence[Any],
    ) -> list[float | None]:
        self.retried = 0
        step = trainer_state.global_step if trainer_state else 0
        rows = [{name: values[i] for name, values in columns.items()} for i in range(len(prompts))]
        items = list(map(Item, prompts, completions, rows))
        keys = [item.key(self.url) for item in items]
        unknown = {key: item for key, item in zip(keys, items, strict=True) if key not in self.known.rewards}
        fresh = await self.ask(unknown, step)  # samples that are alike are asked for once
        self.known.add(fresh)
        return [fresh[key] if key in fresh else self.known.rewards[key] for key in keys]

    async def ask(self, items: Mapping[str, Item], step: int) -> dict[str, float | None]:
        """The server's rewards, by key."""
        if not items:
            return {}
        import httpx

        keys, size = list(items), self.options.batch
        batches = [keys[i : i + size] for i in range(0, len(keys), size)]
        free = asyncio.Semaphore(self.options.concurrency)
        limits = httpx.Limits(max_connections=None)  # who waits for the semaphore has not been asked yet
        own_network = self.host in LOOPBACK  # where no proxy leads
        async with httpx.AsyncClient(
            timeout=None, limits=limits, trust_env=not own_network, verify=certificates()
        ) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [
                        group.create_task(self.ask_batch(client, free, [items[key] for key in batch], step))
                        for batch in batches
                    ]
            except* Exception as failures:  # the first of them; the other requests are cancelled
                raise failures.exceptions[0] from None
        return {
            key: reward
            for batch, task in zip(batches, tasks, strict=True)
            for key, reward in zip(batch, task.result(), strict=True)
        }

    async def ask_batch(
        self, client: httpx.AsyncClient, free: asyncio.Semaphore, items: Sequence[Item], step: int
    ) -> list[float | None]:
        """The rewards of one request, which is repeated while the server fails."""
        columns = dict.fromkeys(name for item in items for name in item.columns)
        request = {
            "step": step,
            "prompts": [item.prompt for item in items],
            "completions": [item.completion for item in items],
            "columns": {name: [item.columns.get(name) for item in items] for name in columns},
        }
        body = json.dumps(request, default=str).encode()
        where = f"reward: {self.url} at step {step}"
        for attempt in range(self.options.retries + 1):
            try:
                async with free:
                    return rewards_in(await self.post(client, body, where), len(items), where)
            except NoAnswer as failure:
                reason = str(failure)
            if attempt < self.options.retries:
                self.retried = (self.retried or 0) + 1
                await asyncio.sleep(min(0.5 * 2**attempt, MAX_PAUSE_SECONDS))
        tried = f"{self.options.retries + 1} attempts" if self.options.retries else "one attempt"
        raise UserError(f"{where} gave no rewards in {tried}, at last: {reason}; mend the server, then --resume.")

    async def post(self, client: httpx.AsyncClient, body: bytes, where: str) -> str:
        """The text of the answer. Raises NoAnswer for what may go better next time, UserError for what will not."""
        import httpx

        headers = {"Content-Type": "application/json"}
        if self.options.token:
            headers["Authorization"] = f"Bearer {os.environ[self.options.token]}"
        try:
            async with asyncio.timeout(self.options.timeout):
                answer = await client.post(self.url, content=body, headers=headers)
        except TimeoutError:
            raise NoAnswer(f"no answer in {self.options.timeout:g} s") from None
        except httpx.RequestError as failure:
            raise NoAnswer(f"{type(failure).__name__}: {str(failure).rstrip('.')}") from None
        if answer.status_code == 429 or answer.status_code >= 500:
            raise NoAnswer(f"status {answer.status_code}, {beginning(answer.text)}")
        if answer.status_code != 200:
            raise UserError(
                f"{where} answered with status {answer.status_code}, {beginning(answer.text)}; 200 is wanted."
            )
        return answer.text


@dataclass(slots=True)
class Answers:
    """The rewards that are known, by key."""

    cache: str  # as in Options
    rewards: dict[str, float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (path := self.path) is None:
            return
        try:
            path.touch()
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # behind the last break: a half-written line
        except (OSError, UnicodeDecodeError) as failure:
            raise UserError(
                f"reward: cache={self.cache} cannot be used ({failure}); name a file to write to."
            ) from failure
        for line in lines:
            key, _, reward = line.partition(" ")
            with contextlib.suppress(ValueError):  # a half-written line that others have been added to
                self.rewards[key] = None if reward == "null" else float(reward)

    @property
    def path(self) -> Path | None:
        """The file, where there is one."""
        return None if self.cache in ("on", "off") else Path(self.cache).expanduser()

    def add(self, fresh: Mapping[str, float | None]) -> None:
        """Keeps these, too."""
        if self.cache == "off":
            return
        self.rewards |= fresh
        if self.path is not None and fresh:
            lines = [f"{key} {json.dumps(reward)}\n" for key, reward in fresh.items()]
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(lines))


def rewards_in(text: str, num_items: int, where: str) -> list[float | None]:
    """The rewards of an answer. UserError unless they are as many numbers or nulls as there were completions."""
    try:
        found = json.loads(text)["rewards"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f'{where} answered {beginning(text)}; {{"rewards": [...]}} is wanted.') from None
    if not isinstance(found, list) or len(found) != num_items:
        given = f"{len(found)} rewards" if isinstance(found, list) else beginning(repr(found))
        raise UserError(f"{where} answered with {given} for {num_items} completions; give one for each.")
    for reward in found:
        if reward is not None and not is_number(reward):
            said = beginning(repr(reward))
            raise UserError(f"{where} answered with the reward {said}; a finite number or null is wanted.")
    return [None if reward is None else float(reward) for reward in found]


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # 10**400
        return False


def options_of(address: str, text: str) -> Options:
    """The options after the #. UserError for one that is unknown or out of range."""
    _, given = name_and_options("reward", f"?{text}")
    check_options("reward", address, given, [field.name for field in fields(Options)])
    values: dict[str, Any] = {}
    for name, value in given.items():
        kind = type(getattr(Options(), name))
        least = {"timeout": 0.001, "concurrency": 1, "batch": 1, "retries": 0}.get(name)
        try:
            values[name] = kind(value)
        except ValueError:
            raise UserError(f"reward: {name}={value} in {address!r} is not a number.") from None
        if least is not None and not least <= values[name] < math.inf:
            raise UserError(f"reward: {name}={value} in {address!r} is out of range; it must be {least} or more.")
    if (token := values.get("token")) and token not in os.environ:
        raise UserError(f"reward: token={token} in {address!r} names no environment variable; set it to the token.")
    return Options(**values)


def place_of(url: str) -> tuple[str, int]:
    """Host and port. UserError for an address that is none, or that holds a password."""
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as failure:
        raise UserError(f"reward: {url!r} is no address ({failure}).") from failure
    if parts.scheme not in ("http", "https"):
        raise UserError(f"reward: {url!r} is not at http:// or https://; nothing else is asked.")
    if not parts.hostname:
        raise UserError(f"reward: {url!r} names no host; write http://HOST:PORT/PATH.")
    if parts.username is not None or parts.password is not None:
        raise UserError("reward: an address with a password would be written to config.yaml; use #token=ENV_VARIABLE.")
    return parts.hostname, port


def beginning(text: str) -> str:
    """The first characters of a text, on one line."""
    line = " ".join(text.split())
    return repr(line if len(line) <= 80 else f"{line[:77]}...")
