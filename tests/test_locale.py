"""Commands with names outside of ASCII, in a process whose locale is not UTF-8."""

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from maskgit_pl.data.images import encode_png

C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
UTF_8 = {"LC_ALL": "C.UTF-8"}


def maskgit(folder: Path, *words: str, locale: dict[str, str] = C) -> str:
    """Runs a command in a folder and returns its output."""
    command = [sys.executable, "-m", "maskgit_pl", *words]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", **locale}
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
