"""Tables of images: parquet files in a folder, and data sets in the format of the Hugging Face Hub."""

import builtins
import importlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from maskgit_pl.data.images import parse_image_header
from maskgit_pl.data.manifest import load_manifest, read_manifest_summary
from maskgit_pl.data.reader import ShardReader
from maskgit_pl.data.samples import Sample
from maskgit_pl.data.sources.opening import open_source
from maskgit_pl.data.writer import make_shards
from tests.data.sources.test_image_folder import ODD_IMAGES
from tests.data.sources.test_parquet_pages import repeated_zeros

datasets = pytest.importorskip("datasets", minversion="4")
# The streams of datasets leave files and generators to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")

NAMES = ["cat", "dog", "tench, Tinca tinca"]
README = """---
dataset_info:
  features:
  - name: picture
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
          '0': cat
          '1': dog
---
"""


def write(tars, path, start, count, *, struct=True, names=NAMES, label_field="label", image_field="image", labels=None):
    images = [tars.png(number) for number in range(start, start + count)]
    labels = [number % 3 for number in range(start, start + count)] if labels is None else labels
    column = [{"bytes": data, "path": f"{n}.png"} for n, data in enumerate(images)] if struct else images
    table = pa.table({image_field: column, label_field: labels})
    if names is not None:
        features = {label_field: {"names": names, "_type": "ClassLabel"}, image_field: {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=4)
    return path


def values(folder, split):
    """Returns the first pixel of each image, which is its number, and the labels."""
    reader = ShardReader(load_manifest(folder, split))
    pixels = [Image.open(io.BytesIO(reader.read(index))).getpixel((0, 0)) for index in range(len(reader))]
    return pixels, reader.labels(np.arange(len(reader))).tolist()


@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize("val", ["validation", "test"])
def test_files_of_both_splits_keep_rows_labels_and_class_names(tars, tmp_path, struct, val):
    for name, start, count in (("train-00000-of-00002", 0, 7), ("train-00001-of-00002", 7, 6), (f"{val}-00000", 20, 5)):
        write(tars, tmp_path / "data" / f"{name}.parquet", start, count, struct=struct)
    make_shards(open_source(tmp_path), tmp_path / "out", shard_size=5)
    assert values(tmp_path / "out", "train") == (list(range(13)), [n % 3 for n in range(13)])
    assert values(tmp_path / "out", "val") == (list(range(20, 25)), [n % 3 for n in range(20, 25)])
    assert read_manifest_summary(tmp_path / "out").classes == tuple(NAMES)
    with pytest.raises(ValueError, match=r"^val_fraction must not be set .* a train and a val split"):
        open_source(tmp_path, val_fraction=0.5)


@pytest.mark.parametrize(
    ("files", "counts", "left_out"),
    [
        ({"train/0": 6, "validation/0": 3, "test/0": 2}, {"train": 6, "val": 3}, ["test/0"]),
        ({"train/data-0": 6, "val/data-0": 3, "test/data-0": 2}, {"train": 6, "val": 3}, ["test/data-0"]),
        ({"latest-train/0": 6, "latest-test/0": 2}, {"train": 6, "val": 2}, []),
        ({"data-0": 6, "train-val-0": 3, "test-0": 2}, {"train": 6, "val": 3}, ["test-0"]),
        ({"data-0": 6, "test-0": 2}, {"train": 6, "val": 2}, []),
    ],
)
def test_the_file_or_else_its_folder_names_the_split(tars, tmp_path, files, counts, left_out):
    for name, count in files.items():
        write(tars, tmp_path / f"{name}.parquet", 0, count)
    source = open_source(tmp_path)
    assert (source.counts, source.has_splits) == (counts, True)
    assert source.left_out == tuple(f"parquet file {name}.parquet" for name in left_out)


def test_files_of_one_val_split_alone_are_refused_with_their_folder(tars, tmp_path):
    write(tars, tmp_path / "test" / "0000.parquet", 0, 3)
    with pytest.raises(ValueError, match=r"must have files of the train split, got test/0000\.parquet$"):
        open_source(tmp_path)


def test_other_columns_and_names_of_ones_own(tars, tmp_path):
    path = tmp_path / "in" / "train.parquet"
    write(tars, path, 0, 40, names=None, label_field="fine_label", image_field="img")
    with pytest.raises(ValueError, match=r"must have a column 'label', got img, fine_label; set it with --label-field"):
        open_source(path.parent)
    assert open_source(path.parent, label_field="fine_label").classes == ("0", "1", "2")
    assert open_source(path.parent, label_field="fine_label", classes=NAMES).classes == tuple(NAMES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": [0, 3, 1]}, "row 1: label must be one of 3 classes, got 3"),
        ({"labels": [0, -1, 1]}, "row 1: label must be one of 3 classes, got -1"),
        ({"labels": [0, None, 1]}, "row 1: label must be one of 3 classes, got None"),
        ({"labels": ["a", "b", "c"]}, r"must hold class numbers, got string"),
        ({"names": ["a", "b"]}, r"must have the class names of"),
    ],
)
def test_bad_files_are_refused_by_name(tars, tmp_path, options, message):
    write(tars, tmp_path / "train-0.parquet", 0, 3)
    write(tars, tmp_path / "train-1.parquet", 3, 3, **options)
    with pytest.raises(ValueError, match=rf"train-1\.parquet.*{message}"):
        open_source(tmp_path)


