import pytest
import yaml
from jsonschema import Draft202012Validator

from maskgit_pl.runs.recipe import STAGES, list_recipes
from maskgit_pl.runs.settings import json_schema


def faults(kind: str, recipe: object) -> list[str]:
    """Returns what an independent checker of JSON Schema says of a recipe."""
    return [error.message for error in Draft202012Validator(json_schema(kind)).iter_errors(recipe)]


@pytest.mark.parametrize("stage", [*STAGES, "cluster"])
def test_every_recipe_is_valid_in_an_editor(stage):
    files = list_recipes(stage)
    assert files
    for name, file in files.items():
        recipe = yaml.safe_load(file.read_text()) or {}
        for kind in (stage,) if stage in STAGES else STAGES:
            assert faults(kind, recipe) == [], name


@pytest.mark.parametrize("kind", ["tokenizer", "transformer", "autoregressive"])
def test_the_schemas_are_schemas_and_refuse_mistakes(kind):
    Draft202012Validator.check_schema(json_schema(kind))
    for wrong in ({"trainer": {"max_step": 3}}, {"trainer": {"max_steps": "many"}}, {"modle": {}}, {"data": 7}):
        assert faults(kind, wrong)
        assert not faults(kind, {"trainer": {"max_steps": 3}})
