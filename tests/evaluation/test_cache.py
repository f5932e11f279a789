from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maskgit_pl.evaluation.cache import Arrays, cached, digest_of


def test_only_what_the_folder_lacks_is_made(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def make(names: Sequence[str]) -> dict[str, Arrays]:
        asked.append(list(names))
        return {name: {"a": np.full(3, len(name))} for name in names}

    keys = {"val-lite0": {"seed": 0}, "val-timm:x/y": {"seed": 0}}
    for folder in (tmp_path / "deep", tmp_path / "deep", None):
        found = cached(folder, keys, make)
        assert {name: arrays["a"].tolist() for name, arrays in found.items()} == {
            name: [len(name)] * 3 for name in keys
        }
    cached(tmp_path / "deep", {"val-lite0": {"seed": 1}, "val-timm:x/y": {"seed": 0}}, make)
    assert asked == [list(keys), list(keys), ["val-lite0"]]


def test_a_damaged_or_other_file_is_made_again(tmp_path: Path, caplog) -> None:
    def make(names: Sequence[str]) -> dict[str, Arrays]:
        return {name: {"a": np.arange(3)} for name in names}

    cached(tmp_path, {"x": {}}, make)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    method = whole.index(b"PK\x01\x02") + 10  # of compression, in the directory: none that zipfile knows
    for damaged in (b"", whole[:-30], whole[:method] + b"\x63" + whole[method + 1 :]):
        file.write_bytes(damaged)
        caplog.clear()
        assert cached(tmp_path, {"x": {}}, make)["x"]["a"].tolist() == [0, 1, 2]
        assert "is damaged" in caplog.text
        assert file.read_bytes() == whole
    cached(tmp_path, {"x": {}}, make, required=("a", "b"))
    assert "it must hold a, b, got a" in caplog.text


def test_the_order_of_keys_does_not_change_a_digest() -> None:
    assert digest_of({"a": 1, "b": [2, 3]}) == digest_of({"b": (2, 3), "a": 1}) != digest_of({"a": 1, "b": [3, 2]})
