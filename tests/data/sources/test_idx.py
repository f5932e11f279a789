import gzip
import shutil
import tracemalloc

import pytest
import torch

from maskgit_pl.data.images import decode_image
from maskgit_pl.data.sources.idx import IdxFiles
from maskgit_pl.data.sources.opening import open_source


def test_order_pixels_and_class_names_are_kept(idx):
    source = IdxFiles(idx, classes=["a", "b", "c"])
    samples = list(source.samples("train", range(12)))
    images = torch.stack([decode_image(sample.data, channels=1, name="x") for sample in samples])
    assert images.shape == (12, 1, 6, 7)
    assert images[:, 0, 0, 0].tolist() == list(range(12))
    assert [sample.label for sample in samples] == [0, 1, 2] * 4
    assert (source.classes, source.counts) == (("a", "b", "c"), {"train": 12, "val": 5})


def test_several_data_sets_in_a_folder_are_refused(idx, tmp_path):
    shutil.copy(idx / "train-images-idx3-ubyte", idx / "train-images.idx3-ubyte.gz")  # another spelling is no other set
    assert IdxFiles(idx).counts == {"train": 12, "val": 5}
    with pytest.raises(ValueError, match=r"^val_fraction must not be set .* a train and a val split"):
        open_source(idx, val_fraction=0.5)
    for name in ("images-idx3", "labels-idx1"):
        shutil.copy(idx / f"train-{name}-ubyte", idx / f"emnist-letters-train-{name}-ubyte")
    with pytest.raises(ValueError, match="must have one data set, got emnist-letters-train, train for the train split"):
        IdxFiles(idx)


def test_a_file_of_another_length_is_refused_by_name(idx):
    path = idx / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte must hold the 12 values of \(12,\), got 11"):
        open_source(idx)


def idx_header(*shape: int) -> bytes:
    return bytes((0, 0, 8, len(shape))) + b"".join(size.to_bytes(4, "big") for size in shape)


HOSTILE_IDX = {
    "its header is small": (lambda: idx_header(5, 6, 7) + bytes(2**24), r"the 210 values of \(5, 6, 7\), got more"),
    "its header is large": (
        lambda: idx_header(2**31, 6, 7),
        r"must hold 1 byte to 1.07 GB, got a header of \(2147483648,",
    ),
    "its header is empty": (lambda: idx_header(5, 0, 7), r"must hold 1 byte to 1.07 GB, got a header of \(5, 0, 7\)"),
    "it is short": (lambda: idx_header(5, 6, 7) + bytes(9), r"the 210 values of \(5, 6, 7\), got 9"),
    "it is no header": (lambda: b"\0\0\x0d\3" + bytes(2**24), "must hold bytes in 3 dimensions"),
}


@pytest.mark.parametrize("name", HOSTILE_IDX)
@pytest.mark.parametrize("packed", [True, False])
def test_no_more_of_an_idx_file_is_unpacked_than_its_header_says(idx, name, packed):
    make, text = HOSTILE_IDX[name]
    for path in idx.glob("t10k-images*"):
        path.unlink()
    path = idx / f"t10k-images-idx3-ubyte{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(make(), 1) if packed else make())
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"IDX file \S+t10k-images-idx3-ubyte\S* .*{text}") as caught:
        open_source(idx)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert "\n" not in str(caught.value)


def test_a_gzip_file_that_is_cut_or_damaged_is_named(idx):
    path = idx / "t10k-images-idx3-ubyte.gz"
    data = path.read_bytes()
    for spoilt in (data[:-9], data[:20] + b"\xff\xff\xff" + data[23:]):
        path.write_bytes(spoilt)
        with pytest.raises(
            ValueError, match=r"IDX file \S+t10k-images-idx3-ubyte.gz (must be a complete gzip file|must hold)"
        ):
            open_source(idx)
