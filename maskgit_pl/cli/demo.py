"""``maskgit demo``: fetches data, trains both stages, and measures the result; see ``maskgit_pl.demo``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from maskgit_pl.cli.arguments import Word
from maskgit_pl.cli.flags import NewRunFlags

__all__ = ["demo"]


def demo(
    *,
    images: Annotated[Path, Word("DIR")] | None = None,
    lenient: bool = False,
    short: bool = False,
    run: NewRunFlags = NewRunFlags(),
    overrides: Sequence[str] = (),
) -> None:
    """Does everything once: fetches data, trains both stages, makes pictures, measures.

    Fashion-MNIST takes about 10 minutes on 2 CPU cores. The same command resumes after a stop. Without --recipe, it
    trains the recipe adaln, and on other data than Fashion-MNIST 'adaln 15m'. Further flags override recipe values of
    both stages.

    Example: maskgit demo --dataset mine --images path/to/folder

    Args:
        images: Folder or archive of your own images, one sub-folder per class, for a --dataset of your own.
        lenient: Skip and list images that cannot be read.
        short: Train 60 steps per stage, as a quick check (run: demo-short).
    """
    from maskgit_pl.evaluation import demo_steps  # torch takes seconds to import

    folder = demo_steps.demo(**asdict(run), images=images, lenient=lenient, short=short, overrides=overrides)
    print(f"\nThe model is in {folder}. Next: maskgit sample {shlex.quote(str(folder))} --out sampled.png")
