"""The benchmark of precisions with a tiny model: each row is compared with float32 of its own draw method."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def precision(monkeypatch: pytest.MonkeyPatch):
    """The script as a module; its folder is on the path, as when it is run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import precision

    yield precision
    for name in ("precision", "measuring"):
        sys.modules.pop(name, None)


def test_each_precision_is_compared_with_float32_of_its_method(precision, tiny_pretrained):
    rows = precision.measure(tiny_pretrained, num_images=6)
    assert [(row["draw method"], row["precision"]) for row in rows] == [
        (method, name) for method in ("gumbel", "inverse_cdf") for name in ("float32", "bfloat16", "int8")
    ]
    assert {row["equal tokens"] for row in rows if row["precision"] == "float32"} == {"-"}
    assert all(0 < float(row["equal tokens"].rstrip(" %")) <= 100 for row in rows if row["precision"] != "float32")
