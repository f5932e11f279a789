"""Data sets of the Hub: they are downloaded once, or refused in one line."""

import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from maskgit_pl.cli import main
from maskgit_pl.data.sources.shards import open_source
from tests.data.sources.test_archives import png
from tests.local_hub import local_hub


def table(start: int, count: int, **labels: list[int]) -> bytes:
    file = pa.BufferOutputStream()
    numbers = range(start, start + count)
    columns = {"image": [{"bytes": png(n), "path": None} for n in numbers], "label": [n % 2 for n in numbers], **labels}
    pq.write_table(pa.table(columns), file)
    return file.getvalue().to_pybytes()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on this machine; the working directory is empty."""
    monkeypatch.chdir(tmp_path)
    with local_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", hub.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        hub.repositories["alice/tables"] = {
            "data/train-0.parquet": table(0, 20),
            "data/test-0.parquet": table(20, 6, label=[-1] * 6),
            "tables.py": b"raise SystemExit",
        }
        hub.repositories["alice/files"] = {f"{'ab'[n % 2]}/{n}.png": png(n) for n in range(20)} | {"README.md": b"x"}
        hub.repositories["alice/both"] = {f"{name}/train-0.parquet": table(0, 9) for name in ("small", "large")}
        yield hub


def test_a_split_of_parquet_files_is_downloaded_once(hub, tmp_path):
    for downloads in (1, 1):
        source = open_source("hf:alice/tables:train", val_fraction=0.3)
        images = [sample.data for split in ("train", "val") for sample in source.samples(split, range(20))]
        assert sorted(images) == sorted(map(png, range(20)))
        assert sum("/resolve/" in line and line.startswith("GET") for line in hub.requests) == downloads
    assert {path.name for path in tmp_path.glob("data/raw/*/data/*")} == {"train-0.parquet"}
    with pytest.raises(ValueError, match=r"test-0\.parquet: row 0: label must be in \[0, 100000\), got -1$"):
        open_source("hf:alice/tables")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alice/nothing", "must be a data set of the Hub, with a connection to it, got: 404 "),
        ("", r"must be hf:OWNER/NAME\[@REVISION\]\[:SPLIT\]"),
        ("a/b/c", "must be a data set of the Hub, with a connection to it, got: Repo id must be"),
        ("alice/both", "must have parquet files of one configuration, got large, small; they are downloaded: name the"),
    ],
)
def test_a_data_set_that_cannot_be_read_is_one_line(hub, name, message, capsys):
    assert main(["data", "make", f"hf:{name}", "--out", "out"]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("maskgit data make: "))
    assert re.search(message, line)
