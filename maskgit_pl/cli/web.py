"""``maskgit web``: shows a page in the browser that generates, compares and edits."""

from __future__ import annotations

import argparse
from pathlib import Path

from maskgit_pl.cli.flags import add_device_argument, read_device_flag

__all__ = ["add_web_parser"]


def add_web_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "web",
        help="show a page in the browser that generates, compares and edits",
        description="Show a page in the browser: generate an image step by step, compare settings, edit with a brush, "
        "and try the mask schedules. Ctrl-C ends it. Requires the extra web: pip install 'maskgit_pl[web]'.",
        epilog="Example: maskgit web runs/fashion-mnist-adaln --port 7861",
    )
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=Path("fashion-mnist-demo"),
        metavar="RUN",
        help="run folder (runs/NAME), pretrained folder, owner/name on the Hub, or a model in the package (default: "
        "fashion-mnist-demo)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address that the page is bound to; others than 127.0.0.1 let other machines use it, without a "
        "password (default: 127.0.0.1)",
    )
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="port of the page (default: 7860)")
    add_device_argument(parser)
    parser.set_defaults(run=_run_web)


def _run_web(args: argparse.Namespace) -> int:
    """Shows the page until Ctrl-C."""
    from maskgit_pl.web.server import LOCAL, check_gradio, check_port, serve

    device = read_device_flag(args)
    check_gradio()
    check_port(args.host, args.port)
    from maskgit_pl.pipeline import MaskGIT

    pipe = MaskGIT.from_pretrained(args.folder, device=device)
    if args.host not in LOCAL:
        print(
            f"warning: everyone who can reach {args.host} can use this page and the computing time of this machine. It "
            "has no password. Leave out --host to keep it to this machine."
        )
    serve(
        pipe,
        str(args.folder),
        host=args.host,
        port=args.port,
        on_start=lambda url: print(f"{url} shows {args.folder}; Ctrl-C ends it", flush=True),
        on_stop=lambda: print("\nmaskgit web: ended; its temporary files are removed"),
    )
