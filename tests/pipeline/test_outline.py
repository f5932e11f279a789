"""The outline from the files of a model equals that from its networks."""

import json
import shutil
from pathlib import Path

import pytest

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.outline import Outline
from maskgit_pl.pipeline.pretrained import save_decoding
from tests.conftest import save_tiny_pretrained


@pytest.mark.parametrize("kind", [{}, {"attention": "causal"}, {"class_dropout": 0.0}, {"in_channels": 3}])
def test_the_outline_of_the_files_is_that_of_the_model(tmp_path: Path, kind) -> None:
    folder = save_tiny_pretrained(tmp_path, **kind)
    assert Outline.read(folder) == MaskGIT.from_pretrained(folder).outline


def test_a_tuned_decoding_is_the_one_that_counts(tmp_path: Path) -> None:
    folder = save_tiny_pretrained(tmp_path)
    save_decoding(folder, DecodingConfig(3, "margin", sampling_temperature=(1.2, 0.7)))
    assert Outline.read(folder) == MaskGIT.from_pretrained(folder).outline


@pytest.mark.parametrize(
    ("part", "path", "value"),
    [
        ("tokenizer", ("image_size",), "8"),
        ("tokenizer", ("network", "patch_size"), "a" * 100),
        ("tokenizer", ("network", "channel_multipliers"), [1] * 70000),
        ("tokenizer", ("network",), None),
        ("transformer", ("network", "grid"), [4]),
        ("transformer", ("network", "grid"), [4, 10**9]),
        ("transformer", ("network", "class_dropout"), "x"),
        ("transformer", ("class_names",), 3),
        ("transformer", ("decoding",), {"steps": 8}),
        ("transformer", ("decoding", "num_steps"), "8"),
    ],
)
def test_files_that_are_not_as_they_must_be_are_left_to_what_loads_them(
    tiny_pretrained: Path, tmp_path: Path, part: str, path: tuple[str, ...], value: object
) -> None:
    folder = shutil.copytree(tiny_pretrained, tmp_path / "model")
    file = folder / part / "config.json"
    content = json.loads(file.read_text())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(content))
    assert Outline.read(folder) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"decoding": {}}'])
def test_a_broken_decoding_file_is_left_to_what_loads_it(tiny_pretrained: Path, tmp_path: Path, text: str) -> None:
    folder = shutil.copytree(tiny_pretrained, tmp_path / "model")
    (folder / "decoding.json").write_text(text)
    assert Outline.read(folder) is None
    with pytest.raises(ValueError, match=r"decoding\.json"):
        MaskGIT.from_pretrained(folder)
