""""""

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from maskgit_pl import evaluation
from maskgit_pl.cli import main
from maskgit_pl.data import ShardData, ShardDataConfig, manifest
from maskgit_pl.data.images import encode_png
from maskgit_pl.data.sources.opening import open_source
from maskgit_pl.data.writer import make_shards
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation import classifier, evaluator, model_evaluation
from maskgit_pl.evaluation.ledger import Ledger, Row
from maskgit_pl.networks.feature_networks import load_classifier
from maskgit_pl.pipeline.pretrained import load_tokenizer, save_decoding
from tests.cli.commands import call_command
from tests.conftest import CLASSES, save_tiny_pretrained
from tests.observing import run_on_ranks


def call(*words: object) -> int:
    return call_command("evaluate", "--device", "cpu", "--features", "classifier", *words)


@pytest.mark.usefixtures("quick_judge")
@pytest.mark.parametrize("command", ["evaluate", "evaluate-tokenizer"])
def test_a_model_in_the_folder_of_the_classifier_is_kept(
    run_folder: Path, tiny_shards: Path, capsys, command: str
) -> None:
    folder = run_folder / "pretrained" / "transformer"
    before = {file: file.read_bytes() for file in folder.iterdir()}
    words = ["--data", tiny_shards, "--features", "classifier", "--classifier", folder, "--device", "cpu"]
    assert main([command, *map(str, [run_folder, *words, "--num-images", 12])]) == 2
    assert "must hold a classifier of these data" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.slow
@pytest.mark.usefixtures("quick_judge")
def test_writes_numbers_pictures_and_a_classifier(run_folder: Path, tiny_shards: Path, capsys) -> None:
    assert call(run_folder, "--data", tiny_shards, "--num-images", 12, "--num-steps", 4) == 0
    report = json.loads((run_folder / "evaluation.json").read_text())
    assert report["reconstruction"]["images"] == 24
    assert report["protocol"]["num_images"] == 12
    assert report["samples"]["without_guidance"]["fid/classifier"] > 0
    assert report["samples"]["exported_guidance"]["fid/classifier"] > 0
    assert report["likelihood"]["elbo_bits_per_token"] > 0
    assert report["classifier"]["real_images"] == 24
    assert report["real_against_real"]["images"] == 12
    assert (run_folder.parent / "shards-classifier" / "small" / "model.safetensors").is_file()
    for name in ("samples.png", "reconstructions.png"):
        with Image.open(run_folder / name) as picture:
            assert picture.width > 100
    with Image.open(run_folder / "decoding.gif") as animation:
        assert animation.n_frames == 4
    out = capsys.readouterr().out
    assert "class agreement" in out
    assert "FID (classifier)" in out
    assert report["limiting_stage"]["stage"] in ("tokenizer", "transformer", "neither")
    for said in (report["limiting_stage"]["text"], report["held_out"]["text"]):
        assert said in out
    assert out.index("FID (classifier)") < out.index("of reconstructions") < out.index("KID x 1000")


@pytest.mark.slow
@pytest.mark.usefixtures("quick_judge")
def test_the_steps_are_the_model_s_own_its_tuned_ones_where_there_are_any(run_folder: Path, tiny_shards: Path) -> None:
    for number in (4, 3):  # as exported; as tuned
        call(run_folder, "--data", tiny_shards, "--num-images", 6)
        protocol = json.loads((run_folder / "evaluation.json").read_text())["protocol"]
        assert (protocol["num_steps"], protocol["decoding"]["num_steps"]) == (number, number)
        save_decoding(run_folder / "pretrained", DecodingConfig(3, "halton"))
    assert protocol["decoding"]["token_selector"] == "halton"


@pytest.mark.slow
@pytest.mark.usefixtures("quick_judge")
def test_the_run_says_what_data_it_was_trained_on_and_numbers_repeat(run_folder: Path, tiny_shards: Path) -> None:
    (run_folder / "transformer").mkdir()
    (run_folder / "transformer" / "config.yaml").write_text(f"data:\n  path: {tiny_shards}\n")
    reports = []
    for name in ("first", "second"):
        call(run_folder, "--num-images", 6, "--num-steps", 2, "--out", run_folder / name / "numbers.json")
        reports.append(json.loads((run_folder / name / "numbers.json").read_text()))
    for report in reports:
        for samples in report["samples"].values():
            del samples["seconds_per_image"]
    assert reports[0] == reports[1]


