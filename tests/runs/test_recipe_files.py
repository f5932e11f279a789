from pathlib import Path

import pytest

from maskgit_pl.runs.recipe import read_run_config, recipe_files


def stems(**options):
    defaults = {"dataset": "fashion-mnist", "names": [], "cluster": "single"}
    return [file.stem for file in recipe_files("transformer", **{**defaults, **options})]


def own_recipe(folder: Path, name: str, text: str = "trainer: {max_steps: 7}") -> Path:
    file = folder / "recipes" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_recipes_of_the_working_directory_come_first_and_the_others_stay(tmp_path, monkeypatch):
    own_recipe(tmp_path, "transformer/cosine.yaml")
    own_recipe(tmp_path, "transformer/mine.yaml")
    monkeypatch.chdir(tmp_path)
    names = ["mine", "cosine", "linear"]
    base, *chosen, _ = recipe_files("transformer", dataset="fashion-mnist", names=names, cluster="single")
    assert base.is_absolute()
    own = Path("recipes/transformer")
    assert [file.parent == own for file in chosen] == [True, True, False]
    assert [file.stem for file in chosen] == names


def test_a_recipe_may_be_the_path_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain, staged = tmp_path / "mine.yaml", own_recipe(tmp_path, "tokenizer/mine.yaml")
    plain.touch()
    wanted = {"dataset": "fashion-mnist", "names": [str(plain), "log", str(staged)], "cluster": "single"}
    assert recipe_files("transformer", **wanted)[1:-1] == [plain, *recipe_files("transformer", **wanted)[2:3]]
    assert recipe_files("tokenizer", **wanted)[1:-1] == [plain, staged]
    with pytest.raises(
        FileNotFoundError, match=r"recipe no/such\.yaml: no such file; a recipe without / and \.yaml is a name"
    ):
        stems(names=["no/such.yaml"])


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


def test_config_yaml_of_a_run_is_a_recipe_without_its_paths(tmp_path):
    text = """
    data: {path: a, token_store: b, seed: 3}
    model: {tokenizer: c, label_smoothing: 0.1}
    trainer: {max_steps: 5}
    """
    file = tmp_path / "config.yaml"
    file.write_text(text)
    tree, paths = read_run_config(file)
    assert tree == {"data": {"seed": 3}, "model": {"label_smoothing": 0.1}, "trainer": {"max_steps": 5}}
    assert paths == {"data.path": "a", "data.token_store": "b", "model.tokenizer": "c"}
    file.write_text("model: {}")
    with pytest.raises(ValueError, match=r"must be the config\.yaml of a run"):
        read_run_config(file)
