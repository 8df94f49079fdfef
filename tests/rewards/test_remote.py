"""The reward over HTTP, against a real server that answers, fails, hangs, is late, or says the wrong thing."""

from __future__ import annotations

import json
import re
import socket
import ssl
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from test_rewards import rollouts

import fastkl
from fastkl.address import certificates
from fastkl.errors import UserError
from fastkl.rewards import remote
from fastkl.rewards.call import compute_rewards
from fastkl.rewards.load import load_rewards, prepare_rewards

CPU = torch.device("cpu")


class Judge(BaseHTTPRequestHandler):
    """Scores by length. `server.plan` holds what to do instead for the next requests."""

    def do_POST(self):
        server = self.server
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            action = server.plan.pop(0) if server.plan else "answer"
            server.requests.append(asked | {"path": self.path, "token": self.headers["Authorization"]})
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            self.act(action, asked)
        finally:
            with server.lock:
                server.at_once -= 1

    def act(self, action, asked):
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in asked["completions"]]
        rewards = [None if text == "none" else len(text) / 4 for text in texts]
        if action == "hang":
            self.server.released.wait(30)
        elif action == "hang up":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif action == "late":
            time.sleep(0.5)
            self.say(200, {"rewards": rewards})
        elif isinstance(action, int):
            self.say(action, {"detail": "out of memory\nin line 3"})
        elif action == "answer":
            self.say(200, {"rewards": rewards})
        else:
            self.say(200, action(rewards))

    def say(self, status, what):
        body = what if isinstance(what, bytes) else json.dumps(what).encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setattr(remote, "MAX_PAUSE_SECONDS", 0.05)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing to do with this machine's own addresses
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.daemon_threads, server.lock, server.released = True, threading.Lock(), threading.Event()
    server.plan, server.requests, server.at_once, server.most_at_once = [], [], 0, 0
    server.url = f"http://127.0.0.1:{server.server_port}/v1/score"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def rewards_of(rewards, texts, **options):
    return compute_rewards(rewards, *rollouts(texts, **options), step=3, timeout=20.0)


def test_the_server_gets_prompts_completions_and_columns_and_its_numbers_are_the_rewards(judge):
    rewards = load_rewards([judge.url], [2.0])
    prepare_rewards(rewards, CPU)
    columns = [{"answer": "x", "level": 1}, {"answer": "y"}]
    result = rewards_of(rewards, [["a", "bb"], ["none", "éé\u2028"]], columns=columns)
    assert result.total.tolist() == [[0.5, 1.0], [0.0, 1.5]] and result.valid.tolist() == [[True, True], [False, True]]
    assert result.by_function == {"score": 0.5} and result.notes.retried == {"score": 0}
    assert judge.requests == [
        {
            "path": "/v1/score",
            "token": None,
            "step": 3,
            "prompts": ["p "] * 4,
            "completions": ["a", "bb", "none", "éé\u2028"],
            "columns": {"answer": ["x", "x", "y", "y"], "level": [1, 1, None, None]},
        }
    ]


