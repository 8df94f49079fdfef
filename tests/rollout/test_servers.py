"""Rollout by servers: real HTTP servers that draw with weights from the file, die, come back, or are none of ours."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from uuid import uuid4

import pytest
import torch
from toy import STOP, VOCAB, ToyTokenizer, prompt, toy_model

from fastkl.config.settings import TrainConfig, check_config
from fastkl.errors import UserError
from fastkl.rollout import meeting, serve, server, wire
from fastkl.rollout.agreement import StaleEngineError
from fastkl.rollout.engine_worker import Engine, tensors_in
from fastkl.rollout.requests import Request, requests_of
from fastkl.rollout.server import ServerGenerator
from fastkl.rollout.transformers import TransformersGenerator
from fastkl.sampling.params import Sampling
from fastkl.scoring import models
from fastkl.storyteller import model_path
from fastkl.training import setup

SAMPLING = Sampling(temperature=0.8, max_new_tokens=6, stop_token_ids=(STOP,))
PROMPTS = (prompt(1, 2, 3), prompt(4), prompt(5, 6, 7, 8, 9))


class Handler(BaseHTTPRequestHandler):
    """The protocol of a server that `fastkl serve` has started, over the library's own decoder."""

    def do_POST(self):
        fake = self.server.fake
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            status, what = fake.answer(self.path, asked)
        except ConnectionError:
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body = json.dumps(what).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


class Http(ThreadingHTTPServer):
    """All requests of a step may connect at once: the system refuses none for a second, as it does beyond a queue."""

    request_queue_size = 128


class Fake:
    """A server with weights of its own. `dies_at`: the request that it dies at."""

    def __init__(
        self, model, sampling=SAMPLING, tokenizer=None, dies_at: int | None = None, host="127.0.0.1", port=0, **about
    ):
        self.base, self.about, self.dies_at, self.lock = model, about, dies_at, threading.Lock()
        self.sampling, self.tokenizer, self.asked = sampling, tokenizer or ToyTokenizer(), []
        self.host, self.port = host, port
        self.loads: list[str] = []
        self.replaced_at = 0
        self.start()

    def start(self):
        """With the weights that it began with, as a new process."""
        self.replace_process()
        self.http = Http((self.host, self.port), Handler)
        self.http.fake, self.http.daemon_threads, self.port = self, True, self.http.server_port
        self.url = f"http://{self.host}:{self.port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def replace_process(self):
        """What a new process has: the weights of the start, and another name."""
        self.model, self.instance, self.version = copy.deepcopy(self.base), uuid4().hex, ""
        self.decoder = TransformersGenerator(self.model, self.tokenizer, self.sampling)

    def stop(self):
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path, asked):
        if path == "/inference/v1/generate":
            return self.drawn(asked)
        return self.rpc(asked) if path == "/collective_rpc" else (200, {})

    def rpc(self, asked):
        usual = {
            "instance": self.instance, "version": self.version, "fastkl": "1", "vllm": "0.32.0", "vocab": VOCAB,
            "dtype": "float32", "max_model_len": 64, "workers": 1, "logprobs": "processed_logprobs",
        }  # fmt: skip
        workers = range(self.about.get("workers", 1))
        if asked["method"] == "fastkl_describe":
            late = {"version": ""} if len(self.loads) == self.about.get("last_worker_fails_at") else {}
            names = [{"instance": f"{self.instance}-{w}"} | (late if w == workers[-1] else {}) for w in workers]
            return 200, {"results": [usual | self.about | name for name in names]}
        given = asked["kwargs"]
        self.loads.append(given["version"])
        if self.about.get("error"):
            return 200, {"results": [{"version": "", "error": self.about["error"]}]}
        self.model.load_state_dict(dict(tensors_in(given["path"])), strict=False)
        self.version = given["version"]
        return 200, {"results": [{"version": self.version, "error": ""}]}

    def drawn(self, asked):
        with self.lock:
            self.asked.append(asked["sampling_params"]["seed"])
            if self.about.get("status"):
                return self.about["status"], {"error": "out of memory"}
            if len(self.asked) == self.replaced_at:
                self.replace_process()
            if self.dies_at is not None and len(self.asked) > self.dies_at:
                threading.Thread(target=self.stop).start()
                self.dies_at = None
                raise ConnectionError
            p = asked["sampling_params"]
            given = {"max_new_tokens": p["max_tokens"], "temperature": p["temperature"]}
            self.decoder.sampling = replace(self.sampling, **given)
            (found,) = self.decoder.generate([Request(prompt(*asked["token_ids"]), 0, 0, p["seed"])])
        pairs = zip(found.token_ids, found.logprobs, strict=True)
        logprobs = {"content": [{"token": str(t), "logprob": x} for t, x in pairs]}
        choice = {"finish_reason": found.finish_reason, "token_ids": list(found.token_ids), "logprobs": logprobs}
        return 200, {"choices": [choice | ({"finish_reason": "abort"} if self.about.get("aborts") else {})]}


