"""Lifelines: each process has a connection to the first one, which the system closes when either ends.

A process that is lost is noticed at once, whatever the others are waiting for, and the first process tells all of them.
A machine that falls silent is noticed by keep-alive probes within some ten seconds. A process that is about to fail
says why, so that the others can say it, too.

The first process listens on the loopback interface where all processes are on one machine, else on every interface, as
torch's own store does; a connection counts only if it knows the secret that the store has for it.
"""

from __future__ import annotations

import json
import secrets
import socket
import threading
from collections.abc import Callable
from typing import Any, Protocol

LOST, WHY, BYE = "lost", "why", "bye"

PROBES = ((socket.TCP_KEEPIDLE, 4), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3))
"""Seconds before the first probe and between probes, and how many may stay unanswered."""

CONNECT_SECONDS = 120.0


class Store(Protocol):
    """What is used of torch's stores."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...


class Lifeline:
    """This process's end of the connections. on_loss(rank, why) is called once, in a thread, for the first loss."""

    def __init__(
        self, rank: int, size: int, store: Store, address: str, on_loss: Callable[[int, str], None], *, local: bool
    ) -> None:
        self.rank, self._on_loss = rank, on_loss
        self._told, self._ending = threading.Lock(), False
        self._peers: dict[int, socket.socket] = {}
        if rank == 0:
            self._welcome(size, store, "127.0.0.1" if local else "")
        else:
            self._connect(store, "127.0.0.1" if local else address)
        for peer in self._peers:
            threading.Thread(target=self._listen, args=(peer,), name="fastkl-lifeline", daemon=True).start()

    def say_why(self, reason: str) -> None:
        """Lets the others know why this process is about to end."""
        self._send({WHY: [self.rank, reason]})

    def close(self) -> None:
        """An orderly end: no loss."""
        self._ending = True
        self._send({BYE: self.rank})
        for connection in self._peers.values():
            connection.close()

    def _welcome(self, size: int, store: Store, host: str) -> None:
        secret = secrets.token_hex(16)
        with socket.create_server((host, 0), backlog=size) as server:
            server.settimeout(CONNECT_SECONDS)
            store.set("fastkl/lifeline", json.dumps([server.getsockname()[1], secret]))
            while len(self._peers) < size - 1:
                connection, _ = server.accept()
                connection.settimeout(CONNECT_SECONDS)
                greeting = connection.makefile("rb").readline(1000)
                rank = _rank_in(greeting, secret)
                if rank is None or rank in self._peers:
                    connection.close()
                    continue
                self._peers[rank] = _watched(connection)

    def _connect(self, store: Store, host: str) -> None:
        port, secret = json.loads(store.get("fastkl/lifeline"))
        connection = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
        connection.sendall(f"{json.dumps([self.rank, secret])}\n".encode())
        self._peers[0] = _watched(connection)

    def _listen(self, peer: int) -> None:
        """Reads what one peer says, until it ends."""
        why, said_goodbye = "", False
        try:
            for line in self._peers[peer].makefile("rb"):
                message = json.loads(line)
                if LOST in message:
                    self._lost(*message[LOST])
                elif WHY in message:
                    why = message[WHY][1]
                said_goodbye = said_goodbye or BYE in message
        except (OSError, ValueError):
            pass  # it cannot be reached any more
        if not said_goodbye:
            self._lost(peer, why)

    def _lost(self, rank: int, why: str) -> None:
        with self._told:
            if self._ending:
                return
            self._ending = True
        if self.rank == 0:
            self._send({LOST: [rank, why]})
        self._on_loss(rank, why)

    def _send(self, message: dict[str, Any]) -> None:
        for connection in self._peers.values():
            try:
                connection.sendall(f"{json.dumps(message)}\n".encode())
            except OSError:
                continue  # that one is gone


def _rank_in(greeting: bytes, secret: str) -> int | None:
    """The rank of who greets; None for a stranger."""
    try:
        rank, said = json.loads(greeting)
    except ValueError:
        return None
    return int(rank) if secrets.compare_digest(str(said), secret) else None


def _watched(connection: socket.socket) -> socket.socket:
    """The connection, which ends where its other side falls silent."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in PROBES:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return connection
