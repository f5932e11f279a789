"""The variants of an ablation, and the commands that train one."""

from pathlib import Path
from typing import Any

import pytest

from maskgit_pl.errors import PreemptedError
from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.runs.variants import (
    AblationConfig,
    Factor,
    TrainingError,
    parse_factor,
    plan_variants,
    train,
)

DEPTH = Factor("model.network.depth", ("2", "6"))
SCALE = Factor("model.decoding.guidance.scale", ("0", "2"))


def plan(*factors: Factor, **options: Any) -> dict[str, Any]:
    """Returns the planned variants by label."""
    return {each.label: each for each in plan_variants(AblationConfig(factors, **options))}


def test_one_factor_at_a_time_changes_one_key_of_the_base() -> None:
    variants = plan(DEPTH, SCALE, overrides={"model.network.embed_dim": 64})
    assert list(variants) == ["base", "depth=2", "depth=6", "guidance.scale=0", "guidance.scale=2"]
    base = variants["base"].recipe.tree
    for label, key, value in (("depth=2", "depth", 2), ("depth=6", "depth", 6)):
        tree = variants[label].recipe.tree
        assert tree["model"]["network"].pop(key) == value
        assert tree["model"]["network"] == {k: v for k, v in base["model"]["network"].items() if k != key}
        assert tree["model"]["decoding"] == base["model"]["decoding"]
    assert {each.recipe.get("model.network.embed_dim") for each in variants.values()} == {64}
    assert {each.recipe.get("trainer.precision") for each in variants.values()} == {"32-true"}  # and not auto


def test_all_variants_are_repeated_at_the_values_of_another_key() -> None:
    variants = plan(SCALE, at=DEPTH)
    assert list(variants) == [
        f"{label}, depth={depth}" for depth in (2, 6) for label in ("base", "guidance.scale=0", "guidance.scale=2")
    ]
    last = variants["guidance.scale=2, depth=6"]
    assert (last.recipe.get("model.network.depth"), last.decoding) == (6, ["--model.decoding.guidance.scale=2"])


def test_the_decoding_of_a_trained_run_is_varied() -> None:
    config = AblationConfig((SCALE,), of=Path("x"), overrides=["--model.decoding.num_steps=4"])
    base, off, _ = plan_variants(config, {"num_steps": 8, "guidance": "linear"})
    assert base.recipe.get("model.decoding") == {"num_steps": 4, "guidance": "linear"}
    assert off.decoding == ["--model.decoding.guidance.scale=0"]


def test_sets_of_recipes_are_variants_and_the_base_file_is_not_read_twice() -> None:
    variants = plan(recipes=("base", "square", "square log"))
    assert list(variants) == ["base", "recipe square", "recipe square log"]
    assert variants["base"].recipe.names == ()
    assert variants["recipe square log"].recipe.get("model.mask_schedule") == "log"


def test_only_keys_of_the_decoding_need_no_training() -> None:
    variants = plan(Factor("model.network", ("{depth: 2, embed_dim: 96}",)), SCALE)
    both = variants["network={depth: 2, embed_dim: 96}"]
    assert (both.recipe.get("model.network.embed_dim"), both.decoding) == (96, [])
    assert variants["guidance.scale=2"].recipe.tree == variants["base"].recipe.tree
    assert variants["guidance.scale=2"].decoding == ["--model.decoding.guidance.scale=2"]


@pytest.mark.parametrize(
    ("text", "factor"),
    [
        ("model.network.depth=2,6", DEPTH),
        ("--decoding.guidance.scale=0, 2", SCALE),
        ("model.mask_schedule=log,{name: pow}", Factor("model.mask_schedule", ("log", "{name: pow}"))),
        (
            "model.optimizer.betas=[0.9, 0.96],[0.9, 0.99]",
            Factor("model.optimizer.betas", ("[0.9, 0.96]", "[0.9, 0.99]")),
        ),
    ],
)
def test_factors_are_parsed(text: str, factor: Factor) -> None:
    assert parse_factor("--vary", text) == factor


@pytest.mark.parametrize(("options", "match"), [
    ({"vary": (DEPTH,), "seeds": (1, 1)}, "--seeds must be different"),
    ({"vary": (Factor("data.seed", ("1",)),)}, "data.seed must not be set in an ablation: .*--seeds"),
    ({"vary": (Factor("data.image_size", ("8",)),)}, "data.image_size must be that of the base"),
    ({"vary": (SCALE,), "stage": "tokenizer"}, "variant guidance.scale=0: .*decoding"),
    ({"vary": (DEPTH,), "stage_2": ()}, "--stage-2 must come with --stage tokenizer"),
    ({"vary": (Factor("model.network.dept", ("2",)),)}, "variant dept=2: .*did you mean 'model.network.depth'"),
    ({"recipes": ("", "squar")}, "recipe 'squar'"),
    ({"vary": (DEPTH,), "at": DEPTH}, "--at must name another key than --vary, got model.network.depth"),
    ({}, "--vary must name a recipe key .*, got none"),
    ({"num_steps": (2, 4), "stage": "tokenizer"}, "--num-steps must come with images of a transformer"),
    ({"vary": (DEPTH,), "of": Path("x")}, "must be of the decoding with --of, .* got model.network.depth"),
    ({"vary": (SCALE,), "of": Path("x"), "recipe": "adaln"}, "--recipe must not be given with --of"),
])  # fmt: skip
def test_a_wrong_ablation_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        plan_variants(AblationConfig(**options))


def test_a_factor_without_values_is_refused() -> None:
    with pytest.raises(ValueError, match="--vary must be KEY=VALUE"):
        parse_factor("--vary", "model.network.depth=")


def test_stage_2_is_trained_after_its_tokens_and_its_output_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[list[str]] = []
    answers = iter([(0, False), (3, False), (0, False), (75, False), (0, True)])

    def run(words: list[str], output: Any) -> tuple[int, bool]:
        called.append(words)
        output.write(b"maskgit: out of memory\n")
        return next(answers)

    monkeypatch.setattr("maskgit_pl.runs.variants.run_maskgit", run)
    recipe = Recipe.read("transformer", names="paper-256 square", dataset="shoes", overrides=["--trainer.max_steps=3"])
    folder = tmp_path / "runs" / "shoes-square"
    with pytest.raises(TrainingError, match=r"^maskgit: out of memory; log: .*train-transformer\.log$") as failed:
        train(recipe, folder, tokenizer=tmp_path / "tokenizer")
    assert failed.value.exit_code == 3
    shared = ["--recipe", "paper-256 square", "--dataset", "shoes", "--run", "shoes-square", "--runs-folder",
              str(tmp_path / "runs"), "--tokenizer", str(tmp_path / "tokenizer"), "--trainer.max_steps=3"]  # fmt: skip
    assert called == [["tokenize", *shared], ["train", "transformer", "--cluster", "single", *shared]]
    for _ in range(2):
        with pytest.raises(PreemptedError, match="stopped by a signal; repeat the command to resume"):
            train(recipe, folder)
