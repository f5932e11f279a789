"""Recipes: what their files and flags mean, in which order they are merged, and what is refused by name."""

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from maskgit_pl.files import read_yaml
from maskgit_pl.runs.fitting import build
from maskgit_pl.runs.plan import Plan
from maskgit_pl.runs.recipe import Layer, Recipe, merge, parse_spec, parse_specs, recipe_files, value_at, without_keys
from maskgit_pl.runs.resolve import known_keys
from tests.conftest import tiny_flags


def read(folder, text, words=(), stage="transformer"):
    (folder / "recipe.yaml").write_text(text)
    return Recipe.from_files(stage, [folder / "recipe.yaml"], list(words))


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--model.tokenizer", "/data/logger/class_path"], "model.tokenizer", "/data/logger/class_path"),
        (["--model.optimizer.learning_rate.peak=1e-3"], "model.optimizer.learning_rate.peak", 1e-3),
        (["--model.mask_schedule={name: pow, exponent: 3}"], "model.mask_schedule", {"name": "pow", "exponent": 3}),
        (["--model.mask_schedule.exponent=3"], "model.mask_schedule", {"name": "cosine", "exponent": 3}),
        (["--data.validation_samples=null"], "data.validation_samples", None),
        (["--data.seed=1", "--data.seed", "2"], "data.seed", 2),
        (["--trainer.devices=[0, 2]"], "trainer.devices", [0, 2]),
    ],
)
def test_a_flag_has_the_type_of_its_key(tmp_path, words, key, value):
    recipe = read(tmp_path, "model: {mask_schedule: cosine}\ndata: {validation_samples: 4}", words)
    assert recipe.get(key) == value
    assert type(recipe.get(key)) is type(value)
    later = recipe.with_overrides({"data.seed": 3})  # further values win
    assert (later.get("data.seed"), later.words) == (3, (*recipe.words, "--data.seed=3"))


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
def test_the_kind_is_that_of_the_merged_recipe(tmp_path, text, words, kind):
    assert read(tmp_path, text, words).kind == kind


def test_a_baseline_drops_the_keys_of_masking_from_files(tmp_path):
    decoding = "decoding: {num_steps: 8, guidance: linear}"
    recipe = read(tmp_path, f"model: {{network: {{attention: causal}}, mask_schedule: {{name: pow}}, {decoding}}}")
    assert recipe.tree == {"model": {"network": {"attention": "causal"}, "decoding": {"guidance": "linear"}}}


def test_values_from_python_are_read_like_flags(tmp_path):
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


def stems(stage="transformer", **options):
    defaults = {"dataset": "fashion-mnist", "names": [], "cluster": "single"}
    return [file.stem for file in recipe_files(stage, **{**defaults, **options})]


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
    assert Recipe.read("tokenizer", names="adaln 64px").names == ("adaln", "64px")
    plain, staged = tmp_path / "mine.yaml", own_recipe(tmp_path, "tokenizer/mine.yaml")
    plain.touch()
    wanted = {"dataset": "fashion-mnist", "names": [str(plain), "log", str(staged)], "cluster": "single"}
    assert recipe_files("transformer", **wanted)[1:-1] == [plain, *recipe_files("transformer", **wanted)[2:3]]
    assert recipe_files("tokenizer", **wanted)[1:-1] == [plain, staged]
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: 'no/such\.yaml'"):
        Recipe.read("transformer", names="no/such.yaml")


@pytest.mark.parametrize(
    ("stage", "options", "names"),
    [
        ("transformer", {"names": ["paper-256", "log"], "dataset": "holidays", "cluster": "ddp"},
         ["base", "own-images", "paper-256", "log", "ddp"]),
        ("transformer", {}, ["base", "single"]),
        ("tokenizer", {"names": ["paper-256", "log"]}, ["base", "paper-256", "single"]),
    ],
)  # fmt: skip
def test_files_come_in_merge_order(stage, options, names):
    assert stems(stage, **options) == names


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(FileNotFoundError, match="did you mean 'cosine'"):
        stems(names=["cosin"])


