"""The server of the page: bound to one address, with a temporary folder that is removed at the end."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from maskgit_pl.web.regions import MAX_UPLOAD_BYTES, MAX_UPLOAD_PIXELS

if TYPE_CHECKING:
    from maskgit_pl.pipeline import MaskGIT

__all__ = ["LOCAL", "check_gradio", "check_port", "serve"]

LOCAL = ("127.0.0.1", "localhost", "::1")
"""Addresses that only this machine can reach."""

_MAX_WAITING = 64  # events in the queue
_MAX_SESSIONS = 200  # whose results are kept
_ATTEMPTS = 20  # to remove the temporary folder


def check_gradio() -> None:
    """Checks that the extra ``web`` is installed.

    Raises:
        ValueError: if it is not. The message says how to install it.
    """
    if find_spec("gradio") is None:
        raise ValueError("web requires the package gradio: pip install 'maskgit_pl[web]'")


def check_port(host: str, port: int) -> None:
    """Checks that the page can be shown at an address.

    Args:
        host: Address of this machine.
        port: Port in [1, 65535].

    Raises:
        ValueError: if the port is out of range or used, or the address is not one of this machine.
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"--port must be in [1, 65535], got {port}")
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise ValueError(
            f"--host and --port must name a free port of this machine, got {host}:{port} ({error.strerror}); choose "
            f"another one, such as --port {port % 65535 + 1}"
        ) from error


def serve(
    pipe: MaskGIT,
    name: str,
    *,
    host: str,
    port: int,
    on_start: Callable[[str], object],
    on_stop: Callable[[], object],
) -> NoReturn:
    """Shows the page of a model until Ctrl-C or SIGTERM, and then ends the process with exit code 0.

    Runs of the model end in the middle: the process does not wait for its threads. Its temporary folder is removed.

    Args:
        pipe: The model.
        name: Name of the model for commands.
        host: Address to bind.
        port: Port to bind.
        on_start: Called with the URL when the page can be opened.
        on_stop: Called after the temporary folder is removed.

    Raises:
        ValueError: if the page cannot show the model.
        KeyboardInterrupt: if Ctrl-C or SIGTERM comes before the page can be opened.
    """
    _skip_proxies(host)
    _interrupt_once()
    with _temporary_folder() as folder:
        url = _launch(pipe, name, folder, host=host, port=port)
        with suppress(KeyboardInterrupt):
            on_start(url)
            while True:
                time.sleep(3600)
        # A thread whose files disappear has errors that concern nobody.
        logging.disable()
    on_stop()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)  # threads of gradio would wait for open pages and for the model


def _launch(pipe: MaskGIT, name: str, folder: Path, *, host: str, port: int) -> str:
    """Starts the server of the page in threads, and returns its URL."""
    from PIL import Image

    from maskgit_pl.web.page import STYLE, build_page
    from maskgit_pl.web.studio import Studio

    Image.MAX_IMAGE_PIXELS = MAX_UPLOAD_PIXELS // 2  # PIL refuses twice as many
    page = build_page(Studio(pipe, name, folder))
    page.queue(max_size=_MAX_WAITING, api_open=False)
    _, url, _ = page.launch(
        server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False, footer_links=[],
        max_file_size=MAX_UPLOAD_BYTES, state_session_capacity=_MAX_SESSIONS, theme=_theme(), css_paths=STYLE,
        pwa=False, ssr_mode=False, mcp_server=False, enable_monitoring=False,
    )  # fmt: skip
    return str(url)


def _interrupt_once() -> None:
    """Lets the first Ctrl-C or SIGTERM raise KeyboardInterrupt; later ones have no effect.

    A job in the background of a shell ignores Ctrl-C until then.
    """

    def interrupt(number: int, frame: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


def _skip_proxies(host: str) -> None:
    """Excepts this machine from the proxies of the environment: gradio asks its own server whether it is up."""
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), *LOCAL, host]))


def _theme() -> Any:
    """Returns a theme whose fonts are those of the system, so that the page loads none."""
    import gradio as gr

    return gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue="orange"
    )


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Makes the folder of all files of the page, and removes it at the end."""
    folder = Path(tempfile.mkdtemp(prefix="maskgit-web-"))
    # gradio and matplotlib, which caches its list of fonts, read these variables when they are imported.
    os.environ["MPLCONFIGDIR"] = str(folder / "matplotlib")
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "gradio")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        yield folder
    finally:
        for _ in range(_ATTEMPTS):  # a thread may still write to it
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
