"""The example that does everything from Python runs as a user would run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from maskgit_pl.data.images import encode_png
from maskgit_pl.data.sources.making import open_source
from maskgit_pl.data.writer import make_shards
from maskgit_pl.evaluation.ledger import FILE_NAME, Ledger

REPOSITORY = Path(__file__).parents[1]
EXAMPLE = REPOSITORY / "docs" / "from_python.py"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Writes grey 28 px images of two classes that differ in brightness."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 32), ("val", 16)):
        for label, low in enumerate((0, 128)):
            folder = tmp_path / "images" / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                image = torch.randint(low, low + 127, (1, 28, 28), dtype=torch.uint8, generator=generator)
                (folder / f"{number}.png").write_bytes(encode_png(image))
    make_shards(open_source(tmp_path / "images"), tmp_path / "shards")
    return tmp_path / "shards"


@pytest.mark.slow  # 40 s
@pytest.mark.trainings
def test_one_short_script_checks_trains_evaluates_tunes_and_writes_table_1(shards, tmp_path):
    assert len(EXAMPLE.read_text().splitlines()) <= 60
    assert "argparse" not in EXAMPLE.read_text()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, EXAMPLE, shards], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs" / "notebook"
    for stage in ("tokenizer", "transformer"):
        assert (run / "pretrained" / stage / "model.safetensors").is_file()
    with Image.open(tmp_path / "image.png") as image:
        assert image.size == (28, 28)
    measured = Ledger(run / "evaluation" / FILE_NAME).rows("samples")
    assert len([row for row in measured if row["model"] == "MaskGIT"]) >= 3  # evaluated, and each trial of the search
    table = (tmp_path / "results" / "shards" / "table-1.md").read_text()
    assert "| MaskGIT | `notebook` |" in table
    assert table.strip() in done.stdout