@pytest.fixture
def fakes():
    """Makes servers, and stops them at the end."""
    made: list[Fake] = []

    def make(*arguments, **options) -> Fake:
        made.append(Fake(*arguments, **options))
        return made[-1]

    yield make
    for fake in made:
        fake.stop()


def asking(folder, *servers: Fake, notes=None) -> ServerGenerator:
    return ServerGenerator(
        [fake.url for fake in servers], ToyTokenizer(), SAMPLING, vocab=VOCAB, dtype="float32", max_model_len=32,
        folder=folder, note=(notes if notes is not None else []).append,
    )  # fmt: skip


def models_and_expected():
    """Weights that the servers begin with, the policy's, and what the policy draws."""
    base, policy = toy_model(0, torch.float32), toy_model(1, torch.float32)
    requests = requests_of(PROMPTS, 4, seed=3, step=1)
    return base, policy, requests, TransformersGenerator(policy, ToyTokenizer(), SAMPLING).generate(requests)


def test_servers_draw_with_the_weights_that_were_pushed_what_one_process_draws(tmp_path, fakes):
    base, policy, requests, expected = models_and_expected()
    one, two = fakes(base), fakes(base)
    generator = asking(tmp_path, one, two)
    generator.sync(policy, 7)
    drawn = generator.generate(requests)
    assert [c.token_ids for c in drawn] == [c.token_ids for c in expected]
    for ours, theirs in zip(drawn, expected, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
        assert (ours.finish_reason, ours.text) == (theirs.finish_reason, theirs.text)
    assert len(one.asked) == len(two.asked) == 6 and {*one.asked, *two.asked} == {r.seed for r in requests}
    generator.sync(base, 8)
    assert [f.name for f in tmp_path.iterdir()] == [f"weights-{generator.version}.safetensors"], "of now, and no others"
    generator.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_requests_of_a_server_that_dies_go_to_the_others_with_their_seeds(tmp_path, fakes):
    base, policy, requests, expected = models_and_expected()
    dying, notes = fakes(base, dies_at=2), []
    generator = asking(tmp_path, fakes(base), dying, notes=notes)
    generator.sync(policy)
    assert [c.token_ids for c in generator.generate(requests)] == [c.token_ids for c in expected]
    assert [note for note in notes if f"{dying.url} is lost" in note] and len(notes) == 1
    assert [c.token_ids for c in generator.generate(requests)] == [c.token_ids for c in expected]


@pytest.mark.slow
def test_a_server_that_is_started_again_gets_the_weights_before_it_is_asked(tmp_path, fakes):
    """Both in turn; the one that is back has the weights of the start, which would draw something else."""
    base, policy, requests, expected = models_and_expected()
    one, two, notes = fakes(base), fakes(base), []
    generator = asking(tmp_path, one, two, notes=notes)
    generator.sync(policy)
    for fake in (one, two):
        fake.stop()
        fake.start()
        assert [c.token_ids for c in generator.generate(requests)] == [c.token_ids for c in expected]
        assert fake.loads == [generator.version] * 2
    one.stop()
    generator.generate(requests)
    one.start()
    generator.generate(requests)
    assert [n.partition(" (")[0] for n in notes] == [
        f"engines: {one.url} is lost", f"engines: {one.url} is back, and has the weights after step 0"
    ]  # fmt: skip


@pytest.mark.slow
def test_what_a_server_has_drawn_while_it_was_replaced_does_not_count(tmp_path, fakes):
    """It dies and is there again, with other weights, within one call: nothing tells but its instance."""
    base, policy, requests, expected = models_and_expected()
    fake = fakes(base)
    generator = asking(tmp_path, fake)
    generator.sync(policy)
    fake.replaced_at = 4
    assert [c.token_ids for c in generator.generate(requests)] == [c.token_ids for c in expected]
    assert len(fake.asked) == 2 * len(requests)


@pytest.mark.slow
def test_a_server_of_several_workers_has_the_weights_where_all_of_them_do(tmp_path, fakes):
    """One of them has lost them after the first load."""
    base, policy, requests, expected = models_and_expected()
    fake = fakes(base, workers=3, last_worker_fails_at=1)
    generator = asking(tmp_path, fake)
    generator.sync(policy)
    assert [c.token_ids for c in generator.generate(requests)] == [c.token_ids for c in expected]
    assert fake.loads == [generator.version] * 2


def test_where_no_server_is_left_the_run_ends_with_a_sentence(tmp_path, fakes, monkeypatch):
    monkeypatch.setattr(server, "PATIENCE_SECONDS", 0.0)
    base, policy, requests, _ = models_and_expected()
    fake = fakes(base)
    generator = asking(tmp_path, fake)
    generator.sync(policy)
    fake.stop()
    with pytest.raises(UserError, match="engines: none of .* answers; start one again with `fastkl serve`"):
        generator.generate(requests)
    fake.start()


@pytest.mark.slow
@pytest.mark.parametrize(("about", "words"), [
    ({"status": 500}, "the servers answer, but draw nothing .*status 500"),
    ({"status": 400}, "refuses a request with status 400: .*out of memory"),
    ({"aborts": True}, "draw nothing .*ended with 'abort'"),
])  # fmt: skip
def test_a_server_that_answers_and_draws_nothing_ends_the_run(tmp_path, fakes, about, words):
    base, policy, requests, _ = models_and_expected()
    generator = asking(tmp_path, fakes(base, **about))
    generator.sync(policy)
    with pytest.raises(UserError, match=words):
        generator.generate(requests)


@pytest.mark.parametrize(("about", "words"), [
    ({"vocab": 99}, "has vocab 99, and this run needs 23"),
    ({"dtype": "bfloat16"}, "has dtype bfloat16, and this run needs float32; .* --dtype float32"),
    ({"logprobs": "raw_logprobs"}, "has logprobs raw_logprobs"),
    ({"max_model_len": 16}, "takes 16 tokens, .* start it with --max-model-len 32"),
    ({"vllm": "0.26.0"}, "servers of one run have one version of vLLM"),
])  # fmt: skip
def test_a_server_that_does_not_fit_is_refused_before_anything_is_sent(tmp_path, fakes, about, words):
    base = toy_model(0, torch.float32)
    with pytest.raises(UserError, match=words):
        asking(tmp_path, fakes(base), fakes(base, **about))


def test_what_is_no_server_of_ours_is_refused(tmp_path, fakes):
    fake = fakes(toy_model(0, torch.float32))
    fake.rpc = lambda asked: (404, {"detail": "Not Found"})
    with pytest.raises(UserError, match=r"is no server that `fastkl serve` has started \(status 404\)"):
        asking(tmp_path, fake)
    fake.stop()
    with pytest.raises(UserError, match="does not answer .* start it with `fastkl serve MODEL --port"):
        asking(tmp_path, fake)
    fake.start()


@pytest.mark.slow
def test_a_run_whose_servers_do_not_do_is_refused_before_a_model_is_loaded_or_a_folder_made(
    tmp_path, fakes, monkeypatch
):
    monkeypatch.setattr(setup, "load", lambda *_: pytest.fail("loading has begun"))
    other = fakes(toy_model(0, torch.float32))
    gone = f"http://127.0.0.1:{free_port()}"
    for url, words in ((gone, "does not answer"), (other.url, "has vocab 23, and this run needs ")):
        with pytest.raises(UserError, match=f"engines: {url} {words}"):
            setup.set_up(TrainConfig(output=str(tmp_path / "run"), engines=(url,), dtype="float32", max_new_tokens=8))
    fitting = fakes(toy_model(0, torch.float32), vocab=2048, max_model_len=4096)
    config = TrainConfig(output=str(tmp_path / "run"), engines=(fitting.url,), dtype="float32", max_new_tokens=8)
    with pytest.raises(
        UserError, match=f"engine_weights: network was asked for, but {fitting.url} takes no weights ov"
    ):
        setup.set_up(replace(config, engine_weights="network"))
    assert not (tmp_path / "run").exists() and not other.loads and not fitting.loads


@pytest.mark.slow
def test_weights_that_did_not_arrive_stop_the_run_and_those_of_another_run_too(tmp_path, fakes):
    base, policy, requests, _ = models_and_expected()
    with pytest.raises(StaleEngineError, match="did not all arrive"):
        asking(tmp_path, fakes(base, error="step 3: the weights did not all arrive: a")).sync(policy, 3)
    shared = fakes(base)
    first, second = asking(tmp_path, shared), asking(tmp_path, shared)
    first.sync(policy)
    second.sync(policy)
    with pytest.raises(UserError, match="another run has given .* its weights"):
        first.generate(requests)


def test_a_push_removes_the_files_of_a_run_that_was_killed(tmp_path, fakes):
    """One for each kill would stay otherwise, as large as the model."""
    base, policy, _, _ = models_and_expected()
    left = [tmp_path / f"weights-0a1b2c3d-{name}" for name in ("7.safetensors", "8.partial")]
    for path in left:
        path.write_bytes(b"x")
    generator = asking(tmp_path, fakes(base))
    generator.sync(policy, 3)
    assert [path.name for path in tmp_path.iterdir()] == [f"weights-{generator.version}.safetensors"]
    generator.close()
    assert not list(tmp_path.iterdir())


def test_a_server_says_why_it_could_not_load_and_lives_on(tmp_path):
    """A file that is none, and a loader that fails as it likes."""
    model = toy_model(0, torch.float32)
    worker = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.float32),
        model_runner=SimpleNamespace(get_model=lambda: model),
        reload_weights=lambda weights_iterator: list(weights_iterator),
    )
    engine = Engine(worker)
    path = tmp_path / "weights.safetensors"
    for content, words in ((None, "FileNotFoundError"), (b"no tensors", "SafetensorError")):
        if content:
            path.write_bytes(content)
        said = engine.load(str(path), "a-1", 1, tied=False)
        assert said["version"] == "" and said["error"].startswith(f"the weights could not be loaded ({words}: ")


