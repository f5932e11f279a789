"""A server of the page in a process of its own, and a Chromium that opens it: one of each for all tests."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).parents[2]
STRANGER = "rebound.example"  # a name of a stranger that leads to this machine
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", f"--host-resolver-rules=MAP {STRANGER} 127.0.0.1",
)  # fmt: skip
SECONDS = 120  # that a busy machine may take for a step of a test
expect.set_options(timeout=SECONDS * 1000)


@dataclass
class Server:
    """A running ``maskgit web``.

    Attributes:
        place: Empty folder that holds all that it could write to: ``home``, ``tmp`` and ``here``.
        process: Its process.
        url: Its address.
    """

    place: Path
    process: subprocess.Popen[str]
    url: str

    @property
    def port(self) -> int:
        """The port of its address."""
        return int(self.url.rsplit(":", 1)[1].rstrip("/"))

    def written(self) -> list[str]:
        """Returns the files in its home, its temporary folder and its working directory."""
        return sorted(str(path.relative_to(self.place)) for path in self.place.rglob("*") if path.is_file())

    def printed(self) -> str:
        """Returns what the process has printed since the last call."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 0)
        return os.read(self.process.stdout.fileno(), 2**16).decode() if ready else ""

    def cpu_seconds(self) -> float:
        """Returns the CPU time of the process so far: other work on the machine does not count."""
        ticks = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    def wait_until_idle(self) -> None:
        """Waits until no thread computes, or waits for a CPU that other processes use."""
        samples: deque[bool] = deque([True] * 20, maxlen=20)  # 1 s
        end = time.monotonic() + SECONDS
        while sum(samples) > len(samples) // 2:  # gradio itself wakes up now and then
            assert time.monotonic() < end, "the server never became idle"
            samples.append(self._is_running())
            time.sleep(0.05)

    def _is_running(self) -> bool:
        states = []
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # a thread that just ended
                states.append((task / "stat").read_text().rpartition(")")[2].split()[0])
        return "R" in states


@contextmanager
def running(place: Path, *, is_background: bool = False) -> Iterator[Server]:
    """Starts ``maskgit web``, waits until it says where the page is, and ends it after the block.

    Args:
        place: Folder for ``Server.place``.
        is_background: True ignores Ctrl-C when the process starts, as a shell does for a job in the background.
    """
    for name in ("home", "tmp", "here"):
        (place / name).mkdir(parents=True)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MPLCONFIG", "XDG_", "GRADIO_"))
    }
    # A proxy that is not there: the server asks no other machine.
    environment |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    environment |= {
        "HOME": str(place / "home"),
        "TMPDIR": str(place / "tmp"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-u", "-m", "maskgit_pl", "web", "--port", str(port), "--device", "cpu"]
    handler = signal.SIG_IGN if is_background else signal.SIG_DFL
    process = subprocess.Popen(
        command, cwd=place / "here", env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
    )  # fmt: skip
    with process:
        try:
            assert process.stdout is not None
            said = ""
            for line in process.stdout:
                said += line
                if " shows " in line:
                    break
            assert " shows " in said, said
            yield Server(place, process, line.split()[0])
        finally:
            process.kill()


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("server")) as found:
        yield found
        assert found.process.poll() is None, "the server ended during the tests"


@pytest.fixture
def server(started: Server) -> Iterator[Server]:
    """The server, which prints nothing, whatever a test sends to it."""
    yield started
    assert started.printed() == ""


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    program = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    assert program, "chromium must be installed, or CHROMIUM must name it"
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program, headless=True, args=list(FLAGS))
        yield found
        found.close()


@contextmanager
def opened(browser: Browser, url: str, *, width: int = 1280, height: int = 900) -> Iterator[Page]:
    """Opens the page, whose requests all go to the server and whose scripts raise no error."""
    faults: list[str] = []
    found = browser.new_page(viewport={"width": width, "height": height})
    found.set_default_timeout(SECONDS * 1000)
    local = (url, "data:", "blob:", "about:")
    found.on("request", lambda request: None if request.url.startswith(local) else faults.append(request.url))
    found.on("pageerror", lambda error: faults.append(str(error)))
    found.goto(url)
    expect(found.locator("#generated img")).to_have_count(4)
    yield found
    found.close()
    assert faults == []


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    with opened(browser, server.url) as found:
        yield found
