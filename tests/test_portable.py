"""Systems that lack names of Linux, such as fork on Windows, and locales that are not UTF-8."""

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from maskgit_pl.data.images import encode_png

ROOT = Path(__file__).parents[1]
WINDOWS = {  # which lacks all names that macOS lacks
    "signal": ("SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGHUP", "SIGKILL", "pthread_sigmask", "sigwaitinfo", "sigwait"),
    "os": ("pread", "register_at_fork", "O_CLOEXEC", "O_NONBLOCK", "O_NOFOLLOW", "sched_getaffinity", "getuid", "fork"),
}
PROGRAM = """
import importlib, sys
# The libraries handle this themselves.
import filelock, lightning.pytorch, matplotlib.figure, simplejpeg, timm, torch_fidelity, torchmetrics
import torch.distributed.checkpoint.state_dict, torch.distributed.fsdp
for module, names in {names!r}.items():
    for name in names:
        delattr(importlib.import_module(module), name)
for module in {modules!r}:
    sys.modules[module] = None  # importing it raises ImportError

import maskgit_pl
from PIL import Image
from maskgit_pl.cli import main
for name in maskgit_pl.__all__:
    getattr(maskgit_pl, name)
pretrained, folder = sys.argv[1:]
assert main(["sample", pretrained, "--classes", "1", "--out", f"{{folder}}/a.png"]) == 0
Image.new("L", (8, 8)).save(f"{{folder}}/black.png")
edit = ["edit", pretrained, f"{{folder}}/black.png", "--box", "0,0,4,4", "--class", "0"]
assert main([*edit, "--out", f"{{folder}}/b.png"]) == 0
"""


@pytest.mark.slow
def test_the_package_samples_and_edits_without_the_names_of_linux(tiny_pretrained: Path, tmp_path: Path) -> None:
    program = PROGRAM.format(names=WINDOWS, modules=("fcntl", "resource"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(tiny_pretrained), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"a.png", "b.png"} <= {file.name for file in tmp_path.iterdir()}


# Names outside of ASCII, in a process whose locale is not UTF-8

C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
UTF_8 = {"LC_ALL": "C.UTF-8"}


def maskgit(folder: Path, *words: str, locale: dict[str, str] = C) -> str:
    """Runs a command in a folder and returns its output."""
    command = [sys.executable, "-m", "maskgit_pl", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **locale}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@pytest.mark.slow
def test_shards_of_a_zip_are_the_same_in_every_locale(tmp_path: Path) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for number in range(40):
            image = torch.full((1, 8, 8), number, dtype=torch.uint8)
            archive.writestr(f"{('größe', '日本')[number % 2]}/é {number}.png", encode_png(image))
    (tmp_path / "ü.zip").write_bytes(content.getvalue())
    maskgit(tmp_path, "data", "make", "ü.zip", "--out=ö C")
    maskgit(tmp_path, "data", "make", "ü.zip", "--out=ö", locale=UTF_8)
    first, second = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("ö C", "ö"))
    assert first == second
    assert "gr\\xf6\\xdfe" in maskgit(tmp_path, "data", "verify", "ö C")
    assert "größe" in maskgit(tmp_path, "data", "verify", "ö C", locale=UTF_8)


@pytest.mark.exports
@pytest.mark.slow
def test_models_graphs_and_images_have_names_outside_of_ascii(tiny_pretrained: Path, tmp_path: Path) -> None:
    (tmp_path / "mödel").symlink_to(tiny_pretrained)
    out = maskgit(tmp_path, "export", "mödel", "--format=pt2", "--out=ü x")
    assert " x: export.json and 3 graphs\n" in out
    assert (tmp_path / "ü x" / "transformer.pt2").is_file()
    maskgit(tmp_path, "sample", "mödel", "--classes=0", "--per-class=1", "--out=é.png")
    maskgit(tmp_path, "sample", "mödel", "--num-images=2", "--out=é.npz")
    assert (tmp_path / "é.png").is_file()
    assert (tmp_path / "é.npz").is_file()
