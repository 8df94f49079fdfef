"""A trainer that draws ahead with a server of vLLM, and is killed while the server stays.

It asks for one completion at a time, so that none depends on what is drawn beside it, and a run has to end bit for bit
as the one that nothing has happened to. Besides, every completion is scored again with the saved weights of the version
that it is said to be of, and with those of the next one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tools.faults import runs
from tools.faults.fault import Bench, Row

START_S, MAX_RUN_S = 600.0, 900.0
PER_STEP = 8  # completions of a step of runs.JOB
GAP_NATS = 1e-4  # between the server's log-probs and those of the weights that it is said to have had, in float32


@dataclass(slots=True)
class Server:
    """`fastkl serve` in a session of its own, at one address however often it is started."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def job(self) -> tuple[str, ...]:
        """The settings of a run that it draws for."""
        ahead = ("--rollout-ahead", "1", "--importance", "sequence", "--save-every", "1", "--keep-checkpoints", "0")
        there = ("--engines", f"http://127.0.0.1:{self.port}", "--engine-weights", "folder")
        return (*runs.WORK, *there, "--lr", "2e-3", *ahead)

    def start(self) -> None:
        """Starts it; it answers some half a minute later."""
        words = [sys.executable, "-m", "fastkl", "serve", "storyteller", "--port", str(self.port), "--dtype", "float32"]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*words, "--max-model-len", "128"], stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + START_S
        while True:
            with socket.socket() as there:
                if there.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self.process is None or self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"faults: no server of vLLM has started; see {self.folder / 'server.log'}.")
            time.sleep(0.2)

    def kill(self) -> None:
        """Ends it, and all of its processes."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextmanager
def served(bench: Bench) -> Iterator[Server]:
    """A server that answers, until the end of the row."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        server = Server(bench.folder, free.getsockname()[1])
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()


def asking_for_one() -> None:
    """In a run's process: it asks for one completion at a time."""
    from fastkl.rollout import server

    server.CONCURRENCY = 1


@dataclass(frozen=True, slots=True)
class Whole:
    """The run with a server that nothing has happened to."""

    output: Path
    duration_s: float

    @classmethod
    def of(cls, bench: Bench, server: Server) -> Whole:
        """Does it twice: two runs must be equal before a fault can show."""
        for name in ("served-again", "served"):
            output = bench.folder / name
            child = finished(server, output)
            duration_s = time.monotonic() - child.started
            if wrong := runs.damaged_beyond_one_line(child, (0,)) or proved(output):
                raise SystemExit(f"faults: a run without a fault failed ({'; '.join(wrong)}):\n{child.text}")
        if differ := runs.differences(bench.folder / "served-again", output):
            raise SystemExit(f"faults: two runs without a fault differ in {', '.join(differ)}.")
        bench.clear(bench.folder / "served-again")
        return cls(output, duration_s)


def finished(server: Server, output: Path, *more: str) -> runs.Child:
    """A run with the server, ended."""
    return runs.finished(output, *more, before=asking_for_one, job=server.job, seconds=MAX_RUN_S)


def trainer_kills(bench: Bench) -> Row:
    """SIGKILL to the trainer at a random moment, now and then once more after --resume; the server stays."""
    row = Row(
        "SIGKILL of a trainer whose server stays",
        "kill -9 at a uniform moment of a run that draws ahead with a server of vLLM, 3 in 10 again after --resume",
    )
    if _skipped(row, bench):
        return row
    with served(bench) as server:
        whole = Whole.of(bench, server)
        for trial in bench.trials():
            if row.runs >= bench.times(20, 1):
                break
            trainer_killed(bench, row, trial, server, whole)
        bench.clear(whole.output)
    row.outcome = "ends bit for bit like an uninterrupted run, every completion by the weights one update before"
    return row


def trainer_killed(bench: Bench, row: Row, trial: int, server: Server, whole: Whole) -> None:
    """One run that is killed, once or more often."""
    rng, output = bench.random("trainer kills", trial), bench.output("trainer-kill", trial)
    moments: list[str] = []
    while not moments or rng.random() < 0.3:
        moment_s = rng.random() * whole.duration_s
        more = ["--resume"] * (output / "config.yaml").is_file()
        child = runs.train(output, *more, before=asking_for_one, job=server.job)
        if child.until(moment_s):
            break  # it was over already
        child.send(signal.SIGKILL)
        child.wait()
        row.runs += 1
        moments.append(f"{moment_s:.3f} s")
    child = finished(server, output, "--resume")
    if child.code == 2 and "start without --resume" in child.text:
        child = finished(server, output)
    wrong = runs.damaged_beyond_one_line(child, (0,)) or runs.differences(output, whole.output) or proved(output)
    row.failed(trial, f"killed after {', '.join(moments)}", wrong)
    if not wrong:
        bench.clear(output)


def _skipped(row: Row, bench: Bench) -> bool:
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
