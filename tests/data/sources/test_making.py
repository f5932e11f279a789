"""The functions that make a data folder: each option has its effect, and a second call does nothing."""

import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from PIL import Image

from maskgit_pl.cli import main
from maskgit_pl.data.manifest import load_manifest, read_manifest_summary
from maskgit_pl.data.sources.making import convert_images, open_source
from tests.hostile_images import save
from tests.local_hub import local_hub


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """40 images with labels in a column of their own and vectors, and one that is damaged."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(40):
        Image.new("RGB", (9, 8), (number, 1, 2)).save(folder / f"{number}.png")
        np.save(folder / f"{number}.npy", np.zeros(3, np.float32))
    (folder / "39.png").write_bytes(b"")
    rows = "".join(f"{number}.png,{number % 2}\n" for number in range(40))
    (folder / "metadata.csv").write_text(f"file_name,kind\n{rows}")
    return folder


OPTIONS = {"image_size": (4, 6), "shard_size": 7, "val_fraction": 0.3, "classes": ["a", "b", "c"], "lenient": True}


def test_images_are_converted_with_every_option_and_once(photos, tmp_path, caplog):
    caplog.set_level("INFO")
    for done in ("made: ", "complete already, nothing to do: "):
        convert_images(photos, tmp_path / "out", **OPTIONS, label_field="kind", vectors=False, workers=1)
        assert f"{tmp_path / 'out'}: {done}" in caplog.messages[0]
        assert "  left out: 1 images that cannot be read, listed in left_out.txt" in caplog.messages[0]
        caplog.clear()
    made = read_manifest_summary(tmp_path / "out")
    assert (made.classes, sum(made.samples.values())) == (("a", "b", "c"), 39)
    manifest = load_manifest(tmp_path / "out", "train")
    assert len(manifest.shards) == -(-made.samples["train"] // 7)


def test_equal_images_and_those_of_val_that_are_in_train_are_named(tmp_path, caplog):
    caplog.set_level("INFO")
    for split, numbers in (("train", (0, 1, 2, 1)), ("val", (2, 5))):
        for place, number in enumerate(numbers):
            path = tmp_path / "photos" / split / "ab"[place % 2] / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 8), (number, 1, 2)).save(path)
    convert_images(tmp_path / "photos", tmp_path / "out", workers=1)
    assert re.search(r"duplicates: 2 images equal an earlier one: train-000000\.tar:\S+ = train-", caplog.text)
    assert "duplicates: 1 of 2 val images (50.0%) are in train" in caplog.text
    caplog.clear()
    shutil.rmtree(tmp_path / "photos" / "val" / "a")
    (tmp_path / "photos" / "train" / "b" / "3.png").unlink()
    (tmp_path / "photos" / "val" / "a").mkdir()
    convert_images(tmp_path / "photos", tmp_path / "other", workers=1)
    assert "duplicates" not in caplog.text


def png(number: int) -> bytes:
    return save(Image.new("RGB", (9, 8), (number, 1, 2)), "PNG")


def table(start: int, count: int, **labels: list[int]) -> bytes:
    file = pa.BufferOutputStream()
    numbers = range(start, start + count)
    columns = {"image": [{"bytes": png(n), "path": None} for n in numbers], "label": [n % 2 for n in numbers], **labels}
    pq.write_table(pa.table(columns), file)
    return file.getvalue().to_pybytes()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on this machine; the working directory is empty."""
    monkeypatch.chdir(tmp_path)
    with local_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", hub.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        hub.repositories["alice/tables"] = {
            "data/train-0.parquet": table(0, 20),
            "data/test-0.parquet": table(20, 6, label=[-1] * 6),
            "tables.py": b"raise SystemExit",
        }
        hub.repositories["alice/files"] = {f"{'ab'[n % 2]}/{n}.png": png(n) for n in range(20)} | {"README.md": b"x"}
        hub.repositories["alice/both"] = {f"{name}/train-0.parquet": table(0, 9) for name in ("small", "large")}
        yield hub


def test_a_split_of_parquet_files_is_downloaded_once(hub, tmp_path):
    for downloads in (1, 1):
        source = open_source("hf:alice/tables:train", val_fraction=0.3)
        images = [sample.data for split in ("train", "val") for sample in source.samples(split, range(20))]
        assert sorted(images) == sorted(map(png, range(20)))
        assert sum("/resolve/" in line and line.startswith("GET") for line in hub.requests) == downloads
    assert {path.name for path in tmp_path.glob("data/raw/*/data/*")} == {"train-0.parquet"}
    with pytest.raises(ValueError, match=r"test-0\.parquet: row 0: label must be in \[0, 100000\), got -1$"):
        open_source("hf:alice/tables")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alice/nothing", "must be a data set of the Hub, with a connection to it, got: 404 "),
        ("", r"must be hf:OWNER/NAME\[@REVISION\]\[:SPLIT\]"),
        ("a/b/c", "must be a data set of the Hub, with a connection to it, got: Repo id must be"),
        ("alice/both", "must have parquet files of one configuration, got large, small; they are downloaded: name the"),
    ],
)
def test_what_cannot_be_read_is_one_line(hub, name, message, capsys):
    assert main(["data", "make", f"hf:{name}", "--out", "out"]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("maskgit data make: "))
    assert re.search(message, line)
