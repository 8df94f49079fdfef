"""Weights over the network: servers that stand in for vLLM's, with the real receiver, over gloo; some of them die, stop
or are cut off while weights are on their way."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_servers import SAMPLING, Fake, models_and_expected
from toy import VOCAB, ToyTokenizer, toy_model

from fastkl.errors import UserError
from fastkl.rollout import meeting, transfer, wire
from fastkl.rollout.agreement import StaleEngineError
from fastkl.rollout.fingerprint import fingerprint
from fastkl.rollout.receiver import Invitation, Receiver, Update
from fastkl.rollout.server import ServerGenerator
from fastkl.rollout.transfer import Broken, Member, Transfer, transport_of
from fastkl.rollout.wire import Entry, Layout, Packed, received, unlike

CPU = torch.device("cpu")

LIBC_NEW_NETWORK = 0x40000000
"""CLONE_NEWNET."""


class Networked(Fake):
    """The same with vLLM's routes for the transfer of weights, and one receiver for each of its workers.

    before_chunk(number) is called when a chunk is about to be received.
    """

    def __init__(self, model, workers=1, before_chunk=None, **options):
        self.workers, self.before_chunk, self.paths = workers, before_chunk or (lambda number: None), []
        super().__init__(model, transport="gloo", workers=workers, **options)

    def replace_process(self):
        super().replace_process()
        self.is_shifted = False  # whether vLLM takes the answers to one call for those to another
        self.receivers, self.updating = [Receiver(CPU, rank) for rank in range(self.workers)], False

    def everywhere(self, method, argument):
        with ThreadPoolExecutor(self.workers) as pool:
            list(pool.map(lambda receiver: getattr(receiver, method)(argument), self.receivers))

    def answer(self, path, asked):
        self.paths.append(path)
        try:
            route = getattr(self, path[1:].partition("?")[0], None)
            return super().answer(path, asked) if route is None else (200, route(asked) or {})
        except ConnectionError:
            raise
        except Exception:
            self.is_shifted = self.workers > 1
            return 500, {}

    def init_weight_transfer_engine(self, asked):
        self.everywhere("join", Invitation(**asked["init_info"]))
        for receiver in self.receivers:
            if not receiver.failed:
                receiver._group = Watched(receiver._group, self)

    def start_weight_update(self, asked):
        assert not self.updating, "start_weight_update called while a weight update is already active"
        self.updating = True
        for receiver in self.receivers:
            receiver.begin()

    def update_weights(self, asked):
        assert self.updating
        self.everywhere("receive", Update(**asked["update_info"]))

    def finish_weight_update(self, asked):
        assert self.updating
        self.updating = False

    def fastkl_leave(self, sender):
        for receiver in self.receivers:
            if not receiver.is_anothers(sender):
                receiver.leave()
                self.updating = False
        return 200, {"results": [{}] * self.workers}

    def rpc(self, asked):
        given = asked["kwargs"]
        if self.is_shifted:
            return 200, {"results": [{}, None]}
        if asked["method"] == "fastkl_leave":
            return self.fastkl_leave(**given)
        if given.get("path") != "":
            status, found = super().rpc(asked)
            return status, {"results": [one | {"failed": self.receivers[0].failed} for one in found["results"]]}
        self.loads.append(given["version"])
        results = []
        for receiver in self.receivers:
            if receiver.failed:
                return 200, {"results": [{"error": "nothing came", "failed": r.failed} for r in self.receivers]}
            tensors = receiver.take()
            sums = wire.numbers([fingerprint(t) for t in tensors.values()])
            results.append({"error": "", "sums": sums, "failed": ""})
        self.model.load_state_dict(tensors, strict=False)
        self.version = given["version"]
        return 200, {"results": results}


class Watched:
    """A group that says which chunk comes."""

    def __init__(self, group, fake):
        self.group, self.fake, self.device, self.number, self.close = group, fake, group.device, 0, group.close

    def broadcast(self, buffer):
        self.fake.before_chunk(self.number)
        self.number += 1
        self.group.broadcast(buffer)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Chunks of which the toy model has about ten, and little patience."""
    monkeypatch.setattr(wire, "CHUNK_BYTES", 2048)
    monkeypatch.setattr(meeting, "SILENCE_SECONDS", 3.0)
    monkeypatch.setattr(transfer, "SLACK_SECONDS", 2.0)
    monkeypatch.setattr("fastkl.rollout.asking.CONNECT_SECONDS", 1.0)


