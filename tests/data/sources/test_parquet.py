"""Folders of parquet files: rows, labels and splits are kept, and memory is bounded."""

import io
import json
import os
import random
import resource
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from maskgit_pl.data.manifest import ShardReader, load_manifest, read_manifest_summary
from maskgit_pl.data.sources.shards import open_source
from maskgit_pl.data.writer import make_shards
from tests.forked import in_own_process

NAMES = ["cat", "dog", "tench, Tinca tinca"]


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


@pytest.fixture
def folder(tars, tmp_path: Path) -> Path:
    """A train split of two files with 13 rows, and a validation split of 5."""
    for name, start, count in (("train-0", 0, 7), ("train-1", 7, 6), ("validation-0", 20, 5)):
        write(tars, tmp_path / "photos" / f"{name}.parquet", start, count)
    return tmp_path / "photos"


@pytest.mark.parametrize(("struct", "val"), [(True, "validation"), (False, "test")])
def test_files_of_both_splits_keep_rows_labels_and_class_names(tars, tmp_path, struct, val):
    for name, start, count in (("train-00000-of-00002", 0, 7), ("train-00001-of-00002", 7, 6), (f"{val}-00000", 20, 5)):
        write(tars, tmp_path / "data" / f"{name}.parquet", start, count, struct=struct)
    make_shards(open_source(tmp_path), tmp_path / "out", shard_size=5)
    assert values(tmp_path / "out", "train") == (list(range(13)), [n % 3 for n in range(13)])
    assert values(tmp_path / "out", "val") == (list(range(20, 25)), [n % 3 for n in range(20, 25)])
    assert read_manifest_summary(tmp_path / "out").classes == tuple(NAMES)
    with pytest.raises(ValueError, match=r"^val_fraction must not be set .* a train and a val split"):
        open_source(tmp_path, val_fraction=0.5)


def test_any_range_can_be_read_in_any_order(tars, folder):
    source = open_source(folder)
    for places in (range(9, 13), range(3, 5), range(5, 9), range(13)):
        images = [(sample.data, sample.label) for sample in source.samples("train", places)]
        assert images == [(tars.png(n), n % 3) for n in places]


def test_a_second_run_does_nothing_unless_a_label_changed(tars, folder, tmp_path):
    assert make_shards(open_source(folder), tmp_path / "out")
    os.utime(folder / "train-0.parquet", (1, 1))  # a copy has another time
    assert not make_shards(open_source(folder), tmp_path / "out")
    write(tars, folder / "train-0.parquet", 0, 7, labels=[1] * 7)
    with pytest.raises(ValueError, match="another --out"):
        make_shards(open_source(folder), tmp_path / "out")


def test_without_a_val_split_a_hash_of_the_rows_divides_them(tars, tmp_path):
    write(tars, tmp_path / "0.parquet", 0, 40)
    source = open_source(tmp_path, val_fraction=0.3)
    images = [sample.data for split in ("train", "val") for sample in source.samples(split, range(40))]
    assert sorted(images) == sorted(map(tars.png, range(40)))
    # Another way to divide them would make other shards of the same files.
    assert source._rows["val"][:, 1].tolist() == [1, 4, 7, 12, 15, 17, 19, 20, 21, 22, 27, 35]


@pytest.mark.parametrize(
    ("files", "counts", "left_out"),
    [
        ({"train/0": 6, "validation/0": 3, "test/0": 2}, {"train": 6, "val": 3}, ["test/0"]),
        ({"train/data-0": 6, "val/data-0": 3, "test/data-0": 2}, {"train": 6, "val": 3}, ["test/data-0"]),
        ({"default/train/0": 6, "default/test/0": 2}, {"train": 6, "val": 2}, []),
    ],
)
def test_the_file_or_else_its_folder_names_the_split(tars, tmp_path, files, counts, left_out):
    for name, count in files.items():
        write(tars, tmp_path / f"{name}.parquet", 0, count)
    source = open_source(tmp_path)
    assert (source.counts, source.has_splits) == (counts, True)
    assert source.left_out == tuple(f"parquet file {name}.parquet" for name in left_out)


def test_other_columns_and_names_of_ones_own(tars, tmp_path):
    path = tmp_path / "in" / "train.parquet"
    write(tars, path, 0, 40, names=None, label_field="fine_label", image_field="img")
    with pytest.raises(ValueError, match=r"must have a column 'label', got img, fine_label; set it with --label-field"):
        open_source(path.parent)
    assert open_source(path.parent, label_field="fine_label").classes == ("0", "1", "2")
    assert open_source(path.parent, label_field="fine_label", classes=NAMES).classes == tuple(NAMES)


