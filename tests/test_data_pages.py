"""The data commands of the pages run on small stand-ins of the same layout, from the raw files to shards."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskgit_pl.cli import main
from maskgit_pl.data.manifest import read_manifest_summary
from tests.test_readme import python_blocks
from tests.test_readme_commands import commands_of, words

SYNSETS = ("n01440764", "n01443537", "n02110185")


def draw(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (12, 14, 3), np.uint8)
    Image.fromarray(pixels).save(path, "JPEG")


def run_data_commands(page: str, *, without: str = "no such words") -> list[str]:
    """Runs the commands ``maskgit data ...`` of a page in the working folder and returns them."""
    lines = [line for line in commands_of(page) if line.startswith("maskgit data ") and without not in line]
    for line in lines:
        assert main(words(line)[1:]) == 0, line
    return lines


@pytest.fixture
def synsets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ImageNet as Kaggle gives it: train in folders of synsets, val in one folder, with a table of its synsets."""
    monkeypatch.chdir(tmp_path)
    for number in range(30):
        draw(tmp_path / "imagenet/train" / SYNSETS[number % 3] / f"{number}.JPEG", number)
    rows = []
    for number in range(9):
        name = f"ILSVRC2012_val_{number:08d}"
        draw(tmp_path / "imagenet/val" / f"{name}.JPEG", 100 + number)
        rows.append((name, f"{SYNSETS[number % 3]} 1 2 3 4 {SYNSETS[0]} 5 6 7 8"))
    with open("LOC_val_solution.csv", "w", newline="") as file:
        csv.writer(file).writerows([("ImageId", "PredictionString"), *rows])
    return tmp_path


def test_imagenet_from_folders_of_synsets(synsets, capsys):
    (block,) = [block for block in python_blocks("docs/imagenet.md") if "LOC_val_solution" in block]
    exec(compile(block, "docs/imagenet.md", "exec"), {})
    assert len(run_data_commands("docs/imagenet.md", without="hub/data")) == 2
    summary = read_manifest_summary(synsets / "data/shards/imagenet")
    assert (summary.classes, summary.samples) == (SYNSETS, {"train": 30, "val": 9})
    assert "left out" not in capsys.readouterr().out


def test_imagenet_from_the_parquet_files_of_the_hub(synsets):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    Path("hub/data").mkdir(parents=True)
    names = {"info": {"features": {"label": {"names": list(SYNSETS), "_type": "ClassLabel"}}}}
    for split, files in (("train", sorted(synsets.glob("imagenet/train/*/*"))), ("validation", [])):
        files = files or sorted(synsets.glob("imagenet/val/*"))
        images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
        table = pa.table({"image": images, "label": [number % 3 for number in range(len(files))]})
        table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
        parquet.write_table(table, f"hub/data/{split}-00000-of-00001.parquet")
    shutil.rmtree("imagenet")
    assert len(run_data_commands("docs/imagenet.md", without="make imagenet")) == 2
    summary = read_manifest_summary(synsets / "data/shards/imagenet")
    assert (summary.classes, summary.samples) == (SYNSETS, {"train": 30, "val": 9})