def test_without_pyarrow_the_way_to_install_it_is_named(tars, tmp_path, monkeypatch):
    write(tars, tmp_path / "train.parquet", 0, 3)
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r'pip install "maskgit_pl\[parquet\]"'):
        open_source(tmp_path)


def test_rows_that_repeat_one_large_image_are_read_few_at_a_time(tars, tmp_path, monkeypatch):
    monkeypatch.setattr("maskgit_pl.data.sources.tables._BYTES_AT_ONCE", 2**21)
    write(tars, tmp_path / "validation.parquet", 0, 3, struct=False, names=None)
    repeated_zeros(tmp_path / "train.parquet")
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in open_source(tmp_path).samples("train", range(64))]
    assert len(held) == 64
    assert max(held) < 16 * 2**20  # 64 of them have 128 MiB


def test_a_long_path_beside_an_image_is_not_decompressed(tars, tmp_path):
    write(tars, tmp_path / "validation.parquet", 0, 3, names=None)
    images = [{"bytes": tars.png(n), "path": "a" * 2**25 if n == 0 else ""} for n in range(4)]
    table = pa.table({"image": images, "label": [0, 1, 0, 1]})
    pq.write_table(table, tmp_path / "train.parquet", compression="zstd", use_dictionary=False, write_statistics=False)
    del images, table
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in open_source(tmp_path).samples("train", range(4))]
    assert len(held) == 4
    assert max(held) < 4 * 2**20  # the path has 32 MiB


def test_more_rows_than_can_be_numbered_are_refused(tmp_path):
    columns = {"image": pa.nulls(2**25 + 1, pa.binary()), "label": pa.nulls(2**25 + 1, pa.int8())}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="must have at most 33554432 rows, got 33554433"):
        open_source(tmp_path)


