import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from maskgit_pl import evaluation
from maskgit_pl.data import ShardData, ShardDataConfig
from maskgit_pl.data.images import encode_png
from maskgit_pl.data.sources.opening import open_source
from maskgit_pl.data.writer import make_shards
from maskgit_pl.evaluation.ledger import Ledger
from maskgit_pl.pipeline.pretrained import load_tokenizer
from tests.cli.commands import call_command
from tests.conftest import save_tiny_pretrained


def call(judge: Path, *words: object) -> int:
    return call_command("evaluate-tokenizer", "--device", "cpu", "--features", f"classifier={judge}", *words)


def test_writes_all_numbers_a_page_a_picture_and_one_ledger_row(
    run_folder: Path, tiny_shards: Path, judge: Path, capsys
) -> None:
    assert call(judge, run_folder, "--data", tiny_shards) == 0
    content = json.loads((run_folder / "tokenizer.json").read_text())
    numbers = content["numbers"]
    # The same images by hand.
    data = ShardData(ShardDataConfig(str(tiny_shards), image_size=8, in_channels=1))
    data.setup()
    tokenizer = load_tokenizer(run_folder / "pretrained" / "tokenizer")
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
    order = [each["psnr_db"] for each in content["worst"]]
    assert order == sorted(order)
    assert order[0] == pytest.approx(-10 * math.log10(errors.max()), rel=1e-4)
    with Image.open(run_folder / "tokenizer-worst.png") as picture:
        assert picture.height > 50
    page = (run_folder / "tokenizer.md").read_text()
    for text in ("| mean PSNR, dB |", "reconstruction FID (classifier)", "Trouser", "tokenizer-worst.png"):
        assert text in page
    (row,) = Ledger(run_folder / "evaluation" / "ledger.jsonl").rows("tokenizer")
    assert row["numbers"] == numbers
    assert "reconstruction FID (classifier)" in capsys.readouterr().out


def test_an_exported_tokenizer_needs_no_transformer_and_prints_json(
    run_folder: Path, tiny_shards: Path, judge: Path, capsys
) -> None:
    shutil.rmtree(run_folder / "pretrained" / "transformer")
    folder = run_folder / "pretrained" / "tokenizer"
    assert call(judge, folder, "--data", tiny_shards, "--num-images", 10, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["protocol"]["num_images"] == 10
    assert (run_folder / "tokenizer.json").is_file()


def test_tiles_of_the_image_size_change_nothing_for_images_of_that_size(
    run_folder: Path, tiny_shards: Path, judge: Path, tmp_path: Path
) -> None:
    found = []
    for name, words in (("plain", ()), ("tile", ("--tile", 8))):
        call(judge, run_folder, "--data", tiny_shards, "--out", tmp_path / f"{name}.json", *words)
        numbers = json.loads((tmp_path / f"{name}.json").read_text())["numbers"]
        found.append(
            {key: value for key, value in numbers.items() if key not in ("images_per_second", "peak_memory_mb")}
        )
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)


def test_bfloat16_measures_other_numbers_in_a_row_of_its_own(run_folder: Path, tiny_shards: Path, judge: Path) -> None:
    found = []
    for dtype in ("float32", "bfloat16"):
        call(judge, run_folder, "--data", tiny_shards, "--dtype", dtype)
        content = json.loads((run_folder / "tokenizer.json").read_text())
        assert content["protocol"]["dtype"] == dtype
        found.append(content["numbers"]["psnr_db"])
    assert found[0] != found[1]
    assert found[0] == pytest.approx(found[1], abs=0.5)
    plain, rounded = Ledger(run_folder / "evaluation" / "ledger.jsonl").rows("tokenizer")
    assert rounded["settings"] == {**plain["settings"], "dtype": "bfloat16"}
    assert plain["settings"]["dtype"] == "float32"


def test_larger_images_that_are_not_square_keep_their_size_in_tiles(
    run_folder: Path, judge: Path, tmp_path: Path
) -> None:
    for split, count in (("train", 4), ("val", 6)):
        (tmp_path / "images" / split / "Bag").mkdir(parents=True)
        for number in range(count):
            pixels = torch.randint(0, 256, (1, 12, 20 + number), dtype=torch.uint8)
            (tmp_path / "images" / split / "Bag" / f"{number}.png").write_bytes(encode_png(pixels))
    make_shards(open_source(tmp_path / "images"), tmp_path / "wide")
    assert call(judge, run_folder, "--data", tmp_path / "wide", "--tile", 8, "--tile-overlap", 2) == 0
    content = json.loads((run_folder / "tokenizer.json").read_text())
    assert content["protocol"]["tile_overlap"] == 2
    assert content["numbers"]["bits_per_pixel"] > 1  # overlapping tiles cost more than 4 bits of 4 pixels
    assert content["numbers"]["ssim"] < 1


