"""``python -m maskgit_pl``: the console script."""

import sys

from maskgit_pl.cli import main

if __name__ == "__main__":
    sys.exit(main())
