"""The benchmark of the data path at tiny sizes: it runs, its tables are whole, and all see the same images."""

import json

import pytest
import torch

from tests.benchmark_scripts import benchmark_script

pytestmark = [  # webdataset leaves its tars to the garbage collector
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def data():
    with benchmark_script("data") as script:
        yield script


def test_the_benchmark_prints_its_tables_and_writes_its_figures(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of the process that runs the tests
    data.main(["--images", "2", "--rows", "300", "--repeats", "1", "--json", str(tmp_path / "figures.json")])
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures["images"]) == len(figures["tokens"]) == 2
    assert all(row["ours / usual"] > 0 for row in figures["images"] + figures["tokens"])
    assert figures["start"]["late / early"] > 0
    assert {"256 x 256", "500 x 375"} <= {size for size in data._SOURCES if f"images, {size}" in printed}
    assert printed.count("| n |") == 3


def test_both_ways_see_each_image_and_each_sequence_once(data, tmp_path):
    data.write_images(tmp_path / "images", (300, 280), 5)
    seen = []
    assert data.read_our_images(tmp_path / "images", on_batch=seen.append) == 5
    assert data.read_webdataset_images(tmp_path / "images") == 5
    assert seen[0].shape == (5, 3, 256, 256)
    reader = data.write_tokens(tmp_path / "tokens", 10)
    assert data.read_our_tokens(reader, 4) >= 10
    assert data.read_item_by_item(reader, 4) == 10


def test_only_the_time_of_the_work_counts(data):
    found = data.measure_rates(
        {"ours": lambda: sum(range(10**5)) and 10, "usual": lambda: sum(range(10**6)) and 10}, repeats=3
    )
    assert [len(values) for values in found.values()] == [3, 3]
    row = data._row("sums", found, goal="3 x")
    assert row["ours / usual"] > 3
    assert row["n"] == 3