@pytest.fixture
def networked():
    """Makes servers in this process, and stops them at the end."""
    made: list[Networked] = []

    def make(*arguments, **options) -> Networked:
        made.append(Networked(*arguments, **options))
        return made[-1]

    yield make
    for fake in made:
        fake.stop()


@pytest.fixture
def asking(tmp_path):
    """Makes generators, and closes them at the end."""
    made: list[ServerGenerator] = []

    def make(*urls, notes=None, weights="network") -> ServerGenerator:
        made.append(
            ServerGenerator(
                urls, ToyTokenizer(), SAMPLING, vocab=VOCAB, dtype="float32", max_model_len=32,
                folder=tmp_path / "engines", weights=weights, note=(notes if notes is not None else []).append,
            )
        )  # fmt: skip
        return made[-1]

    yield make
    for generator in made:
        generator.close()


def differing(model, policy) -> list[str]:
    theirs = policy.state_dict()
    return [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, theirs[name])]


@pytest.mark.slow
def test_servers_with_other_weights_hold_the_policys_after_a_push_over_the_network(networked, asking, tmp_path):
    base, policy, requests, expected = models_and_expected()
    one, two = networked(base), networked(toy_model(5, torch.float32))
    assert differing(one.model, policy) and differing(two.model, policy)
    generator = asking(one.url, two.url, weights="auto")
    generator.sync(policy, 7)
    assert not differing(one.model, policy) and not differing(two.model, policy)
    assert [c.token_ids for c in generator.generate(requests)] == [c.token_ids for c in expected]
    assert one.asked and two.asked and not (tmp_path / "engines").exists()
    generator.sync(base, 8)
    assert not differing(one.model, base) and not differing(two.model, base)
    assert [path for path in one.paths if path.startswith("/init")] == ["/init_weight_transfer_engine"], "one group"
    last = [p.partition("?")[0] for p in one.paths if p != "/collective_rpc"][-5:]
    assert last == ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update", "/resume"]
    assert generator.way() == "engines: weights go to the servers over the network (gloo)"


@pytest.mark.slow
def test_every_worker_of_every_server_has_a_rank_of_its_own(networked):
    """A server with three workers between two with one."""
    policy = toy_model(1, torch.float32)
    fakes = [networked(toy_model(0, torch.float32), workers=workers) for workers in (1, 3, 1)]
    sender = Transfer("gloo", "a", CPU)
    sender.keep(policy.named_parameters())
    sender.send([Member(fake.url, "", fake.workers) for fake in fakes], "a-1", 1, tied=True)
    assert not any(differing(fake.model, policy) for fake in fakes)
    sender.close()


def test_what_was_changed_on_the_way_stops_the_run_with_the_names_of_the_tensors(networked, asking):
    fake, policy = networked(toy_model(0, torch.float32)), toy_model(1, torch.float32)
    generator = asking(fake.url)
    generator.sync(policy, 1)
    take = fake.receivers[0].take

    def one_bit(self=fake):
        tensors = take()
        tensors["model.norm.weight"].view(torch.int32)[3] ^= 1
        return tensors

    fake.receivers[0].take = one_bit
    with pytest.raises(StaleEngineError, match=r"step 2: other weights came .* were sent: model\.norm\.weight; no "):
        generator.sync(policy, 2)
    assert fake.paths[-1] == "/resume", "not left paused"


@pytest.mark.slow
def test_a_second_trainer_does_not_take_the_servers_of_one_that_lives(networked, asking):
    """And does once that one is gone."""
    base, policy = toy_model(0, torch.float32), toy_model(1, torch.float32)
    fake = networked(base)
    first, second = asking(fake.url), asking(fake.url)
    first.sync(policy, 1)
    with pytest.raises(UserError, match="another run gives this server its weights, and its trainer is alive"):
        second.sync(base, 1)
    assert not differing(fake.model, policy)
    first.sync(base, 2)
    assert not differing(fake.model, base), "the first one's group is as it was"
    first.transfer._beacon.close()  # what the system does when the process ends
    second.sync(policy, 2)
    assert not differing(fake.model, policy)


@pytest.mark.slow
def test_a_trainer_that_died_within_a_push_is_followed_by_another(networked, asking):
    base, policy = toy_model(0, torch.float32), toy_model(1, torch.float32)
    fake = networked(base)
    first = asking(fake.url)
    first.sync(base, 1)
    fake.answer("/start_weight_update", {})
    first.transfer._beacon.close()
    second = asking(fake.url)
    second.sync(policy, 1)
    assert not differing(fake.model, policy)


