"""Recipes: what their files and flags mean, in which order they are merged, and what is refused by name."""

from pathlib import Path

import pytest

from maskgit_pl.runs.layers import merge
from maskgit_pl.runs.recipe import Recipe, read_run_config, recipe_files
from maskgit_pl.runs.settings import resolve


def write(folder, text):
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


def read(folder, text, words=(), stage="transformer"):
    return Recipe.from_files(stage, [write(folder, text)], list(words))


UNKNOWN = [
    ("model: {mask_shedule: cosine}", "unknown key 'model.mask_shedule': did you mean 'model.mask_schedule'?"),
    ("model: {network: {embed_dim: wide}}", "model.network.embed_dim must be an integer, got 'wide'"),
    ("model: {optimizer: {betas: [0.9]}}", "model.optimizer.betas must be a list of the right length, got [0.9]"),
    ("trainer: {max_epochs: 3}", "trainer.max_epochs cannot be set: runs are counted in steps; set trainer.max_steps"),
    ("model: {seed: 3}", "model.seed cannot be set: it follows data.seed"),
    ("trainer: inner.yaml", "trainer must be a mapping, got 'inner.yaml'"),
    ("chekpoint_every: 3", "unknown key 'chekpoint_every': did you mean 'checkpoint_every'?"),
    ("trainer: {strategy: '{class_path: m.C}'}", "trainer.strategy must be 'auto', 'ddp' or 'fsdp', got '{class_path"),
    ("model: {loss_vocabulary: some}", "model.loss_vocabulary must be 'codes' or 'all', got 'some'"),
]


@pytest.mark.parametrize(("text", "answer"), UNKNOWN)
def test_a_wrong_key_or_type_is_answered_with_the_file_the_key_and_the_way_out(tmp_path, text, answer):
    with pytest.raises(ValueError, match=r"^recipe .*recipe\.yaml: ") as caught:
        read(tmp_path, text)
    assert answer in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--data.path=/data/plugins/callbacks"], "data.path", "/data/plugins/callbacks"),
        (["--model.tokenizer", "/data/logger/class_path"], "model.tokenizer", "/data/logger/class_path"),
        (["--data.path=123"], "data.path", "123"),
        (["--data.path=[a"], "data.path", "[a"),
        (["--model.optimizer.learning_rate.peak=1e-3"], "model.optimizer.learning_rate.peak", 1e-3),
        (["--model.mask_schedule={name: pow, exponent: 3}"], "model.mask_schedule", {"name": "pow", "exponent": 3}),
        (["--model.mask_schedule.exponent=3"], "model.mask_schedule", {"name": "cosine", "exponent": 3}),
        (["--trainer.devices=2"], "trainer.devices", 2),
        (["--trainer.devices=auto"], "trainer.devices", "auto"),
        (["--model.optimizer.betas=[0.9,0.99]"], "model.optimizer.betas", [0.9, 0.99]),
        (["--data.validation_samples=null"], "data.validation_samples", None),
        (["--data.seed=1", "--data.seed", "2"], "data.seed", 2),
        (["--loggers=csv"], "loggers", ["csv"]),  # the list of one item
        (["--data.path=on"], "data.path", "on"),  # YAML's true
        (["--trainer.devices=[0, 2]"], "trainer.devices", [0, 2]),
        (["--trainer.limit_val_batches=0.5"], "trainer.limit_val_batches", 0.5),
    ],
)
def test_a_flag_means_what_its_key_takes(tmp_path, words, key, value):
    recipe = read(tmp_path, "model: {mask_schedule: cosine}\ndata: {validation_samples: 4}", words)
    assert recipe.get(key) == value
    assert type(recipe.get(key)) is type(value)
    later = recipe.with_overrides({"data.seed": 3})  # further values win
    assert (later.get("data.seed"), later.words) == (3, (*recipe.words, "--data.seed=3"))


