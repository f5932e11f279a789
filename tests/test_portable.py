"""Systems that lack names of Linux: Windows has no fork, ``pread``, ``fcntl`` and signals of jobs; macOS few."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WINDOWS = {
    "signal": ("SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGHUP", "SIGKILL", "pthread_sigmask", "sigwaitinfo", "sigwait"),
    "os": ("pread", "register_at_fork", "O_CLOEXEC", "O_NONBLOCK", "O_NOFOLLOW", "sched_getaffinity", "getuid", "fork"),
}
MACOS = {"signal": ("sigwaitinfo",), "os": ("sched_getaffinity",)}
SYSTEMS = {"windows": (WINDOWS, ("fcntl", "resource")), "macos": (MACOS, ())}
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
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_package_samples_and_edits_without_the_names_of_linux(
    system: str, tiny_pretrained: Path, tmp_path: Path
) -> None:
    names, modules = SYSTEMS[system]
    program = PROGRAM.format(names=names, modules=modules)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(tiny_pretrained), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"a.png", "b.png"} <= {file.name for file in tmp_path.iterdir()}
