"""The functions that make a data folder: each option has its effect, and a second call does nothing."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskgit_pl.data.folders import hold_lock
from maskgit_pl.data.manifest import load_manifest, read_manifest_summary
from maskgit_pl.data.sources.making import convert_images, fetch_dataset


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


def test_a_folder_that_another_process_makes_is_not_touched(photos, tmp_path):
    with (
        hold_lock(tmp_path / "out", hint="wait"),
        pytest.raises(ValueError, match=r"is in use by .*give another --out$"),
    ):
        convert_images(photos, tmp_path / "out", label_field="kind")
    assert not (tmp_path / "out").exists()


def test_a_data_set_that_there_is_not_is_named():
    with pytest.raises(ValueError, match="NAME must be one of fashion-mnist"):
        fetch_dataset("fashion")
