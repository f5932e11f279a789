"""The README's Python, run as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.networks.transformer import MaskedTransformer, TransformerConfig
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.pretrained import fingerprint, save_tokenizer, save_transformer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "pipe" in block]
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def save_small_model(folder: Path) -> None:
    """Random weights in the sizes of the default data: 28 px, 7 x 7 tokens, its ten classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vqgan = VQGANConfig(
            1,
            base_channels=8,
            channel_multipliers=(1, 1, 1),
            num_res_blocks=1,
            num_groups=2,
            codebook_size=16,
            code_dim=4,
        )
        tokenizer = VQGAN(vqgan)
        config = TransformerConfig(16, 10, (7, 7), 16, 1, 2, 32)
        transformer = MaskedTransformer(config)
    save_tokenizer(folder / "tokenizer", vqgan, tokenizer.state_dict(), image_size=28)
    save_transformer(
        folder / "transformer",
        config,
        transformer.state_dict(),
        mask_schedule="cosine",
        decoding=DecodingConfig(),
        class_names=CLASSES,
        tokenizer_fingerprint=fingerprint(folder / "tokenizer"),
    )


def test_the_first_example_takes_three_lines():
    lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(lines) == 3
    assert ".generate(" in lines[-1]


@pytest.mark.slow
def test_the_examples_run_one_after_the_other(tmp_path: Path):
    save_small_model(tmp_path / "runs/fashion-mnist-cosine/pretrained")
    code = "\n".join(BLOCKS)
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    for name in re.findall(r'save\("(\S+\.png)"\)', code):
        with Image.open(tmp_path / name) as picture:
            assert picture.height == 28, name


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_the_examples_name_the_demos_run(block: str):
    for path in re.findall(r'"(runs/[^"]+)"', block):
        assert path == "runs/fashion-mnist-cosine"


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_paper_s_tables_are_those_of_the_results():
    pages = "\n".join(page.read_text() for page in (ROOT / "results").rglob("*.md"))
    rows = [line for line in section("Measured as the paper does").splitlines() if line.startswith("|")]
    assert len(rows) > 10
    for row in rows:
        assert row in pages, "print it again with the command above it"


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#:]+)\)", README))
def test_what_the_readme_links_to_is_there(path: str):
    assert (ROOT / path).exists()
