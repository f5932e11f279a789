"""Commands and ranks in processes that start at once: forked from a server that has imported torch, Lightning and ours.

A fresh interpreter takes 3 s of CPU time for these imports. A forked process, too, has its own environment, working
directory, streams, session, signals and exit code. Tests of imports, locales and closed streams start an interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import torch

SECONDS = 300  # limit for one command on a busy machine
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["maskgit_pl.runs.fitting", "torch._dynamo", "torch.distributed.fsdp", "torch.utils.tensorboard"]
)


def begin(environment: Mapping[str, str], out: Path, error: Path) -> None:
    """Makes a forked process one that a user starts.

    Args:
        environment: All of its variables.
        out: File to which stdout is appended.
        error: File to which stderr is appended; may be ``out``.
    """
    os.environ.clear()
    os.environ.update(environment)
    os.setsid()  # signals to a group are for this process and its children
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    for number, file in ((1, out), (2, error)):
        with file.open("ab") as stream:
            os.dup2(stream.fileno(), number)


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns ``function(*arguments)`` of a process whose end frees its memory, as of networks of a published size."""
    with ProcessPoolExecutor(1, PROCESSES, torch.set_num_threads, (1,)) as process:
        return process.submit(function, *arguments).result()


def run_ranks(function: Callable[..., None], *arguments: Any, ranks: int = 2) -> None:
    """Calls ``function(rank, *arguments)`` in a process for each rank, and waits for all."""
    torch.multiprocessing.start_processes(function, arguments, ranks, start_method="forkserver")


class Command:
    """A running ``python -m maskgit_pl``, or code, with the methods of ``subprocess.Popen``.

    A ``with`` block ends the process and its children.

    Args:
        what: Words of the command, or Python code as for ``python -c``.
        cwd: Its working directory; None for ours.
        env: Its environment; None for ours.
    """

    def __init__(
        self, what: Sequence[object] | str, *, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        self._folder = Path(tempfile.mkdtemp())
        self._files = [self._folder / name for name in ("out", "error")]
        self._texts: tuple[str, str] | None = None
        environment = dict(os.environ if env is None else env)
        given = what if isinstance(what, str) else [str(word) for word in what]
        arguments = given, environment, str(cwd or Path.cwd()), self._files
        self._process = PROCESSES.Process(target=_run, args=arguments)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = SECONDS) -> int:
        self._process.join(timeout)
        assert self.returncode is not None, f"still running after {timeout} s:\n{''.join(self._read())}"
        return self.returncode

    def communicate(self, timeout: float = SECONDS) -> tuple[str, str]:
        """Waits for the end, and returns the content of stdout and stderr."""
        self.wait(timeout)
        if self._texts is None:
            self._texts = self._read()
            shutil.rmtree(self._folder)
        return self._texts

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        if self.poll() is None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has no group yet
                self._process.kill()
        self.communicate()

    def _read(self) -> tuple[str, str]:
        out, error = (file.read_text() if file.is_file() else "" for file in self._files)
        return out, error


def run(
    what: Sequence[object] | str, *, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> CompletedProcess[str]:
    """Runs a command, or code, to its end; see ``Command``."""
    with Command(what, cwd=cwd, env=env) as command:
        out, error = command.communicate()
        return CompletedProcess(what, command.wait(), out, error)


def _run(what: list[str] | str, environment: dict[str, str], cwd: str, files: list[Path]) -> None:
    begin(environment, *files)
    os.chdir(cwd)
    sys.path[:0] = [cwd, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    if isinstance(what, str):
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = ["maskgit", *what]
        runpy.run_module("maskgit_pl", run_name="__main__", alter_sys=True)


HOLD = """
import os, sys, time
from pathlib import Path
from maskgit_pl.folders import hold_lock
rank = int(sys.argv[3]) if sys.argv[3:] else None
with hold_lock(Path(sys.argv[1]), hint="wait", rank=rank):
    if sys.argv[2] == "fork":
        ready, started = os.pipe()
        if os.fork() == 0:
            os.write(started, b"x")
            time.sleep(30)
            os._exit(0)
        os.read(ready, 1)
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(target: Path, how: str = "plain", *, rank: int | None = None) -> Iterator[subprocess.Popen[str]]:
    """Starts a process that holds a lock until its stdin is closed or it is killed with its children."""
    words = [sys.executable, "-c", HOLD, str(target), how, *([] if rank is None else [str(rank)])]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
