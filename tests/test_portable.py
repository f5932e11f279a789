"""Systems that lack names of Linux: Windows has no fork, ``pread``, ``fcntl`` and signals of jobs; macOS few."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from maskgit_pl import portable

ROOT = Path(__file__).parents[1]
WINDOWS = {
    "signal": ("SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGHUP", "SIGKILL", "pthread_sigmask", "sigwaitinfo", "sigwait"),
    "os": ("pread", "register_at_fork", "O_CLOEXEC", "O_NONBLOCK", "O_NOFOLLOW", "sched_getaffinity", "getuid", "fork"),
}
MACOS = {"signal": ("sigwaitinfo",), "os": ("sched_getaffinity",)}
SYSTEMS = {"windows": (WINDOWS, ("fcntl", "resource")), "macos": (MACOS, ())}
HIDE = """
import importlib, sys
# The libraries handle this themselves.
import lightning.pytorch, matplotlib.figure, simplejpeg, tensorboard, timm, torch_fidelity, torchmetrics, webdataset
import torch.distributed.checkpoint.state_dict, torch.distributed.fsdp, torch.utils.tensorboard
for module, names in {names!r}.items():
    for name in names:
        delattr(sys.modules.get(module) or importlib.import_module(module), name)
for module in {modules!r}:
    sys.modules[module] = None  # importing it raises ImportError
if "fcntl" in {modules!r}:
    import types
    sys.modules["msvcrt"] = types.SimpleNamespace(locking=lambda *_: None, LK_LOCK=1, LK_NBLCK=2)
"""


def run(system: str, code: str, *words: object) -> subprocess.CompletedProcess[str]:
    names, modules = SYSTEMS[system]
    program = HIDE.format(names=names, modules=modules) + textwrap.dedent(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_module_is_imported_without_the_names_of_linux(system: str) -> None:
    done = run(
        system,
        """
        import pkgutil
        import maskgit_pl
        found = pkgutil.walk_packages(maskgit_pl.__path__, "maskgit_pl.")
        skipped = ("__main__", "diffusers_export.pipeline")  # the second requires an extra
        for name in sorted(module.name for module in found if not module.name.endswith(skipped)):
            importlib.import_module(name)
        print("imported")
        """,
    )
    assert done.stdout.splitlines()[-1:] == ["imported"], done.stderr


@pytest.mark.slow
def test_a_model_is_trained_sampled_and_edited_without_the_names_of_linux(
    tiny_shards: Path, tiny_pretrained: Path, tmp_path: Path
) -> None:
    done = run(
        "windows",
        """
        import yaml
        from maskgit_pl.cli import main
        from tests.conftest import flags
        shards, pretrained, folder, tiny = sys.argv[1:]
        train = ["train", "transformer", "--data", shards, "--tokenizer", f"{pretrained}/tokenizer", "--run", "one"]
        train += ["--runs-folder", f"{folder}/runs", *flags(yaml.safe_load(open(tiny)))]
        assert main(train) == 0
        assert main([*train, "--trainer.max_steps=5"]) == 0  # resumed
        from PIL import Image
        assert main(["sample", f"{folder}/runs/one", "--classes", "1", "--out", f"{folder}/a.png"]) == 0
        Image.new("L", (8, 8)).save(f"{folder}/black.png")
        edit = ["edit", f"{folder}/runs/one", f"{folder}/black.png", "--box", "0,0,4,4", "--class", "0"]
        assert main([*edit, "--out", f"{folder}/b.png"]) == 0
        assert main(["data", "verify", shards]) == 0
        """,
        tiny_shards, tiny_pretrained, tmp_path, ROOT / "tests" / "tiny" / "transformer.yaml",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"a.png", "b.png"} <= {file.name for file in tmp_path.iterdir()}


@pytest.mark.parametrize("has_pread", [True, False])
def test_pread_reads_at_an_offset_and_leaves_the_position(has_pread: bool, tmp_path: Path, monkeypatch) -> None:
    if not has_pread:
        monkeypatch.delattr(os, "pread")
    file = tmp_path / "file"
    file.write_bytes(bytes(range(100)))
    descriptor = os.open(file, portable.READ_FLAGS)
    try:
        os.lseek(descriptor, 7, os.SEEK_SET)
        assert portable.pread(descriptor, 3, 50) == bytes([50, 51, 52])
        assert portable.pread(descriptor, 9, 98) == bytes([98, 99])
        assert os.read(descriptor, 1) == bytes([7])
    finally:
        os.close(descriptor)


def test_peak_memory_is_that_of_this_process() -> None:
    before = portable.peak_memory()
    block = bytearray(200_000_000)
    block[::4096] = b"x" * len(block[::4096])
    assert portable.peak_memory() >= max(before, 200_000_000)


def test_signals_are_those_that_the_system_has() -> None:
    assert [each.name for each in portable.signals_named("SIGINT", "SIGNONE", "SIGTERM")] == ["SIGINT", "SIGTERM"]
