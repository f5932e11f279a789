"""The server of the page: a port, a guard in front of gradio, and a temporary folder, removed at the end."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TypeAlias
from urllib.parse import urlsplit

from PIL import Image

from maskgit_pl.checks import check_integer
from maskgit_pl.devices import find_device
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.text import shorten, size_text

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]

MAX_UPLOAD_BYTES = 16 * 2**20
_MAX_REQUEST_BYTES = MAX_UPLOAD_BYTES + 2**16  # an upload has more than the file
_MAX_EVENT_BYTES = 2**20  # of JSON, which takes many times its size as objects
_MAX_PIXELS = 64_000_000  # of a picture that gradio opens
_UPLOAD = "/gradio_api/upload"  # the only path that takes a form
_ADDRESS = "127.0.0.1"  # which only this machine can reach
_NAMES = (_ADDRESS, "localhost", "::1")  # of the page: a tunnel of SSH may listen to the last
_ATTEMPTS = 20  # to remove the temporary folder
_log = logging.getLogger(__name__)


def serve(folder: str | Path, *, port: int = 7860, device: str | None = None) -> NoReturn:
    """Shows the page of a model until Ctrl-C or SIGTERM, and then ends the process with exit code 0.

    Runs of the model end in the middle: the process does not wait for its threads. Its temporary folder is removed.

    Args:
        folder: Run folder, pretrained folder, name of a model in the package, or ``owner/name`` on the Hub.
        port: Port in [1, 65535] of 127.0.0.1, which only this machine can reach.
        device: Device of the model; None for a GPU if there is one.
    """
    chosen = find_device(device)
    if find_spec("gradio") is None:
        raise ValueError("web requires the package gradio: pip install 'maskgit_pl[web]'")
    with open_socket(port) as listening:
        pipe = MaskGIT.from_pretrained(folder, device=chosen)
        for number in (signal.SIGINT, signal.SIGTERM):  # a job in the background of a shell ignores Ctrl-C until here
            signal.signal(number, signal.default_int_handler)
        with _temporary_folder() as files:
            _start(pipe, str(folder), listening, files)
            with suppress(KeyboardInterrupt):
                _log.info("http://%s:%d/ shows %s; Ctrl-C ends it", _ADDRESS, port, folder)
                while True:
                    time.sleep(1)  # not longer: a signal that another thread takes does not wake this one
            # A thread whose files disappear has errors that concern nobody.
            logging.disable()
    logging.disable(logging.NOTSET)
    _log.info("\nmaskgit web: ended; its temporary files are removed")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)  # threads would wait for open pages and for the model


def open_socket(port: int) -> socket.socket:
    """Returns a socket that listens to a port of this machine."""
    check_integer("port", port, "[1, 65535]")
    try:
        return socket.create_server((_ADDRESS, port), backlog=128)
    except OSError as error:
        raise ValueError(
            f"--port must be a free port of this machine, got {port} ({error.strerror}); choose another one, such as "
            f"--port {port % 65535 + 1}"
        ) from error


class Guard:
    """An ASGI application in front of another one, which refuses what the page itself never sends.

    1. ``Host`` must be localhost or its address, else 403. A site that lets its own name point to this machine
       (DNS rebinding) is refused, because its name stays in ``Host``.
    2. ``Origin`` must be that host and port, if it is sent, else 403. Browsers send it with every upload, and
       with every request whose answer a script of another site could read.
    3. A request has a length, else 411, of at most 16 MiB for an upload and 1 MiB for all others, else 413.
    4. A POST that is no upload is JSON, and each ``path`` in it a file of the page, else 403: gradio copies the files
       that an event names to where the page can read them. No request names another site, from which gradio would load.

    No site can show the answers in a frame.

    Args:
        app: Application that gets the other requests.
        files: Folder of the uploads and of the images of the page.
    """

    def __init__(self, app: App, files: Path) -> None:
        self._app, self._files = app, Path(os.path.realpath(files))

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # "lifespan"; websockets are not served
            await self._app(scope, receive, send)
            return

        async def send_framed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", b"frame-ancestors 'none'")]
            await send(message)

        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1"))
        refusal = _refuse(scope["path"], headers)
        if refusal is None and scope["method"] == "POST" and scope["path"] != _UPLOAD:
            body, receive = await _read_body(receive)
            refusal = self._refuse_files(body)
        if refusal is None:
            await self._app(scope, receive, send_framed)
            return
        status, text = refusal
        content = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
        await send_framed({"type": "http.response.start", "status": status, "headers": content})
        await send_framed({"type": "http.response.body", "body": f"{text}\n".encode()})

    def _refuse_files(self, body: bytes) -> tuple[int, str] | None:
        def check(pairs: list[tuple[str, Any]]) -> None:  # also of a name that stands twice
            for path in (value for name, value in pairs if name == "path" and isinstance(value, str)):
                real = Path(os.path.realpath(path))
                if not (real.is_relative_to(self._files) and real.is_file()):
                    raise ValueError(f"path must be a file of the page, got {shorten(path)}; upload it")

        try:
            json.loads(body, object_pairs_hook=check)
        except (ValueError, RecursionError) as error:
            return 403, str(error)
        return None


async def _read_body(receive: Receive) -> tuple[bytes, Receive]:
    """Returns the body of a request, and a function that receives it again and then what follows."""
    messages = [await receive()]
    while messages[-1].get("more_body"):
        messages.append(await receive())
    again = iter(messages)

    async def receive_again() -> Message:
        return next(again, None) or await receive()

    return b"".join(message.get("body", b"") for message in messages), receive_again


def _refuse(path: str, headers: Mapping[str, list[str]]) -> tuple[int, str] | None:
    """Returns the status and the text of the answer to a request that ``Guard`` refuses; None for others."""
    host, origins = ",".join(headers.get("host", [])).lower(), headers.get("origin", [])
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        name = None
    if name not in _NAMES:
        return 403, "Host must be localhost or its address: the page is for this machine only"
    if any(origin.lower() not in (f"http://{host}", f"https://{host}") for origin in origins):
        return 403, "Origin must be the page itself"
    if "://" in path:
        return 403, "a request must not name another site"
    if "transfer-encoding" in headers:
        return 411, "a request must have a length"
    length = int(headers.get("content-length", ["0"])[0])
    most = _MAX_REQUEST_BYTES if path == _UPLOAD else _MAX_EVENT_BYTES
    if length > most:
        return 413, f"a request must have at most {size_text(most)}, got {size_text(length)}"
    return None


def _start(pipe: MaskGIT, name: str, listening: socket.socket, files: Path) -> None:
    """Starts the server of the page in a thread, and waits until it answers."""
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    from maskgit_pl.web.page import STYLE, build_page

    Image.MAX_IMAGE_PIXELS = _MAX_PIXELS // 2  # PIL refuses twice as many
    theme = gr.themes.Default(  # with fonts of the system, so that the page loads none
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue="orange"
    )
    plain = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # their pages load scripts of other sites
    app = gr.mount_gradio_app(
        plain, build_page(pipe, name), "/", footer_links=[], run_history=False, theme=theme, css=STYLE,
        max_file_size=MAX_UPLOAD_BYTES, ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False,
    )  # fmt: skip
    guarded = Guard(app, files)
    server = uvicorn.Server(uvicorn.Config(guarded, http="h11", ws="none", lifespan="on", log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server of the page ended while it started")
        time.sleep(0.02)


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Makes the folder of all files of the page, and removes it at the end; yields the part of gradio."""
    folder = Path(tempfile.gettempdir(), f"maskgit-web-{secrets.token_hex(8)}")
    # gradio and matplotlib, which caches its list of fonts, read these variables when they are imported.
    os.environ["MPLCONFIGDIR"] = str(folder / "matplotlib")
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "gradio")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        folder.mkdir(mode=0o700)  # in the try block: Ctrl-C may come right after it
        tempfile.tempdir = str(folder)
        yield folder / "gradio"
    finally:
        for _ in range(_ATTEMPTS):  # a thread may still write to it
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
