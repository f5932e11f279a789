from pathlib import Path

import pytest
import torch

from maskgit_pl.data.manifest import read_manifest_summary
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.folders import check_data, check_model_decoding, describe_held_out, open_model
from maskgit_pl.evaluation.run_folders import data_name, find_run
from maskgit_pl.pipeline import MaskGIT
from tests.conftest import save_tiny_pretrained
from tests.evaluation.feature_networks import open_shards
from tests.networks.backbone_cases import save_model_of_vectors


@pytest.fixture(scope="module")
def pipe(tiny_pretrained: Path) -> MaskGIT:
    return MaskGIT.from_pretrained(tiny_pretrained)


def test_guidance_of_a_model_without_a_null_class_is_refused_before_any_work(tmp_path: Path) -> None:
    pipe = MaskGIT.from_pretrained(save_tiny_pretrained(tmp_path, class_dropout=0.0))
    check_model_decoding(pipe, pipe.decoding)
    with pytest.raises(ValueError, match="no null class"):
        check_model_decoding(pipe, DecodingConfig(4, guidance={"name": "constant", "scale": 1.0}))


def test_data_of_other_classes_are_refused(pipe: MaskGIT, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_shards(tiny_shards)
    check_data(pipe, data)
    monkeypatch.setattr(type(pipe), "class_names", ("a", "b"))
    with pytest.raises(ValueError, match="the classes must be the model's"):
        check_data(pipe, data)


def test_a_model_that_needs_a_vector_for_each_image_is_refused(
    tiny_pretrained: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    pipe = MaskGIT.from_pretrained(save_model_of_vectors(tiny_pretrained, tmp_path, dim=3))
    with pytest.raises(ValueError, match="the model must generate from classes only"):
        check_data(pipe, open_shards(tiny_shards))


@pytest.mark.slow
def test_a_run_records_its_data(tmp_path: Path, tiny_shards: Path) -> None:
    save_tiny_pretrained(tmp_path / "run" / "pretrained")
    with pytest.raises(FileNotFoundError, match="choose them with --data"):
        find_run(tmp_path / "run")
    config = tmp_path / "run" / "transformer" / "config.yaml"
    config.parent.mkdir()
    config.write_text(f"data:\n  path: {tiny_shards}\n")
    folders = find_run(tmp_path / "run")
    assert (folders.run, folders.data) == (tmp_path / "run", tiny_shards)
    assert folders.classifier == tmp_path / f"{tiny_shards.name}-classifier" / "small"
    save_tiny_pretrained(tmp_path / "ablation" / "run" / "pretrained")
    assert find_run(tmp_path / "ablation" / "run", data=tiny_shards).references == folders.references


@pytest.mark.parametrize("path", [".", "..", "/somewhere/shoes"])
def test_the_name_of_the_data_is_that_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    (tmp_path / "shoes" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "shoes" / ("deep" if path == ".." else ""))
    assert data_name(Path(path)) == "shoes"


def test_the_held_out_images_are_described(tiny_shards: Path) -> None:
    described = describe_held_out(read_manifest_summary(tiny_shards))
    assert described == "Held out: 24 images of the val split (29% of the data)."


def test_a_model_in_bfloat16_has_other_rows_and_the_same_tokenizer(tiny_pretrained: Path) -> None:
    folders = find_run(tiny_pretrained, data=Path("data"))
    plain, same, cast = (open_model(folders, "cpu", dtype=dtype) for dtype in (None, "float32", "bfloat16"))
    assert next(cast.pipe.tokenizer.network.parameters()).dtype == torch.float32
    assert next(cast.pipe.transformer.network.parameters()).dtype == torch.bfloat16
    assert same.identity == plain.identity
    assert {name for name in plain.identity if plain.identity[name] != cast.identity[name]} == {"config"}
