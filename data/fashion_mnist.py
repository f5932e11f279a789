"""Makes shards of Fashion-MNIST (60,000 + 10,000 product photos, 28 x 28 grey, 10 classes, MIT licence).

    python data/fashion_mnist.py --out data/shards/fashion-mnist

Sources, each with a timeout of seconds: existing files (--source FOLDER), torchvision's mirrors, and the Debian package
dataset-fashion-mnist, downloaded with apt into a temporary folder (without root).
Source: Xiao, Rasul, Vollgraf, arXiv:1708.07747.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path

from maskgit_pl.cli.data import make
from maskgit_pl.shards.sources import IdxFiles

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
)  # fmt: skip
# SHA-256 of the decompressed files, since mirrors and Debian compress them differently
FILES = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
LARGEST = 47_040_016  # bytes of the first file, decompressed
MIRROR_SECONDS = 5  # without an answer; a blocked network gives no error
APT_SECONDS = 120
PACKAGE = "dataset-fashion-mnist"
_log = logging.getLogger("fashion_mnist")


def main() -> int:
    """Downloads and checks the files and makes shards; does nothing if they exist."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/shards/fashion-mnist"), help="data folder to make")
    parser.add_argument(
        "--raw", type=Path, default=Path("data/raw/fashion-mnist"), help="folder that keeps the four files"
    )
    parser.add_argument(
        "--source", type=Path, help="folder of the four IDX files (.gz or plain), instead of a download"
    )
    args = parser.parse_args()
    try:
        convert(args.source or fetch(args.raw), args.out)
    except (OSError, ValueError) as error:
        _log.error("error: %s", error)
        return 2
    return 0


def convert(raw: Path, out: Path) -> None:
    """Checks the four files and makes shards of them."""
    bad = {name: fault for name in FILES if (fault := fault_of(raw, name))}
    if bad:
        raise ValueError(f"{raw}: " + "; ".join(f"{name}: {fault}" for name, fault in bad.items()))
    make(IdxFiles(raw, classes=CLASSES), out)


def fault_of(folder: Path, name: str) -> str | None:
    """Returns the fault of a file in a few words; None if it has the known content."""
    path = next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)
    if path is None:
        return "missing"
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            data = file.read(LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        return f"not a complete gzip file ({error})"
    return None if hashlib.sha256(data).hexdigest() == FILES[name] else "wrong checksum"


def fetch(raw: Path) -> Path:
    """Downloads the four files to a folder, from the first source that has all of them, and returns the folder.

    Raises:
        FileNotFoundError: if no source has them. The message names the alternatives.
    """
    if all(fault_of(raw, name) is None for name in FILES):
        return raw
    failures = []
    for title, source in (("torchvision's mirrors", from_mirrors), ("the Debian package", from_debian)):
        _log.info("Fashion-MNIST: trying %s", title)
        with tempfile.TemporaryDirectory() as folder:
            failure = attempt(source, Path(folder))
            if failure is None:
                raw.mkdir(parents=True, exist_ok=True)
                for name in FILES:
                    shutil.copyfile(Path(folder) / f"{name}.gz", raw / f"{name}.gz")
                return raw
        failures.append(f"{title}: {failure}")
    raise FileNotFoundError(
        "Fashion-MNIST: no source answered (" + "; ".join(failures) + "). Connect to a network or an apt mirror; or "
        f"copy the four files {', '.join(FILES)} (.gz or plain) from another machine and pass --source FOLDER; or "
        "train on your own images: `maskgit data make FOLDER --out DIR`"
    )


def attempt(source: Callable[[Path], None], folder: Path) -> str | None:
    """Tries one source and returns the reason if it fails, else None."""
    try:
        source(folder)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    faults = {name: fault for name in FILES if (fault := fault_of(folder, name))}
    return str(faults) if faults else None


def from_mirrors(folder: Path) -> None:
    """Downloads the files from torchvision's mirrors."""
    from torchvision.datasets import FashionMNIST

    mirror = FashionMNIST.mirrors[0]
    for name in sorted(FILES):
        with urllib.request.urlopen(f"{mirror}{name}.gz", timeout=MIRROR_SECONDS) as answer:
            (folder / f"{name}.gz").write_bytes(answer.read(LARGEST))


def from_debian(folder: Path) -> None:
    """Downloads the files from Debian's package, with lists and cache in a temporary folder, not in the system's."""
    for name in ("apt-get", "dpkg-deb"):
        if shutil.which(name) is None:
            raise FileNotFoundError(f"{name} is not installed (not a Debian or Ubuntu system?)")
    for place in ("lists/partial", "cache/archives/partial"):
        (folder / place).mkdir(parents=True)
    options = [f"Dir::State::Lists={folder}/lists", f"Dir::Cache={folder}/cache", "Debug::NoLocking=1"]
    options += ["Acquire::http::Timeout=5", "Acquire::https::Timeout=5", "Acquire::Retries=0"]
    apt = ["apt-get", "-qq", *(word for option in options for word in ("-o", option))]
    run([*apt, "update"], folder)
    run([*apt, "download", PACKAGE], folder)
    package = next(folder.glob("*.deb"))
    run(["dpkg-deb", "-x", str(package), str(folder / "unpacked")], folder)
    for path in (folder / "unpacked/usr/share/datasets/fashion-mnist").iterdir():
        path.rename(folder / path.name)


def run(command: list[str], folder: Path) -> None:
    """Runs a command in a folder, with a timeout; the end of its output becomes the error message."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=APT_SECONDS, check=False)
    if done.returncode:
        raise OSError(f"{' '.join([command[0], *command[-2:]])}: {done.stderr.strip()[-300:]}")


if __name__ == "__main__":
    sys.exit(main())
