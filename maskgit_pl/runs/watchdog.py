"""The watchdog of a run: ends a run that hangs or has lost a rank, and names the rank that it waits for.

Each rank runs two threads beside its training loop:

1. The progress thread checks once per second for a finished micro-batch, validation batch or checkpoint. After a time
   without progress that exceeds the limit, it writes the stacks of all threads and ends the process.
2. The heartbeat thread (only with several ranks) calls ``Peers.beat`` once per second. It ends the process when another
   rank is gone or has announced an error. Collectives cannot do this: if a rank is gone, gloo raises an error, but NCCL
   waits.

The main thread announces an error that only this rank has (``on_exception``). Each of the three follows the same steps
to end the process:

a. announce the reason to the other ranks, so that they exit with the same code;
b. write the reason, and after a hang the stacks, to stderr and to the folder of the stage;
c. wait until the other ranks have read the announcement, since it is in the store that rank 0 holds;
d. exit without cleanup, which would wait for the collective that hangs.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not list it
from torch.distributed.distributed_c10d import PrefixStore

from maskgit_pl.distributed import rank_and_world
from maskgit_pl.errors import INTERNAL_ERROR, PeerError, RunError, exit_code_of

__all__ = ["Ending", "Peers", "Watchdog"]

log = logging.getLogger(__name__)
T = TypeVar("T")

_TICK_SECONDS = 1.0
_MEDIANS = 20  # limit of a training step, in median step times
_MIN_STEPS = 5  # steps before the median is used
# Set-up, validation and saving have no median. Their limit is this many times ``seconds``: 30 min with the default.
_OTHER_PHASES = 18
_DELIVERY_SECONDS = 3.0  # time for the other ranks to read the reason and to write their stacks
_REPORT_SECONDS = 30.0  # time limit for writing the reason and the stacks
_POLLS = 20  # polls of the child processes within a tick

_SILENT_SECONDS = 3.5  # a living rank beats at least twice in this time
_SILENT_BEATS = 4  # beats of this rank within _SILENT_SECONDS
_GRACE_BEATS = 8  # beats from a broken connection to the end of the run, so that an announcement arrives first
_CONNECT_BEATS = 20  # beats between two attempts to connect to the next rank, which a firewall may drop or refuse
_STORE_SECONDS = 5.0  # the store answers in milliseconds, or not at all while the process of rank 0 is stopped
_ENDING = "ending"
_STORE = "rank 0 (which holds the store)"


class Watchdog(Callback):
    """A callback that ends the process with exit code 70 if a run makes no progress.

    The limit in training is max(``seconds``, 20 x the median step); with gradient accumulation, a step here is a
    micro-batch. The limit is 18 x ``seconds`` during set-up, validation, saving and export, and in the first steps.
    Time in which the process is stopped (SIGSTOP) does not count.

    Before the process ends, each rank that still runs writes the stacks of all its threads to ``stacks.txt``
    (``stacks-rank1.txt`` ...) in the folder of the stage, and to stderr.

    If the process of another rank has ended, or fails with an error that only that rank has, this process also ends
    within seconds.

    Args:
        folder: Folder of the stage.
        seconds: Shortest limit in seconds, > 0.

    Raises:
        ValueError: if ``seconds`` is not positive.
    """

    def __init__(self, folder: Path, *, seconds: float = 100.0) -> None:
        if not seconds > 0:
            raise ValueError(f"hang_seconds must be > 0, got {seconds}")
        self.folder = folder
        self.seconds = seconds
        self._step_seconds: deque[float] = deque(maxlen=50)
        self._last_batch_end = time.monotonic()
        self._idle_ticks = 0  # not a clock, which would also run while the process is stopped
        self._phase = "set-up"
        self._step = 0
        self._outlives_fit = False
        self._is_done = threading.Event()
        self._thread: threading.Thread | None = None
        self._peers: Peers | None = None
        self._peers_ending: Ending | None = None

    @property
    def limit(self) -> float:
        """The time limit without progress in the current phase, in seconds."""
        if self._phase == "training" and len(self._step_seconds) >= _MIN_STEPS:
            return max(self.seconds, _MEDIANS * statistics.median(self._step_seconds))
        return self.longest_limit

    @property
    def longest_limit(self) -> float:
        """The time limit in seconds of the phases without a median; ranks wait for each other up to this long."""
        return _OTHER_PHASES * self.seconds

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._note_progress("set-up", trainer)
        self._thread = threading.Thread(target=self._watch_progress, args=(trainer,), name="watchdog", daemon=True)
        self._thread.start()
        rank, world_size = rank_and_world()
        if world_size > 1:
            self._peers = Peers(rank, world_size)
            threading.Thread(
                target=self._watch_peers, args=(trainer, self._peers), name="heartbeat", daemon=True
            ).start()

    @contextmanager
    def watch_past_fit(self, trainer: Trainer) -> Iterator[None]:
        """Keeps the watchdog active until the context ends: after the fit, all ranks export the result together."""
        self._outlives_fit = True
        try:
            yield
        except BaseException as error:
            if not self._is_done.is_set():
                self._stop_with_error(trainer, error)
            raise
        self._stop()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        now = time.monotonic()
        if self._phase == "training":
            self._step_seconds.append(now - self._last_batch_end)
        self._last_batch_end = now
        self._note_progress("training", trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note_progress("validation", trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._note_progress("validation", trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._note_progress("saving", trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note_progress("the end", trainer)
        if not self._outlives_fit:
            self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Announces an error that only this rank has to the other ranks.

        Raises:
            PeerError: if the error is a consequence of one that another rank has announced.
        """
        self._stop_with_error(trainer, exception)

    def _stop(self) -> None:
        self._is_done.set()
        if self._thread is not None:
            self._thread.join(_TICK_SECONDS)  # it holds the Trainer, whose memory is freed next
        if self._peers is not None:
            self._peers.leave()

    def _stop_with_error(self, trainer: Trainer, exception: BaseException) -> None:
        agreed = exception.on_all_ranks if isinstance(exception, RunError) else not isinstance(exception, Exception)
        if agreed:  # all ranks raise it together
            self._stop()
        else:
            self._report_error(trainer, exception)
        self._is_done.set()

    def _report_error(self, trainer: Trainer, exception: BaseException) -> None:
        """Announces an error of this rank, or raises the error of the rank that caused it."""
        # A collective raises RuntimeError when another rank is gone, so the cause may be elsewhere.
        is_of_collective = isinstance(exception, RuntimeError) and not isinstance(exception, RunError)
        ending = None
        if self._peers is not None and is_of_collective:
            ending = self._peers_ending or self._peers.read_ending()
        if ending is not None:
            self._is_done.set()
            raise PeerError(ending.code, ending.text) from exception
        where = f"rank {trainer.global_rank}, step {trainer.global_step}"
        # The heartbeat thread continues during this wait, so that no other rank considers this one lost.
        lost = self._describe_lost(trainer) if is_of_collective else ""
        if lost:
            log.error("%s: %s", where, lost)
        elif self._peers is not None:
            text = " ".join(f"{where}: {type(exception).__name__}: {exception}".split())
            self._is_done.set()  # before the announcement, which our own heartbeat thread would act on
            self._peers.announce(Ending(exit_code_of(exception), "rank", text))
            time.sleep(_DELIVERY_SECONDS)

    def _note_progress(self, phase: str, trainer: Trainer) -> None:
        self._phase, self._step, self._idle_ticks = phase, trainer.global_step, 0

    def _watch_progress(self, trainer: Trainer) -> None:
        """Checks for progress once per tick; runs in the progress thread."""
        while not self._is_done.wait(_TICK_SECONDS):
            self._idle_ticks += 1
            if self._is_over_limit():
                # This takes seconds, so the limit is checked again before the process ends.
                ending = self._describe_hang(trainer)
                if self._is_over_limit() and not self._is_done.is_set():
                    self._end_process(trainer, ending)

    def _is_over_limit(self) -> bool:
        return self._idle_ticks * _TICK_SECONDS > self.limit

    def _watch_peers(self, trainer: Trainer, peers: Peers) -> None:
        """Sends a heartbeat once per tick; runs in the heartbeat thread."""
        while not self._is_done.wait(_TICK_SECONDS):
            self._peers_ending = peers.beat()
            if self._peers_ending is not None and not self._is_done.is_set():
                self._end_process(trainer, self._peers_ending)

    def _describe_hang(self, trainer: Trainer) -> Ending:
        text = (
            f"{self._phase}: no progress for {self.limit:.0f} s after step {self._step} "
            f"(limit: {_MEDIANS} x the median step, at least {self.seconds:.0f} s)"
        )
        lost = self._describe_lost(trainer)
        return Ending(INTERNAL_ERROR, "hang", f"{text}; {lost}" if lost else text)

    def _end_process(self, trainer: Trainer, ending: Ending) -> None:
        """Reports the reason locally and to the other ranks, and ends the process: steps a to d of the module."""
        # In a thread, since a write to stderr can block: a full disk, or a pipe that no process reads.
        reporting = threading.Thread(target=self._report_ending, args=(trainer, ending), name="report", daemon=True)
        reporting.start()  # a, b
        reporting.join(_REPORT_SECONDS)
        time.sleep(_DELIVERY_SECONDS)  # c
        os._exit(ending.code)  # d

    def _report_ending(self, trainer: Trainer, ending: Ending) -> None:
        rank = trainer.global_rank
        # Rank 0 prints a reason that another rank has announced; each rank prints a reason that it found itself.
        prints = rank == 0 or self._peers is None or self._peers.read_ending() is None
        if self._peers is not None:
            self._peers.announce(ending)
        # Without logging, whose lock the main thread may hold.
        if ending.reason == "hang":
            path = self.folder / ("stacks.txt" if rank == 0 else f"stacks-rank{rank}.txt")
            stacks = _format_stacks()
            with suppress(OSError):  # a full disk must not keep the process alive
                path.write_text(stacks)
            sys.stderr.write(f"hang, rank {rank}: {ending.text}; stacks: {path}\n{stacks}")
        elif prints:
            sys.stderr.write(f"all ranks exit: {ending.text}\n")
        sys.stderr.flush()

    def _describe_lost(self, trainer: Trainer) -> str:
        """Returns a text that names the ranks known to have ended or to be silent; empty if there are none."""
        children = getattr(trainer.strategy.launcher, "procs", [])  # only with Lightning's own launcher
        for _ in range(_POLLS if children else 0):
            ended = [(rank, child) for rank, child in enumerate(children, start=1) if child.poll() is not None]
            if ended:
                return ", ".join(
                    f"rank {rank} (process {child.pid}) ended with {child.returncode}" for rank, child in ended
                )
            # The kernel closes the connections of a process shortly before the process counts as ended.
            time.sleep(_TICK_SECONDS / _POLLS)
        return "" if self._peers is None else self._peers.describe_silent()


