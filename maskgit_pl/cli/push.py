"""``maskgit push``: uploads a pretrained folder with its model card to the Hugging Face Hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maskgit_pl.runs.pushing import Push

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "push",
        help="upload a pretrained folder with its model card to the Hugging Face Hub",
        description="Upload a pretrained folder with its model card to the Hugging Face Hub, in one commit. The name, "
        "every file and every weight are checked first. MaskGIT.from_pretrained and all commands load it by its name. "
        "Log in with `hf auth login`, or set HF_TOKEN.",
        epilog="Example: maskgit push runs/fashion-mnist-adaln alice/maskgit-fashion --license apache-2.0 --dry-run",
    )
    parser.add_argument(
        "folder",
        type=Path,
        metavar="FOLDER",
        help="run, pretrained folder, or model of the package, such as fashion-mnist-demo",
    )
    parser.add_argument("repository", metavar="OWNER/NAME", help="repository, created if it does not exist")
    parser.add_argument(
        "--dry-run", action="store_true", help="only check, list the files and show the card; asks no network"
    )
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument(
        "--license", metavar="NAME", help="license of the weights, such as apache-2.0 (default: that of the card)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Checks the folder, and uploads it or shows what would be uploaded."""
    from maskgit_pl.runs.pushing import plan_push, push  # torch takes seconds to import

    plan = plan_push(args.folder, args.repository, license=args.license)
    if args.dry_run:
        _show(plan, private=args.private)
    else:
        print(push(plan, private=args.private))
    return 0


def _show(plan: Push, *, private: bool) -> None:
    """Prints the files with size and digest, then the card."""
    from maskgit_pl.cli.tables import print_rows
    from maskgit_pl.files import size_text
    from maskgit_pl.text import printable

    visibility = "private" if private else "public"
    total = size_text(sum(each.num_bytes for each in plan.files))
    print(f"{plan.hub_id} ({visibility}): {len(plan.files)} files, {total}; nothing is uploaded (--dry-run)\n")
    rows = [{"file": each.path, "bytes": each.num_bytes, "sha256": each.sha256} for each in plan.files]
    print_rows(rows, as_json=False)
    print()
    for line in plan.card.splitlines():  # may be of somebody else: no control characters
        print(printable(line, limit=None))