def test_chats_travel_as_messages_and_a_token_as_a_header(judge, monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    chat = [{"role": "user", "content": "hi"}]
    result = rewards_of(load_rewards([f"{judge.url}#token=JUDGE_TOKEN"], None), [["a", "bb"]], raw=chat)
    assert result.total.tolist() == [[0.25, 0.5]]
    (asked,) = judge.requests
    assert asked["token"] == "Bearer secret" and asked["prompts"] == [chat] * 2 and asked["columns"] == {}
    assert asked["completions"][1] == [{"role": "assistant", "content": "bb"}]


def test_batches_go_out_at_once_but_no_more_than_allowed(judge):
    judge.plan = ["late"] * 6
    rewards = load_rewards([f"{judge.url}#batch=2&concurrency=3"], None)
    result = rewards_of(rewards, [[f"{i}" * (i + 1) for i in range(6)], [f"{i}" * (i + 1) for i in range(6, 12)]])
    assert judge.most_at_once == 3 and Counter(len(asked["completions"]) for asked in judge.requests) == {2: 6}
    lengths = [len(f"{i}") * (i + 1) / 4 for i in range(12)]
    assert result.total.flatten().tolist() == lengths


def test_two_servers_wait_at_the_same_time(judge):
    judge.plan = ["late"] * 2
    rewards = load_rewards([judge.url, f"{judge.url}/again"], None)
    result = rewards_of(rewards, [["a", "bb"]])
    assert judge.most_at_once == 2 and result.total.tolist() == [[0.5, 1.0]]
    assert all(seconds >= 0.5 for seconds in result.notes.seconds.values())


def test_certificates_are_read_once_and_not_for_every_step(judge, monkeypatch):
    read, original = [], ssl.SSLContext.load_verify_locations
    monkeypatch.setattr(
        ssl.SSLContext, "load_verify_locations", lambda self, *a, **k: read.append(1) or original(self, *a, **k)
    )
    certificates.cache_clear()
    for text in ("a", "bb"):
        rewards_of(load_rewards([judge.url], None), [[text]])
    assert len(judge.requests) == 2 and len(read) == 1


def test_what_was_asked_once_is_not_asked_again(judge, tmp_path):
    for cache, requests in (("on", 1), ("off", 2)):
        judge.requests.clear()
        rewards = load_rewards([f"{judge.url}#cache={cache}"], None)
        for _ in range(2):
            result = rewards_of(rewards, [["a", "a", "bb", "none"]])
            assert result.total.tolist() == [[0.25, 0.25, 0.5, 0.0]] and result.valid.tolist() == [[True] * 3 + [False]]
        assert [asked["completions"] for asked in judge.requests] == [["a", "bb", "none"]] * requests
    judge.requests.clear()
    rewards_of(rewards, [["a"], ["a"]], columns=[{"answer": "x"}, {"answer": "y"}])
    assert judge.requests[0]["completions"] == ["a", "a"], "other columns are another question"


def test_a_cache_in_a_file_serves_the_next_run_and_survives_a_torn_line(judge, tmp_path):
    address = f"{judge.url}#cache={tmp_path / 'known.txt'}"
    rewards_of(load_rewards([address], None), [["a", "bb", "none", "ccc"]])
    whole = (tmp_path / "known.txt").read_text()
    assert whole.endswith(" 0.75\n")
    (tmp_path / "known.txt").write_text(whole[:-3])  # 0. is a number, too
    judge.requests.clear()
    result = rewards_of(load_rewards([address], None), [["a", "none"], ["bb", "ccc"]])
    assert [asked["completions"] for asked in judge.requests] == [["ccc"]]
    assert result.total.tolist() == [[0.25, 0.0], [0.5, 0.75]] and not result.valid[0, 1]
    rewards_of(load_rewards([f"{judge.url}/other#cache={tmp_path / 'known.txt'}"], None), [["a"]])
    assert judge.requests[-1]["completions"] == ["a"], "another server gives other rewards"


@pytest.mark.parametrize("failure", [500, 503, 429, "hang up", "hang"])
def test_a_request_that_fails_is_repeated_and_counted(judge, failure):
    judge.plan = [failure, failure]
    result = rewards_of(load_rewards([f"{judge.url}#timeout=0.3"], None), [["a", "bb"]])
    assert result.total.tolist() == [[0.25, 0.5]] and result.notes.retried == {"score": 2}
    assert len(judge.requests) == 3


@pytest.mark.parametrize(
    ("plan", "words", "requests"),
    [
        ([500] * 9, ["no rewards in 3 attempts", "status 500", "out of memory", "--resume"], 3),
        (["hang"] * 9, ["no rewards in 3 attempts", "no answer in 0.3 s"], 3),
        (["hang up"] * 9, ["no rewards in 3 attempts", "RemoteProtocolError"], 3),
        ([404], ["status 404", "out of memory", "200 is wanted"], 1),
        ([302], ["status 302"], 1),
        ([lambda rewards: {"rewards": rewards[:1]}], ["1 rewards for 2 completions"], 1),
        ([lambda rewards: {"rewards": [*rewards, 0.5]}], ["3 rewards for 2 completions"], 1),
        ([lambda rewards: {"rewards": "ab"}], ["answered with \"'ab'\" for 2 completions"], 1),
        ([lambda rewards: {"scores": rewards}], ["scores", '{"rewards": [...]} is wanted'], 1),
        ([lambda rewards: b"<html>busy</html>"], ["<html>busy</html>"], 1),
        ([lambda rewards: b"[" * 100_000], ["is wanted"], 1),
        ([lambda rewards: {"rewards": [0.5, "1"]}], ["the reward \"'1'\"", "finite number or null"], 1),
        ([lambda rewards: {"rewards": [0.5, True]}], ["the reward 'True'"], 1),
        ([lambda rewards: b'{"rewards": [0.5, NaN]}'], ["the reward 'nan'"], 1),
        ([lambda rewards: {"rewards": [0.5, 10**400]}], ["the reward '1000"], 1),
    ],
    ids=lambda value: re.sub(r"<function .*? at \w+>", "an answer", str(value)),
)  # fmt: skip
def test_what_cannot_be_a_reward_ends_in_one_sentence(judge, plan, words, requests):
    judge.plan = plan
    with pytest.raises(UserError) as refused:
        rewards_of(load_rewards([f"{judge.url}#timeout=0.3&retries=2"], None), [["a", "bb"]])
    said = str(refused.value)
    assert said.startswith(f"reward: {judge.url} at step 3 ") and "\n" not in said and len(said) < 300
    assert all(word in said for word in words), said
    assert len(judge.requests) == requests


def test_a_server_that_hangs_is_cut_off_by_the_reward_timeout_too(judge):
    judge.plan = ["hang"] * 9
    began = time.monotonic()
    with pytest.raises(UserError, match="reward: score had not returned after 0.5 s at step 3"):
        compute_rewards(load_rewards([judge.url], None), *rollouts([["a"]]), step=3, timeout=0.5)
    assert time.monotonic() - began < 10  # a judge that hangs never answers


def test_a_server_that_does_not_listen_is_found_before_a_model_is_loaded():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        rewards = load_rewards([f"http://127.0.0.1:{closed.getsockname()[1]}/score"], None)
        with pytest.raises(UserError, match=r"nothing listens at http://127.*\(.*refused.*\); start the server first"):
            prepare_rewards(rewards, CPU)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ftp://host/score", ["'ftp://host/score' is not at http"]),
        ("file:///etc/passwd", ["is not at http"]),
        ("http:///score", ["names no host"]),
        ("http://host:99999/score", ["is no address", "65535"]),
        ("http://me:secret@host/score", ["password", "#token="]),
        ("http://host/score#timeout=soon", ["timeout=soon", "is not a number"]),
        ("http://host/score#timeout=0", ["timeout=0", "out of range"]),
        ("http://host/score#retries=-1", ["retries=-1", "0 or more"]),
        ("http://host/score#concurrency=0", ["concurrency=0", "1 or more"]),
        ("http://host/score#batchsize=8", ["no option 'batchsize'", "Did you mean 'batch'"]),
        ("http://host/score#token=NOT_SET_ANYWHERE", ["names no environment variable"]),
        ("http://host/score#cache=/no/such/folder/file", ["cache=/no/such", "cannot be used"]),
    ],
)
def test_addresses_that_cannot_work_are_explained(address, words):
    with pytest.raises(UserError) as refused:
        load_rewards([address], None)
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert "\n" not in str(refused.value) and "secret" not in str(refused.value)


