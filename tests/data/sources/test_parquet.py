import builtins
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maskgit_pl.data.manifest import load_manifest, read_manifest_summary
from maskgit_pl.data.reader import ShardReader
from maskgit_pl.data.sources.opening import open_source
from maskgit_pl.data.writer import make_shards

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
    import io

    from PIL import Image

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


@pytest.mark.parametrize("name", ["{}/0000", "{}/data-0", "latest-test/{}-0"])
def test_a_sub_folder_names_the_split_of_files_that_name_none(tars, tmp_path, name):
    for split, start, count in (("train", 0, 6), ("validation", 10, 3), ("test", 20, 2)):
        write(tars, tmp_path / f"{name.format(split)}.parquet", start, count)
    source = open_source(tmp_path)
    assert (source.counts, source.has_splits) == ({"train": 6, "val": 3}, True)
    assert source.left_out == (f"parquet file {name.format('test')}.parquet",)
    make_shards(source, tmp_path / "out")
    assert values(tmp_path / "out", "train")[0] == list(range(6))
    assert values(tmp_path / "out", "val")[0] == [10, 11, 12]


@pytest.mark.parametrize(
    ("second", "val"), [("validation", [10, 11, 12]), ("train-val", [10, 11, 12]), (None, [20, 21])]
)
def test_files_of_a_test_split_never_become_train(tars, tmp_path, second, val):
    write(tars, tmp_path / "data-0.parquet", 0, 6)
    if second is not None:
        write(tars, tmp_path / f"{second}-0.parquet", 10, 3)
    write(tars, tmp_path / "test-0.parquet", 20, 2)
    source = open_source(tmp_path)
    assert source.left_out == (("parquet file test-0.parquet",) if second else ())
    make_shards(source, tmp_path / "out")
    assert values(tmp_path / "out", "train")[0] == list(range(6))
    assert values(tmp_path / "out", "val")[0] == val


def test_files_of_one_val_split_alone_are_refused_with_their_folder(tars, tmp_path):
    write(tars, tmp_path / "test" / "0000.parquet", 0, 3)
    with pytest.raises(ValueError, match=r"must have files of the train split, got test/0000\.parquet$"):
        open_source(tmp_path)


def test_rows_are_split_by_a_hash_where_files_are_not(tars, tmp_path):
    write(tars, tmp_path / "in" / "train.parquet", 0, 60)
    make_shards(open_source(tmp_path / "in", val_fraction=0.3), tmp_path / "out")
    train, val = values(tmp_path / "out", "train"), values(tmp_path / "out", "val")
    assert sorted(train[0] + val[0]) == list(range(60))
    assert 8 < len(val[0]) < 30
    assert train[1] == [number % 3 for number in train[0]]


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
        ({"labels": [0, 3, 1]}, r"row 1: the class must be in \[0, 3\), got 3"),
        ({"labels": [0, -1, 1]}, r"row 1: the class must be in \[0, 3\), got -1"),
        ({"labels": [0, None, 1]}, r"must have 'label' in every row, got 1 rows without"),
        ({"labels": ["a", "b", "c"]}, r"must hold class numbers, got string"),
        ({"names": ["a", "b"]}, r"must have the class names of"),
    ],
)
def test_bad_files_are_refused_by_name(tars, tmp_path, options, message):
    write(tars, tmp_path / "train-0.parquet", 0, 3)
    write(tars, tmp_path / "train-1.parquet", 3, 3, **options)
    with pytest.raises(ValueError, match=rf"train-1\.parquet.*{message}"):
        open_source(tmp_path)