@pytest.mark.slow
def test_an_evaluation_that_was_stopped_goes_on(
    run_folder: Path, tiny_shards: Path, judge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        run_folder,
        "--data",
        tiny_shards,
        "--num-images",
        6,
        "--num-steps",
        2,
        "--features",
        f"classifier={judge}",
    )

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluator.Evaluator, "measure_likelihood", stopped)
        with pytest.raises(KeyboardInterrupt):
            call(*words)
    ledger = run_folder / "evaluation" / "ledger.jsonl"
    kept = ledger.read_text()
    images = {file: file.stat().st_mtime_ns for file in (run_folder / "evaluation").glob("samples-*.npz")}
    # Those of the user, and those of a command that runs at the same time.
    others = [run_folder / "evaluation" / name for name in ("samples-50k.npz", "samples-0123456789abcdef.npz")]
    parts = [file.with_name(f"{file.name}.parts") / "0.npz" for file in others]
    for file in [*others, *parts]:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    assert not (run_folder / "evaluation.json").exists()
    call(*words, "--resume")
    assert ledger.read_text().startswith(kept)
    assert len(ledger.read_text().splitlines()) == len(kept.splitlines()) + 1  # the likelihood
    assert {file: file.stat().st_mtime_ns for file in images} == images
    resumed = json.loads((run_folder / "evaluation.json").read_text())
    call(*words)  # measures again
    assert all(file.is_file() for file in [*others, *parts])
    assert all(file.stat().st_mtime_ns > made for file, made in images.items())
    assert len(ledger.read_text().splitlines()) == 2 * (len(kept.splitlines()) + 1)  # nothing is lost
    again = json.loads((run_folder / "evaluation.json").read_text())
    for report in (resumed, again):
        for samples in report["samples"].values():
            samples.pop("seconds_per_image", None)
    assert resumed == again


@pytest.mark.slow
@pytest.mark.usefixtures("quick_judge")
def test_a_negative_model_is_named_in_the_report_and_changes_only_the_guided_images(
    run_folder: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    weaker = save_tiny_pretrained(tmp_path / "weaker", seed=0)
    words = (run_folder, "--data", tiny_shards, "--num-images", 6, "--num-steps", 2)
    reports = []
    for more in ((), ("--negative-model", weaker)):
        assert call(*words, *more) == 0
        reports.append(json.loads((run_folder / "evaluation.json").read_text()))
    assert "negative_model" not in reports[0]["protocol"]
    named = reports[1]["protocol"]["negative_model"]
    assert named["folder"] == str(weaker / "transformer")
    plain, guided = ({name: each["fid/classifier"] for name, each in report["samples"].items()} for report in reports)
    assert plain["without_guidance"] == guided["without_guidance"]
    # The negative model is the model itself: guidance by it is none.
    assert guided["exported_guidance"] == pytest.approx(guided["without_guidance"], rel=1e-4)


@pytest.mark.slow
def test_accepted_images_are_measured_beside_all_and_a_judge_that_chose_them_is_named(
    run_folder: Path, tiny_shards: Path, judge: Path, quick_judge, tmp_path: Path, capsys
) -> None:
    words = (run_folder, "--data", tiny_shards, "--num-images", 12, "--num-steps", 2, "--accept-rate", 0.5)
    assert call(*words) == 0
    report = json.loads((run_folder / "evaluation.json").read_text())
    assert list(report["samples"]) == ["exported_guidance", "without_guidance", "accepted"]
    accepted, others = report["samples"]["accepted"], report["samples"]["exported_guidance"]
    assert accepted["class_agreement"] >= others["class_agreement"]
    assert accepted["fid/classifier"] != others["fid/classifier"]
    assert {"precision/classifier", "recall/classifier", "diversity"} <= set(accepted)
    recorded = report["acceptance"]
    assert (recorded["accept_rate"], recorded["num_candidates"]) == (0.5, 24)
    assert recorded["also_judges"] == ["classifier"]
    out = " ".join(capsys.readouterr().out.split())
    assert "the best 50.0% of 24 candidates by classifier" in out
    assert "which also judges them" in out
    assert not list((run_folder / "evaluation").glob("*candidates*"))
    # Another classifier than the one that judges.
    other = tmp_path / "other"
    shutil.copytree(judge, other)
    weights = load_file(other / "model.safetensors")
    save_file({**weights, "head.bias": weights["head.bias"] + 0.1}, other / "model.safetensors")
    assert call(*words, "--accept-classifier", other) == 0
    report = json.loads((run_folder / "evaluation.json").read_text())
    assert report["acceptance"]["also_judges"] == []
    assert report["acceptance"]["classifier"] == str(other)
    assert "which also judges" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--accept-rate", 0), "--accept-rate must be a number in"),
        (("--accept-rate", 0.5, "--num-images", 13), "--num-images must be a multiple of 3"),
        (("--accept-classifier", "runs/x"), "--accept-classifier must be given with accept_rate"),
    ],
)
def test_refuses_an_acceptance_that_cannot_be(run_folder: Path, tiny_shards: Path, words, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(run_folder, "--data", tiny_shards, *words)
    assert not (run_folder / "evaluation").exists()


@pytest.mark.survival
@pytest.mark.slow
def test_two_ranks_write_the_numbers_of_one(run_folder: Path, tiny_shards: Path, judge: Path, tmp_path: Path) -> None:
    reports = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}" / "evaluation.json"
        words = [
            "evaluate", run_folder, "--data", tiny_shards, "--num-images", 300, "--features", f"classifier={judge}",
            "--device", "cpu", "--out", out,
        ]  # fmt: skip
        run_on_ranks(words, ranks)
        reports.append(json.loads(out.read_text()))
    for report in reports:
        del report["environment"]
        for samples in report["samples"].values():
            del samples["seconds_per_image"]
    assert reports[0] == reports[1]


