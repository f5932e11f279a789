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


def test_the_order_of_keys_does_not_change_a_digest() -> None:
    assert digest_of({"a": 1, "b": [2, 3]}) == digest_of({"b": (2, 3), "a": 1}) != digest_of({"a": 1, "b": [3, 2]})
