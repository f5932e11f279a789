"""The folders of a run. tests/cli/test_train.py tests them with whole commands."""

from pathlib import Path

import pytest

from maskgit_pl.runs.plan import find_data, find_tokenizer
from maskgit_pl.runs.recipe import Recipe


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.read("transformer")


def test_data_are_the_named_else_the_repeated_runs_else_the_data_sets(tmp_path, recipe, monkeypatch):
    for name in ("named", "own", "data/shards/fashion-mnist"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("data: {path: own}\nmodel: {}\ntrainer: {}\n")
    again = Recipe.from_run("transformer", Path("config.yaml"))
    assert find_data(again, "named") == Path("named")
    assert find_data(again) == Path("own")
    assert find_data(recipe) == Path("data/shards/fashion-mnist")
    with pytest.raises(FileNotFoundError, match="data gone: no such folder"):
        find_data(recipe, "gone")


def test_the_tokenizer_is_the_named_else_the_runs_else_the_weights(tiny_pretrained, tmp_path, recipe):
    where = {"folder": tmp_path / "one", "shards": tmp_path}
    with pytest.raises(FileNotFoundError, match="no such folder; train one"):
        find_tokenizer(recipe, **where)
    of_weights = find_tokenizer(recipe, **where, pretrained=tiny_pretrained)
    assert of_weights == tiny_pretrained / "tokenizer"
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "pretrained").symlink_to(tiny_pretrained)
    assert find_tokenizer(recipe, **where, pretrained=tiny_pretrained) == tmp_path / "one" / "pretrained" / "tokenizer"
    assert find_tokenizer(recipe, **where, tokenizer=of_weights) == of_weights
