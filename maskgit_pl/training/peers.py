"""What ranks know of one another beside the training: which of them live, and why one of them ends the run.

A collective does not tell: gloo raises when a rank is gone, NCCL waits. So each rank leaves a beat in the store through
which they found each other, says there why it ends, and holds a connection to the next rank, which breaks when that
process ends. The watchdog uses it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from datetime import timedelta
from typing import Literal, NamedTuple

import torch.distributed as dist

from maskgit_pl.errors import INTERNAL_ERROR

__all__ = ["Ending", "Peers"]

_SILENCE = 3.5  # seconds in which a rank that lives beats at least twice
_PATIENCE = 8  # beats between a broken connection and the end: what the rank has to say of it comes before
_TOLD = "maskgit_pl/told"


class Ending(NamedTuple):
    """Why all ranks end.

    Attributes:
        code: Their exit code.
        why: ``hang`` where a rank waits in vain; ``rank`` where one has ended, or is about to.
        text: What is known.
    """

    code: int
    why: Literal["hang", "rank"]
    text: str


class Peers:
    """The other ranks, as seen from this one.

    Args:
        rank: This rank.
        world_size: Of the run.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own: the one of the process group may be waiting for something.
        connect = dist.TCPStore  # type: ignore[attr-defined]  # torch does not list it
        self._store = connect(address, port, is_master=False, timeout=timedelta(seconds=10))
        self._lock = threading.Lock()
        self._rank = rank
        self._beat_keys = [f"maskgit_pl/beat/{each}" for each in range(world_size)]
        self._name = f"rank {rank} ({socket.gethostname()}, process {os.getpid()})"
        self._count = 0
        self._unanswered = 0  # beats in a row that nobody took
        self._next = (rank + 1) % world_size
        self._line: socket.socket | None = None  # to the next rank
        self._broken = 0  # beats since it broke
        self._door = _open_door()  # nobody is let in: the kernel holds the connection as long as this process lives
        self.beat()
        self._store.set(_door_key(rank), f"{_own_address(address, port)} {self._door.getsockname()[1]}")

    def beat(self) -> Ending | None:
        """Shows that this rank lives; why it must end, if it must. About once a second."""
        self._count += 1
        try:
            with self._lock:
                self._store.set(self._beat_keys[self._rank], f"{self._name} {self._count}")
                self._unanswered = 0
                told = self._told()
                return told if told is not None else self._look_at_the_next()
        except dist.DistNetworkError:
            self._unanswered += 1
        except RuntimeError:  # slow to answer
            pass
        return self._without_store() if self._unanswered > _PATIENCE else None

    def told(self) -> Ending | None:
        """What a rank has said to all."""
        try:
            with self._lock:
                return self._told()
        except RuntimeError:
            return None

    def tell(self, ending: Ending) -> None:
        """Says to all ranks why they end; who comes first is heard."""
        with contextlib.suppress(RuntimeError), self._lock:
            self._store.compare_set(_TOLD, "", json.dumps(ending))

    def leave(self) -> None:
        """Takes leave: this rank ends as the others do, each by itself, and is missed by none."""
        with contextlib.suppress(RuntimeError), self._lock:
            self._store.set(_left_key(self._rank), "")
            self._door.close()
            if self._line is not None:
                self._line.close()

    def silent(self) -> str:
        """Which ranks do not beat, as a text; takes some seconds."""
        before = self._beats()
        time.sleep(_SILENCE)
        after = self._beats()
        if before is None or after is None:
            return self._without_store().text
        silent = [
            new.rpartition(" ")[0]
            for rank, (old, new) in enumerate(zip(before, after, strict=True))
            if old == new and rank != self._rank
        ]
        return f"{', '.join(silent)}: not heard of for {_SILENCE} s" if silent else ""

    def _told(self) -> Ending | None:
        return Ending(*json.loads(self._store.get(_TOLD))) if self._store.check([_TOLD]) else None

    def _look_at_the_next(self) -> Ending | None:
        """Whether the next rank's process has ended without a word."""
        if self._line is None:
            self._line = self._call_the_next()
        if self._line is None or not _is_broken(self._line) or self._store.check([_left_key(self._next)]):
            return None
        self._broken += 1
        if self._broken <= _PATIENCE:
            return None
        name = self._store.get(self._beat_keys[self._next]).decode().rpartition(" ")[0]
        return Ending(INTERNAL_ERROR, "rank", f"{name}: its process has ended")

    def _call_the_next(self) -> socket.socket | None:
        """A connection to the next rank, if it listens already and can be reached."""
        if not self._store.check([_door_key(self._next)]):
            return None
        host, _, port = self._store.get(_door_key(self._next)).decode().rpartition(" ")
        with contextlib.suppress(OSError):
            line = socket.create_connection((host, int(port)), timeout=2)
            line.setblocking(False)
            return line
        return None

    def _beats(self) -> list[str] | None:
        """The last beat of each rank; of one that has not begun yet, its number. None if the store does not answer."""
        try:
            with self._lock:
                begun = [self._store.check([key]) for key in self._beat_keys]
                return [
                    self._store.get(key).decode() if there else f"rank {rank} 0"
                    for rank, (key, there) in enumerate(zip(self._beat_keys, begun, strict=True))
                ]
        except RuntimeError:
            return None

    @staticmethod
    def _without_store() -> Ending:
        return Ending(INTERNAL_ERROR, "rank", "rank 0, which keeps the store, no longer answers")


def _door_key(rank: int) -> str:
    return f"maskgit_pl/door/{rank}"


def _left_key(rank: int) -> str:
    return f"maskgit_pl/left/{rank}"


def _open_door() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _own_address(address: str, port: int) -> str:
    """Where other machines find this one: the address from which it reaches the first."""
    family, kind, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # sends nothing
        own = str(probe.getsockname()[0])
    return address if own.startswith("127.") or own == "::1" else own  # the first machine, by the name that all know


def _is_broken(line: socket.socket) -> bool:
    """Whether the other side's process has ended; it sends nothing before."""
    try:
        return line.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
