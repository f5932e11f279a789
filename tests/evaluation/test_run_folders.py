from pathlib import Path

import pytest

from maskgit_pl.evaluation.run_folders import data_name, find_run
from tests.conftest import save_tiny_pretrained


@pytest.mark.slow
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


@pytest.mark.parametrize("path", [".", "..", "../shoes", "/somewhere/shoes"])
def test_the_name_of_the_data_is_that_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    (tmp_path / "shoes" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "shoes" / ("deep" if path == ".." else ""))
    assert data_name(Path(path)) == "shoes"


def test_a_classifier_is_shared_unless_its_folder_is_named(tmp_path: Path, tiny_shards: Path) -> None:
    save_tiny_pretrained(tmp_path / "run" / "pretrained")
    assert find_run(tmp_path / "run", data=tiny_shards).shares_classifier
    assert not find_run(tmp_path / "run", data=tiny_shards, classifier=tmp_path / "judge").shares_classifier
