"""The same as `maskgit data fetch emoji`, for a clone without an installed command."""

import sys

from maskgit_pl.cli import main

if __name__ == "__main__":
    sys.exit(main(["data", "fetch", "emoji", *sys.argv[1:]]))
