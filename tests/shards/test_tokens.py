import dataclasses

import numpy as np
import pytest

from maskgit_pl.shards.tokens import StoreDescription, TokenWriter, complete_store, is_complete, open_store

DESCRIPTION = StoreDescription((2, 3), 256, 28, "tokenizer", "data", ("a", "b"), {"train": 10})
TOKENS = np.arange(60, dtype=np.int64).reshape(10, 6)
LABELS = np.arange(10) % 2


def write(folder, description=DESCRIPTION):
    writer = TokenWriter(folder, "train", description, LABELS)
    writer.write(TOKENS[writer.rows_done :])
    writer.finish()
    complete_store(folder, description)


def test_rows_come_back_as_written(tmp_path):
    write(tmp_path)
    reader = open_store(tmp_path, data="data", tokenizer="tokenizer")["train"]
    tokens, labels = reader.read(np.array([7, 0, 7]))
    assert (tokens.dtype, tokens.tolist()) == (np.int64, TOKENS[[7, 0, 7]].tolist())
    assert labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize(("num_codes", "bytes_a_token"), [(2**16, 2), (2**16 + 1, 4)])
def test_token_width_follows_the_codebook(tmp_path, num_codes, bytes_a_token):
    write(tmp_path, dataclasses.replace(DESCRIPTION, num_codes=num_codes))
    assert np.load(tmp_path / "train-tokens.npy").dtype.itemsize == bytes_a_token


@pytest.mark.parametrize("wanted", [{"data": "other"}, {"tokenizer": "other"}, {"image_size": 32}])
def test_foreign_store_is_refused_with_the_way_out(tmp_path, wanted):
    write(tmp_path)
    with pytest.raises(ValueError, match=r"must be .* got .*make tokenize"):
        open_store(tmp_path, **{"data": "data", **wanted})


def test_unfinished_store_is_refused_and_gone_on_with(tmp_path):
    writer = TokenWriter(tmp_path, "train", DESCRIPTION, LABELS)
    writer.write(TOKENS[:4])
    writer.flush()
    writer.write(TOKENS[4:6])  # never flushed
    with pytest.raises(FileNotFoundError, match="make tokenize"):
        open_store(tmp_path, data="data")
    assert TokenWriter(tmp_path, "train", DESCRIPTION, LABELS).rows_done == 4
    write(tmp_path)
    tokens, _ = open_store(tmp_path, data="data")["train"].read(np.arange(10))
    assert np.array_equal(tokens, TOKENS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store.json", "train-labels.npy", "train-tokens.npy"]


def test_rows_of_another_tokenizer_are_not_gone_on_with(tmp_path):
    writer = TokenWriter(tmp_path, "train", DESCRIPTION, LABELS)
    writer.write(TOKENS[:4])
    writer.flush()
    other = dataclasses.replace(DESCRIPTION, tokenizer="other")
    assert TokenWriter(tmp_path, "train", other, LABELS).rows_done == 0


def test_finished_store_is_known_and_a_new_writer_takes_it_back(tmp_path):
    write(tmp_path)
    other = dataclasses.replace(DESCRIPTION, data="other")
    assert is_complete(tmp_path, DESCRIPTION)
    assert not is_complete(tmp_path, other)
    TokenWriter(tmp_path, "train", other, LABELS)
    assert not is_complete(tmp_path, DESCRIPTION)


def test_wrong_rows_are_refused(tmp_path):
    writer = TokenWriter(tmp_path, "train", DESCRIPTION, LABELS)
    for bad in (TOKENS[:, :5], TOKENS + 250, np.vstack([TOKENS, TOKENS])):
        with pytest.raises(ValueError, match="tokens"):
            writer.write(bad)
    with pytest.raises(ValueError, match="0 of 10 rows"):
        writer.finish()