def test_what_is_wrong_is_answered_before_any_work(
    run_folder: Path, tiny_shards: Path, judge: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    colour = save_tiny_pretrained(tmp_path / "colour", in_channels=3)
    for words, error, message in (
        ((tmp_path / "nowhere",), FileNotFoundError, "nowhere: no such folder"),
        ((tmp_path / "empty",), FileNotFoundError, "no tokenizer there; `maskgit train tokenizer`"),
        ((run_folder,), FileNotFoundError, "choose them with --data"),
        ((run_folder, "--data", tmp_path / "no"), FileNotFoundError, "no: no such folder"),
        ((run_folder, "--data", tiny_shards, "--num-images", 25), ValueError, "must have >= 25 images, got 24"),
        ((run_folder, "--data", tiny_shards, "--num-images", 3), ValueError, "--num-images must be >= 4, got 3"),
        (
            (run_folder, "--data", tiny_shards, "--tile-overlap", 3),
            ValueError,
            "--tile-overlap must be given with tile",
        ),
        ((run_folder, "--data", tiny_shards, "--tile", 8, "--tile-overlap", 8), ValueError, "--tile-overlap must be"),
        ((run_folder, "--data", tiny_shards, "--out", "x.txt"), ValueError, "--out must end in .json"),
    ):
        with pytest.raises(error, match=message):
            call(judge, *words)
    assert not (run_folder / "evaluation").exists()
    config = colour / "tokenizer" / "config.json"
    config.write_text(config.read_text().replace('"image_size": 8', '"image_size": 16'))
    with pytest.raises(ValueError, match="must have >= 16 x 16 pixels, those of the tokenizer, got 8 x 8"):
        call(judge, colour, "--data", tiny_shards)


def test_a_ledger_that_cannot_take_the_row_is_found_before_and_loses_no_report(
    run_folder: Path, tiny_shards: Path, judge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = run_folder / "evaluation" / "ledger.jsonl"
    file.parent.mkdir()
    file.write_text("{\n")
    module = "maskgit_pl.evaluation.tokenizer_measurement.measure_tokenizer"
    with monkeypatch.context() as patch:
        patch.setattr(module, lambda *_, **__: pytest.fail("measured"))
        with pytest.raises(ValueError, match=r"ledger\.jsonl: line 1 .*remove the line"):
            call(judge, run_folder, "--data", tiny_shards)
        file.unlink()
        file.mkdir()
        with pytest.raises(ValueError, match=r"ledger"):
            call(judge, run_folder, "--data", tiny_shards)
    file.rmdir()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("maskgit_pl.evaluation.ledger.Ledger.add", full)
    with pytest.raises(OSError, match="no space left"):
        call(judge, run_folder, "--data", tiny_shards)
    assert (run_folder / "tokenizer.json").is_file()


def test_the_table_measures_each_tokenizer_once_and_writes_a_row_for_each(
    tiny_shards: Path, judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [save_tiny_pretrained(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two"))]
    words = ["tokenizers", *runs, "--data", tiny_shards, "--device", "cpu", "--features", f"classifier={judge}"]
    words += ["--results", tmp_path / "results", "--num-images", 12]
    assert call_command("table", *words) == 0
    folder = tmp_path / "results" / "shards"
    page = (folder / "tokenizers.md").read_text()
    assert page.count("4 x 4 of 16") == 2
    assert "| `one` |" in page
    rows = list(csv.DictReader((folder / "tokenizers.csv").read_text().splitlines()))
    assert [row["run"] for row in rows] == ["one", "two"]
    assert rows[0]["psnr_db"] != rows[1]["psnr_db"]
    module = "maskgit_pl.evaluation.reports.tokenizer_table.measure_tokenizer"
    monkeypatch.setattr(module, lambda *_, **__: pytest.fail("measured again"))
    assert call_command("table", *words) == 0
    assert (folder / "tokenizers.md").read_text() == page


@pytest.mark.slow
def test_a_trained_run_is_measured_without_its_transformer(tiny_shards: Path, judge: Path, tmp_path: Path) -> None:
    import yaml

    from maskgit_pl.cli import main
    from tests.conftest import flags

    tiny = yaml.safe_load((Path(__file__).parents[1] / "tiny" / "tokenizer.yaml").read_text())
    words = ["train", "tokenizer", "--data", str(tiny_shards), "--runs-folder", str(tmp_path / "runs"), "--run", "x"]
    assert main([*words, *flags(tiny)]) == 0
    run = tmp_path / "runs" / "x"
    report = evaluation.evaluate_tokenizer(
        run, features=[f"classifier={judge}"], options=evaluation.TokenizerOptions(device="cpu")
    )
    assert report.file == run / "tokenizer.json"  # the run records its data
    assert report.content["numbers"]["psnr_db"] > 0
