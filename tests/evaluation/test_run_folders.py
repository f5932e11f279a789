from pathlib import Path

import pytest

from maskgit_pl.data import ShardData, ShardDataConfig
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.run_folders import (
    check_data,
    check_model_decoding,
    default_steps,
    find_run,
    open_data,
    round_to_classes,
)
from maskgit_pl.pipeline import MaskGIT
from tests.conftest import save_tiny_pretrained


@pytest.fixture(scope="module")
def pipe(tiny_pretrained: Path) -> MaskGIT:
    return MaskGIT.from_pretrained(tiny_pretrained)


def test_a_run_records_its_data(tmp_path: Path, tiny_shards: Path) -> None:
    save_tiny_pretrained(tmp_path / "run" / "pretrained")
    with pytest.raises(FileNotFoundError, match="choose them with --data"):
        find_run(tmp_path / "run")
    config = tmp_path / "run" / "transformer" / "config.yaml"
    config.parent.mkdir()
    config.write_text(f"data:\n  path: {tiny_shards}\n")
    found = find_run(tmp_path / "run")
    assert (found.run, found.data) == (tmp_path / "run", tiny_shards)
    assert found.classifier == tmp_path / f"{tiny_shards.name}-classifier" / "small"
    assert found.evaluation == tmp_path / "run" / "evaluation"
    for text, error in (("data: [1]\n", "must be a string"), ("data: &a [*a]\n", "recipe"), ("[" * 5000, "recipe")):
        config.write_text(text)
        with pytest.raises(ValueError, match=error) as caught:
            find_run(tmp_path / "run")
        assert "\n" not in str(caught.value)
    assert find_run(tmp_path / "run", data=tiny_shards, classifier=tmp_path).classifier == tmp_path


@pytest.mark.parametrize(
    ("decoding", "match"),
    [
        (DecodingConfig(17), "num_steps must be <= 16, the tokens per image"),
        (DecodingConfig(4, "confidnce"), "did you mean 'confidence'"),
        (DecodingConfig(4, guidance={"name": "constant", "scale": -1.0}), "scale must be a number in"),
    ],
)
def test_an_invalid_decoding_is_refused_before_any_work(pipe: MaskGIT, decoding: DecodingConfig, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        check_model_decoding(pipe, decoding)


def test_guidance_of_a_model_without_a_null_class_is_refused_before_any_work(tmp_path: Path) -> None:
    pipe = MaskGIT.from_pretrained(save_tiny_pretrained(tmp_path, class_dropout=0.0))
    check_model_decoding(pipe, pipe.decoding)
    with pytest.raises(ValueError, match="no null class"):
        check_model_decoding(pipe, DecodingConfig(4, guidance={"name": "constant", "scale": 1.0}))


def test_all_classes_have_the_same_number_of_images_at_least_two() -> None:
    assert [round_to_classes(count, 3) for count in (6, 7, 14)] == [6, 6, 12]
    with pytest.raises(ValueError, match=r"^plot_images must be >= 20 \(2 per class\), got 19"):
        round_to_classes(19, 10, name="plot_images")


def test_the_usual_steps_go_as_far_as_there_are_tokens() -> None:
    assert default_steps(16, (4, 8, 16, 32)) == (4, 8, 16)
    assert default_steps(3, (4, 8)) == (3,)


def test_data_of_other_classes_are_refused(pipe: MaskGIT, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ShardData(ShardDataConfig(str(tiny_shards), image_size=8, in_channels=1))
    data.setup()
    check_data(pipe, data)
    monkeypatch.setattr(type(pipe), "class_names", ("a", "b"))
    with pytest.raises(ValueError, match="the classes must be the model's"):
        check_data(pipe, data)


@pytest.mark.parametrize(("side", "count"), [(16, 1), (8, 0)])
def test_real_images_that_are_all_resized_are_named_once(tmp_path, tiny_shards, caplog, side, count) -> None:
    pretrained = save_tiny_pretrained(tmp_path / "run" / "pretrained", image_size=side)
    open_data(find_run(tmp_path / "run", data=tiny_shards), MaskGIT.from_pretrained(pretrained))
    said = f"data {tiny_shards}: images of 8 x 8 pixels are enlarged to 16 x 16, which adds no detail"
    assert [line.startswith(said) for line in caplog.messages] == [True] * count
