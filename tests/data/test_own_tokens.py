import os

import numpy as np
import pytest

from maskgit_pl.data.own_tokens import write_own_tokens
from maskgit_pl.data.token_store import open_store

TOKENS = np.arange(40 * 16).reshape(40, 4, 2, 2)


def test_arrays_of_a_folder_become_one_store_in_the_order_of_their_names(tmp_path):
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "b.npy", TOKENS[15:].reshape(25, 16).astype(np.int16))
    np.save(tmp_path / "in" / "a.npy", TOKENS[:15])
    (tmp_path / "labels.txt").write_text("\n".join(str(row % 3) for row in range(40)))
    options = {"grid": (4, 2, 2), "codebook_size": 640, "labels": tmp_path / "labels.txt"}
    write_own_tokens(tmp_path / "in", tmp_path / "out", **options)
    seen = []
    for reader in open_store(tmp_path / "out").values():
        tokens, labels = reader.read(np.arange(len(reader)))
        rows = tokens[:, 0] // 16
        assert (tokens == TOKENS.reshape(40, 16)[rows]).all()
        assert (labels == rows % 3).all()
        seen += rows.tolist()
    assert sorted(seen) == list(range(40))


WRONG = {  # words of the message -> arrays of tokens and labels, and other options
    r"must be in \[0, 640\), got 0 to 640": (TOKENS + 1, None, {}),
    r"must be in \[0, 640\), got -1 to 638": (TOKENS - 1, None, {}),
    "grid must fit": (TOKENS, None, {"grid": (3, 5)}),
    r"must be 40 integers in .* got \(39,\)": (TOKENS, np.zeros(39, int), {}),
    r"must be 40 integers in .* from -1 to -1": (TOKENS, np.full(40, -1), {}),
    "must be integers, got float64": (TOKENS / 1, None, {}),
    "cannot be read .*object": (np.array([{}], dtype=object), None, {}),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arrays_are_refused_in_one_line_and_nothing_is_written(tmp_path, message):
    tokens, labels, options = WRONG[message]
    np.save(tmp_path / "tokens.npy", tokens, allow_pickle=True)
    if labels is not None:
        np.save(tmp_path / "labels.npy", labels)
        options = {"labels": tmp_path / "labels.npy", **options}
    options = {"grid": (4, 2, 2), "codebook_size": 640} | options
    with pytest.raises(ValueError, match=message) as caught:
        write_own_tokens(tmp_path / "tokens.npy", tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_truncated_array_is_refused(tmp_path):
    np.save(tmp_path / "tokens.npy", TOKENS)
    os.truncate(tmp_path / "tokens.npy", 1000)
    with pytest.raises(ValueError, match=r"tokens\.npy: cannot be read"):
        write_own_tokens(tmp_path / "tokens.npy", tmp_path / "out", grid=(16,), codebook_size=640)


def test_folders_train_and_val_set_the_splits(tmp_path):
    for name, rows in {"train/a": TOKENS[3:30], "train/b": TOKENS[30:], "val/a": TOKENS[:3]}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / f"{name}.npy", rows)
    np.save(tmp_path / "labels.npy", np.arange(40))
    write_own_tokens(tmp_path, tmp_path / "out", grid=(4, 2, 2), codebook_size=640, labels=tmp_path / "labels.npy")
    stores = open_store(tmp_path / "out")
    for split, rows, first in (("train", TOKENS[3:], 0), ("val", TOKENS[:3], 37)):
        tokens, labels = stores[split].read(np.arange(len(rows)))
        assert (tokens == rows.reshape(-1, 16)).all()
        assert (labels == np.arange(first, first + len(rows))).all()


def test_the_val_split_has_samples_of_every_kind(tmp_path):
    kinds = np.arange(400) % 4  # every fourth sample is of one kind, as if each image had four clips
    np.save(tmp_path / "tokens.npy", np.repeat(kinds[:, None], 4, axis=1))
    write_own_tokens(tmp_path / "tokens.npy", tmp_path / "out", grid=(2, 2), codebook_size=4)
    tokens, _ = open_store(tmp_path / "out")["val"].read(np.arange(40))
    assert np.bincount(tokens[:, 0], minlength=4).min() >= 4
