"""``maskgit web``: shows a page in the browser that generates and edits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from maskgit_pl.cli.arguments import Word
from maskgit_pl.cli.flags import Device, Run

__all__ = ["web"]


def web(
    folder: Run = Path("fashion-mnist-demo"),
    *,
    host: Annotated[str, Word("ADDRESS")] = "127.0.0.1",
    port: int = 7860,
    device: Device | None = None,
) -> None:
    """Shows a page in the browser that generates and edits.

    The page generates images step by step, compares settings, and edits with a brush. Ctrl-C ends it. Requires the
    extra web: pip install 'maskgit_pl[web]'.

    Example: maskgit web runs/fashion-mnist-adaln --port 7861

    Args:
        folder: Run folder (runs/NAME), pretrained folder, owner/name on the Hub, or a model in the package.
        host: Address that the page is bound to; others than 127.0.0.1 let other machines use it, without a password.
            0.0.0.0 and :: are all addresses of this machine.
        port: Port of the page.
        device: cpu, cuda, cuda:1, mps ... (default: a GPU if there is one).
    """
    from maskgit_pl.web.server import serve

    serve(folder, host=host, port=port, device=device)
