import json
import subprocess
import sys
import time

import pytest
import yaml

from maskgit_pl.runs.build import StageRun
from maskgit_pl.runs.layers import merged
from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.runs.recipe_files import read_run_config, recipe_files
from maskgit_pl.runs.recipe_schema import build_schema, load_schema
from maskgit_pl.runs.safe_yaml import read_yaml


def write(folder, text):
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


def stems(**options):
    defaults = {"dataset": "fashion-mnist", "names": [], "cluster": "cpu"}
    return [file.stem for file in recipe_files("transformer", **{**defaults, **options})]


def test_files_come_in_merge_order():
    assert stems(names=["paper-256", "log"], dataset="blue-marble", cluster="ddp") == [
        "base", "blue-marble", "paper-256", "log", "ddp",
    ]  # fmt: skip


def test_the_default_data_is_the_base_and_unknown_data_is_own_images():
    assert stems() == ["base", "cpu"]
    assert stems(dataset="holidays") == ["base", "own-images", "cpu"]


def test_a_stage_takes_the_recipes_it_has():
    files = recipe_files("tokenizer", dataset="fashion-mnist", names=["paper-256", "log"], cluster="cpu")
    assert [file.stem for file in files] == ["base", "paper-256", "cpu"]


@pytest.mark.parametrize(("kind", "wrong", "right"), [("names", ["cosin"], "cosine"), ("cluster", "fdsp", "fsdp")])
def test_an_unknown_name_is_answered_with_the_nearest(kind, wrong, right):
    with pytest.raises(FileNotFoundError, match=f"did you mean '{right}'"):
        stems(**{kind: wrong})


def test_an_unknown_recipe_is_answered_in_two_seconds_without_torch():
    code = (
        "import sys; from maskgit_pl.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(90 if 'torch' in sys.modules else code)"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "transformer", "--recipe", "cosin"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean 'cosine'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a: &x [1, 1]\nb: [*x, *x]", "aliases are not allowed"),
        ("model: {mask_schedule: cosine}\nmodel: {}", "stands twice"),
        ("model:\n\tmask_schedule: cosine", "recipe.yaml"),
        ("- 1\n- 2", "a mapping is needed"),
        ("model: {class_path: os.system}", "model.class_path cannot be set"),
        ("trainer: {callbacks: [{class_path: a.B}]}", "trainer.callbacks.class_path cannot be set"),
        ("1: 2", "the key 1 is not a word"),
        ("model: {a: .nan}", "model.a must be finite"),
        ("model: {a: 2020-01-01}", "model.a must be a number, a word, a list or a mapping"),
        ("a: " + "[" * 5000, "nested too deep"),
        ("a: " + "[" * 30 + "]" * 30, "nested too deep"),
        ("a: " + "9" * 5000, "recipe.yaml"),
        ("a: b: c", r"line 1, column 5: mapping values are not allowed here"),
        ("model: !!python/object/apply:os.system [echo]", "recipe.yaml"),
        ("a: " + "x" * 200_001, "at most 200000 bytes"),
    ],
)
def test_an_unsafe_recipe_is_refused_by_name(tmp_path, text, rule):
    with pytest.raises(ValueError, match=rule) as caught:
        read_yaml(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def read(folder, text, words=(), stage="transformer"):
    return Recipe.from_files(stage, [write(folder, text)], list(words))


UNKNOWN = [
    ("model: {mask_shedule: cosine}", "unknown key 'model.mask_shedule': did you mean 'model.mask_schedule'?"),
    ("model: {network: {width: wide}}", "model.network.width must be an integer, got 'wide'"),
    ("model: {network: {depth: true}}", "model.network.depth must be an integer, got True"),
    ("model: {betas: [0.9]}", "model.betas must be a list of a number and a number, got [0.9]"),
    ("trainer: {max_epochs: 3}", "trainer.max_epochs cannot be set: runs are counted in steps; set trainer.max_steps"),
    ("trainer: {logger: true}", "trainer.logger cannot be set: recipes name registered things, never classes"),
    ("trainer: {default_root_dir: x}", "trainer.default_root_dir cannot be set: use --runs and --run"),
    ("model: {seed: 3}", "model.seed cannot be set: it follows data.seed"),
    ("trainer: inner.yaml", "trainer must be a mapping, got 'inner.yaml'"),
    ("chekpoint_every: 3", "unknown key 'chekpoint_every': did you mean 'checkpoint_every'?"),
    (
        "trainer: {strategy: '{class_path: m.C}'}",
        "trainer.strategy must be 'auto' or 'ddp' or 'fsdp', got '{class_path",
    ),
    ("model: {loss_vocabulary: some}", "model.loss_vocabulary must be 'codes' or 'all', got 'some'"),
]


@pytest.mark.parametrize(("text", "answer"), UNKNOWN)
def test_a_wrong_key_or_type_is_answered_with_the_file_the_key_and_the_way_out(tmp_path, text, answer):
    with pytest.raises(ValueError, match=r"^recipe .*recipe\.yaml: ") as caught:
        read(tmp_path, text)
    assert answer in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "answer"), UNKNOWN)
