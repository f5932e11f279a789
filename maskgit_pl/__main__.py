"""Runs the console script ``maskgit`` for ``python -m maskgit_pl``."""

import sys

from maskgit_pl.cli import main

if __name__ == "__main__":
    sys.exit(main())
