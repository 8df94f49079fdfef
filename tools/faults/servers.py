"""A trainer that draws ahead with a server of vLLM, and is killed while the server stays.

It asks a server for one completion at a time, so that none depends on what is drawn beside it, and a run has to end bit
for bit as the one that nothing has happened to. Besides, every completion is scored again with the saved weights of the
version that it is said to be of, and with those of the next one. server_kills.py kills servers in the same way.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastkl.rollout.serve import environment
from tools.faults import runs
from tools.faults.fault import Bench, Row

START_S, MAX_RUN_S = 600.0, 900.0
PER_STEP = 8  # completions of a step of runs.JOB
BURIED_S = 20.0  # how long a server's processes may take to end after it
VICTIMS = {"server": "APIServer", "engine": "EngineCore", "worker": "Worker"}
"""A server's processes, each started by the one before it, by what they are called in what they print."""

SERVER_MODULES = (
    *("vllm.entrypoints.launchers.api_server.entry", "vllm.v1.engine.async_llm", "vllm.v1.engine.core"),
    *("vllm.v1.executor.multiproc_executor", "vllm.v1.worker.cpu_worker", "vllm.v1.sample.sampler"),
    *("vllm.model_executor.models.registry", "vllm.model_executor.models.llama", "fastkl.rollout.engine_worker"),
)

GAP_NATS = 1e-4  # between the server's log-probs and those of the weights that it is said to have had, in float32


def import_vllm() -> None:
    """What a server of vLLM and its engine import, which takes longer than all that they do then."""
    os.environ |= environment(os.environ)
    for name in SERVER_MODULES:
        import_module(name)
    gc.collect()
    gc.freeze()


@dataclass(slots=True)
class Server:
    """`fastkl serve` in a session of its own, at one address however often it is started."""

    folder: Path
    port: int
    tensor_parallel_size: int = 1
    pid: int = 0
    is_up: bool = False  # whether its own process lives, when that was looked at last

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        """What it has printed."""
        return self.folder / f"server-{self.port}.log"

    def start(self, by_fork: bool = True) -> None:
        """Starts it. by_fork: it and its engine are forks of this process, and answer in some ten seconds; otherwise
        they import everything anew, as after the command."""
        words = ["serve", "storyteller", "--port", str(self.port), "--dtype", "float32", "--max-model-len", "128"]
        words += ["--tensor-parallel-size", str(self.tensor_parallel_size)]
        sys.stdout.flush(), sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setsid()
                log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(log, 1), os.dup2(log, 2)
                if not by_fork:
                    os.execv(sys.executable, [sys.executable, "-m", "fastkl", *words])
                served_here(words)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        self.is_up = True

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + START_S
        while True:
            with socket.socket() as there:
                if there.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self.has_ended() or time.monotonic() > deadline:
                raise SystemExit(f"faults: no server of vLLM has started:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.2)

    def has_ended(self) -> bool:
        """Whether its own process has."""
        if self.is_up:
            self.is_up = os.waitpid(self.pid, os.WNOHANG)[0] == 0
        return not self.is_up

    def pids_of(self, victim: str) -> list[int]:
        """The numbers of its processes of a kind of VICTIMS."""
        named = re.findall(rf"\({VICTIMS[victim]}\w* pid=(\d+)\)", self.log.read_text())
        return sorted({*map(int, named)} & {*in_session(self.pid)})

    def buried(self) -> list[str]:
        """What is wrong with what is left of it once it has ended; whatever is left is ended."""
        deadline = time.monotonic() + BURIED_S
        while left := in_session(self.pid):
            if time.monotonic() > deadline:
                self.kill()
                return [f"{len(left)} of the server's processes outlive it"]
            time.sleep(0.05)
        return []

    def kill(self) -> None:
        """Ends it, and all of its processes."""
        for pid in in_session(self.pid) if self.pid else ():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while not self.has_ended():
            time.sleep(0.01)


def served_here(words: Sequence[str]) -> None:
    """`fastkl serve` in this process: where it would become vLLM's server, that is run here, and what that starts is a
    fork of it."""
    from fastkl.cli import main

    def become(program: str, command: Sequence[str], given: Mapping[str, str]) -> None:
        os.environ |= given
        sys.argv = [program, *command[3:]]
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)

    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: fork
    os.execve = become
    main([*words])


