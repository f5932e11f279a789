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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from maskgit_pl.checks import check_integer
from maskgit_pl.distributed import find_device
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.web.regions import MAX_UPLOAD_BYTES, MAX_UPLOAD_PIXELS

__all__ = ["check_port", "serve"]

_LOCAL = ("127.0.0.1", "localhost", "::1")  # addresses that only this machine can reach
_MAX_WAITING = 64  # events in the queue
_MAX_SESSIONS = 200  # whose results are kept
_ATTEMPTS = 20  # to remove the temporary folder
_log = logging.getLogger(__name__)


def serve(folder: str | Path, *, host: str = "127.0.0.1", port: int = 7860, device: str | None = None) -> NoReturn:
    """Shows the page of a model until Ctrl-C or SIGTERM, and then ends the process with exit code 0.

    Runs of the model end in the middle: the process does not wait for its threads. Its temporary folder is removed.

    Args:
        folder: Run folder, pretrained folder, name of a model in the package, or ``owner/name`` on the Hub.
        host: Address of this machine. Others than 127.0.0.1 let other machines use the page, without a password.
        port: Port in [1, 65535].
        device: Device of the model; None for a GPU if there is one.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if the device or gradio is missing, the port is out of range or used, the address is not one of this
            machine, or the page cannot show the model.
        KeyboardInterrupt: if Ctrl-C or SIGTERM comes before the page can be opened.
    """
    chosen = find_device(device)
    if find_spec("gradio") is None:
        raise ValueError("web requires the package gradio: pip install 'maskgit_pl[web]'")
    check_port(host, port)
    pipe = MaskGIT.from_pretrained(folder, device=chosen)
    if host not in _LOCAL:
        _log.warning(
            "warning: everyone who can reach %s can use this page and the computing time of this machine. It has no "
            "password. Leave out --host to keep it to this machine.",
            host,
        )
    _skip_proxies(host)
    _interrupt_once()
    with _temporary_folder() as temporary:
        url = _launch(pipe, str(folder), temporary, host=host, port=port)
        with suppress(KeyboardInterrupt):
            _log.info("%s shows %s; Ctrl-C ends it", url, folder)
            while True:
                time.sleep(3600)
        # A thread whose files disappear has errors that concern nobody.
        logging.disable()
    logging.disable(logging.NOTSET)
    _log.info("\nmaskgit web: ended; its temporary files are removed")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)  # threads of gradio would wait for open pages and for the model


def check_port(host: str, port: int) -> None:
    """Checks that the page can be shown at an address.

    Raises:
        ValueError: if the port is out of range or used, or the address is not one of this machine.
    """
    check_integer("port", port, "[1, 65535]")
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise ValueError(
            f"--host and --port must name a free port of this machine, got {host}:{port} ({error.strerror}); choose "
            f"another one, such as --port {port % 65535 + 1}"
        ) from error


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
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), *_LOCAL, host]))


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