@pytest.mark.parametrize(("settings", "words"), [
    ({"engines": ("127.0.0.1:8001",)}, "engines: '127.0.0.1:8001' is no address of a server"),
    ({"engines": ("http://a:1", "http://a:1/")}, "engines: a server is named twice"),
    ({"engines": ("http://a:1",), "generator": "vllm"}, "engines: servers draw the completions, and generator vllm"),
    ({"generator": "server"}, "generator: server needs the addresses of servers"),
    ({"engine_weights": "network"}, "engine_weights: network is a way to servers, and there are none"),
])  # fmt: skip
def test_addresses_that_are_none_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        check_config(TrainConfig(**settings))


def test_the_server_listens_on_the_loopback_interface_and_its_log_probs_are_of_what_is_drawn(monkeypatch):
    monkeypatch.setattr(serve, "vllm_version", lambda: (0, 32))
    words = serve.command("m", "127.0.0.1", 8001, "float32", 0, 0.9, True)
    pairs = dict(zip(words, words[1:], strict=False))
    assert pairs["--host"] == "127.0.0.1" and pairs["--logprobs-mode"] == "processed_logprobs"
    assert json.loads(pairs["--weight-transfer-config"]) == {"backend": "fastkl"}
    assert pairs["--generation-config"] == "vllm" and "--no-enable-prefix-caching" in words
    assert pairs["--middleware"] == "fastkl.rollout.orphans.EndWithEngine"
    assert serve.worker_words((0, 31)) == ["--worker-extension-cls", "fastkl.rollout.engine_worker.FastklWorker"]
    given = serve.environment({"VLLM_CPU_KVCACHE_SPACE": "7"})
    assert given["VLLM_SERVER_DEV_MODE"] == "1" and given["VLLM_CPU_KVCACHE_SPACE"] == "7"


