import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from maskgit_pl.data.manifest import read_manifest_summary
from maskgit_pl.evaluation.model_evaluation import describe_limit, find_limiting_stage, next_commands
from maskgit_pl.evaluation.run_folders import describe_held_out


@pytest.mark.parametrize(
    ("fid", "reconstruction_fid", "real_fid", "stage"),
    [
        (0.63, 0.55, 0.11, "tokenizer"),  # of the demo
        (1.44, 0.55, 0.11, "transformer"),
        (1.0, 0.5, 0.1, "transformer"),  # half of it is not more than half
        (0.15, 0.14, 0.1, "neither"),
        (0.2, 0.3, 0.1, "tokenizer"),  # generated images may be better than reconstructions
    ],
)
def test_the_stage_that_most_of_the_fid_comes_from(
    fid: float, reconstruction_fid: float, real_fid: float, stage: str
) -> None:
    assert find_limiting_stage(fid, reconstruction_fid, real_fid) == stage


def report(*, rfid: float | None = 0.55, codebook_usage: float = 1.0) -> dict[str, Any]:
    return {
        "protocol": {"features": {"classifier": {}, "lite0": {}}},
        "reconstruction": {"codebook_usage": codebook_usage, **({} if rfid is None else {"rfid/classifier": rfid})},
        "samples": {"exported_guidance": {"fid/classifier": 0.64}},
        "real_against_real": {"fid/classifier": 0.1},
        "likelihood": {"elbo_bits_per_token": 5.15},
        "model": {"codebook_size": 256},
    }


def make_run(folder: Path, recipe: str) -> Path:
    for stage in ("tokenizer", "transformer"):
        (folder / stage).mkdir(parents=True)
        (folder / stage / "config.yaml").write_text(yaml.safe_dump({"trainer": {"max_steps": 850}}))
        record = {"recipe": recipe.split(), "dataset": "mine", "data": "data/shards/mine"}
        (folder / stage / "environment.json").write_text(json.dumps(record))
    return folder


def test_bits_stand_beside_those_of_a_uniform_guess_with_or_without_a_reconstruction_fid(tmp_path: Path) -> None:
    known, unknown = (describe_limit(report(rfid=rfid), tmp_path) for rfid in (0.55, None))
    assert known["stage"] == "tokenizer"
    assert known["reconstruction_share"] == pytest.approx(0.55 / 0.64)
    assert (known["bits_per_token"], known["uniform_bits_per_token"]) == (5.15, 8)
    assert known["commands"] == []  # the folder records no training
    assert "stage" not in unknown
    assert unknown["text"] == "The transformer needs 5.15 bits per val token, a uniform guess 8.00."


def test_the_commands_repeat_the_recipe_with_more(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine-adaln", "adaln 15m")
    of_run = "--dataset mine --recipe 'adaln 15m' --run mine-adaln-more"
    assert next_commands("tokenizer", run, report()) == [
        f"maskgit train tokenizer {of_run} --model.network.codebook_size=1024",
        f"maskgit tokenize {of_run}",
        f"maskgit train transformer {of_run}",
    ]
    longer = f"--dataset mine --recipe 'adaln 1h' --run mine-adaln-more --tokenizer {run}/pretrained/tokenizer"
    assert next_commands("transformer", run, report()) == [
        f"maskgit tokenize {longer}",
        f"maskgit train transformer {longer}",
    ]
    assert next_commands("neither", run, report()) == []


def test_after_an_hour_or_with_unused_codes_there_are_more_steps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "1h")
    unused = report(codebook_usage=0.5)
    for stage, content in (("transformer", report()), ("tokenizer", unused)):
        assert next_commands(stage, run, content)[0].endswith(" --trainer.max_steps=1700")


def test_words_of_a_stranger_are_quoted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "$(rm -rf x)\x1b")
    for command in next_commands("transformer", run, report()):
        assert r"--recipe '$(rm -rf x)\x1b 1h'" in command


@pytest.mark.parametrize(
    ("record", "source", "said"),
    [
        ({"source": {"kind": "idx"}}, "idx", "the official test set"),
        ({"source": {"kind": "image folder"}}, "image folder", "about a tenth"),
        ({"source": "odd"}, "unknown", "maskgit_pl did not choose"),
        (None, "unknown", "--data"),
    ],
)
def test_the_split_that_judges_is_named(tiny_shards: Path, tmp_path: Path, record: Any, source: str, said: str) -> None:
    if record is not None:
        (tmp_path / "made_from.json").write_text(json.dumps(record))
    found = describe_held_out(tmp_path, read_manifest_summary(tiny_shards))
    assert (found["images"], found["source"]) == (24, source)
    assert found["text"].startswith("Held out: 24 images of the val split (29% of the data)")
    assert said in found["text"]
