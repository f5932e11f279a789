"""Runs the console script ``maskgit`` for ``python -m maskgit_pl``."""

import sys

from maskgit_pl.cli import main

if __name__ == "__main__":
    code = main()
    # Python kills a process of `python -m` at its end if Ctrl-C came within `exec` of a string, which dataclasses and
    # many imports use, even when the error was caught. The next `exec` of a string clears that flag.
    exec("")  # noqa: S102  # runs nothing
    sys.exit(code)