def test_unknown_or_doubled_networks_are_refused_before_any_work(run_folder: Path, tiny_shards: Path) -> None:
    with pytest.raises(ValueError, match="unknown feature network 'clasifier'"):
        call(run_folder, "--data", tiny_shards, "--features", "clasifier")
    with pytest.raises(ValueError, match="must name each network once, got lite0 twice"):
        call(run_folder, "--data", tiny_shards, "--features", "lite0,classifier,lite0")
    with pytest.raises(ValueError, match="MASKGIT_INCEPTION"):
        call(run_folder, "--data", tiny_shards, "--features", f"inception={run_folder}/nowhere.pth")
    assert not (run_folder.parent / "shards-classifier").exists()


def test_missing_or_foreign_data_are_named(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="choose them with --data"):
        call(run_folder)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        call(run_folder, "--data", tmp_path / "nowhere")


def test_too_few_images_are_refused_before_any_work(run_folder: Path, tiny_shards: Path) -> None:
    with pytest.raises(ValueError, match=r"--num-images must be >= 6 \(2 per class\)"):
        call(run_folder, "--data", tiny_shards, "--num-images", 5)
    assert not (run_folder.parent / "shards-classifier").exists()


def call_compare(*words: object) -> int:
    return call_command("compare", *words, "--device", "cpu")


