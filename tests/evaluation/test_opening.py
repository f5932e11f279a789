from pathlib import Path

import pytest

from maskgit_pl.data import ShardData, ShardDataConfig
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.opening import check_data, check_model_decoding, open_data
from maskgit_pl.evaluation.run_folders import find_run
from maskgit_pl.pipeline import MaskGIT
from tests.conftest import save_tiny_pretrained


@pytest.fixture(scope="module")
def pipe(tiny_pretrained: Path) -> MaskGIT:
    return MaskGIT.from_pretrained(tiny_pretrained)


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
