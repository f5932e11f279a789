"""Starts a process that holds the lock of a file or folder, for tests of locks."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HOLD = """
import os, sys, time
from pathlib import Path
from maskgit_pl.data.folders import hold_lock
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