@pytest.mark.parametrize("words", [["cosine"], ["--model.mask_schedule"], ["--data.seed", "--x=1"], ["-x=1"], ["--=3"]])
def test_a_word_that_is_no_flag_or_has_no_value_is_refused(tmp_path, words):
    with pytest.raises(ValueError, match=r"unrecognized argument|must have a value"):
        read(tmp_path, "{}", words)


CAUSAL = "model: {network: {attention: causal}}"


@pytest.mark.parametrize(
    ("text", "words", "kind"),
    [
        (CAUSAL, [], "autoregressive"),
        (CAUSAL, ["--model.network.attention=bidirectional", "--model.mask_schedule=log"], "transformer"),
        ("{}", ["--model.network.attention", "causal", "--model.label_smoothing=0"], "autoregressive"),
        ("{}", ["--model.mask_schedule=log"], "transformer"),
    ],
)
def test_the_baseline_is_what_the_merged_recipe_says(tmp_path, text, words, kind):
    assert read(tmp_path, text, words).kind == kind


@pytest.mark.parametrize(
    "flag", ["--model.mask_schedule=log", "--model.min_mask_ratio=0.5", "--model.decoding.num_steps=8"]
)
def test_a_flag_that_the_baseline_has_no_use_for_is_refused(tmp_path, flag):
    with pytest.raises(
        ValueError, match=f"flag {flag.partition('=')[0]}: with causal attention .*; leave the flag out"
    ):
        read(tmp_path, CAUSAL, ["--data.seed=1", flag])


def test_a_layer_is_left_without_what_the_baseline_has_no_use_for(tmp_path):
    text = """
    data: {seed: 1}
    model:
      network: {attention: causal}
      mask_schedule: {name: pow, exponent: 3}
      decoding: {num_steps: 8, guidance: linear, token_selector: random}
    """
    recipe = read(tmp_path, text)
    network = {"attention": "causal"}
    assert recipe.tree == {"data": {"seed": 1}, "model": {"network": network, "decoding": {"guidance": "linear"}}}
    (keys,) = recipe.left_out.values()
    assert keys == ["model.mask_schedule", "model.decoding.num_steps", "model.decoding.token_selector"]


def test_a_value_that_nothing_says_is_named(tmp_path):
    recipe = read(tmp_path, "model: {optimizer: {learning_rate: {warmup_steps: 3}}}", stage="tokenizer")
    with pytest.raises(ValueError, match=r"^model\.optimizer\.learning_rate\.peak must be set by the recipe$"):
        resolve("tokenizer", merge([{"data": {"path": "nowhere"}}, recipe.tree]))


def test_a_recipe_is_read_by_the_names_of_its_files():
    recipe = Recipe.read("transformer", names="paper-256 log", dataset="holidays", overrides={"data.seed": 3})
    assert recipe.title == (
        "transformer/base + transformer/own-images + transformer/paper-256 + transformer/log + cluster/single"
    )
    assert (recipe.dataset, recipe.run_name) == ("holidays", "holidays-paper-256-log")
    assert recipe.get("model.mask_schedule") == "log"
    assert Recipe.read("transformer", names=["paper-256", "log"], dataset="holidays").base == recipe.base
    assert Recipe.read("tokenizer").run_name == "fashion-mnist-base"


def test_values_from_python_mean_what_flags_mean(tmp_path):
    values = {
        "data.path": tmp_path,
        "data.seed": 2,
        "model.optimizer.betas": (0.9, 0.99),
        "model.mask_schedule": {"name": "pow", "exponent": 1e-3},
        "data.validation_samples": None,
        "data.num_workers": 0,
        "data.stream": {"urls": ["'a'", "#b: c"], "samples": 3},
    }
    recipe = Recipe.from_files("transformer", [], values)
    expected = {**values, "data.path": str(tmp_path), "model.optimizer.betas": [0.9, 0.99]}
    assert {key: recipe.get(key) for key in values} == expected
    assert Recipe.from_files("transformer", [], recipe.words).tree == recipe.tree
    causal = Recipe.from_files("transformer", [], {"model.network.attention": "causal"})
    assert causal.kind == "autoregressive"
    with pytest.raises(ValueError, match=r"^flag --data\.seed must be an integer, got 'NaN'$"):
        Recipe.from_files("transformer", [], {"data.seed": float("nan")})


