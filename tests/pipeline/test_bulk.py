"""``generate_many``: images depend on their index only, with any number of processes."""

import os
import signal
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.bulk import BulkOptions, BulkResult, generate_many
from tests import forked
from tests.conftest import save_tiny_pretrained


def many(pipe: MaskGIT, file: Path, *, on_images=lambda count: None, **options) -> BulkResult:
    return generate_many(pipe, file, BulkOptions(**options), on_images=on_images)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "made" / "samples.npz"


def read_file(file: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(file, allow_pickle=False) as arrays:
        assert sorted(arrays.files) == ["arr_0", "arr_1"]
        return arrays["arr_0"], arrays["arr_1"]


def check_equal(images: np.ndarray, expected: np.ndarray) -> None:
    """Checks that grey or colour images are equal up to rounding to bytes."""
    assert np.abs(images.astype(int) - expected.astype(int)).max() <= 1


def test_the_file_has_the_layout_that_evaluators_read(pipe: MaskGIT, out: Path) -> None:
    result = many(pipe, out, num_images=11, batch_size=3, seed=5)
    assert (result.made, result.missing_parts) == (11, 0)
    images, labels = read_file(out)
    assert (images.shape, images.dtype) == ((11, 8, 8, 3), np.uint8)
    assert (labels.tolist(), labels.dtype) == ([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2], np.int64)
    assert (images[..., 0] == images[..., 2]).all()  # grey
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    with zipfile.ZipFile(out) as archive:
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}
    for row in (0, 5, 10):
        check_equal(images[row], pipe.generate([int(labels[row])], seed=5 + row, output_type="np")[0])


@pytest.mark.parametrize(
    ("count", "classes", "labels"),
    [(5, ["Trouser", 0], [2, 2, 2, 0, 0]), (2, None, [0, 1]), (6, None, [0, 0, 1, 1, 2, 2])],
)
def test_images_are_spread_evenly_over_the_classes(pipe: MaskGIT, out: Path, count, classes, labels) -> None:
    many(pipe, out, num_images=count, classes=classes, decoding=pipe.decoding_with(num_steps=1))
    assert read_file(out)[1].tolist() == labels


def test_colour_images_and_no_class_are_written(tmp_path: Path) -> None:
    pipe = MaskGIT.from_pretrained(save_tiny_pretrained(tmp_path / "model", in_channels=3))
    many(pipe, tmp_path / "samples.npz", num_images=4, classes=[None, 1])
    images, labels = read_file(tmp_path / "samples.npz")
    assert labels.tolist() == [3, 3, 1, 1]
    check_equal(images, pipe.generate([None, None, 1, 1], output_type="np"))


@pytest.mark.parametrize("kind", ["tiny_pretrained", "tiny_autoregressive"])
def test_settings_and_a_negative_class_reach_the_images(request, out: Path, kind) -> None:
    pipe = MaskGIT.from_pretrained(request.getfixturevalue(kind))
    settings = {"top_k": 8, "guidance": {"name": "constant", "scale": 20.0}}
    many(pipe, out, num_images=9, negative_class="Trouser", decoding=pipe.decoding_with(**settings))
    images, labels = read_file(out)
    check_equal(images, pipe.generate(labels.tolist(), negative_class="Trouser", output_type="np", **settings))


def test_tokens_are_those_of_the_images_with_any_number_of_ranks(pipe: MaskGIT, tmp_path: Path) -> None:
    options = {"num_images": 7, "batch_size": 3, "keep_tokens": True}
    many(pipe, tmp_path / "single.npz", **options)
    for rank in range(3):
        many(pipe, tmp_path / "shared.npz", rank=rank, world_size=3, **options)
    single, shared = (np.load(tmp_path / name) for name in ("single.npz", "shared.npz"))
    assert single["tokens"].dtype == np.int32
    assert np.array_equal(single["tokens"], shared["tokens"])
    assert np.array_equal(single["arr_0"], shared["arr_0"])
    decoded = pipe.tokenizer.decode(torch.from_numpy(single["tokens"].astype(np.int64)))
    check_equal(single["arr_0"][..., 0], decoded[:, 0].numpy())


def test_any_ranks_in_any_order_write_the_same_file(pipe: MaskGIT, tmp_path: Path) -> None:
    single, shared = tmp_path / "single.npz", tmp_path / "shared.npz"
    many(pipe, single, num_images=23)
    results = [many(pipe, shared, num_images=23, rank=rank, world_size=3) for rank in (2, 0, 1)]
    assert [result.missing_parts for result in results] == [2, 1, 0]
    assert sorted(result.made for result in results) == [7, 8, 8]
    assert single.read_bytes() == shared.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shared.npz", "single.npz"]


