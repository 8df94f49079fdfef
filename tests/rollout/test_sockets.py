"""The engine's sockets: nobody on the network can reach them, unless the user has asked for it."""

from __future__ import annotations

import json
import os

import commands
import pytest

from fastkl.rollout import vllm

ENGINE = """
import contextlib, ctypes, json, os, socket, sys
from pathlib import Path
folder, address = Path(sys.argv[1]), sys.argv[2]
clone_newuts = 0x04000000
if ctypes.CDLL(None).unshare(clone_newuts):
    sys.exit(77)
socket.sethostname(address)  # a host name that resolves to the network's address, as on a node of a cluster
import psutil
from fastkl.rollout import vllm
from test_generators import STOP, Sampling, ToyTokenizer, tied_model
before = dict(os.environ)
tied_model().save_pretrained(folder)

def listening():
    generator = vllm.VllmGenerator(
        str(folder), ToyTokenizer(), Sampling(1.0, 4, stop_token_ids=(STOP,)), dtype="float32", max_model_len=32,
        gpu_memory_utilization=0.2, log=folder / "engine.log",
    )
    found = [c.laddr.ip for c in psutil.Process().net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]
    generator.close()
    return found

guarded = listening()
left = [name for name in ("GLOO_SOCKET_IFNAME", "VLLM_HOST_IP") if os.environ.get(name) != before.get(name)]
vllm._sockets_on_loopback = contextlib.nullcontext
print(json.dumps([guarded, listening(), left]))
"""


def network_address() -> str:
    """The IPv4 address of an interface that is not the loopback."""
    psutil = pytest.importorskip("psutil")
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family.name == "AF_INET" and not address.address.startswith("127."):
                return address.address
    pytest.skip("this machine has no network interface besides the loopback")


@pytest.fixture(scope="module")
def listening(tmp_path_factory) -> tuple[str, set[str], set[str]]:
    """The address that the host's name resolves to, and where an engine's process listens there: with the guard, and
    without it."""
    address = network_address()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GLOO_SOCKET_IFNAME", "VLLM_HOST_IP"):
            patch.delenv(name, raising=False)
        done = commands.run(str(tmp_path_factory.mktemp("sockets")), address, script=ENGINE)
    if done.returncode == 77:
        pytest.skip("giving a process a host name of its own needs more rights")
    assert done.returncode == 0, done.stderr
    guarded, unguarded, left = json.loads(done.stdout.splitlines()[-1])
    assert not left, "the environment is as it was before the engine started"
    return address, set(guarded), set(unguarded)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.long
def test_the_engine_listens_on_the_loopback_alone_where_the_host_name_is_the_networks(listening):
    assert listening[1] == {"127.0.0.1"}


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.long
def test_without_the_guard_it_would_listen_on_the_network(listening):
    """The control."""
    address, _, unguarded = listening
    assert address in unguarded


def test_an_interface_that_the_user_names_is_left_alone_and_the_environment_is_as_before(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.delenv("VLLM_HOST_IP", raising=False)
    with vllm._sockets_on_loopback():
        assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["VLLM_HOST_IP"]) == ("eth7", "127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7" and "VLLM_HOST_IP" not in os.environ