class Ending(NamedTuple):
    """The reason why all ranks end.

    Attributes:
        code: Exit code of all ranks.
        reason: ``hang`` if a rank makes no progress, ``rank`` if a rank has ended or is about to end.
        text: Description for the user.
    """

    code: int
    reason: Literal["hang", "rank"]
    text: str


class Peers:
    """The other ranks as seen from this rank: detects ranks that have ended, and tells all ranks why the run ends.

    The protocol uses keys in the TCP store of the process group, which rank 0 holds. ``MASTER_ADDR`` and
    ``MASTER_PORT`` must name it.

    1. Each rank opens a listen socket, writes its first beat to ``beat/RANK`` and the socket's address to
       ``listen/RANK``. It never accepts a connection: the kernel completes it and keeps it open for as long as the
       process lives.
    2. About once a second, each rank writes its next beat, a counter, to ``beat/RANK``.
    3. It then reads ``ending``. If the key exists, this rank ends, too.
    4. It then checks the connection to the next rank, (rank + 1) modulo the number of ranks:
       a. An open connection means that the process lives, even if it is stopped or silent.
       b. A closed or missing connection proves nothing, since the network may be the cause. As long as the next rank
          beats, it lives, and this rank tries to connect again from time to time.
       c. If the beats have also stopped, and the next rank has not written ``left/RANK``, this rank connects again. A
          refusal comes from the kernel of the next rank's machine and means that the process has ended. The exception
          is a firewall that refuses connections; it is known by an earlier refusal while the next rank was still
          beating.
    5. If the connection to the store breaks, the rank connects again. If the address refuses for several beats in a
       row, rank 0 has ended.
    6. A rank that fails writes its error to ``ending``; only the first error is kept. A rank that ends as planned
       writes ``left/RANK``.

    Args:
        rank: Rank of this process.
        world_size: Number of ranks, >= 2.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self._store_address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = _open_store(*self._store_address)
        self._lock = threading.Lock()  # a store's connection serves one request at a time
        self._rank = rank
        self._beat_keys = [f"beat/{each}" for each in range(world_size)]
        self._name = f"rank {rank} ({socket.gethostname()}, process {os.getpid()})"
        self._beats = 0  # beats that this rank has written
        self._store_refusals = 0  # refused connections to the store in a row
        self._next = (rank + 1) % world_size
        self._connection: socket.socket | None = None  # to the next rank
        self._is_refused = False  # the last attempt to connect to the next rank was refused
        self._is_firewalled = False  # connections to the next rank are refused although it lives
        self._next_attempt = 0  # earliest beat of this rank for another attempt
        self._last_beat = b""  # last beat read from the next rank
        self._unchanged = 0  # number of reads in a row without a new beat
        # 1. The beat comes before the address, so that a rank that finds the address also finds a beat.
        self._listen_socket = _open_listen_socket()
        self._write_beat()
        self._store.set(
            _listen_key(rank), f"{_own_address(*self._store_address)} {self._listen_socket.getsockname()[1]}"
        )

    def beat(self) -> Ending | None:
        """Writes a beat, and checks the store and the next rank.

        Must be called about once per second in a separate thread: it blocks while the process of rank 0 is stopped.

        Returns:
            The reason why this rank must end, or None.
        """
        try:
            with self._lock:
                self._write_beat()  # step 2
                self._store_refusals = 0
                ending = self._get_ending()  # step 3
                return ending if ending is not None else self._check_next_rank()  # step 4
        except dist.DistNetworkError:
            self._reconnect_store()  # step 5
        except RuntimeError:  # a slow answer of the store is not an error
            pass
        is_gone = self._store_refusals > _GRACE_BEATS
        return Ending(INTERNAL_ERROR, "rank", f"{_STORE} has ended") if is_gone else None

    def read_ending(self) -> Ending | None:
        """Returns the reason that a rank has announced, or None."""
        return self._ask(self._get_ending)

    def announce(self, ending: Ending) -> None:
        """Announces to all ranks why they end; only the first announcement is kept."""
        self._ask(lambda: self._store.compare_set(_ENDING, "", json.dumps(ending)))

    def leave(self) -> None:
        """Ends the checks, as this rank ends as planned; no other rank then considers it lost."""
        self._ask(self._leave)

    def describe_silent(self) -> str:
        """Returns a text that names the ranks without new beats, empty if there are none; takes some seconds."""
        before = self._ask(self._read_beats)
        # This rank keeps beating, since the other ranks may be in the same function.
        for _ in range(_SILENT_BEATS if before else 0):
            time.sleep(_SILENT_SECONDS / _SILENT_BEATS)
            self._ask(self._write_beat)
        after = self._ask(self._read_beats) if before else None
        if before is None or after is None:
            return f"{_STORE} does not answer"
        silent = [
            new.rpartition(" ")[0]
            for rank, (old, new) in enumerate(zip(before, after, strict=True))
            if old == new and rank != self._rank
        ]
        return f"{', '.join(silent)}: no heartbeat for {_SILENT_SECONDS} s" if silent else ""

    def _leave(self) -> None:
        try:
            self._store.set(_left_key(self._rank), "")
        finally:
            self._listen_socket.close()
            self._close_connection()

    def _get_ending(self) -> Ending | None:
        return Ending(*json.loads(self._store.get(_ENDING))) if self._store.check([_ENDING]) else None

    def _write_beat(self) -> None:
        self._beats += 1
        self._store.set(self._beat_keys[self._rank], f"{self._name} {self._beats}")

    def _read_beats(self) -> list[str]:
        """Returns the last beat of each rank, or ``rank R 0`` for a rank that has not started yet."""
        if self._store.check(self._beat_keys):
            return [beat.decode() for beat in self._store.multi_get(self._beat_keys)]
        # ``get`` would wait for a missing key.
        has_begun = [self._store.check([key]) for key in self._beat_keys]
        return [
            self._store.get(key).decode() if begun else f"rank {rank} 0"
            for rank, (key, begun) in enumerate(zip(self._beat_keys, has_begun, strict=True))
        ]

    def _ask(self, request: Callable[[], T]) -> T | None:
        """Returns the result of a request to the store; None if it fails or takes more than some seconds."""
        answer: list[T] = []

        def call() -> None:
            with suppress(RuntimeError), self._lock:
                answer.append(request())

        # In a thread, since the store's own timeout is not reliable.
        thread = threading.Thread(target=call, name="store", daemon=True)
        thread.start()
        thread.join(_STORE_SECONDS)
        return answer[0] if answer else None

    def _reconnect_store(self) -> None:
        """Connects to the store again, or counts a refusal (step 5)."""
        try:
            # A plain connection first, since the store itself retries for a long time if the port is closed.
            socket.create_connection(self._store_address, timeout=1).close()
            store = _open_store(*self._store_address)
            with self._lock:
                self._store = store
        except ConnectionRefusedError:
            self._store_refusals += 1
        except (OSError, RuntimeError):  # the network is down, which proves nothing about rank 0
            self._store_refusals = 0

    def _check_next_rank(self) -> Ending | None:
        """Returns an ending if the next rank has ended without an announcement (step 4)."""
        state = "unreachable" if self._connection is None else _state_of(self._connection)
        if state == "open":  # 4a
            return None
        if state == "unreachable":
            self._close_connection()
        if not self._store.check([_listen_key(self._next)]):  # the next rank has not started yet
            return None
        beat = self._store.get(self._beat_keys[self._next])
        if beat != self._last_beat:  # 4b: it lives
            # It has beaten after a refusal, so a firewall refused the connection, not the kernel for an ended process.
            self._is_firewalled = self._is_firewalled or self._is_refused
            self._last_beat, self._unchanged = beat, 0
            if self._beats >= self._next_attempt:
                self._connect_to_next_rank()
            return None
        self._unchanged += 1
        late = self._unchanged - _GRACE_BEATS - 1
        if late < 0 or late % _CONNECT_BEATS or self._store.check([_left_key(self._next)]):
            return None
        self._connect_to_next_rank()  # 4c: the kernel of its machine refuses if the process has ended
        if not self._is_refused or self._is_firewalled:
            return None
        return Ending(INTERNAL_ERROR, "rank", f"{beat.decode().rpartition(' ')[0]}: its process has ended")

    def _connect_to_next_rank(self) -> None:
        """Connects to the listen socket of the next rank if it is reachable."""
        self._close_connection()
        self._next_attempt, self._is_refused = self._beats + _CONNECT_BEATS, False
        host, _, port = self._store.get(_listen_key(self._next)).decode().rpartition(" ")
        try:
            self._connection, self._unchanged = _connect(host, int(port)), 0
        except OSError as error:
            self._is_refused = isinstance(error, ConnectionRefusedError)

    def _close_connection(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _format_stacks() -> str:
    """Returns the stacks of all threads as text.

    ``faulthandler`` is not used: it writes to a stream that may block, and it stops all threads.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "".join(
        f"Thread {names.get(number, number)}:\n{''.join(traceback.format_stack(frame))}\n"
        for number, frame in sys._current_frames().items()
    )