@pytest.mark.slow
def test_a_run_is_rewarded_by_a_server_and_a_model_and_says_what_they_took(judge, tmp_path):
    from test_reward_model import saved

    folder = saved(tmp_path / "rm", "Llama")
    judge.plan = [500]
    config = fastkl.TrainConfig(
        output=str(tmp_path / "run"), generator="transformers", steps=2, prompts_per_step=2, num_samples=3,
        max_new_tokens=6, report_to=(), dtype="float32", dynamic_sampling=1,
        reward=(judge.url, f"model:{folder}", "regex?pattern=a"), reward_weights=(1.0, 0.5, 2.0),
    )  # fmt: skip
    metrics = fastkl.train(config).metrics
    assert {"reward/score", "reward/rm", "reward/regex", "reward/drawn", "groups/replaced"} <= set(metrics)
    assert min(metrics[f"time/reward/{name}"] for name in ("score", "rm", "regex")) > 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["time/retried/score"] for line in lines] == [1, 0]
    for sample in map(json.loads, (tmp_path / "run" / "samples.jsonl").read_text().splitlines()):
        score, by_model, found = (sample["rewards"][name] for name in ("score", "rm", "regex"))
        assert score == len(sample["completion"]) / 4 and found == ("a" in sample["completion"])
        assert sample["reward"] == pytest.approx(score + 0.5 * by_model + 2 * found, abs=1e-5)
