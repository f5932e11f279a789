"""The installed wheel in an empty folder: what a newcomer types works without a clone of the repository."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from maskgit_pl import __version__

ROOT = Path(__file__).parents[2]

Run = Callable[[str], str]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a command of the wheel in a folder that is empty at first, and returns what it prints."""
    place = tmp_path_factory.mktemp("newcomer")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place / "env")], check=True)
    python = place / "env" / "bin" / "python"
    installed = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                               capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    # The libraries of this environment, behind the new one's own: a path file in it is not followed.
    Path(installed, "libraries.pth").write_text(sysconfig.get_path("purelib"))
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(command, check=True)
    (place / "here").mkdir()
    hidden = ("PYTHON", "MASKGIT")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    environment["PATH"] = f"{python.parent}{os.pathsep}{environment['PATH']}"

    def call(line: str) -> str:
        done = subprocess.run(shlex.split(line), cwd=place / "here", env=environment, capture_output=True, text=True,
                              check=False)  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout

    call.place = place / "here"  # type: ignore[attr-defined]  # an attribute of the fixture
    return call


def test_the_wheel_has_only_the_package_the_recipes_and_the_models(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"maskgit_pl", f"maskgit_pl-{__version__}.dist-info"}
    for file in (ROOT / "recipes").rglob("*.*"):
        assert f"maskgit_pl/recipes/{file.relative_to(ROOT / 'recipes').as_posix()}" in names
    for file in (ROOT / "maskgit_pl" / "models").rglob("*.*"):
        assert file.relative_to(ROOT).as_posix() in names
    assert wheel.stat().st_size < 9_000_000


def test_the_first_commands_work(run: Run) -> None:
    assert run("maskgit --version") == f"maskgit_pl {__version__}\n"
    assert "maskgit demo" in " ".join(run("maskgit").split())
    assert "adaln" in run("maskgit recipes list")
    assert "fashion-mnist-demo" in run("maskgit models")
    assert run("maskgit env").count(str(ROOT)) == 0  # not the clone
    assert "tokenizer" in run("maskgit train transformer --recipe adaln --print-config")


def test_pictures_are_made_before_anything_is_trained(run: Run) -> None:
    run("maskgit sample fashion-mnist-demo --classes Sneaker,Bag --per-class 4 --images pictures --out sampled.png")
    picture = min((run.place / "pictures").iterdir())  # type: ignore[attr-defined]  # an attribute of the fixture
    run(f"maskgit edit fashion-mnist-demo pictures/{picture.name} --box 0,4,28,16 --class 'Ankle boot' --out boot.png")
    for made in ("sampled.png", "boot.png"):
        assert (run.place / made).stat().st_size > 500  # type: ignore[attr-defined]  # an attribute of the fixture


def test_the_demo_runs_and_its_model_is_listed(run: Run) -> None:
    here: Path = run.place  # type: ignore[attr-defined]  # an attribute of the fixture
    if (files := ROOT / "data" / "raw" / "fashion-mnist").is_dir():  # an earlier download
        shutil.copytree(files, here / "data" / "raw" / "fashion-mnist")
    try:
        run("maskgit data fetch fashion-mnist")
    except AssertionError as error:
        if "no source answered" in str(error):
            pytest.skip("no network")
        raise
    said = run("maskgit demo --short")
    assert re.findall(r"^\[(\d)/5\]", said, re.MULTILINE) == list("12345")
    assert "complete already, nothing to do" in said
    assert (here / "runs/demo-short/samples.png").is_file()
    assert "maskgit sample runs/demo-short" in run("maskgit models")
    run("maskgit sample runs/demo-short --per-class 1")
    assert not list(here.glob("*.partial"))