def ledger(folder: Path) -> list[Row]:
    """Returns the ledger rows of generated images, in the order of the file."""
    return [row for row in Ledger(folder / "ledger.jsonl").rows("samples") if row["run"]]


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "comparison.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.usefixtures("quick_judge")
@pytest.mark.slow
def test_measures_every_selector_and_a_second_run_measures_nothing(
    run_folder: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    words = (run_folder, "--data", tiny_shards, "--num-images", 6, "--num-steps", "2,3")
    assert call_compare(*words) == 0
    out, rows = run_folder / "comparison", ledger(run_folder / "evaluation")
    assert [row["num_steps"] for row in rows] == [2] * 12 + [3] * 12
    for row in rows:
        assert 0 <= row["class_agreement"] <= 1
        assert row["fid"] > 0
        assert row["num_images"] == 6
        assert row["decoding"]["guidance"] == {"name": "linear", "scale": 1.0}  # the model's own
    assert (out / "comparison.md").read_text().startswith("# Comparison of token selectors\n\n    maskgit compare ")
    assert {float(row["fid/classifier"]) for row in table(out)} == {row["fid"] for row in rows}
    assert len(table(out)) == 24
    with Image.open(out / "selectors.png") as picture:
        assert picture.height > 12 * 84
    assert "measured 24 rows, reused 0" in capsys.readouterr().out

    monkeypatch.setattr(evaluator, "generate_images", lambda *args, **options: pytest.fail("measured again"))
    assert call_compare(*words) == 0
    assert ledger(run_folder / "evaluation") == rows
    assert "measured 0 rows, reused 24" in capsys.readouterr().out


@pytest.mark.usefixtures("quick_judge")
@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_and_finds_what_an_unbroken_one_finds(
    run_folder: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (run_folder, "--data", tiny_shards, "--num-images", 6, "--num-steps", 2, "--guidance-scale", "0.5")
    words = (*words, "--selectors", "halton, {name: remdm, eta: 0.4}, random")
    call_compare(*words, "--out", run_folder / "whole")
    plain, left = evaluator.generate_images, [None]

    def stops(*args: object, **options: object) -> object:
        left.pop()  # the second call has none
        return plain(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "generate_images", stops)
        with pytest.raises(IndexError):
            call_compare(*words, "--out", run_folder / "broken")
    assert len(ledger(run_folder / "broken")) == 1
    call_compare(*words, "--out", run_folder / "broken")
    whole, broken = (ledger(run_folder / name) for name in ("whole", "broken"))
    for row in whole + broken:
        assert row.pop("seconds_per_image") > 0
        assert row["decoding"]["guidance"] == {"name": "linear", "scale": 0.5}
    assert [row["purpose"] for row in whole] == ["selector halton", "selector remdm (eta 0.4)", "selector random"]
    assert whole == broken
    assert {row["selector"] for row in table(run_folder / "broken")} == {"halton", "remdm (eta 0.4)", "random"}


@pytest.mark.usefixtures("quick_judge")
@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--num-steps", "4,17"), "--num-steps must be <= 16, the tokens per image, got 17"),
        (("--out", __file__), "--out must be a folder, got the file"),
        (("--num-steps", "4,0"), "must be numbers >= 1 and rising ranges, got '0'"),
        (("--num-steps", "many"), "--num-steps must be numbers such as 4,8,16"),
        (("--selectors", "halton,confidnce"), "did you mean 'confidence'"),
        (("--selectors", ","), "must have at least one name"),
        (("--selectors", "{name: remdm"), "a name or a mapping such as"),
        (("--selectors", "{name: remdm, strategy: lop}"), "did you mean 'loop'"),
        (("--selectors", "halton,halton"), "must be different, got halton twice"),
        (("--selectors", "4"), "must be names or mappings, got 4"),
        (("--guidance-scale", "-1"), "scale must be a number in [0, 10000], got -1.0"),
        (("--guidance", "{name: linear, scal: 1}"), "scal"),
        (("--num-images", "5"), "--num-images must be >= 6 (2 per class), got 5"),
        (("--batch-size", "0"), "--batch-size must be >= 1, got 0"),
        (("--data", "nowhere"), "no such folder"),
    ],
)
def test_wrong_input_ends_with_2_and_one_line_before_any_work(
    run_folder: Path, tiny_shards: Path, words: tuple[str, ...], match: str, capsys
) -> None:
    given = () if "--data" in words else ("--data", str(tiny_shards))
    assert main(["compare", str(run_folder), *given, *words, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert match in error
    assert error.count("\n") == 1
    assert not (run_folder.parent / "shards-classifier").exists()
    assert [path.name for path in run_folder.iterdir()] == ["pretrained"]


@pytest.mark.usefixtures("quick_judge")
@pytest.mark.slow
def test_numbers_of_steps_go_as_far_as_there_are_tokens(run_folder: Path, tiny_shards: Path) -> None:
    call_compare(run_folder, "--data", tiny_shards, "--num-images", 6, "--selectors", "halton")
    assert [row["num_steps"] for row in ledger(run_folder / "evaluation")] == [4, 8, 16]


def call_evaluate_tokenizer(judge: Path, *words: object) -> int:
    return call_command("evaluate-tokenizer", "--device", "cpu", "--features", f"classifier={judge}", *words)


def test_writes_all_numbers_a_page_a_picture_and_one_ledger_row(
    run_folder: Path, tiny_shards: Path, judge: Path, capsys
) -> None:
    assert call_evaluate_tokenizer(judge, run_folder, "--data", tiny_shards) == 0
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
    assert call_evaluate_tokenizer(judge, folder, "--data", tiny_shards, "--num-images", 10, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["protocol"]["num_images"] == 10
    assert (run_folder / "tokenizer.json").is_file()


def test_tiles_of_the_image_size_change_nothing_for_images_of_that_size(
    run_folder: Path, tiny_shards: Path, judge: Path, tmp_path: Path
) -> None:
    found = []
    for name, words in (("plain", ()), ("tile", ("--tile", 8))):
        call_evaluate_tokenizer(judge, run_folder, "--data", tiny_shards, "--out", tmp_path / f"{name}.json", *words)
        numbers = json.loads((tmp_path / f"{name}.json").read_text())["numbers"]
        found.append(
            {key: value for key, value in numbers.items() if key not in ("images_per_second", "peak_memory_mb")}
        )
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)


def test_bfloat16_measures_other_numbers_in_a_row_of_its_own(run_folder: Path, tiny_shards: Path, judge: Path) -> None:
    found = []
    for dtype in ("float32", "bfloat16"):
        call_evaluate_tokenizer(judge, run_folder, "--data", tiny_shards, "--dtype", dtype)
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
    assert (
        call_evaluate_tokenizer(judge, run_folder, "--data", tmp_path / "wide", "--tile", 8, "--tile-overlap", 2) == 0
    )
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
            call_evaluate_tokenizer(judge, *words)
    assert not (run_folder / "evaluation").exists()
    config = colour / "tokenizer" / "config.json"
    config.write_text(config.read_text().replace('"image_size": 8', '"image_size": 16'))
    with pytest.raises(ValueError, match="must have >= 16 x 16 pixels, those of the tokenizer, got 8 x 8"):
        call_evaluate_tokenizer(judge, colour, "--data", tiny_shards)


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
            call_evaluate_tokenizer(judge, run_folder, "--data", tiny_shards)
        file.unlink()
        file.mkdir()
        with pytest.raises(ValueError, match=r"ledger"):
            call_evaluate_tokenizer(judge, run_folder, "--data", tiny_shards)
    file.rmdir()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("maskgit_pl.evaluation.ledger.Ledger.add", full)
    with pytest.raises(OSError, match="no space left"):
        call_evaluate_tokenizer(judge, run_folder, "--data", tiny_shards)
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


def call_train_classifier(data: Path, *words: str) -> int:
    return main(["train-classifier", "--data", str(data), "--device", "cpu", *words])


@pytest.mark.slow
def test_it_trains_once_and_says_how_good_it_is(tiny_shards, tmp_path, capsys):
    words = ("--out", str(tmp_path / "judge"), "--max-steps", "80", "--batch-size", "20", "--seed", "1")
    assert call_train_classifier(tiny_shards, *words) == 0
    first = capsys.readouterr().out
    assert "judge: trained; on 24 real val images:" in first
    assert "top-1" in first
    found = load_classifier(tmp_path / "judge")
    assert found.class_names == CLASSES
    assert found.network.sizes.image_size == 8
    kept = (tmp_path / "judge" / "model.safetensors").stat().st_mtime_ns
    assert call_train_classifier(tiny_shards, *words) == 0
    second = capsys.readouterr().out
    assert "reused" in second
    assert second.splitlines()[-1] == first.splitlines()[-1]
    assert (tmp_path / "judge" / "model.safetensors").stat().st_mtime_ns == kept


@pytest.mark.slow
def test_a_network_of_timm_goes_where_the_data_say(tiny_shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(classifier, "available_cores", lambda: 1)
    assert (
        call_train_classifier(
            tiny_shards, "--model", "resnet10t", "--max-steps", "2", "--batch-size", "4", "--image-size", "16"
        )
        == 0
    )
    assert (tmp_path / "runs" / "shards-classifier" / "resnet10t" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "resnt18"), "did you mean"),
        (("--max-steps", "0"), "--max-steps must be an integer in [1, inf), got 0"),
        (("--batch-size", "1"), "--batch-size must be an integer in [2, inf), got 1"),
        (("--learning-rate", "0"), "--learning-rate must be a number in (0, inf), got 0"),
        (("--learning-rate", "nan"), "--learning-rate must be a finite number in (0, inf), got nan"),
        (("--flip-probability", "2"), "--flip-probability must be a number in [0, 1], got 2"),
        (("--image-size", "0"), "--image-size must be an integer in [1, inf), got 0"),
        (("--num-workers", "-1"), "--num-workers must be an integer in [0, inf), got -1"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_line(tiny_shards, capsys, words, said):
    assert call_train_classifier(tiny_shards, *words) == 2
    assert said in capsys.readouterr().err


def test_a_folder_of_another_network_or_that_cannot_be_written_is_refused(
    tiny_shards, tiny_pretrained, tmp_path, capsys
):
    copy = Path(shutil.copytree(tiny_pretrained / "transformer", tmp_path / "copy"))
    (tmp_path / "file").touch()
    before = {file: file.read_bytes() for file in copy.iterdir()}
    for out, said in (
        (copy, "config.json is not of a classifier; name another"),
        (tmp_path / "file", "--out must be a fold"),
    ):
        assert call_train_classifier(tiny_shards, "--out", str(out), "--max-steps", "2") == 2
        assert said in capsys.readouterr().err
    assert {file: file.read_bytes() for file in copy.iterdir()} == before


def test_data_that_are_not_there_are_said(tmp_path, capsys):
    assert call_train_classifier(tmp_path / "none") == 2
    assert "none" in capsys.readouterr().err


def test_images_of_several_sizes_need_one(tiny_shards, monkeypatch, capsys):
    varied = manifest.ImageRange((8, 12), (8, 20), (1,))
    plain = manifest.read_manifest_summary(tiny_shards)
    monkeypatch.setattr(model_evaluation, "read_manifest_summary", lambda folder: replace(plain, images=varied))
    assert call_train_classifier(tiny_shards) == 2
    assert "--image-size must be given for data" in capsys.readouterr().err