@pytest.mark.parametrize(("given", "classes"), [(None, ("fox", "wolf")), (["wolf", "fox"], ("wolf", "fox"))])
def test_texts_are_class_names(tars, tmp_path, given, classes):
    write(tars, tmp_path / "train.parquet", 0, 40, names=None, labels=[("wolf", "fox")[n % 2] for n in range(40)])
    source = open_source(tmp_path, classes=given)
    assert source.classes == classes
    named = {sample.data: classes[sample.label] for sample in source.samples("train", range(40))}
    assert named.items() <= {tars.png(n): ("wolf", "fox")[n % 2] for n in range(40)}.items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": [0, 3, 1]}, r"row 1: label must be in \[0, 3\), got 3"),
        ({"labels": [0, None, 1]}, "row 1: label must be a class, got nothing"),
        ({"labels": [0.5, 1, 2]}, "must hold class numbers or names, got double"),
        ({"labels": ["x" * 2**23] * 3}, "must hold class names of at most 16 MiB"),
        ({"names": ["a", "b"]}, "must have the class names of train-0"),
    ],
)
def test_bad_files_are_refused_by_name(tars, tmp_path, options, message):
    write(tars, tmp_path / "train-0.parquet", 0, 3)
    write(tars, tmp_path / "train-1.parquet", 3, 3, **options)
    with pytest.raises(ValueError, match=rf"train-1\.parquet.*{message}"):
        open_source(tmp_path)


def test_tables_without_train_rows_val_rows_or_images_are_refused(tars, tmp_path):
    write(tars, tmp_path / "test" / "0000.parquet", 0, 3)
    with pytest.raises(ValueError, match=r"must have files of the train split, got test/0000\.parquet$"):
        open_source(tmp_path)
    write(tars, tmp_path / "train" / "0000.parquet", 0, 3)
    assert open_source(tmp_path, classes=["a", "b", "c"]).classes == ("a", "b", "c")
    path = write(tars, tmp_path / "train.parquet", 0, 3)
    pq.write_table(pq.read_table(path).slice(0, 0), tmp_path / "validation.parquet")
    with pytest.raises(ValueError, match="the val split must have at least 1 row, got 0"):
        open_source(tmp_path)
    pq.write_table(pa.table({"label": [0, 1]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"must have a column of images, got label$"):
        open_source(tmp_path)


def test_without_pyarrow_the_way_to_install_it_is_named(tars, tmp_path, monkeypatch):
    write(tars, tmp_path / "in" / "train.parquet", 0, 3)
    (tmp_path / "pyarrow.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r'pip install "maskgit_pl\[parquet\]"'):
        open_source(tmp_path / "in")


def write_zeros(path: Path, dictionary: bool) -> None:
    """Writes 16 rows, which are read at once: the same zeros, which zstd and the dictionary compress to a few bytes."""
    table = pa.table({"image": pa.array([bytes(2**23)] * 16, pa.binary()), "label": [0] * 16})
    options = {"compression": "zstd", "dictionary_pagesize_limit": 2**30, "data_page_size": 2**30}
    pq.write_table(table, path, use_dictionary=dictionary, **options)


@pytest.mark.parametrize("dictionary", [True, False], ids=["a dictionary", "one large page"])
def test_pages_that_expand_end_the_child_at_its_bound_and_not_this_process(tars, tmp_path, monkeypatch, dictionary):
    write(tars, tmp_path / "validation.parquet", 0, 3, struct=False, names=None)
    path = tmp_path / "train.parquet"
    in_own_process(write_zeros, path, dictionary)
    assert path.stat().st_size < 50_000
    monkeypatch.setattr("maskgit_pl.data.sources.parquet._CHILD_BYTES", 2**27)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"train\.parquet cannot be read: its pages take more than 134 MB of memory"):
        list(open_source(tmp_path).samples("train", range(16)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # kB


def test_a_child_that_dies_is_an_error_of_one_line(tars, tmp_path, monkeypatch):
    write(tars, tmp_path / "train.parquet", 0, 3)
    (tmp_path / "abort.py").write_text("import os; os.abort()")
    monkeypatch.setattr("maskgit_pl.data.sources.parquet_child.__file__", str(tmp_path / "abort.py"))
    with pytest.raises(ValueError, match=r"train\.parquet cannot be read: it is damaged, and pyarrow ended with -6$"):
        open_source(tmp_path)


@pytest.mark.slow
def test_a_damaged_file_gives_its_samples_or_one_line(tars, tmp_path):
    path = write(tars, tmp_path / "train.parquet", 0, 8, struct=False)
    write(tars, tmp_path / "validation.parquet", 8, 3, struct=False)
    whole, chance, errors = path.read_bytes(), random.Random(0), list[str]()
    for _ in range(20):
        data = bytearray(whole)
        for _ in range(3):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        try:
            assert len(list(open_source(tmp_path).samples("train", range(8)))) <= 8
        except ValueError as error:
            errors.append(str(error))
    assert errors
    assert not any("\n" in error for error in errors)


@pytest.mark.parametrize(
    ("content", "message"), [(b"PAR1 no", "Parquet file size is 7 bytes"), (None, "must be a regular file")]
)
def test_a_file_that_is_no_parquet_is_named(tmp_path, content, message):
    path = tmp_path / "train.parquet"
    path.symlink_to("/dev/zero") if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{message}.*|:train\.parquet cannot be read: .*{message}"):
        open_source(tmp_path)


def test_paths_in_a_file_are_not_followed(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.array([{"bytes": None, "path": "/etc/passwd"}] * 40, kind)
    pq.write_table(pa.table({"image": rows, "label": [0] * 40}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet row \d+ must be inside the data set"):
        make_shards(open_source(tmp_path, val_fraction=0.5), tmp_path / "out")
