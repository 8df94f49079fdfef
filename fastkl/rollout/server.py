"""Rollout by servers: requests go over HTTP to engines that `fastkl serve` has started, on this machine or others.

A push sends the weights over the network (transfer.py), or writes them to a file that the servers read (a folder that
all of them see); they compare them with what they then hold, and name them by a version. Completions count only if
their server had this version, in the same process, before and after it drew them. So a server may die at any moment:
its requests go to the others, with their seeds, and one that is started again gets the weights before it is asked for
anything.

Of several trainer processes the first alone speaks with the servers: it asks for all completions, and pushes weights
that all processes gather. What fails there is raised in each of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

import torch
from torch import nn

from fastkl.distributed.world import ALONE, World
from fastkl.errors import UserError
from fastkl.rollout import asking
from fastkl.rollout.agreement import StaleEngineError
from fastkl.rollout.asking import NoAnswer, client_of, in_thread
from fastkl.rollout.push_check import Weights
from fastkl.rollout.receiver import TAKEN
from fastkl.rollout.requests import EngineOptions, Request, completion
from fastkl.rollout.serve import NAME
from fastkl.rollout.transfer import LOAD_SECONDS, Broken, Member, Transfer, transport_of
from fastkl.rollout.weight_sync import by_first
from fastkl.sampling.params import Sampling, vllm_arguments
from fastkl.scoring.models import text_config
from fastkl.types import Completion

if TYPE_CHECKING:
    import httpx

CPU = torch.device("cpu")

CONCURRENCY = 256
"""Requests that one server has at a time; what it cannot draw at once waits in its own queue."""

ANSWER_SECONDS, DRAW_SECONDS = 30.0, 3600.0

PATIENCE_SECONDS = 300.0
"""How long a step waits for a server where none is left: one that is started again is there after a minute or more."""

PUSHES = 2
"""How often in a row a push may fail although all servers are there."""

ROUNDS = 4
"""How often in a row all servers may fail to draw anything although they answer."""


@dataclass(slots=True)
class Server:
    """One server, as it was when the weights reached it."""

    url: str
    instance: str = ""  # of its process; empty: no weights have reached it
    is_lost: bool = False  # has been said to be
    reason: str = ""  # why it was lost, the last time


class ServerGenerator:
    """Draws with servers. vocab: ids that the policy knows. folder: for the weights; the servers read it, too. world:
    the processes that it draws for; every one of them makes it, and calls `sync`."""

    serves_all = True

    def __init__(
        self,
        urls: Sequence[str],
        tokenizer: Any,
        sampling: Sampling,
        *,
        vocab: int,
        dtype: str,
        max_model_len: int,
        folder: Path,
        weights: str = "folder",
        device: torch.device = CPU,
        note: Callable[[str], None] = print,
        world: World = ALONE,
    ) -> None:
        self.servers = [Server(url.rstrip("/")) for url in urls]
        self.tokenizer, self.sampling, self.note = tokenizer, sampling, note
        self.wanted: dict[str, Any] = {"vocab": vocab, "dtype": dtype, "logprobs": "processed_logprobs"}
        self.max_model_len, self.folder, self.name = max_model_len, folder.resolve(), uuid4().hex[:8]
        self.step, self.version, self.tied = 0, "", False
        self.world, self.weights, self.device, self.why_folder = world, weights, device, ""
        self.transfer: Transfer | None = None  # in the first process alone
        world.once(self.check_all)

    def check_all(self) -> None:
        """UserError where a server does not answer, or does not fit."""
        abouts = [self.describe_or_refuse(server) for server in self.servers]
        if len({about["vllm"] for about in abouts}) > 1:
            versions = ", ".join(f"{s.url} has {a['vllm']}" for s, a in zip(self.servers, abouts, strict=True))
            raise UserError(f"engines: servers of one run have one version of vLLM, and {versions}.")
        by_url = {server.url: about for server, about in zip(self.servers, abouts, strict=True)}
        transport, self.why_folder = transport_of(by_url, self.weights, self.device)
        if transport:
            self.transfer = Transfer(transport, self.name, self.device)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """See Generator. Each request has its own seed, so that it is the same whichever server draws it."""
        found: dict[int, Completion] = {}
        in_vain = 0
        while left := [place for place in range(len(requests)) if place not in found]:
            ready = self.ready()
            drawn = in_thread(self.draw, {place: requests[place] for place in left}, ready)
            for server, completions in zip(ready, drawn, strict=True):
                if completions and self.holds(server):
                    found |= completions
            in_vain = 0 if any(place in found for place in left) else in_vain + 1
            if in_vain == ROUNDS:
                reasons = "; ".join(f"{server.url}: {server.reason}" for server in ready)
                raise UserError(
                    f"engines: the servers answer, but draw nothing ({reasons}); see what they have printed."
                )
        return [found[place] for place in range(len(requests))]

    def sync(self, policy: nn.Module, step: int = 0) -> None:
        """See Generator: the weights go to every server, and are compared there."""
        self.step, self.version = step, f"{self.name}-{step}"
        self.tied = bool(getattr(policy.config, "tie_word_embeddings", False))
        by_first(policy, self.world, self.push)

    def push(self, weights: Weights) -> None:
        """Gives every server the weights of now; the first process alone comes here."""
        if self.transfer is None:
            self.write(weights)
        else:
            self.transfer.keep(weights)
        self.fill(self.servers)
        self.ready()  # one of them has to have it
        for path in self.folder.glob("weights-*"):  # of the step before, or left behind by a run that was killed
            if path != self.path_of(self.version):
                path.unlink(missing_ok=True)

    def way(self) -> str:
        """How the weights reach the servers, for the user."""
        if self.transfer is not None:
            return f"engines: weights go to the servers over the network ({self.transfer.transport})"
        return f"engines: weights go to the servers through {self.folder} ({self.why_folder})"

    def rest(self) -> None:
        """See Generator: the servers' memory is their own."""

    def close(self) -> None:
        """See Generator. The servers go on; the weights' file, or their copy, is needed no more."""
        if self.transfer is not None:
            self.transfer.close()
        if self.version and self.world.is_first:
            self.path_of(self.version).unlink(missing_ok=True)

    def path_of(self, version: str) -> Path:
        """The file of these weights."""
        return self.folder / f"weights-{version}.safetensors"

    def write(self, weights: Weights) -> None:
        """The weights into their file, whole or not at all."""
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path_of(self.version)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights}
        save_file(unshared(tensors), path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)

    def ready(self) -> list[Server]:
        """The servers that hold the weights of now; those that have come back are given them. UserError where there
        is none for PATIENCE_SECONDS."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            self.fill([server for server in self.servers if not self.holds(server)])
            found = [server for server in self.servers if server.instance]
            if found:
                return found
            if time.monotonic() > deadline:
                urls = ", ".join(server.url for server in self.servers)
                raise UserError(f"engines: none of {urls} answers; start one again with `fastkl serve`, then --resume.")
            time.sleep(1.0)

    def holds(self, server: Server) -> bool:
        """Whether the server's process is the one that the weights of now have reached."""
        try:
            about = self.describe(server)
        except NoAnswer as failure:
            self.lose(server, str(failure))
            return False
        return bool(server.instance) and (about["instance"], about["version"]) == (server.instance, self.version)

    def fill(self, servers: Sequence[Server]) -> None:
        """Gives servers the weights; those that cannot be reached are lost."""
        if self.transfer is not None:
            return self.fill_over_network(servers, self.transfer)
        with ThreadPoolExecutor(max(1, len(servers))) as pool:
            list(pool.map(self.fill_from_folder, servers))

    def fill_over_network(self, servers: Sequence[Server], transfer: Transfer) -> None:
        """The same in one group, which is made again without those that are lost while it lasts."""
        in_vain = 0
        while members := [(server, about) for server in servers if (about := self.described(server)) is not None]:
            joining = [Member(s.url, a["instance"], a["workers"]) for s, a in members]
            try:
                transfer.send(joining, self.version, self.step, tied=self.tied)
            except Broken as failure:
                for server, _ in members:
                    if server.url in failure.lost:
                        self.lose(server, failure.lost[server.url])
                left = self.left_of([s for s, _ in members if s.url not in failure.lost])
                in_vain = in_vain + 1 if len(left) == len(members) else 0
                self.refuse_broken(left, failure, in_vain)
                continue
            for server, about in members:
                self.filled(server, about)
            return

    def left_of(self, servers: Sequence[Server]) -> dict[str, str]:
        """Those that are still there after a push that has failed, by address: what has failed there, or nothing."""
        return {server.url: about["failed"] for server in servers if (about := self.described(server)) is not None}

    def refuse_broken(self, said: Mapping[str, str], failure: Broken, in_vain: int) -> None:
        """UserError where a push fails again and again although all servers are there, or would take another run's.
        said: see left_of."""
        for url, reason in said.items():
            if reason == TAKEN:
                raise UserError(f"engines: {url}: {TAKEN}, and its trainer is alive; let each run have its servers.")
        if in_vain == PUSHES:
            reasons = "; ".join(f"{url}: {reason}" for url, reason in said.items() if reason) or str(failure)
            raise UserError(
                f"engines: weights do not reach the servers over the network, although they answer ({reasons}); open "
                "it in both directions, or use --engine-weights folder."
            )

    def described(self, server: Server) -> dict[str, Any] | None:
        """What a server is, if it fits; None where it is lost."""
        try:
            about = self.describe(server)
        except NoAnswer as failure:
            self.lose(server, str(failure))
            return None
        self.check(server, about)
        return about

    def fill_from_folder(self, server: Server) -> None:
        """Gives a server the weights from the file, unless it cannot be reached."""
        try:
            about = self.describe(server)
            self.check(server, about)
            self.ask(server, "resume", {}, ANSWER_SECONDS)  # a trainer that was killed may have left it paused
            asked = {"path": str(self.path_of(self.version)), "version": self.version, "step": str(self.step)}
            answers = self.call(server, "fastkl_load", asked | {"tied": str(self.tied)})
        except NoAnswer as failure:
            return self.lose(server, str(failure))
        if error := next((answer["error"] for answer in answers if answer["error"]), ""):
            raise StaleEngineError(f"{server.url}: {error}")
        self.filled(server, about)

    def filled(self, server: Server, about: Mapping[str, Any]) -> None:
        """It has the weights of now."""
        server.instance = about["instance"]
        if server.is_lost:
            self.note(f"engines: {server.url} is back, and has the weights after step {self.step}")
            server.is_lost = False

    def lose(self, server: Server, reason: str) -> None:
        """The others draw what it was asked for."""
        server.instance, server.reason = "", reason
        if not server.is_lost:
            self.note(f"engines: {server.url} is lost ({reason}); the others draw what it was asked for")
            server.is_lost = True

    def check(self, server: Server, about: Mapping[str, Any]) -> None:
        """UserError where the server cannot draw for this run, or draws for another one."""
        for name, wanted in self.wanted.items():
            if about[name] != wanted:
                raise UserError(
                    f"engines: {server.url} has {name} {about[name]}, and this run needs {wanted}; start it with "
                    f"`fastkl serve` for the same model{f' and --dtype {wanted}' if name == 'dtype' else ''}."
                )
        if about["max_model_len"] < self.max_model_len:
            raise UserError(
                f"engines: {server.url} takes {about['max_model_len']} tokens, and the longest prompt with its "
                f"completion has {self.max_model_len}; start it with --max-model-len {self.max_model_len}."
            )
        others = about["version"] and not about["version"].startswith(self.name)
        if others and server.instance and about["instance"] == server.instance:
            raise UserError(f"engines: another run has given {server.url} its weights; let each run have its servers.")

    def describe_or_refuse(self, server: Server) -> dict[str, Any]:
        """What a server is, at the start. UserError where nothing answers, or it does not fit."""
        try:
            about = self.describe(server)
        except NoAnswer as failure:
            raise UserError(
                f"engines: {server.url} does not answer ({failure}); start it with `fastkl serve MODEL --port "
                f"{urlsplit(server.url).port or 80}`."
            ) from None
        self.check(server, about)
        return about

    def describe(self, server: Server) -> dict[str, Any]:
        """What its workers say of themselves: each has an instance, and all must have one version. One that is
        lost already is not waited for."""
        seconds = asking.CONNECT_SECONDS if server.is_lost else ANSWER_SECONDS
        abouts = self.call(server, "fastkl_describe", {}, seconds)
        instance, versions = "+".join(about["instance"] for about in abouts), {about["version"] for about in abouts}
        failed = next((about["failed"] for about in abouts if about.get("failed")), "")
        version = versions.pop() if len(versions) == 1 else ""
        return abouts[0] | {"instance": instance, "version": version, "failed": failed}

    def call(
        self, server: Server, method: str, arguments: Mapping[str, str], seconds: float = LOAD_SECONDS
    ) -> list[dict[str, Any]]:
        """What a method of the server's workers gives, one for each. NoAnswer where it cannot be reached, UserError
        where it is none of ours."""
        answer = self.ask(server, "collective_rpc", {"method": method, "kwargs": dict(arguments)}, seconds)
        try:
            (first, *others) = map(dict, answer.json()["results"])
            return [first, *others]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"engines: {server.url} is no server that `fastkl serve` has started (status {answer.status_code})."
            ) from None

    def ask(self, server: Server, path: str, body: Mapping[str, Any], seconds: float) -> httpx.Response:
        """An answer of the server. NoAnswer where there is none in so many seconds."""
        answer: httpx.Response = in_thread(asking.ask, server.url, path, body, seconds)
        return answer

    async def draw(self, requests: Mapping[int, Request], servers: Sequence[Server]) -> list[dict[int, Completion]]:
        """What each server has drawn of its part of the requests, by place; what is missing has to be drawn again."""
        places = list(requests)
        parts = [{place: requests[place] for place in places[i :: len(servers)]} for i in range(len(servers))]
        return list(await asyncio.gather(*map(self.draw_with, servers, parts)))

    async def draw_with(self, server: Server, requests: Mapping[int, Request]) -> dict[int, Completion]:
        """What one server has drawn. Its first failure ends the rest."""
        free, found = asyncio.Semaphore(CONCURRENCY), dict[int, Completion]()

        async def one(place: int, request: Request) -> None:
            async with free:
                found[place] = self.completed(request, await self.post(client, server, request))

        async with client_of(server.url, DRAW_SECONDS) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    for place, request in requests.items():
                        group.create_task(one(place, request))
            except* NoAnswer as failures:
                self.lose(server, str(failures.exceptions[0]))
            except* UserError as failures:
                raise failures.exceptions[0] from None
        return found

    async def post(self, client: httpx.AsyncClient, server: Server, request: Request) -> dict[str, Any]:
        """The answer to one request. NoAnswer where another server may do better."""
        arguments = vllm_arguments(self.sampling, self.wanted["vocab"])
        arguments |= {"logprobs": 0, "detokenize": False, "seed": request.seed}
        if self.sampling.stop:
            arguments |= {"detokenize": True, "include_stop_str_in_output": True}
        body = {"model": NAME, "token_ids": list(request.prompt.token_ids), "sampling_params": arguments}
        answer = await asking.post(client, server.url, "inference/v1/generate", body)
        if answer.status_code != 200:
            said = " ".join(answer.text.split())[:160]
            raise UserError(f"engines: {server.url} refuses a request with status {answer.status_code}: {said}")
        return dict(answer.json())

    def completed(self, request: Request, answer: Mapping[str, Any]) -> Completion:
        """The completion of an answer. NoAnswer for one that was cut off."""
        (choice,) = answer["choices"]
        if choice["finish_reason"] not in ("stop", "length"):
            raise NoAnswer(f"a completion ended with {choice['finish_reason']!r}")
        logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
        if len(logprobs) != len(choice["token_ids"]):
            raise UserError(f"engines: {len(logprobs)} log-probs came with {len(choice['token_ids'])} tokens.")
        return completion(request, choice["token_ids"], logprobs, self.sampling, self.tokenizer)