@pytest.mark.parametrize(("num_gpus", "size", "passed_on"), [(0, 2, "2"), (4, 4, "4"), (1, 1, None)])
def test_the_server_divides_the_model_among_as_many_gpus_as_asked(monkeypatch, num_gpus, size, passed_on):
    called = []
    monkeypatch.setattr(serve.os, "execve", lambda program, words, environment: called.append((words, environment)))
    options = {"host": "127.0.0.1", "port": 8001, "dtype": "float32", "max_model_len": 0, "gpu_memory_utilization": 0.9}
    serve.serve("storyteller", **options, num_gpus=num_gpus, tensor_parallel_size=size)
    ((words, environment),) = called
    assert dict(zip(words, words[1:], strict=False)).get("--tensor-parallel-size") == passed_on
    assert ("--gpu-memory-utilization" in words) is bool(num_gpus)
    assert environment["FASTKL_SERVER_PROCESS"] == str(os.getpid()), "which the server's process is from then on"
    for wrong in (0, num_gpus + 1 if num_gpus else -1):
        with pytest.raises(
            UserError, match=f"^tensor_parallel_size: {wrong} workers need a GPU each, and PyTorch sees"
        ):
            serve.serve("storyteller", **options, num_gpus=num_gpus, tensor_parallel_size=wrong)


