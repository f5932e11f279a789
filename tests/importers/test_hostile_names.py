"""No name in a checkpoint controls the terminal on which the report of an import is printed."""

import pytest
import torch

from maskgit_pl.cli import main
from tests.importers.test_taming import reference, save
from tests.importers.test_transformers import SMALL, Halton, randomise, save_checkpoint
from tests.importers.test_transformers import tokenizer as tokenizer  # a fixture


@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_names_of_other_entries_are_printable_and_few(stage, tokenizer, tmp_path, capsys):
    beside = {"\x1b]0;title\x07\n": 1, "x" * 10_000: 1, **{f"entry {number}": 1 for number in range(1000)}}
    if stage == "tokenizer":
        file = save(reference("taming"), tmp_path / "a.ckpt", **beside)
        more = ["--image-size", "16"]
    else:
        content = torch.load(save_checkpoint(randomise(Halton(**SMALL)), tmp_path / "a.pth"), weights_only=True)
        torch.save({**content, **beside}, file := tmp_path / "b.pth")
        more = ["--tokenizer", str(tokenizer()), "--num-heads", "4"]
    assert main([f"import-{stage}", str(file), "--out", str(tmp_path / "out"), *more]) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("  ignored "))
    assert said.replace("\n", "").isprintable()
    assert r"\x1b]0;title\x07\n" in line
    assert " more" in line
    assert len(line) < 1000
