"""The token store of a run, and the ranks that share its making."""

from collections import Counter

import pytest

from maskgit_pl import runs
from maskgit_pl.data.token_store import read_description
from tests.runs.test_fitting import recipe


@pytest.mark.slow
def test_tokens_are_made_and_training_reads_them(tiny_shards, tiny_pretrained, tmp_path):
    where = {"run": tmp_path / "one", "data": tiny_shards, "tokenizer": tiny_pretrained / "tokenizer"}
    assert runs.tokenize(recipe("transformer"), **where) is None
    reads_tokens, told = recipe("transformer", data__source="tokens"), Counter()
    options = runs.TokenizeOptions(flip=True, batch_size=4)
    store = runs.tokenize(
        reads_tokens, **where, options=options, bars=lambda title, total, **_: lambda rows: told.update({title: rows})
    )
    assert store.parent == tmp_path / "tokens"
    assert store == (tmp_path / "one" / "tokens").resolve()
    assert told == {"tokens of train": 120, "tokens of val": 24}
    assert runs.fit(reads_tokens, **where).step == 1


@pytest.mark.slow
def test_few_images_are_trained_on_the_views_that_were_tokenized(tiny_shards, tiny_pretrained, tmp_path):
    where = {"run": tmp_path / "one", "data": tiny_shards, "tokenizer": tiny_pretrained / "tokenizer"}
    few = recipe("transformer", data__source="tokens", max_passes=1)
    assert read_description(runs.tokenize(few, **where)).crops == 8
    assert runs.fit(few, **where).step == 1