def test_files_that_are_no_parquet_or_hold_only_paths_are_refused(tars, tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"train\.parquet: cannot be read"):
        open_source(tmp_path)
    table = pa.table({"label": [0, 1]})
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"must have a column of image bytes, got label \(int64\)$"):
        open_source(tmp_path)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.array([{"bytes": None, "path": "/etc/passwd"}] * 40, kind)
    pq.write_table(pa.table({"image": rows, "label": [0] * 40}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet: row \d+: the image must be stored as bytes"):
        make_shards(open_source(tmp_path, val_fraction=0.5), tmp_path / "out")


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


def varint(value: int) -> bytes:
    """Encodes an integer as Thrift does: zigzag, seven bits per byte."""
    value <<= 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def zeros(path, *, dictionary=True, size=2**21):
    """Writes 64 rows whose images are the same zeros: zstd and the dictionary compress them to 300 bytes."""
    table = pa.table({"image": pa.array([bytes(size)] * 64, pa.binary()), "label": [0] * 64})
    pq.write_table(
        table,
        path,
        compression="zstd",
        use_dictionary=dictionary,
        dictionary_pagesize_limit=2**30,
        data_page_size=2**30,
    )
    return path


def large_dictionary(path):
    return zeros(path)


def large_page(path):
    return zeros(path, dictionary=False)


def large_page_that_the_footer_denies(path):
    zeros(path, dictionary=False)
    size = varint(pq.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size)
    data = path.read_bytes()
    start = data.rindex(size)
    path.write_bytes(data[:start] + bytes([0x80] * (len(size) - 1)) + b"\0" + data[start + len(size) :])
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size == 0
    return path


def damaged_page_header(path):
    zeros(path)
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes(8) + data[12:])
    return path


def large_footer(path):
    path.write_bytes(b"PAR1" + (2**30).to_bytes(4, "little") + b"PAR1")
    return path


def many_rows(path):
    pq.write_table(pa.table({"image": pa.nulls(2**25 + 1, pa.binary()), "label": pa.nulls(2**25 + 1, pa.int8())}), path)
    return path


def unending(path):
    path.symlink_to("/dev/zero")
    return path


HOSTILE = {
    large_dictionary: "row group 0 must have pages of at most 1.05 MB, got 2.1 MB",
    large_page: "row group 0 must have pages of at most 1.05 MB, got 134 MB",
    large_page_that_the_footer_denies: "row group 0 must have pages of at most 1.05 MB, got 134 MB",
    damaged_page_header: "row group 0: damaged page header at byte 4",
    large_footer: "must have a footer of at most 33.6 MB, got 1.07 GB",
    unending: "must be a regular file",
}


@pytest.mark.slow
@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
def test_small_files_that_expand_are_refused_in_one_line(make, tars, tmp_path, monkeypatch):
    monkeypatch.setattr("maskgit_pl.data.sources.parquet._MAX_PAGE_BYTES", 2**20)
    path = make(tmp_path / "train.parquet")
    assert path.is_symlink() or path.stat().st_size < 50_000
    write(tars, tmp_path / "validation.parquet", 0, 3, struct=False, names=None)
    with pytest.raises(ValueError, match=f"parquet file .*train.parquet.*{HOSTILE[make]}") as caught:
        make_shards(open_source(tmp_path), tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_rows_that_repeat_one_large_image_are_read_few_at_a_time(tars, tmp_path, monkeypatch):
    monkeypatch.setattr("maskgit_pl.data.sources.parquet._BYTES_AT_ONCE", 2**21)
    write(tars, tmp_path / "validation.parquet", 0, 3, struct=False, names=None)
    zeros(tmp_path / "train.parquet")
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


def test_columns_with_dots_in_their_names_are_checked_as_a_part_of_the_images(tars, tmp_path, monkeypatch):
    monkeypatch.setattr("maskgit_pl.data.sources.parquet._MAX_PAGE_BYTES", 2**20)
    write(tars, tmp_path / "validation.parquet", 0, 3, struct=False, names=None)
    columns = {"image": [tars.png(0)] * 4, "image.more": [bytes(2**22)] * 4, "label": [0, 1, 0, 1]}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet", use_dictionary=False)
    with pytest.raises(ValueError, match=r"row group 0 must have pages of at most 1\.05 MB, got"):
        list(open_source(tmp_path).samples("train", range(4)))


@pytest.mark.parametrize(
    ("column", "field"), [(0, "total_compressed_size"), (1, "total_compressed_size"), (1, "data_page_offset")]
)
def test_pages_at_negative_bytes_of_a_file_are_refused(tars, tmp_path, column, field):
    path = write(tars, tmp_path / "train.parquet", 0, 4, struct=False, names=None)
    write(tars, tmp_path / "validation.parquet", 0, 3, struct=False, names=None)
    pq.write_table(pq.read_table(path), path, use_dictionary=False, write_statistics=False)
    number = varint(getattr(pq.ParquetFile(path).metadata.row_group(0).column(column), field))
    data = path.read_bytes()
    # The lowest bit of a zigzag number is its sign. Of equal numbers in the footer, the last is the column's.
    place = data.rindex(number, 0, len(data) - 8)
    path.write_bytes(data[:place] + bytes([number[0] | 1]) + data[place + 1 :])
    with pytest.raises(ValueError, match=r"train\.parquet: row group 0: pages at bytes .* must be within the file of"):
        list(open_source(tmp_path).samples("train", range(4)))


def test_more_rows_than_can_be_numbered_are_refused(tmp_path):
    many_rows(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="must have at most 33554432 rows, got 33554433"):
        open_source(tmp_path)
