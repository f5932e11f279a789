"""The Python blocks of the pages run as printed: all blocks of a page in order, in one process and one folder.

A block that needs what a test does not have follows a comment with the reason, ``<!-- not run: REASON -->``.
``tests/test_readme.py`` compiles every block.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import forked
from tests.test_readme import PAGES, ROOT, python_blocks

DEMO = ROOT / "maskgit_pl/models/fashion-mnist-demo"
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?^```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
EXPORT = """
from maskgit_pl.cli import main
assert main(["export", "fashion-mnist-demo", "--format=onnx", "--out=exported"]) == 0
"""
CLIPS = """
import gzip, os
import numpy as np
os.makedirs("data/raw/fashion-mnist")
for split in ("train", "t10k"):
    with gzip.open(f"data/raw/fashion-mnist/{split}-images-idx3-ubyte.gz", "wb") as file:
        file.write(bytes(16 + 8 * 28 * 28))
np.save("continued.npy", np.zeros((24, 4, 7, 7), np.uint8))
"""
BEFORE = {"docs/export.md": EXPORT, "docs/own-tokens.md": CLIPS}  # what a page takes for granted
FILES = {  # what the blocks of a page write
    "README.md": ["shirt.png"],
    "docs/index.md": ["shirt.png"],
    "docs/export.md": ["generated.png"],
    "docs/generation.md": ["shirt.png", "reconstruction.png", "folder/config.json"],
    "docs/own-tokens.md": ["clips.npy", "directions.npy", "known.npy", "clips.gif"],
    "docs/python.md": ["first.png", "my-model/transformer/model.safetensors"],
}


def blocks_of(page: str) -> list[tuple[str | None, str]]:
    """Returns the reason for which a block is not run, or None, and the code of each block."""
    return [(found["reason"], found["code"]) for found in BLOCK.finditer((ROOT / page).read_text())]


BLOCKS = {page: blocks_of(page) for page in PAGES if python_blocks(page)}
RUN = {page: [code for reason, code in blocks if reason is None] for page, blocks in BLOCKS.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The demo's model as three runs, and a folder of pictures."""
    for name in ("fashion-mnist-adaln/pretrained", "fashion-mnist-adaln/early", "fashion-mnist-cosine/pretrained"):
        (tmp_path / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / name).symlink_to(DEMO)
    for number in range(24):
        file = tmp_path / "photos" / ("cat", "dog")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (40, 36, 3), np.uint8)).save(file)
    return tmp_path


def test_every_block_is_run_or_says_why_not():
    assert {page: len(blocks) for page, blocks in BLOCKS.items()} == {page: len(python_blocks(page)) for page in BLOCKS}
    assert sum(map(len, RUN.values())) >= 20
    left_out = [reason for blocks in BLOCKS.values() for reason, _ in blocks if reason]
    assert len(left_out) <= 8
    for reason in left_out:
        for file in re.findall(r"(?:docs|tests)/[\w/]+\.py", reason):
            assert (ROOT / file).is_file(), reason


@pytest.mark.slow
@pytest.mark.trainings
@pytest.mark.parametrize("page", [page for page, blocks in RUN.items() if blocks])
def test_the_blocks_of_a_page_run(page: str, folder: Path):
    if page == "docs/export.md":
        pytest.importorskip("onnxruntime")
    code = BEFORE.get(page, "") + "\n".join(RUN[page])
    done = forked.run(code, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert [file for file in FILES.get(page, ()) if not (folder / file).is_file()] == []
