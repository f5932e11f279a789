import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from maskgit_pl.data import ShardData, ShardDataConfig
from maskgit_pl.evaluation import TokenizerOptions, classifier, evaluate_tokenizer
from maskgit_pl.evaluation.ledger import Ledger
from maskgit_pl.evaluation.options import ClassifierConfig
from maskgit_pl.pipeline.pretrained import load_tokenizer


@pytest.fixture
def run(tiny_pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of its own, whose classifier is trained for a moment."""
    shutil.copytree(tiny_pretrained, tmp_path / "run" / "pretrained")
    monkeypatch.setattr(classifier, "SMALL_TRAINING", ClassifierConfig(width=4, max_steps=3, batch=20))
    return tmp_path / "run"


def test_all_numbers_are_those_of_the_images_measured_by_hand(run: Path, tiny_shards: Path) -> None:
    report = evaluate_tokenizer(run, data=tiny_shards, options=TokenizerOptions(device="cpu", batch_size=7))
    content = json.loads((run / "tokenizer.json").read_text())
    assert content == report.content
    numbers = content["numbers"]
    data = ShardData(ShardDataConfig(str(tiny_shards), image_size=8, in_channels=1))
    data.setup()
    tokenizer = load_tokenizer(run / "pretrained" / "tokenizer")
    pixels = torch.cat([batch.content[batch.valid] for batch in data.val_dataloader()])
    tokens = tokenizer.encode(pixels)
    decoded = tokenizer.network.decode(tokens, tokenizer.grid).clamp(0, 1)
    errors = (decoded - pixels / 255).double().square().flatten(1).mean(1)
    assert numbers["psnr_db"] == pytest.approx(-10 * math.log10(errors.mean()), rel=1e-4)
    assert numbers["mean_psnr_db"] == pytest.approx(float(-10 * errors.log10().mean()), rel=1e-4)
    shares = tokens.flatten().bincount(minlength=16) / tokens.numel()
    assert numbers["bits_per_pixel"] == pytest.approx(16 * 4 / 64)  # 16 tokens of 4 bits, 64 pixels
    entropy = float(torch.special.entr(shares).sum()) / math.log(2)
    assert numbers["coded_bits_per_pixel"] == pytest.approx(entropy * 16 / 64, rel=1e-4)
    assert numbers["codebook_usage"] == pytest.approx(float((shares > 0).float().mean()))
    assert {"rfid/classifier", "rfid_floor/classifier", "rkid/classifier", "rkid_floor/classifier"} <= numbers.keys()
    assert numbers["images_per_second"] > 0
    assert content["protocol"]["num_images"] == content["held_out"]["images"] == 24
    assert list(content["psnr_db_per_class"]) == ["Ankle boot", "T-shirt", "Trouser"]
    assert sum(content["psnr_db_per_class"].values()) / 3 == pytest.approx(numbers["mean_psnr_db"], rel=1e-4)
    worst = [each["psnr_db"] for each in content["worst"]]
    assert worst == pytest.approx((-10 * errors.log10()).sort().values[:8].tolist(), rel=1e-4)
    (row,) = Ledger(run / "evaluation" / "ledger.jsonl").rows("tokenizer")
    assert row["numbers"] == numbers


def test_the_report_has_a_page_a_picture_and_a_table(run: Path, tiny_shards: Path) -> None:
    options = TokenizerOptions(device="cpu", num_images=30)  # of 24
    report = evaluate_tokenizer(run, data=tiny_shards, options=options, out=run / "other" / "a.json")
    assert report.content["protocol"]["num_images"] == 24
    assert {path.name for path in (run / "other").iterdir()} == {"a.json", "a.md", "a-worst.png"}
    page = (run / "other" / "a.md").read_text()
    for text in ("| mean PSNR, dB |", "reconstruction FID (classifier)", "Trouser", "a-worst.png"):
        assert text in page
    with Image.open(report.picture) as picture:
        assert picture.height > 50
    assert len(report.table().rows) == len(report.content["numbers"]) - 2  # the floors stand beside their metrics


def test_bfloat16_measures_other_numbers_in_a_row_of_its_own(run: Path, tiny_shards: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        evaluate_tokenizer(run, data=tiny_shards, options=TokenizerOptions(device="cpu", dtype=dtype), features=())
    plain, rounded = Ledger(run / "evaluation" / "ledger.jsonl").rows("tokenizer")
    assert [plain["settings"]["dtype"], rounded["settings"]["dtype"]] == ["float32", "bfloat16"]
    assert plain["numbers"]["psnr_db"] != rounded["numbers"]["psnr_db"]
    assert plain["numbers"]["psnr_db"] == pytest.approx(rounded["numbers"]["psnr_db"], abs=0.5)


def test_a_report_is_written_even_if_the_ledger_cannot_take_the_row(
    run: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "evaluation" / "ledger.jsonl").mkdir(parents=True)
    with pytest.raises(ValueError, match="ledger"):
        evaluate_tokenizer(run, data=tiny_shards)
    assert not (run.parent / "shards-classifier").exists()  # found before any work
    (run / "evaluation" / "ledger.jsonl").rmdir()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Ledger, "add", full)
    with pytest.raises(OSError, match="no space left"):
        evaluate_tokenizer(run, data=tiny_shards, features=())
    assert (run / "tokenizer.json").is_file()
