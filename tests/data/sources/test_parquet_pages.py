"""Parquet files made to exhaust memory: each is refused in one line before a page is decompressed."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maskgit_pl.data.sources.opening import open_source
from maskgit_pl.data.sources.parquet_pages import check_parquet


def varint(value: int) -> bytes:
    """Encodes an integer as Thrift does: zigzag, seven bits per byte."""
    value <<= 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def repeated_zeros(path, *, dictionary=True, size=2**21):
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


def large_page_that_the_footer_denies(path):
    repeated_zeros(path, dictionary=False)
    size = varint(pq.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size)
    data = path.read_bytes()
    start = data.rindex(size)
    path.write_bytes(data[:start] + bytes([0x80] * (len(size) - 1)) + b"\0" + data[start + len(size) :])
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size == 0
    return path


def damaged_page_header(path):
    repeated_zeros(path)
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes(8) + data[12:])
    return path


def large_footer(path):
    path.write_bytes(b"PAR1" + (2**30).to_bytes(4, "little") + b"PAR1")
    return path


def no_parquet(path):
    path.write_bytes(b"PAR1 no")
    return path


def unending(path):
    path.symlink_to("/dev/zero")
    return path


HOSTILE = {
    repeated_zeros: "its pages must have at most 1.05 MB, got 2.1 MB",
    lambda path: repeated_zeros(path, dictionary=False): "its pages must have at most 1.05 MB, got 134 MB",
    large_page_that_the_footer_denies: "its pages must have at most 1.05 MB, got 134 MB",
    damaged_page_header: "damaged page header at byte 4",
    large_footer: "its footer must have at most 33.6 MB, got 1.07 GB",
    no_parquet: "Parquet file size is 7 bytes",
    unending: "must be a regular file",
}


@pytest.mark.slow
@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
def test_small_files_that_expand_are_refused_in_one_line(make, tmp_path, monkeypatch):
    monkeypatch.setattr("maskgit_pl.data.sources.parquet_pages._MAX_PAGE_BYTES", 2**20)
    path = make(tmp_path / "train.parquet")
    assert path.is_symlink() or path.stat().st_size < 50_000
    before = pa.total_allocated_bytes()
    with pytest.raises(ValueError, match=rf"^source .*:train\.parquet cannot be read: .*{HOSTILE[make]}") as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)
    assert pa.total_allocated_bytes() - before < 2**20


@pytest.mark.parametrize(
    ("column", "field"), [(0, "total_compressed_size"), (1, "total_compressed_size"), (1, "data_page_offset")]
)
def test_pages_at_negative_bytes_of_a_file_are_refused(tmp_path, column, field):
    path, columns = (
        tmp_path / "train.parquet",
        {"image": [bytes(range(60 + n)) for n in range(4)], "label": [0, 1, 2, 0]},
    )
    pq.write_table(pa.table(columns), path, use_dictionary=False, write_statistics=False, store_schema=False)
    number = varint(getattr(pq.ParquetFile(path).metadata.row_group(0).column(column), field))
    data = path.read_bytes()
    # The lowest bit of a zigzag number is its sign. Of equal numbers in the footer, the last is the column's.
    place = data.rindex(number, 0, len(data) - 8)
    path.write_bytes(data[:place] + bytes([number[0] | 1]) + data[place + 1 :])
    with pytest.raises(ValueError, match=r"^its pages must lie within its \d+ bytes, got"):
        check_parquet(path)


def test_a_file_that_is_not_hostile_gives_its_rows_and_its_largest_page(tmp_path):
    pq.write_table(pa.table({"image": [bytes(5000)] * 3, "label": [0, 1, 2]}), tmp_path / "train.parquet")
    rows, largest = check_parquet(tmp_path / "train.parquet")
    assert rows == 3
    assert 5000 <= largest < 5100