def in_session(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "ZX":
                found.append(int(path.parent.name))
    return found


@contextmanager
def served(bench: Bench, count: int = 1, tensor_parallel_size: int = 1) -> Iterator[list[Server]]:
    """Servers that answer, until the end of the row."""
    with ExitStack() as stack:
        free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        servers = [Server(bench.folder, there.getsockname()[1], tensor_parallel_size) for there in free]
    import_vllm()
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait()
        yield servers
    finally:
        for server in servers:
            server.kill()


def job(servers: Sequence[Server], weights: str, max_new_tokens: int = 16) -> tuple[str, ...]:
    """The settings of a run that they draw for. weights: the way that these take, network or folder."""
    ahead = ("--rollout-ahead", "1", "--importance", "sequence", "--save-every", "1", "--keep-checkpoints", "0")
    there = ("--engines", *(server.url for server in servers), "--engine-weights", weights)
    work = [*runs.WORK]
    work[work.index("--max-new-tokens") + 1] = str(max_new_tokens)
    return (*work, *there, "--lr", "2e-3", *ahead)


def asking_for_one() -> None:
    """In a run's process: it asks for one completion at a time."""
    from fastkl.rollout import server

    server.CONCURRENCY = 1


@dataclass(frozen=True, slots=True)
class Whole:
    """The run with servers that nothing has happened to."""

    output: Path
    duration_s: float

    @classmethod
    def of(cls, bench: Bench, run: Callable[[Path], runs.Child]) -> Whole:
        """Does it twice: two runs must be equal before a fault can show."""
        for name in ("served-again", "served"):
            output = bench.folder / name
            child = run(output)
            duration_s = time.monotonic() - child.started
            if wrong := runs.damaged_beyond_one_line(child, (0,)) or proved(output):
                raise SystemExit(f"faults: a run without a fault failed ({'; '.join(wrong)}):\n{child.text}")
        if differ := runs.differences(bench.folder / "served-again", output):
            raise SystemExit(f"faults: two runs without a fault differ in {', '.join(differ)}.")
        bench.clear(bench.folder / "served-again")
        return cls(output, duration_s)


def finished(servers: Sequence[Server], output: Path, *more: str) -> runs.Child:
    """A run with these servers, ended."""
    return runs.finished(output, *more, before=asking_for_one, job=job(servers, "folder"), seconds=MAX_RUN_S)


def trainer_kills(bench: Bench) -> Row:
    """SIGKILL to the trainer at a random moment, now and then once more after --resume; the server stays."""
    row = Row(
        "SIGKILL of a trainer whose server stays",
        "kill -9 at a uniform moment of a run that draws ahead with a server of vLLM, 3 in 10 again after --resume",
    )
    if skipped(row, bench):
        return row
    with served(bench) as servers:
        whole = Whole.of(bench, lambda output: finished(servers, output))
        for trial in bench.trials():
            if row.runs >= bench.times(20, 1):
                break
            trainer_killed(bench, row, trial, servers, whole)
        bench.clear(whole.output)
    row.outcome = "ends bit for bit like an uninterrupted run, every completion by the weights one update before"
    return row


def trainer_killed(bench: Bench, row: Row, trial: int, servers: Sequence[Server], whole: Whole) -> None:
    """One run that is killed, once or more often."""
    rng, output = bench.random("trainer kills", trial), bench.output("trainer-kill", trial)
    moments: list[str] = []
    while not moments or rng.random() < 0.3:
        moment_s = rng.random() * whole.duration_s
        more = ["--resume"] * (output / "config.yaml").is_file()
        child = runs.train(output, *more, before=asking_for_one, job=job(servers, "folder"))
        if child.until(moment_s):
            break  # it was over already
        child.send(signal.SIGKILL)
        child.wait()
        row.runs += 1
        moments.append(f"{moment_s:.3f} s")
    child = finished(servers, output, "--resume")
    if child.code == 2 and "start without --resume" in child.text:
        child = finished(servers, output)
    wrong = runs.damaged_beyond_one_line(child, (0,)) or runs.differences(output, whole.output) or proved(output)
    row.failed(trial, f"killed after {', '.join(moments)}", wrong)
    bench.tell(f"{row.runs} trainers killed")
    if not wrong:
        bench.clear(output)


def skipped(row: Row, bench: Bench) -> bool:
    """Whether no engine can be started, or none is worth it."""
    if find_spec("vllm") is None:
        row.skipped = "vLLM is not installed"
    elif bench.quick and bench.trial is None:
        row.skipped = "an engine takes half a minute to start"
    return bool(row.skipped)


# ------------------------------------------------------------------------------------------------- what can be compared


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    """A log."""
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def proved(run: Path) -> list[str]:
    """What is wrong with where a run's completions come from; empty: each step has its 8, drawn by one version, the one
    before the step's own, by what the logs say and by the saved weights."""
    metrics, wrong = lines(run, "metrics"), []
    expected = [(max(0, step - 2), min(1, step - 1)) for step in range(1, runs.STEPS + 1)]
    if [(row["policy_version"], row["stale/age"]) for row in metrics] != expected:
        wrong.append("other versions than those of one step ahead")
    if Counter(line["step"] for line in lines(run, "samples")) != dict.fromkeys(range(1, runs.STEPS + 1), PER_STEP):
        wrong.append("completions are lost or doubled")
    said = runs.in_fork(lambda: "; ".join(_by_other_weights(run)))
    return wrong + ([said] if said else [])


def _by_other_weights(run: Path) -> Iterator[str]:
    """Complaints about the completions that the checkpoints hold for the step after them."""
    import torch
    from safetensors.torch import load_file

    from fastkl.data.prompts import PromptSource
    from fastkl.evaluation.plan import prompts_of
    from fastkl.scoring import models
    from fastkl.storyteller import model_path
    from fastkl.training.checkpoint import AHEAD
    from fastkl.training.run_folder import started_with

    models.quiet_transformers()
    config = started_with(run)
    assert config is not None and config.temperature == 1.0, "what is sampled from is the softmax of the logits"
    tokenizer = models.load_tokenizer(str(model_path()))
    taken = PromptSource(
        prompts_of(config, config.prompts, tokenizer, 100, lambda text: None), seed=config.seed, shuffle=config.shuffle
    )
    samples = lines(run, "samples")
    taken.take(config.prompts_per_step)

    def weights_after(step: int) -> Any:
        folder = run / "checkpoints" / f"step-{step}" if step else model_path()
        return models.load_model(str(folder), torch.device("cpu"))

    models_after = [weights_after(step) for step in range(runs.STEPS)]
    for step in range(2, runs.STEPS + 1):
        folder = run / "checkpoints" / f"step-{step - 1}"
        words = json.loads((folder / "checkpoint.json").read_text())["state"]["ahead"]
        kept = load_file(folder / AHEAD)
        lengths = kept["lengths"].tolist()
        prompts = [p.token_ids for p in taken.take(config.prompts_per_step) for _ in range(config.num_samples)]
        drawn = [*zip(prompts, kept["token_ids"].split(lengths), kept["logprobs"].split(lengths), strict=True)]
        if [text for _, text in words["words"]] != [s["completion"] for s in samples if s["step"] == step]:
            yield f"step {step} trains on other completions than were kept for it"
        gaps = [max(_gap(model, *one) for one in drawn) for model in models_after[step - 2 : step]]
        if words["version"] != step - 2 or not gaps[0] < min(GAP_NATS, gaps[1] / 10):
            yield f"step {step} has completions by other weights than those after step {step - 2} ({gaps})"


def _gap(model: Callable[..., Any], prompt: Any, ids: Any, logprobs: Any) -> float:
    """The largest |server - weights| log-prob of a completion's tokens, by transformers' own forward."""
    import torch

    together = torch.tensor([[*prompt, *ids.tolist()]])
    with torch.no_grad():
        scores = model(together).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return float((scores.gather(1, ids.long()[:, None])[:, 0] - logprobs).abs().max())