def test_images_are_bytes_and_paths_of_a_parquet_file_are_not_followed(tmp_path):
    pq.write_table(pa.table({"label": [0, 1]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"must have a column of images, got label$"):
        open_source(tmp_path)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.array([{"bytes": None, "path": "/etc/passwd"}] * 40, kind)
    pq.write_table(pa.table({"image": rows, "label": [0] * 40}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet row \d+ must be inside the data set"):
        make_shards(open_source(tmp_path, val_fraction=0.5), tmp_path / "out")


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 8), (number, 1, 2)).save(file, "PNG")
    return file.getvalue()


def write_parquet(folder: Path, split: str, images: list[bytes | str], labels: list[object]) -> None:
    """Writes the rows of a split as two parquet files, like those of the Hub."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    rows = [
        {"bytes": image, "path": f"{n}.png"} if isinstance(image, bytes) else {"bytes": None, "path": image}
        for n, image in enumerate(images)
    ]
    half = len(rows) // 2
    for number, part in enumerate((slice(0, half), slice(half, None))):
        table = pa.table({"picture": rows[part], "other": list(map(str, labels[part])), "label": labels[part]})
        pq.write_table(table, folder / "data" / f"{split}-0000{number}-of-00002.parquet")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of 20 train and 6 test rows in parquet files, with a README that has the class names."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "hub"
    write_parquet(folder, "train", [png(n) for n in range(20)], [n % 2 for n in range(20)])
    write_parquet(folder, "test", [png(100 + n) for n in range(6)], [n % 2 for n in range(6)])
    (folder / "README.md").write_text(README)
    return folder


def read(source: object, split: str, places: range) -> list[tuple[bytes, int]]:
    samples = list(source.samples(split, places))
    assert all(isinstance(sample, Sample) for sample in samples), samples
    return [(sample.data, sample.label) for sample in samples]


@pytest.fixture(params=["hf:", ""], ids=["datasets", "parquet files"])
def path(hub: Path, request: pytest.FixtureRequest) -> str:
    """The rows of ``hub`` as a source of either kind."""
    return f"hf:{hub}" if request.param else str(hub / "data")


def test_rows_keep_their_order_bytes_labels_and_splits(path):
    source = open_source(path)
    assert source.classes == (("cat", "dog") if path.startswith("hf:") else ("0", "1"))
    assert source.counts == {"train": 20, "val": 6}
    assert read(source, "train", range(20)) == [(png(n), n % 2) for n in range(20)]
    assert read(source, "val", range(6)) == [(png(100 + n), n % 2) for n in range(6)]
    with pytest.raises(ValueError, match=r"^val_fraction must not be set .* a train and a val split"):
        open_source(path, val_fraction=0.5)


def test_any_range_can_be_read_in_any_order(path):
    source = open_source(path)
    for places in (range(15, 20), range(3, 6), range(6, 9), range(20)):
        assert read(source, "train", places) == [(png(n), n % 2) for n in places]


def test_shards_have_the_rows_and_a_second_run_does_nothing(path, hub, tmp_path):
    assert make_shards(open_source(path), tmp_path / "out", shard_size=6)
    reader = ShardReader(load_manifest(tmp_path / "out", "train"))
    assert [reader.read(n) for n in range(20)] == [png(n) for n in range(20)]
    assert reader.labels(np.arange(20)).tolist() == [0, 1] * 10
    os.utime(hub / "data" / "train-00000-of-00002.parquet", (1, 1))  # a copy has another time
    assert not make_shards(open_source(path), tmp_path / "out", shard_size=6)
    write_parquet(hub, "train", [png(n) for n in range(20)], [0] * 20)
    with pytest.raises(ValueError, match="another --out"):
        make_shards(open_source(path), tmp_path / "out", shard_size=6)


@pytest.mark.slow  # worker processes import torch
def test_workers_write_the_shards_of_one_process(path, tmp_path):
    for name, workers in (("one", 1), ("two", 2)):
        make_shards(open_source(path), tmp_path / name, shard_size=6, workers=workers)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_a_named_split_is_divided_by_a_hash_of_the_rows(hub):
    source = open_source(f"hf:{hub}:train", val_fraction=0.3)
    assert sum(source.counts.values()) == 20
    both = [*read(source, "train", range(20)), *read(source, "val", range(20))]
    assert sorted(both) == sorted((png(n), n % 2) for n in range(20))
    with pytest.raises(ValueError, match=r"must have the split 'validation', got \w+, \w+"):
        open_source(f"hf:{hub}:validation")


def test_parquet_files_without_features_are_read_without_the_prefix(hub):
    (hub / "README.md").unlink()
    with pytest.raises(ValueError, match=r"a column of the type Image of datasets, got picture, .*; .*leave out hf:$"):
        open_source(f"hf:{hub}")
    assert open_source(hub / "data").counts == {"train": 20, "val": 6}


def test_a_local_folder_has_no_revision(hub):
    for name in (f"hf:{hub}@main", f"hf:{hub}@main:train"):
        with pytest.raises(
            ValueError, match=r"must have no @REVISION, since it is a local folder, got @main; leave it"
        ):
            open_source(name)


def test_the_folder_layout_gives_the_files(hub, tmp_path):
    for number in range(20):
        path = tmp_path / "folder" / ("test" if number % 5 == 0 else "train") / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    source = open_source(f"hf:{tmp_path}/folder")
    assert source.classes == ("a", "b")
    assert source.counts == {"train": 16, "val": 4}
    assert sorted(read(source, "val", range(4))) == sorted((png(n), n % 2) for n in (0, 5, 10, 15))


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A function that puts a file on a Hub in memory and returns its address; ``owner/name`` has 20 images there."""
    from fsspec.implementations.memory import MemoryFileSystem

    class Hub(MemoryFileSystem):
        protocol = "hf"
        store: ClassVar = {}
        pseudo_dirs: ClassVar = [""]

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + str(path).removeprefix("hf://").strip("/")

        def unstrip_protocol(self, name):
            return f"hf:/{self._strip_protocol(name)}"

        def glob(self, path, **options):
            return {name.lstrip("/"): details for name, details in super().glob(path, **options).items()}

    def put(name, data):
        address = f"hf://datasets/{name}"
        Hub().pipe_file(address, data)
        return address

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setitem(importlib.import_module("fsspec.registry")._registry, "hf", Hub)
    files = [put(f"owner/name@{'c' * 40}/{'ab'[n % 2]}/{n:02d}.png", png(n)) for n in range(20)]
    real = datasets.load_dataset_builder

    def load(name, revision, **options):
        return real("imagefolder", data_files={"train": files}, drop_labels=False, **options)

    monkeypatch.setattr("datasets.load_dataset_builder", load)
    return put, files


def test_images_of_a_repository_of_files_are_read(remote, tmp_path):
    source = open_source("hf:owner/name", val_fraction=0.3)
    assert source.classes == ("a", "b")
    read_images = [*read(source, "train", range(20)), *read(source, "val", range(20))]
    assert sorted(read_images) == sorted((png(n), n % 2) for n in range(20))
    make_shards(source, tmp_path / "out")
    assert sum(load_manifest(tmp_path / "out", split).samples for split in ("train", "val")) == 20


@pytest.mark.parametrize("place", ["other/name@main/a/30.png", "owner/name-2@main/a/30.png", "here.png"])
def test_a_file_outside_of_the_repository_is_not_read(remote, tmp_path, place):
    put, files = remote
    if place == "here.png":  # a README of a data set may name files of this machine
        (tmp_path / place).write_bytes(png(30))
        files.append(str(tmp_path / place))
    else:
        files.append(put(place, png(30)))
    source = open_source("hf:owner/name", val_fraction=0.3)
    samples = [*source.samples("train", range(30)), *source.samples("val", range(30))]
    (bad,) = (sample for sample in samples if not isinstance(sample, Sample))
    assert "must be inside the data set, got a path outside" in bad.error
    assert len(samples) == 21


def test_a_remote_image_that_is_too_large_or_gone_is_named(remote, monkeypatch):
    put, files = remote
    monkeypatch.setattr("maskgit_pl.data.sources.tables.MAX_IMAGE_BYTES", 1000)
    put(files[3].removeprefix("hf://datasets/"), png(3) + bytes(2000))
    source = open_source("hf:owner/name", val_fraction=0.3)
    samples = [*source.samples("train", range(20)), *source.samples("val", range(20))]
    (bad,) = (sample for sample in samples if not isinstance(sample, Sample))
    assert "must have at most 1 kB, got 1 kB" in bad.error

    # A Hub that does not answer is no damaged image, which would be left out.
    def fail(*options):
        raise OSError("no network")

    monkeypatch.setattr("datasets.utils.file_utils.xopen", fail)
    with pytest.raises(ValueError, match=r"^source hf:owner/name:train cannot be read: no network$"):
        list(source.samples("train", range(20)))


@pytest.mark.parametrize(
    ("labels", "given", "classes"),
    [
        (["wolf", "fox"], None, ("fox", "wolf")),
        (["wolf", "fox"], ["wolf", "fox"], ("wolf", "fox")),
        ([0, 2], None, ("0", "1", "2")),
        ([0, 2], ["a", "b", "c"], ("a", "b", "c")),
    ],
)
def test_labels_without_class_names_are_numbers_or_names(hub, labels, given, classes):
    (hub / "README.md").unlink()
    shutil.rmtree(hub / "data")
    write_parquet(hub, "train", [png(n) for n in range(20)], [labels[n % 2] for n in range(20)])
    (hub / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: picture\n    dtype: image\n  - name: other\n    dtype: string\n"
        f"  - name: label\n    dtype: {'string' if isinstance(labels[0], str) else 'int64'}\n---\n"
    )
    source = open_source(f"hf:{hub}", classes=given, val_fraction=0.3)
    assert source.classes == classes
    named = {label if isinstance(label, str) else classes[label] for label in labels}
    assert {classes[sample.label] for sample in source.samples("train", range(20))} == named


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_that_is_no_class_is_named_with_its_row(hub, label):
    write_parquet(hub, "test", [png(n) for n in range(6)], [0, 0, 0, 0, label, 0])
    with pytest.raises(ValueError, match=rf":test: row 4: label must be one of 2 classes, got {label}; name"):
        open_source(f"hf:{hub}")


def test_a_row_that_names_a_file_elsewhere_is_not_followed(hub, tmp_path):
    (tmp_path / "secret.png").write_bytes(png(1))
    images = [str(tmp_path / "secret.png"), *(png(n) for n in range(1, 20))]
    write_parquet(hub, "train", images, [n % 2 for n in range(20)])
    first, *others = open_source(f"hf:{hub}").samples("train", range(20))
    assert "train row 0 must be inside the data set, got a path" in first.error
    assert all(isinstance(sample, Sample) for sample in others)


def test_faults_are_one_line(hub, tmp_path):
    for name, text in (
        (f"{tmp_path}/nowhere", "cannot be read: "),
        ("", r"must be hf:OWNER/NAME\[@REVISION\]\[:SPLIT\]"),
    ):
        with pytest.raises(ValueError, match=text) as caught:
            open_source(f"hf:{name}")
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"must have a column 'kind', got picture, .*label.*set it with --label-field"):
        open_source(f"hf:{hub}", label_field="kind")
    with pytest.raises(ValueError, match="class names must not be given, since the data set has its own"):
        open_source(f"hf:{hub}", classes=["a", "b"])


def test_odd_images_are_treated_as_in_folders(path, hub):
    images = [data for data, _ in ODD_IMAGES.values()]
    write_parquet(hub, "train", images, [n % 2 for n in range(len(images))])
    source = open_source(path)
    samples = source.samples("train", range(len(images)))
    for (name, (data, expected)), sample in zip(ODD_IMAGES.items(), samples, strict=True):
        if isinstance(expected, str):
            assert expected in sample.error, name
        else:
            header = parse_image_header(sample.data, name=name)
            assert (sample.data, header.height, header.width, header.channels) == (data, *expected)


def test_code_of_a_data_set_is_not_run(tmp_path):
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="cannot be read: "):
        open_source(f"hf:{folder}")
    with pytest.raises(ValueError, match="cannot be read: "):
        open_source(f"hf:{folder}/evil.py")
    assert not (tmp_path / "ran").exists()
