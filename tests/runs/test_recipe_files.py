import shutil

import pytest

from maskgit_pl import old_names
from maskgit_pl.runs.recipe_files import read_run_config, recipe_files, recipes_folder


def stems(**options):
    defaults = {"dataset": "fashion-mnist", "names": [], "cluster": "single"}
    return [file.stem for file in recipe_files("transformer", **{**defaults, **options})]


def test_files_come_in_merge_order():
    assert stems(names=["paper-256", "log"], dataset="blue-marble", cluster="ddp") == [
        "base", "own-images", "paper-256", "log", "ddp",
    ]  # fmt: skip


def test_the_default_data_is_the_base_and_unknown_data_is_own_images():
    assert stems() == ["base", "single"]
    assert stems(dataset="holidays") == ["base", "own-images", "single"]


def test_a_stage_takes_the_recipes_it_has():
    files = recipe_files("tokenizer", dataset="fashion-mnist", names=["paper-256", "log"], cluster="single")
    assert [file.stem for file in files] == ["base", "paper-256", "single"]


@pytest.mark.parametrize(("kind", "wrong", "right"), [("names", ["cosin"], "cosine"), ("cluster", "fdsp", "fsdp")])
def test_an_unknown_name_is_answered_with_the_nearest(kind, wrong, right):
    with pytest.raises(FileNotFoundError, match=f"did you mean '{right}'"):
        stems(**{kind: wrong})


def test_a_cluster_of_version_0_1_0_is_found_by_its_old_name(tmp_path, monkeypatch, caplog):
    old_names._warn_once.cache_clear()
    assert stems(cluster="cpu") == ["base", "single"]
    assert [record.getMessage() for record in caplog.records] == ["--cluster: cpu is now called single"]
    shutil.copytree(recipes_folder(), tmp_path / "recipes")
    (tmp_path / "recipes" / "cluster" / "cpu.yaml").write_text("trainer: {devices: 1}")  # a file of one's own
    monkeypatch.chdir(tmp_path)
    assert stems(cluster="cpu") == ["base", "cpu"]


def test_config_yaml_of_a_run_is_a_recipe_without_its_paths(tmp_path):
    text = """
    seed_everything: false
    data: {path: a, token_store: b, seed: 3}
    model: {tokenizer: c, label_smoothing: 0.1}
    trainer: {max_steps: 5, use_distributed_sampler: true, fast_dev_run: false}
    """
    file = tmp_path / "config.yaml"
    file.write_text(text)
    tree, paths = read_run_config(file)
    assert tree == {"data": {"seed": 3}, "model": {"label_smoothing": 0.1}, "trainer": {"max_steps": 5}}
    assert paths == {"data.path": "a", "data.token_store": "b", "model.tokenizer": "c"}
    file.write_text("model: {}")
    with pytest.raises(ValueError, match=r"must be the config\.yaml of a run"):
        read_run_config(file)