def _open_store(address: str, port: int) -> PrefixStore:
    """Opens a second connection to the store, since that of the process group may be blocked in a request."""
    # The store of torchrun survives a restart; an announcement from before must not end the new processes.
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
    return PrefixStore(f"maskgit_pl/{restart}", store)


def _listen_key(rank: int) -> str:
    return f"listen/{rank}"


def _left_key(rank: int) -> str:
    return f"left/{rank}"


def _open_listen_socket() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _own_address(address: str, port: int) -> str:
    """Returns the address of this machine for the other ranks: the one from which it reaches rank 0."""
    family, kind, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # only selects the route: a datagram socket sends nothing here
        own = str(probe.getsockname()[0])
    # A loopback address means that this is the machine of rank 0, whose name all ranks know.
    return address if own.startswith("127.") or own == "::1" else own


def _connect(host: str, port: int) -> socket.socket:
    connection = socket.create_connection((host, port), timeout=1)
    connection.settimeout(0)  # reads do not block
    # Firewalls drop connections without traffic, and ours carries no data: keep-alive packets prevent that.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    return connection


def _state_of(connection: socket.socket) -> Literal["open", "closed", "unreachable"]:
    """Returns the state of a connection on which the other side never sends data while its process lives."""
    try:
        return "closed" if connection.recv(1) == b"" else "open"
    except BlockingIOError:  # nothing to read
        return "open"
    except ConnectionResetError:
        return "closed"
    except OSError:  # the network is down
        return "unreachable"