@pytest.mark.slow
@pytest.mark.long
def test_a_run_whose_server_dies_and_comes_back_has_the_samples_of_one_process(tmp_path, fakes):
    """The one dies in step 2, and is there again, as it began, from step 3 on."""
    import fastkl

    shared = {
        "steps": 4, "prompts_per_step": 2, "num_samples": 4, "max_new_tokens": 10, "report_to": (), "dtype": "float32",
        "rollout_ahead": 1, "importance": "sequence", "lr": 2e-3, "save_every": 0,
    }  # fmt: skip
    alone = TrainConfig(output=str(tmp_path / "alone"), generator="transformers", **shared)
    fastkl.train(alone)
    model = models.load_model(str(model_path()), torch.device("cpu")).requires_grad_(False)
    tokenizer = models.load_tokenizer(str(model_path()))
    sampling = Sampling.of(alone, models.stop_token_ids(model.config, str(model_path()), tokenizer))
    about = {"vocab": model.config.vocab_size, "max_model_len": 128}
    one, dying = (fakes(model, sampling, tokenizer, at, **about) for at in (None, 10))

    class Back:
        def on_step_end(self, metrics, samples):
            if metrics["step"] == 2:
                dying.start()

    config = TrainConfig(output=str(tmp_path / "served"), engines=(one.url, dying.url), **shared)
    fastkl.train(config, callbacks=[Back()])
    ours, theirs = (
        [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
        for name in ("served", "alone")
    )
    assert [(s["step"], s["completion"]) for s in ours] == [(s["step"], s["completion"]) for s in theirs]
    assert len(dying.loads) >= 3 and len(dying.asked) > 11, "it has drawn again"
    assert not list((tmp_path / "served" / "engines").iterdir())


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def vllm_server(tmp_path_factory):
    """(address, process) of a server of vLLM, which the tests share."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "server.log"
    words = [sys.executable, "-m", "fastkl", "serve", "storyteller", "--port", str(port), "--dtype", "float32"]
    with open(log, "wb") as out:
        child = subprocess.Popen([*words, "--max-model-len", "128"], stdout=out, stderr=out, start_new_session=True)
    try:
        deadline = time.monotonic() + 400
        while True:
            assert child.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}", child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.long
def test_a_run_with_a_server_of_vllm_trains_on_what_the_pushed_weights_draw(tmp_path, vllm_server, capsys):
    """Over the network. The canary after each push compares; what the server holds is compared bit by bit."""
    import fastkl

    config = TrainConfig(
        output=str(tmp_path / "run"), engines=(vllm_server[0],), engine_weights="network", steps=3,
        prompts_per_step=2, num_samples=4, max_new_tokens=12, report_to=(), dtype="float32", rollout_ahead=1,
        importance="sequence", lr=2e-3,
    )  # fmt: skip
    result = fastkl.train(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert result.step == 3 and [row["policy_version"] for row in rows] == [0, 0, 1]
    assert all(row["mismatch/mean_abs_logprob"] < 1e-4 for row in rows), rows
    assert rows[2]["stale/drift"] > 1e-6
    assert "over the network (gloo)" in capsys.readouterr().out and not (tmp_path / "run" / "engines").exists()


def policies_and_checksums(url):
    """Two policies, and a function for what vLLM itself says of its parameters."""
    import httpx

    first = models.load_model(str(model_path()), torch.device("cpu")).requires_grad_(False)
    second = copy.deepcopy(first)
    torch.manual_seed(0)
    for parameter in second.parameters():
        parameter.add_(1e-3 * torch.randn_like(parameter))

    def checksums():
        asked = {"action": "checksum"}
        return httpx.post(f"{url}/weight_checker", json=asked, timeout=60, trust_env=False).json()["checksums"]

    return first, second, checksums


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.long
def test_vllm_says_that_both_ways_leave_the_same_parameters_and_pushes_that_break_off_do_not_matter(
    tmp_path, vllm_server, monkeypatch
):
    """The last test of this server, which does not survive it."""
    url, child = vllm_server
    first, second, checksums = policies_and_checksums(url)
    requests = requests_of(PROMPTS, 2, seed=3, step=1)
    found, notes = {}, []
    for way, policy in (("network", first), ("network", second), ("folder", first), ("folder", second)):
        generator = ServerGenerator(
            [url], ToyTokenizer(), SAMPLING, vocab=first.config.vocab_size, dtype="float32", max_model_len=64,
            folder=tmp_path, weights=way, note=notes.append,
        )  # fmt: skip
        generator.sync(policy, 1)
        found[way, policy] = checksums(), [(c.token_ids, c.logprobs) for c in generator.generate(requests)]
        assert found["network", policy] == found[way, policy]
        generator.close()
    one, other = found["network", first], found["network", second]
    readable = {name for name, checksum in one[0].items() if checksum != sha256().hexdigest()}  # not packed away
    assert len(readable) > 5 and all(one[0][name] != other[0][name] for name in readable)
    assert all(ours[1] != theirs[1] for ours, theirs in zip(one[1], other[1], strict=True))

    monkeypatch.setattr(wire, "CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(server, "PATIENCE_SECONDS", 0.0)
    generator = ServerGenerator(
        [url], ToyTokenizer(), SAMPLING, vocab=first.config.vocab_size, dtype="float32", max_model_len=64,
        folder=tmp_path, weights="network", note=notes.append,
    )  # fmt: skip
    generator.sync(first, 2)
    sent = []

    def broken_off_by(ending):
        """The group, which something happens to before the third chunk."""
        group, number = generator.transfer._group, len(sent) + 3

        def broadcast(buffer, to_all=group.broadcast):
            sent.append(len(buffer))
            if len(sent) == number:
                ending()
            to_all(buffer)

        monkeypatch.setattr(group, "broadcast", broadcast)

    def cut():
        raise RuntimeError("the connection is closed")

    broken_off_by(cut)
    generator.sync(second, 3)
    assert len(sent) == 3 and notes == [] and checksums() == other[0], "sent again by a new group"
    broken_off_by(lambda: os.killpg(child.pid, signal.SIGKILL))
    begin = time.monotonic()
    with pytest.raises(UserError, match=f"engines: none of {url} answers"):
        generator.sync(first, 4)
    assert len(sent) in (6, 7) and time.monotonic() - begin < meeting.SILENCE_SECONDS
    assert notes[-1].startswith(f"engines: {url} is lost (")