def unshared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, none of which shares its memory with another one: a file holds each once."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return found


def obstacle(model_config: Any, device: torch.device) -> str | None:
    """Why servers cannot be asked, or None if they can; whether they can run the model is theirs to say."""
    return None if find_spec("httpx") else "httpx is not installed (pip install httpx)"


def check_servers(
    urls: Sequence[str],
    sampling: Sampling,
    *,
    vocab: int,
    dtype: str,
    max_model_len: int,
    weights: str,
    device: torch.device,
    world: World = ALONE,
) -> None:
    """UserError where one of them does not answer, or cannot draw for such a run, or take its weights in the way that
    was asked for; they are given nothing."""
    about: dict[str, Any] = {"vocab": vocab, "dtype": dtype, "max_model_len": max_model_len}
    ServerGenerator(urls, None, sampling, **about, folder=Path(), weights=weights, device=device, world=world)


def start(options: EngineOptions) -> ServerGenerator:
    """Servers that have the policy's weights."""
    generator = ServerGenerator(
        options.engines,
        options.tokenizer,
        options.sampling,
        vocab=text_config(options.policy.config).vocab_size,
        dtype=str(options.dtype).removeprefix("torch."),
        max_model_len=options.max_model_len,
        folder=options.log.parent / "engines",
        weights=options.engine_weights,
        device=next(options.policy.parameters()).device,
        note=options.note,
        world=options.world,
    )
    if options.world.is_first:
        options.note(generator.way())
    generator.sync(options.policy)
    return generator
