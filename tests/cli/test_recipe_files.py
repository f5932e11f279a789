import subprocess
import sys
import time

import pytest

from maskgit_pl.cli.recipes import check_overrides, fitting_layer, is_causal, read_yaml, recipe_files


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
        ("model: {class_path: os.system}", "model.class_path"),
        ("trainer: {callbacks: [{class_path: a.B}]}", "trainer.callbacks"),
        ("model: !!python/object/apply:os.system [echo]", "recipe.yaml"),
        ("a: " + "x" * 1_000_001, "at most 1 MB"),
    ],
)
def test_an_unsafe_recipe_is_refused_by_name(tmp_path, text, rule):
    with pytest.raises(ValueError, match=rule):
        read_yaml(write(tmp_path, text))


def test_flags_cannot_import_code():
    for word in ("--trainer.callbacks=a.B", "--model.class_path=os.system", "--config=x.yaml"):
        with pytest.raises(ValueError, match="flag"):
            check_overrides([word])


CAUSAL = "model: {network: {attention: causal}}"


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        (CAUSAL, [], True),
        (CAUSAL, ["--model.network.attention=bidirectional", "--model.mask_schedule=log"], False),
        ("{}", ["--model.network.attention", "causal", "--model.label_smoothing=0"], True),
        ("{}", ["--model.mask_schedule=log"], False),
    ],
)
def test_the_baseline_is_what_the_merged_recipe_says(tmp_path, text, overrides, expected):
    assert is_causal([write(tmp_path, text)], overrides) == expected


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
        is_causal([write(tmp_path, CAUSAL)], ["--data.seed=1", flag])


def test_a_layer_is_left_without_what_the_baseline_has_no_use_for(tmp_path):
    text = """
    data: {seed: 1}
    model:
      mask_schedule: {name: pow, exponent: 3}
      decoding: {num_steps: 8, guidance: linear, token_selector: random}
    """
    layer, without = fitting_layer(write(tmp_path, text))
    assert layer == {"data": {"seed": 1}, "model": {"decoding": {"guidance": "linear"}}}
    assert without == ["model.mask_schedule", "model.decoding.num_steps", "model.decoding.token_selector"]
    for same in ("{}", "model: 3", "model: {decoding: null}", CAUSAL):
        file = write(tmp_path, same)
        assert fitting_layer(file) == (read_yaml(file), [])