def test_a_flag_is_answered_as_a_file_is(tmp_path, text, answer):
    ((group, value),) = yaml.safe_load(text).items()
    key, value = (group, value) if not isinstance(value, dict) else (f"{group}.{next(iter(value))}", value)
    while isinstance(value, dict):
        (inner, value) = next(iter(value.items()))
        key = key if key.endswith(inner) else f"{key}.{inner}"
    with pytest.raises(ValueError, match=rf"^flag --{key}[: ]") as caught:
        read(tmp_path, "{}", [f"--{key}={json.dumps(value)}"])
    assert answer in str(caught.value)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--data.path=/data/plugins/callbacks"], "data.path", "/data/plugins/callbacks"),
        (["--model.tokenizer", "/data/logger/class_path"], "model.tokenizer", "/data/logger/class_path"),
        (["--data.path=123"], "data.path", "123"),
        (["--data.path=[a"], "data.path", "[a"),
        (["--model.learning_rate.peak=1e-3"], "model.learning_rate.peak", 1e-3),
        (["--model.mask_schedule={name: pow, exponent: 3}"], "model.mask_schedule", {"name": "pow", "exponent": 3}),
        (["--model.mask_schedule.exponent=3"], "model.mask_schedule", {"name": "cosine", "exponent": 3}),
        (["--trainer.devices=2"], "trainer.devices", 2),
        (["--trainer.devices=auto"], "trainer.devices", "auto"),
        (["--model.betas=[0.9,0.99]"], "model.betas", [0.9, 0.99]),
        (["--data.validation_samples=null"], "data.validation_samples", None),
        (["--data.seed=1", "--data.seed", "2"], "data.seed", 2),
    ],
)
def test_a_flag_means_what_its_key_takes(tmp_path, words, key, value):
    recipe = read(tmp_path, "model: {mask_schedule: cosine}\ndata: {validation_samples: 4}", words)
    assert recipe.get(key) == value
    assert type(recipe.get(key)) is type(value)


@pytest.mark.parametrize("words", [["cosine"], ["--model.mask_schedule"], ["--data.seed", "--x=1"], ["-x=1"], ["--=3"]])
def test_a_word_that_is_no_flag_or_has_no_value_is_refused(tmp_path, words):
    with pytest.raises(ValueError, match=r"unrecognized argument|must have a value"):
        read(tmp_path, "{}", words)


def test_later_files_win_key_by_key_and_a_named_thing_is_replaced():
    trees = [
        {"a": {"x": 1, "y": 2}, "spec": {"name": "pow", "exponent": 3}, "word": "cosine", "null": None},
        {"a": {"x": 5}, "spec": {"name": "log"}, "word": {"rate": 2}, "null": {"z": 1}},
        {"spec": {"base": 2}},
    ]
    assert merged(trees) == {
        "a": {"x": 5, "y": 2},
        "spec": {"name": "log", "base": 2},
        "word": {"name": "cosine", "rate": 2},
        "null": {"z": 1},
    }
    assert trees[0]["spec"] == {"name": "pow", "exponent": 3}


def test_the_schemas_are_those_of_the_signatures():
    for kind in ("tokenizer", "transformer", "autoregressive"):
        assert load_schema(kind) == json.loads(json.dumps(build_schema(kind))), "run recipe_schema.write_schemas()"


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
    "flag",
    [
        "--model.mask_schedule=log",
        "--model.mask_schedule.exponent=3",
        "--model.min_mask_ratio=0.5",
        "--model.decoding.num_steps=8",
        "--model.decoding.token_selector.choice_temperature=1",
        "--model.decoding.tokens_per_step=[1]",
        "--model.decoding.mask_schedule=log",
        "--model.decoding.context_cache=2",
    ],
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


def test_config_yaml_of_a_run_is_a_recipe_without_its_paths(tmp_path):
    text = """
    seed_everything: false
    data: {path: a, token_store: b, seed: 3}
    model: {tokenizer: c, label_smoothing: 0.1}
    trainer: {max_steps: 5, use_distributed_sampler: true, fast_dev_run: false}
    """
    tree, paths = read_run_config(write(tmp_path, text))
    assert tree == {"data": {"seed": 3}, "model": {"label_smoothing": 0.1}, "trainer": {"max_steps": 5}}
    assert paths == {"data.path": "a", "data.token_store": "b", "model.tokenizer": "c"}
    with pytest.raises(ValueError, match=r"must be config\.yaml of a run"):
        read_run_config(write(tmp_path, "model: {}"))


def test_a_value_that_nothing_says_is_named(tmp_path):
    recipe = read(tmp_path, "model: {learning_rate: {warmup_steps: 3}}", stage="tokenizer")
    with pytest.raises(ValueError, match=r"^model\.learning_rate\.peak must be set by the recipe$"):
        StageRun(recipe, merged([{"data": {"path": "nowhere"}}, recipe.tree]), tmp_path)
