import json

from maskgit_pl.runs.recipe_schema import build_schema, load_schema


def test_the_schemas_are_those_of_the_configurations():
    for kind in ("tokenizer", "transformer", "autoregressive"):
        assert load_schema(kind) == json.loads(json.dumps(build_schema(kind))), "run recipe_schema.write_schemas()"