def test_config_yaml_of_a_run_is_a_recipe_without_its_paths(tmp_path):
    text = """
    data: {path: a, token_store: b, seed: 3}
    model: {tokenizer: c, label_smoothing: 0.1}
    trainer: {max_steps: 5}
    """
    file = tmp_path / "config.yaml"
    file.write_text(text)
    recipe = Recipe.from_run("transformer", file)
    assert recipe.tree == {"data": {"seed": 3}, "model": {"label_smoothing": 0.1}, "trainer": {"max_steps": 5}}
    assert recipe.paths == {"data.path": "a", "data.token_store": "b", "model.tokenizer": "c"}
    file.write_text("model: {}")
    with pytest.raises(ValueError, match=r"must be the config\.yaml of a run"):
        Recipe.from_run("transformer", file)


def test_a_flag_may_bring_the_values_of_files_into_range(tmp_path):
    (tmp_path / "mine.yaml").write_text("data: {source: stream}")
    names = [str(tmp_path / "mine.yaml")]
    with pytest.raises(ValueError, match=r"data\.stream\.urls must be given"):
        Recipe.read("transformer", names=names)
    assert Recipe.read("transformer", names=names, overrides=["--data.source=images"]).get("data.source") == "images"


WRONG = [  # text of a file, flags, stage, error
    ("model: {mask_shedule: cosine}", [], "transformer", "recipe .*'model.mask_shedule': did you mean 'model.mask_sch"),
    ("model: {optimizer: {betas: [0.9]}}", [], "transformer", "recipe .*betas must be a list of the right length, got"),
    ("model: {seed: 3}", [], "transformer", "recipe .*: model.seed cannot be set: it follows data.seed"),
    ("data.image_size: 8", [], "tokenizer", r"recipe .*'data\.image_size': keys of a file are nested"),
    ("data: {augmentations: [nope]}", ["--data.seed=3"], "tokenizer", "recipe .*: data: unknown augmentation"),
    ("", ["--model.network.backbone=null"], "transformer", "flag --model.network.backbone must be a string"),
    ("", ["--data.path=[a"], "tokenizer", "flag --data.path: line 1, column 3: expected ',' or ']'"),
    ("", ["--data.stream={urls: 3, samples: x}"], "tokenizer", "flag --data.stream.*urls must be a string or"),
    ("", ["cosine"], "transformer", "unrecognized argument"),
    ("", ["--data.seed", "--x=1"], "transformer", "flag --data.seed must have a value"),
    (CAUSAL, ["--model.mask_schedule=log"], "transformer", "flag --model.mask_schedule: unknown key"),
]


@pytest.mark.parametrize(("text", "flags", "stage", "error"), WRONG, ids=[wrong[3] for wrong in WRONG])
def test_a_mistake_is_answered_with_its_file_or_flag_and_the_key(tmp_path, text, flags, stage, error):
    (tmp_path / "mine.yaml").write_text(text or "{}")
    with pytest.raises(ValueError, match=f"^{error}") as caught:
        Recipe.read(stage, names=[str(tmp_path / "mine.yaml")], overrides=flags)
    assert "\n" not in str(caught.value)


def test_later_trees_override_keys_and_replace_named_objects():
    trees = [
        {"a": {"x": 1, "y": 2}, "spec": {"name": "pow", "exponent": 3}, "word": "cosine", "null": None},
        {"a": {"x": 5}, "spec": {"name": "log"}, "word": {"rate": 2}, "null": {"z": 1}},
        {"spec": {"base": 2}},
    ]
    assert merge(trees) == {
        "a": {"x": 5, "y": 2},
        "spec": {"name": "log", "base": 2},
        "word": {"name": "cosine", "rate": 2},
        "null": {"z": 1},
    }
    assert trees[0]["spec"] == {"name": "pow", "exponent": 3}


def test_a_dotted_key_is_read_and_removed():
    tree = {"a": {"b": {"c": 1, "d": None}}, "word": "x"}
    assert [value_at(tree, key) for key in ("a.b.c", "a.b.d", "a.x.c", "word.x")] == [1, None, None, None]
    assert without_keys(tree, ("a.b.c", "a.b.d", "a.x.c", "word.x", "gone")) == {"a": {"b": {}}, "word": "x"}
    assert without_keys(tree, ("word", "a.b")) == {"a": {}}
    assert tree == {"a": {"b": {"c": 1, "d": None}}, "word": "x"}


