"""What ranks know of one another beside the training: which of them live, and why one of them ends the run.

A collective does not tell: gloo raises when a rank is gone, NCCL waits. So each rank leaves a beat in the store through
which they found each other, says there why it ends, and holds a connection to the next rank, which breaks when that
process ends: the kernel says so, or refuses a new one. Whatever else befalls a connection is the network's fault and
nobody's end, nor is silence: a process may be stopped for a while. The watchdog uses it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Literal, NamedTuple, TypeVar

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not list it
from torch.distributed.distributed_c10d import PrefixStore

from maskgit_pl.errors import INTERNAL_ERROR

__all__ = ["Ending", "Peers"]

_SILENCE = 3.5  # seconds in which a rank that lives beats at least twice
_PATIENCE = 8  # beats between a broken connection and the end: what the rank has to say of it comes before
_PAUSE = 20  # beats between calls of the next rank: a firewall may let none through, or answer for it
_LONGEST = 5.0  # seconds: the store answers in milliseconds, or, while rank 0's process is stopped, not at all
_SHOWN = 4  # beats within a silence
_TOLD = "told"
_STORE = "rank 0, which keeps the store,"

T = TypeVar("T")


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
        self._place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = _open_store(*self._place)
        self._lock = threading.Lock()
        self._rank = rank
        self._beat_keys = [f"beat/{each}" for each in range(world_size)]
        self._name = f"rank {rank} ({socket.gethostname()}, process {os.getpid()})"
        self._count = 0
        self._unanswered = 0  # beats in a row that nobody took
        self._next = (rank + 1) % world_size
        self._line: socket.socket | None = None  # to the next rank
        self._refused = False  # the last call
        self._is_walled = False  # calls are refused though it lives
        self._next_call = 0  # beats
        self._last_beat = b""  # of the next rank, when it was looked at
        self._still = 0  # how often in a row it was the same
        self._door = _open_door()  # nobody is let in: the kernel holds the connection as long as this process lives
        self.beat()
        self._store.set(_door_key(rank), f"{_own_address(*self._place)} {self._door.getsockname()[1]}")

    def beat(self) -> Ending | None:
        """Shows that this rank lives; why it must end, if it must.

        About once a second, in a thread of its own: while rank 0's process is stopped, it does not return.
        """
        try:
            with self._lock:
                self._show()
                self._unanswered = 0
                told = self._told()
                return told if told is not None else self._look_at_the_next()
        except dist.DistNetworkError:
            self._find_store()
        except RuntimeError:  # slow to answer
            pass
        return Ending(INTERNAL_ERROR, "rank", f"{_STORE} has ended") if self._unanswered > _PATIENCE else None

    def told(self) -> Ending | None:
        """What a rank has said to all."""
        return _in_time(self._locked(self._told))

    def tell(self, ending: Ending) -> None:
        """Says to all ranks why they end; who comes first is heard."""
        _in_time(self._locked(lambda: self._store.compare_set(_TOLD, "", json.dumps(ending))))

    def leave(self) -> None:
        """Takes leave: this rank ends as the others do, each by itself, and is missed by none."""
        _in_time(self._locked(self._leave))

    def silent(self) -> str:
        """Which ranks do not beat, as a text; takes some seconds."""
        before = _in_time(self._locked(self._beats))
        for _ in range(_SHOWN if before else 0):  # the others may be asking the same
            time.sleep(_SILENCE / _SHOWN)
            _in_time(self._locked(self._show))
        after = _in_time(self._locked(self._beats)) if before else None
        if before is None or after is None:
            return f"{_STORE} does not answer"
        silent = [
            new.rpartition(" ")[0]
            for rank, (old, new) in enumerate(zip(before, after, strict=True))
            if old == new and rank != self._rank
        ]
        return f"{', '.join(silent)}: not heard of for {_SILENCE} s" if silent else ""

    def _leave(self) -> None:
        try:
            self._store.set(_left_key(self._rank), "")
        finally:
            self._door.close()
            self._hang_up()

    def _told(self) -> Ending | None:
        return Ending(*json.loads(self._store.get(_TOLD))) if self._store.check([_TOLD]) else None

    def _show(self) -> None:
        self._count += 1
        self._store.set(self._beat_keys[self._rank], f"{self._name} {self._count}")

    def _locked(self, ask: Callable[[], T]) -> Callable[[], T | None]:
        def locked() -> T | None:
            with contextlib.suppress(RuntimeError), self._lock:
                return ask()
            return None

        return locked

    def _find_store(self) -> None:
        """Connects anew, if somebody listens there."""
        try:
            socket.create_connection(self._place, timeout=1).close()  # the store itself would try for long
            store = _open_store(*self._place)
            with self._lock:
                self._store = store
        except ConnectionRefusedError:
            self._unanswered += 1
        except (OSError, RuntimeError):  # no way there at the moment
            self._unanswered = 0

    def _look_at_the_next(self) -> Ending | None:
        """Whether the next rank's process has ended without a word: its kernel says so, and it beats no more."""
        end = "lost" if self._line is None else _other_end(self._line)
        if end == "held":
            return None
        if end == "lost":
            self._hang_up()
        if not self._store.check([_door_key(self._next)]):  # it has not begun
            return None
        beat = self._store.get(self._beat_keys[self._next])
        if beat != self._last_beat:
            self._is_walled = self._is_walled or self._refused
            self._last_beat, self._still = beat, 0
            if self._count >= self._next_call:
                self._call_the_next()
            return None
        self._still += 1
        over = self._still - _PATIENCE - 1
        if over < 0 or over % _PAUSE or self._store.check([_left_key(self._next)]):
            return None
        self._call_the_next()  # its kernel knows
        if not self._refused or self._is_walled:
            return None
        return Ending(INTERNAL_ERROR, "rank", f"{beat.decode().rpartition(' ')[0]}: its process has ended")

    def _call_the_next(self) -> None:
        """Connects to the next rank, if it can be reached."""
        self._hang_up()
        self._next_call, self._refused = self._count + _PAUSE, False
        host, _, port = self._store.get(_door_key(self._next)).decode().rpartition(" ")
        try:
            self._line, self._still = _connect(host, int(port)), 0
        except OSError as error:
            self._refused = isinstance(error, ConnectionRefusedError)

    def _hang_up(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None

    def _beats(self) -> list[str]:
        """The last beat of each rank; of one that has not begun yet, its number."""
        if self._store.check(self._beat_keys):
            return [beat.decode() for beat in self._store.multi_get(self._beat_keys)]
        begun = [self._store.check([key]) for key in self._beat_keys]
        return [
            self._store.get(key).decode() if there else f"rank {rank} 0"
            for rank, (key, there) in enumerate(zip(self._beat_keys, begun, strict=True))
        ]


def _in_time(ask: Callable[[], T]) -> T | None:
    """What comes of it, or None if nothing does for long: the store's own limit does not hold on all its ways."""
    answer: list[T] = []
    thread = threading.Thread(target=lambda: answer.append(ask()), name="store", daemon=True)
    thread.start()
    thread.join(_LONGEST)
    return answer[0] if answer else None


def _open_store(address: str, port: int) -> PrefixStore:
    """A connection of its own to the store of all: the process group's may be waiting for something."""
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store knows what was said before a restart
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
    return PrefixStore(f"maskgit_pl/{start}", store)


def _door_key(rank: int) -> str:
    return f"door/{rank}"


def _left_key(rank: int) -> str:
    return f"left/{rank}"


def _open_door() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _connect(host: str, port: int) -> socket.socket:
    line = socket.create_connection((host, port), timeout=1)
    line.setblocking(False)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # of what is silent, firewalls forget the way
    if hasattr(socket, "TCP_KEEPIDLE"):
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    return line


def _own_address(address: str, port: int) -> str:
    """Where other machines find this one: the address from which it reaches the first."""
    family, kind, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # sends nothing
        own = str(probe.getsockname()[0])
    return address if own.startswith("127.") or own == "::1" else own  # the first machine, by the name that all know


def _other_end(line: socket.socket) -> Literal["held", "closed", "lost"]:
    """What is known of a connection's other side, which sends nothing as long as its process lives."""
    try:
        return "closed" if line.recv(1) == b"" else "held"
    except BlockingIOError:
        return "held"
    except ConnectionResetError:
        return "closed"
    except OSError:  # no way there at the moment
        return "lost"
