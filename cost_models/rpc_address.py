"""Who answers at an address: TVM's trackers and RPC servers, asked by plain sockets, so that a wrong address or key is
found in seconds and before TVM is loaded."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

from .boards import Unreachable

SECONDS = 5.0  # until an address counts as dead
TRACKER, SERVER, MISMATCH = 0x2F271, 0xFF271, 0xFF273  # first words of TVM's protocols
SUMMARY = 6
TUNNEL = "ssh -N -L 9190:127.0.0.1:9190 user@board"

Address = tuple[str, int]


def parse(what: str, text: str) -> Address:
    """Host and port of "host:port".

    Raises:
        ValueError: it is not of that form.
    """
    host, colon, port = text.strip().rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{what} is {text!r}; it must be host:port, such as 127.0.0.1:9190.")
    return host.strip("[]"), int(port)


def show(address: Address) -> str:
    """The other way round."""
    return f"{address[0]}:{address[1]}"


def check_listening(what: str, address: Address) -> None:
    """Raise Unreachable unless something listens there."""
    with _connected(what, address):
        pass


def check_server(address: Address, key: str) -> None:
    """Greet an RPC server and leave.

    Raises:
        Unreachable: nothing listens, something else than TVM answers, the key is wrong, or it is busy.
    """
    name = f"client:{key}".encode()
    with _connected("board", address) as connection:
        connection.sendall(struct.pack("<ii", SERVER, len(name)) + name)
        try:
            (answer,) = struct.unpack("<i", _received(connection, 4))
            if answer == SERVER:  # read all it says: a server that meets a reset connection ends
                _received(connection, *struct.unpack("<i", _received(connection, 4)))
        except TimeoutError:
            raise Unreachable(
                f"The board at {show(address)} accepts connections but does not answer: somebody else may be measuring "
                "on it, or its server hangs. Wait, or start board.py there again."
            ) from None
        except OSError:
            raise Unreachable(
                f"What answers at {show(address)} closes the connection: no server runs at the tunnel's other end. "
                "Start board.py there."
            ) from None
    if answer == MISMATCH:
        raise Unreachable(
            f"The board at {show(address)} has another key than {key!r}. Give --key as it was started there."
        )
    if answer != SERVER:
        raise Unreachable(f"What answers at {show(address)} is no TVM RPC server. Start one there: see board.py.")


def boards_of(tracker: Address, key: str) -> int:
    """How many boards with this key a tracker knows, busy ones included.

    Raises:
        Unreachable: nothing listens, something else than a tracker answers, or it knows no such board.
    """
    try:
        with _connected("tracker", tracker) as connection:
            connection.sendall(struct.pack("<i", TRACKER))
            (answer,) = struct.unpack("<i", _received(connection, 4))
            if answer != TRACKER:
                raise ConnectionError
            question = json.dumps([SUMMARY]).encode()
            connection.sendall(struct.pack("<i", len(question)) + question)
            (size,) = struct.unpack("<i", _received(connection, 4))
            summary: Any = json.loads(_received(connection, size))[1]
    except Unreachable:
        raise
    except (OSError, ValueError):
        raise Unreachable(
            f"What answers at {show(tracker)} is no TVM tracker. Start one: "
            "python -m tvm.exec.rpc_tracker --host 127.0.0.1 --port 9290 --port-end 9291"
        ) from None
    known = [str(server["key"]).removeprefix("server:") for server in summary["server_info"] if "key" in server]
    if key not in known:
        names = ", ".join(f"{name} ({known.count(name)})" for name in sorted(set(known))) or "none"
        raise Unreachable(f"The tracker at {show(tracker)} knows no board with the key {key!r}. Its boards: {names}.")
    return known.count(key)


@contextlib.contextmanager
def _connected(what: str, address: Address) -> Iterator[socket.socket]:
    hint = "" if what == "tracker" else f" Start board.py there, and keep a tunnel open: {TUNNEL}"
    try:
        connection = socket.create_connection(address, timeout=SECONDS)
    except ConnectionRefusedError:
        raise Unreachable(f"No {what} answers at {show(address)}: the connection was refused.{hint}") from None
    except TimeoutError:
        raise Unreachable(f"No {what} answers at {show(address)} within {SECONDS:.0f} s.{hint}") from None
    except OSError as error:
        raise Unreachable(f"No {what} can be reached at {show(address)}: {error.strerror or error}.{hint}") from None
    with connection:
        yield connection


def _received(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise ConnectionError("the connection was closed")
        data += piece
    return data
