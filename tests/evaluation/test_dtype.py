"""A model can be measured in bfloat16: its rows in the ledger are others than those of float32."""

import json
from pathlib import Path

import pytest
import torch

from maskgit_pl.evaluation.opening import create_evaluated_model, find_run, open_model
from maskgit_pl.evaluation.options import EvaluationOptions


def test_the_transformer_is_cast_and_the_tokenizer_is_not(tiny_pretrained):
    folders = find_run(tiny_pretrained, data=Path("data"))
    pipe = open_model(folders, "cpu", dtype="bfloat16")
    assert next(pipe.transformer.network.parameters()).dtype == torch.bfloat16
    assert next(pipe.tokenizer.network.parameters()).dtype == torch.float32
    assert EvaluationOptions().dtype is None


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_only_bfloat16_changes_the_identity_of_a_model(tiny_pretrained, dtype):
    folders = find_run(tiny_pretrained, data=Path("data"))
    plain, same, other = (
        create_evaluated_model(folders, open_model(folders, "cpu", dtype=each)).identity
        for each in (None, dtype, "bfloat16")
    )
    assert same == plain
    assert {name for name in plain if plain[name] != other[name]} == {"config"}
    assert json.dumps(other)