def served_elsewhere(connection, port, base, number, ending):
    """A server as a process of its own, which ends, or stops, before a chunk of this number."""
    torch.set_num_threads(1)
    at_chunk = {number: lambda: os.kill(os.getpid(), ending)}
    fake = Networked(base, before_chunk=lambda n: at_chunk.get(n, int)(), port=port)
    connection.send(fake.url)
    while connection.recv() == "differing?":
        connection.send(differing(fake.model, connection.recv()))


@contextlib.contextmanager
def elsewhere(base, number=-1, ending=signal.SIGKILL, port=0):
    """(address, process, connection) of such a server."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=served_elsewhere, args=(theirs, port, base, number, ending), daemon=True)
    process.start()
    try:
        yield ours.recv(), process, ours
    finally:
        process.kill()
        process.join()


@pytest.mark.slow
@pytest.mark.parametrize(("ending", "number"), [(signal.SIGKILL, 0), (signal.SIGKILL, 4), (signal.SIGSTOP, 4)])
def test_a_server_that_ends_or_stops_within_a_push_is_named_and_the_others_get_the_weights(
    networked, asking, ending, number
):
    """And its requests; one that is started at its address again gets them before it is asked."""
    base, policy, requests, expected = models_and_expected()
    left, notes = [networked(base), networked(base)], []
    with elsewhere(base, number, ending) as (url, process, _):
        generator = asking(left[0].url, url, left[1].url, notes=notes)
        begin = time.monotonic()
        generator.sync(policy, 3)
        print(ending, number, time.monotonic() - begin, notes)
        assert time.monotonic() - begin < 2 * meeting.SILENCE_SECONDS + 2 * transfer.SLACK_SECONDS
        assert len(notes) == 1 and notes[0].startswith(f"engines: {url} is lost (")
        assert not differing(left[0].model, policy) and not differing(left[1].model, policy)
        process.kill()
    assert [c.token_ids for c in generator.generate(requests)] == [c.token_ids for c in expected]
    with elsewhere(base, port=int(url.rpartition(":")[2])) as (again, _, connection):
        assert again == url
        connection.send("differing?")
        connection.send(policy)
        assert connection.recv()
        assert [c.token_ids for c in generator.generate(requests)] == [c.token_ids for c in expected]
        assert notes[1] == f"engines: {url} is back, and has the weights after step 3"
        connection.send("differing?")
        connection.send(policy)
        assert connection.recv() == []
        generator.sync(base, 4)
        assert not differing(left[0].model, base) and not differing(left[1].model, base)
        connection.send("differing?")
        connection.send(base)
        assert connection.recv() == []


def test_servers_that_answer_and_never_come_end_the_run_with_a_sentence(networked, asking):
    """Their way to the trainer is closed, say."""
    fake = networked(toy_model(0, torch.float32))
    generator = asking(fake.url)
    fake.receivers[0].failed = "no route to host"
    fake.init_weight_transfer_engine = lambda asked: 1 / 0
    with pytest.raises(UserError, match=r"although they answer \(.*no route to host\); .* --engine-weights folder"):
        generator.sync(toy_model(1, torch.float32), 1)


@pytest.mark.slow
def test_servers_whose_engines_die_within_pushes_are_lost_one_after_the_other_and_the_last_gets_the_weights(
    networked, asking
):
    """They answer, that they have failed."""
    base, policy, requests, expected = models_and_expected()
    fakes, notes = [networked(base) for _ in range(3)], []

    def dies(fake):
        def before_chunk(number):
            fake.answer = lambda path, asked: (500, {})
            raise RuntimeError("the engine is dead")

        return before_chunk

    generator = asking(*(fake.url for fake in fakes), notes=notes)
    first, second, last = fakes
    first.before_chunk = dies(first)
    second.before_chunk = lambda number: notes and dies(second)(number)
    generator.sync(policy, 3)
    assert [note.partition(" (")[0] for note in notes] == [f"engines: {f.url} is lost" for f in (first, second)]
    assert not differing(last.model, policy)
    assert [c.token_ids for c in generator.generate(requests)] == [c.token_ids for c in expected]


@pytest.mark.slow
def test_a_server_of_two_workers_serves_on_after_a_push_that_broke_off_and_for_the_next_trainer(networked, asking):
    """No call fails there, since vLLM would then take answers for those to other calls."""
    base, policy = toy_model(0, torch.float32), toy_model(1, torch.float32)
    wide, other, breaks = networked(base, workers=2), networked(base), [4]
    generator = asking(wide.url, other.url)
    generator.sync(base, 1)

    def before_chunk(number):
        if breaks and number >= breaks[0]:
            breaks.clear()
            raise RuntimeError("the connection is closed")

    wide.before_chunk = before_chunk
    generator.sync(policy, 2)
    assert not breaks and not wide.is_shifted and not differing(wide.model, policy)
    generator.close()
    following = asking(wide.url, other.url)
    following.sync(base, 3)
    assert not wide.is_shifted and not differing(wide.model, base) and not differing(other.model, base)


def test_weights_that_have_come_in_part_are_not_taken():
    receiver = Receiver(CPU)
    with pytest.raises(RuntimeError, match="no weights have come as a whole"):
        receiver.take()
    chunks = [torch.zeros(2048, dtype=torch.uint8)]
    receiver._group = SimpleNamespace(broadcast=lambda buffer: chunks.pop(), device=CPU, close=lambda: None)
    receiver.begin()
    receiver.receive(Update(["a", "b"], ["uint8", "uint8"], [[2000], [2000]], 2048))
    assert receiver.failed == "pop from empty list"
    with pytest.raises(RuntimeError, match="no weights have come as a whole"):
        receiver.take()


ABOUT = {"http://a:1": {"transport": "gloo"}, "http://b:1": {"transport": "gloo"}}
OLD, GPU = {"http://b:1": {}}, {"http://b:1": {"transport": "nccl", "gpu": "GPU-2"}}


@pytest.mark.parametrize(("abouts", "words"), [
    (ABOUT | OLD, "http://b:1 takes no weights over the network"),
    (GPU, "http://b:1 takes weights from a GPU only, and the policy is on the CPU"),
    (ABOUT | GPU, "http://b:1 takes weights from a GPU only"),
])  # fmt: skip
def test_the_folder_is_the_way_where_the_network_is_none_and_the_network_is_refused_then(abouts, words):
    assert transport_of(ABOUT, "auto", CPU) == transport_of(ABOUT, "network", CPU) == ("gloo", "")
    assert transport_of(ABOUT, "folder", CPU) == ("", "asked for")
    transport, why = transport_of(abouts, "auto", CPU)
    assert transport == "" and words in why
    with pytest.raises(UserError, match=f"engine_weights: network was asked for, but {words}.*use --engine-weights fo"):
        transport_of(abouts, "network", CPU)


def test_gpus_take_them_over_nccl_and_all_servers_must_take_them_alike(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(transfer, "gpu_of", lambda device: "GPU-1" if device.type == "cuda" else "")
    same = {"http://b:1": {"transport": "nccl", "gpu": "GPU-1"}}
    assert "http://b:1 has the policy's GPU" in transport_of(same, "auto", gpu)[1]
    assert transport_of(GPU, "auto", gpu) == ("nccl", "")
    assert "in the same way (http://a:1 over gloo" in transport_of(ABOUT | GPU, "auto", gpu)[1]
    monkeypatch.setattr(transfer, "find_spec", lambda name: None)
    assert "is not installed beside the trainer" in transport_of(GPU, "auto", gpu)[1]
    assert transport_of(ABOUT, "auto", gpu) == ("gloo", "")


def fill(chunks, buffer):
    buffer.copy_(next(chunks))


def test_tensors_of_all_kinds_arrive_as_they_were_in_whatever_chunks():
    """Odd sizes, empty ones, numbers of one to eight bytes; the memory of an earlier push is used again."""
    torch.manual_seed(0)
    shapes = [(7,), (3, 5), (), (0, 4), (1000,), (33,), (1,)]
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bfloat16, torch.float8_e4m3fn, torch.bool]
    packed = Packed()
    for scale in (1.0, 3.0):
        given = {
            f"t{i}": (scale * torch.randn(shape)).to(dtype)
            for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
        }
        given["turned"] = torch.randn(40, 30).T
        packed.take(given.items())
        chunks = [chunk.clone() for chunk in packed.chunks()]
        assert len(chunks) > 2 and all(len(chunk) <= 2048 for chunk in chunks[:-1])
        found = dict(received(packed.entries, packed.chunk_bytes, partial(fill, iter(chunks)), CPU))
        assert list(found) == list(given)
        for name, tensor in given.items():
            assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
            assert torch.equal(fingerprint(found[name]), fingerprint(tensor)), name
        sums = wire.numbers([fingerprint(t) for t in found.values()])
        assert unlike(packed.entries, packed.sums, sums) == []
        found["t1"][1, 2] += 1
        sums = wire.numbers([fingerprint(t) for t in found.values()])
        assert unlike(packed.entries, packed.sums, sums) == ["t1"]
        assert len(unlike(packed.entries, packed.sums, sums[:-1])) == len(given)


def test_a_tensor_larger_than_a_chunk_has_one_of_its_own():
    layout = Layout(2048)
    sizes = [100, 3000, 100, 1900, 200]
    assert [layout.add(Entry("", "uint8", (size,)))[0] for size in sizes] == [0, 1, 2, 2, 3]


def test_the_store_and_the_beacon_listen_on_the_address_that_leads_to_the_servers():
    assert meeting.own_address([("127.0.0.1", 1), ("localhost", 2)]) == "127.0.0.1"
    beacon = meeting.Beacon("me", "127.0.0.1")
    assert beacon._listening.getsockname()[0] == "127.0.0.1"
    assert meeting.is_seen("me", beacon.address) and not meeting.is_seen("you", beacon.address)
    beacon.close()
    assert not meeting.is_seen("me", beacon.address)


def in_two_networks():
    """Run in a network namespace of its own: the server is in another one, with a cable between them, which is pulled
    out while weights are on their way, and put back."""
    for command in ("ip link add v0 type veth peer name v1", "ip link set lo up"):
        subprocess.run(command.split(), check=True)
    meeting.SILENCE_SECONDS, transfer.SLACK_SECONDS, wire.CHUNK_BYTES = 2.0, 1.0, 2048
    base, policy = toy_model(0, torch.float32), toy_model(1, torch.float32)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def other_side():
        torch.set_num_threads(1)
        assert ctypes.CDLL(None).unshare(LIBC_NEW_NETWORK) == 0
        theirs.send(os.getpid())
        theirs.recv()
        for command in ("ip addr add 10.9.0.2/24 dev v1", "ip link set v1 up", "ip link set lo up"):
            subprocess.run(command.split(), check=True)
        pull = {4: lambda: subprocess.run(["ip", "link", "set", "v1", "down"], check=True)}
        fake = Networked(copy.deepcopy(base), before_chunk=lambda n: pull.pop(n, int)(), host="10.9.0.2")
        theirs.send(fake.url)
        theirs.recv()
        subprocess.run(["ip", "link", "set", "v1", "up"], check=True)
        theirs.send(differing(fake.model, base))
        theirs.recv()
        theirs.send(differing(fake.model, policy))

    process = context.Process(target=other_side, daemon=True)
    process.start()
    subprocess.run(["ip", "link", "set", "v1", "netns", str(ours.recv())], check=True)
    for command in ("ip addr add 10.9.0.1/24 dev v0", "ip link set v0 up"):
        subprocess.run(command.split(), check=True)
    ours.send("")
    member = Member(ours.recv(), "")
    sender = Transfer("gloo", "a", CPU)
    sender.keep(policy.named_parameters())
    begin = time.monotonic()
    with pytest.raises(Broken) as broken:
        sender.send([member], "a-1", 1, tied=True)
    seconds = time.monotonic() - begin
    assert list(broken.value.lost) == [member.url], broken.value
    assert seconds < 3 * meeting.SILENCE_SECONDS, seconds
    ours.send("")
    assert ours.recv() == [], "what has come of the weights has not reached the model"
    time.sleep(meeting.SILENCE_SECONDS)  # the server notices no sooner
    sender.send([member], "a-2", 2, tied=True)
    ours.send("")
    assert ours.recv() == []
    print(f"cut off, named after {seconds:.1f} s, and filled when it was back")


@pytest.mark.slow
@pytest.mark.long
def test_a_connection_that_is_cut_within_a_push_is_noticed_and_the_server_is_filled_when_it_is_back():
    """A cable between two network namespaces is pulled out; nobody is told."""
    command = ["unshare", "--map-root-user", "--net"]
    if not shutil.which("ip") or subprocess.run([*command, "ip", "link", "add", "v0", "type", "veth"]).returncode:
        pytest.skip("no network namespaces here")
    here = Path(__file__).parent
    folders = os.pathsep.join(map(str, (here, here.parent, *sys.path)))
    found = subprocess.run(
        [*command, sys.executable, "-c", "import test_transfer; test_transfer.in_two_networks()"],
        env=os.environ | {"PYTHONPATH": folders}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert found.returncode == 0 and "cut off, named" in found.stdout, found.stderr[-3000:]