def test_a_stopped_process_starts_over_and_finished_parts_are_used(pipe: MaskGIT, out: Path) -> None:
    class StoppedError(Exception):
        pass

    def stop(count: int) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        many(pipe, out, num_images=10, on_images=stop, world_size=2)
    assert not list(out.parent.rglob("*.*"))[1:]  # only the folder of the parts
    assert many(pipe, out, num_images=10, rank=1, world_size=2).missing_parts == 1
    assert many(pipe, out, num_images=10, rank=1, world_size=2).made == 0
    result = many(pipe, out, num_images=10, world_size=2)
    assert (result.made, result.missing_parts) == (5, 0)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_files_of_the_user_in_the_folder_of_the_parts_stay(pipe: MaskGIT, tmp_path: Path) -> None:
    (tmp_path / "a.npz.parts").mkdir()
    (tmp_path / "a.npz.parts" / "thesis.txt").touch()
    many(pipe, tmp_path / "a.npz", num_images=4, seed=1, rank=1, world_size=2)
    many(pipe, tmp_path / "a.npz", num_images=4)
    assert [path.name for path in (tmp_path / "a.npz.parts").iterdir()] == ["thesis.txt"]


def test_parts_of_other_settings_are_not_used(pipe: MaskGIT, tmp_path: Path) -> None:
    many(pipe, tmp_path / "a.npz", num_images=4, seed=1, rank=1, world_size=2)
    other = MaskGIT.from_pretrained(save_tiny_pretrained(tmp_path / "other", seed=1))
    for model, seed in ((pipe, 2), (other, 1)):
        assert many(model, tmp_path / "a.npz", num_images=4, seed=seed, world_size=2).missing_parts == 1


def test_a_finished_file_is_kept_and_refused_for_other_settings(pipe: MaskGIT, out: Path) -> None:
    given = {"num_images": 8, "seed": 5}
    many(pipe, out, **given)
    before = (out.stat().st_ino, out.stat().st_mtime_ns)
    assert many(pipe, out, **given).made == 0
    for changes, message in (
        ({"seed": 6}, "settings: seed 5 -> 6. Use the same settings"),
        ({"classes": [0]}, r"settings: classes \[0, 1, 2\] -> \[0\]"),
        (
            {"decoding": pipe.decoding_with(token_selector="margin")},
            "settings: decoding.token_selector 'confidence' -> 'margin'",
        ),
        ({"negative_class": 0}, "settings: negative_class None -> 0"),
    ):
        with pytest.raises(ValueError, match=message):
            many(pipe, out, **{**given, **changes})
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 0}, r"num_images must be an integer in \[1, inf\), got 0"),
        ({"rank": 2, "world_size": 2}, r"rank must be an integer in \[0, 2\), got 2"),
        ({"seed": 2**32 - 4}, r"seed must be an integer in \[0, 4294967291\]"),
        ({"classes": [1, 1]}, "classes must be different"),
        ({"classes": ["Trousers"]}, "did you mean 'Trouser'"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(pipe: MaskGIT, tmp_path: Path, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        many(pipe, tmp_path / "samples.npz", **{"num_images": 5, **options})
    assert list(tmp_path.iterdir()) == []


def test_foreign_files_and_full_disks_are_refused(pipe: MaskGIT, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"file must end in \.npz"):
        many(pipe, tmp_path / "samples.png", num_images=1)
    np.savez(tmp_path / "foreign.npz", a=np.zeros(1))
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("foreign", "text"):
        with pytest.raises(FileExistsError, match=rf"{name}\.npz exists and was not written by generate_many"):
            many(pipe, tmp_path / f"{name}.npz", num_images=1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"samples\.npz needs 19.2 kB of disk space, 1 kB are free"):
        many(pipe, tmp_path / "samples.npz", num_images=100)


@pytest.mark.slow
def test_processes_write_the_same_file_after_a_kill(tiny_pretrained: Path, tmp_path: Path) -> None:
    def start(out: Path, rank: int = 0, world_size: int = 1) -> forked.Command:
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world_size)}
        options = ("--num-images", 400, "--batch-size", 7, "--device", "cpu", "--out", out)
        return forked.Command(["sample", tiny_pretrained, *options], env=environment)

    def end(process: forked.Command) -> str:
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        return out

    single, shared = tmp_path / "single.npz", tmp_path / "shared.npz"
    process = start(shared)
    while not list(tmp_path.glob(".shared.npz.*.partial")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not shared.exists()
    assert "400 images of 3 classes; 400 generated by this process" in end(start(single))
    ranks = [start(shared, rank, 2) for rank in (0, 1)]
    assert "shared.npz" in "".join(map(end, ranks))
    assert shared.read_bytes() == single.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shared.npz", "single.npz"]