REMDM = {"name": "remdm", "eta": 0.4}


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_specs, "halton, {name: remdm, eta: 0.4}", ["halton", REMDM]),
        (parse_specs, '{"name": "remdm", "eta": 0.4},halton,', [REMDM, "halton"]),
        (parse_spec, "linear", "linear"),
        (parse_spec, "1e-3", "1e-3"),  # a name is no YAML
        (parse_spec, "true", "true"),
        (parse_spec, '{"name": "remdm", "eta": 4e-1}', REMDM),
        (parse_spec, "{name: remdm, eta: 0.4}", REMDM),
        (parse_specs, "classifier,inception=a.pt", ["classifier", "inception=a.pt"]),
    ],
)
def test_flags_are_parsed(parse, text, value) -> None:
    assert parse("--x", text) == value


# Recipes and flags that try to run code; a canary module records any success

RECIPES = Path(__file__).parents[2] / "recipes"
CANARY = "canary_module"
MODULE = """
import lightning.pytorch as pl
def wake(*a, **k): open({file!r}, "w")
wake()
class Callback(pl.Callback):
    def __init__(self, *a, **k): wake()
"""
EVERY = 97  # one attack of so many is tried
MORE = ["config", "seed_everything", "optimizer", "trainer.callbacks", "trainer.logger", "trainer.plugins"]  # no keys


def payloads(inner: Path) -> Iterator[Any]:
    """Yields values that a parser of classes, nested documents or files would follow to the canary."""
    ours, theirs = f"{CANARY}.Callback", "lightning.pytorch.callbacks.LambdaCallback"
    specs: list[dict[str, Any]] = [{"class_path": name} for name in (ours, theirs, CANARY)]
    specs += [{"class_path": theirs, "init_args": {"on_fit_start": "os._exit"}}]
    specs += [{"name": "cosine", "class_path": ours}, {"name": ours}, {"name": {"class_path": ours}}]
    for spec in specs:
        for nested in (spec, [spec], {"callbacks": spec}, {"strategy": json.dumps(spec)}, {"x": [{"y": spec}]}):
            yield from (nested, json.dumps(nested), json.dumps(json.dumps(nested)), yaml.safe_dump(nested))
    yield from (ours, theirs, CANARY, str(inner), f"@{inner}", {"config": str(inner)}, [str(inner)], f"file://{inner}")
    yield from (f"!!python/name:{CANARY}.wake", f"!!python/object/apply:{CANARY}.wake []", f"__import__('{CANARY}')")
    yield from (f"${{{CANARY}}}", f"{{{{ {CANARY} }}}}", f"${{env:{CANARY}}}", "&a [*a]", "{<<: {class_path: x}}")


@pytest.fixture
def is_awake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Writes the canary module. Returns a function that tells if it was imported or called."""
    canary = tmp_path / "awake"
    (tmp_path / f"{CANARY}.py").write_text(MODULE.format(file=str(canary)))
    (tmp_path / "inner.yaml").write_text(f"callbacks: {{class_path: {CANARY}.Callback}}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, CANARY, raising=False)
    return lambda: canary.exists() or CANARY in sys.modules


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_no_recipe_and_no_flag_runs_code(stage: Any, tmp_path, is_awake, tiny_shards, tiny_pretrained) -> None:
    """Each attack is rejected in one line, or is read as plain data, and never runs code."""
    file, base = tmp_path / "recipe.yaml", Layer("base", read_yaml(RECIPES / stage / "base.yaml"))
    tokenizer = tiny_pretrained / "tokenizer" if stage == "transformer" else None
    attacks = itertools.product([*known_keys(stage), *MORE], payloads(tmp_path / "inner.yaml"), (False, True))
    answers = set()
    for key, value, is_flag in itertools.islice(attacks, 0, None, EVERY):
        words = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}"] if is_flag else []
        tree = value
        for part in reversed(key.split(".")):
            tree = {part: tree}
        file.write_text("{}" if is_flag else yaml.safe_dump(tree))
        answer, recipe = "", None
        try:
            recipe = Recipe.from_layers(stage, [base, Layer("recipe", read_yaml(file))], words)
        except ValueError as error:
            answer = str(error)
        assert "\n" not in answer
        assert not is_awake(), (key, value)
        answers.add(recipe is None)
        if recipe is not None:
            tiny = [word for word in tiny_flags(stage) if not key.startswith(word[2:].partition("=")[0])]
            with suppress(ValueError, OSError):
                build(Plan(recipe.with_overrides(tiny), tiny_shards, tmp_path / "run", tokenizer))
            assert not is_awake(), (key, value)
    assert answers == {True, False}
