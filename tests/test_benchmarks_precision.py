"""The benchmark of precisions with a tiny model: each row is compared with float32 of its own draw method."""

import pytest

from tests.benchmark_scripts import benchmark_script


@pytest.fixture
def precision():
    with benchmark_script("precision") as script:
        yield script


def test_each_precision_is_compared_with_float32_of_its_method(precision, tiny_pretrained):
    rows = precision.measure(tiny_pretrained, num_images=6)
    assert [(row["draw method"], row["precision"]) for row in rows] == [
        (method, name) for method in ("gumbel", "inverse_cdf") for name in ("float32", "bfloat16")
    ]
    assert {row["equal tokens"] for row in rows if row["precision"] == "float32"} == {"-"}
    assert all(0 < float(row["equal tokens"].rstrip(" %")) <= 100 for row in rows if row["precision"] != "float32")