def test_a_key_with_dots_in_a_file_is_answered_with_the_nested_key(tmp_path):
    with pytest.raises(ValueError, match=r"unknown key 'data\.image_size': .* as in data: \{image_size: \.\.\.\}"):
        read(tmp_path, "data.image_size: 8", stage="tokenizer")


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
    spaced = own_recipe(tmp_path / "my folder", "one two.yaml")
    assert Recipe.read("tokenizer", names=str(spaced)).get("trainer.max_steps") == 7
    assert Recipe.read("tokenizer", names="adaln 64px").names == ("adaln", "64px")
    plain, staged = tmp_path / "mine.yaml", own_recipe(tmp_path, "tokenizer/mine.yaml")
    plain.touch()
    wanted = {"dataset": "fashion-mnist", "names": [str(plain), "log", str(staged)], "cluster": "single"}
    assert recipe_files("transformer", **wanted)[1:-1] == [plain, *recipe_files("transformer", **wanted)[2:3]]
    assert recipe_files("tokenizer", **wanted)[1:-1] == [plain, staged]
    with pytest.raises(
        FileNotFoundError, match=r"recipe no/such\.yaml: no such file; a recipe without / and \.yaml is a name"
    ):
        stems(names=["no/such.yaml"])


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"names": ["paper-256", "log"], "dataset": "blue-marble", "cluster": "ddp"},
         ["base", "own-images", "paper-256", "log", "ddp"]),
        ({}, ["base", "single"]),
        ({"dataset": "holidays"}, ["base", "own-images", "single"]),  # unknown data
    ],
)  # fmt: skip
def test_files_come_in_merge_order(options, wanted):
    assert stems(**options) == wanted


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


def test_a_flag_may_bring_the_values_of_files_into_range(tmp_path):
    (tmp_path / "mine.yaml").write_text("data: {source: tokens, crop: random}")  # the store has central crops
    names = [str(tmp_path / "mine.yaml")]
    with pytest.raises(ValueError, match=r"data\.crop must be 'center'"):
        Recipe.read("transformer", names=names)
    assert Recipe.read("transformer", names=names, overrides=["--data.crop=center"]).get("data.crop") == "center"


@pytest.mark.parametrize(
    ("text", "flags", "stage", "said"),
    [
        ("", ["--model.network.backbone=null"], "transformer", "flag --model.network.backbone must be a string"),
        ("", ["--loggers=[{name: [a]}, {name: [a]}]"], "tokenizer", "flag --loggers must be different"),
        (
            "",
            ["--trainer.limit_val_batches={a: 1}"],
            "tokenizer",
            "flag --trainer.limit_val_batches must be an integer",
        ),
        ("", ["--data.stream={urls: 3, samples: x}"], "tokenizer", "flag --data.stream.*urls must be a string or"),
        ("trainer: {max_steps: abc}", ["--trainer.max_steps=10"], "tokenizer", "recipe .*: trainer.max_steps must be"),
        ("data: {augmentations: [nope]}", ["--data.seed=3"], "tokenizer", "recipe .*: data: unknown augmentation"),
        ("", ["--model.mask_shedule=log"], "transformer", "flag --model.mask_shedule: unknown key .*'model.mask_sch"),
    ],
)
def test_a_mistake_is_answered_with_the_file_or_the_flag_that_made_it(tmp_path, text, flags, stage, said):
    (tmp_path / "mine.yaml").write_text(text or "{}")
    with pytest.raises(ValueError, match=f"^{said}") as caught:
        Recipe.read(stage, names=[str(tmp_path / "mine.yaml")], overrides=flags)
    assert "\n" not in str(caught.value)
