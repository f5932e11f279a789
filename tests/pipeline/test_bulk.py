"""``generate_many``: images depend on their index only, with any number of processes and after any stop."""

import os
import signal
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from maskgit_pl.files import size_text
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline import bulk as bulk_module
from maskgit_pl.pipeline.bulk import BulkOptions, generate_many
from tests import forked
from tests.conftest import save_tiny_pretrained


@pytest.fixture(scope="module")
def pipe(tiny_pretrained: Path) -> MaskGIT:
    return MaskGIT.from_pretrained(tiny_pretrained)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "made" / "samples.npz"


def read(file: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(file, allow_pickle=False) as arrays:
        assert sorted(arrays.files) == ["arr_0", "arr_1"]
        return arrays["arr_0"], arrays["arr_1"]


def test_the_file_is_what_evaluators_read(pipe: MaskGIT, out: Path) -> None:
    result = generate_many(pipe, out, num_images=11, part_size=4, batch_size=3, seed=5)
    assert (result.made, result.found, result.missing_parts) == (11, 0, 0)
    images, labels = read(out)
    assert (images.shape, images.dtype) == ((11, 8, 8, 3), np.uint8)
    assert (labels.tolist(), labels.dtype) == ([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2], np.int64)
    assert (images[..., 0] == images[..., 2]).all()  # grey
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    with zipfile.ZipFile(out) as archive:
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}


def test_steps_are_told_of_each_batch(pipe: MaskGIT, out: Path) -> None:
    steps: list[tuple[int, int]] = []
    generate_many(
        pipe,
        out,
        num_images=5,
        batch_size=3,
        num_steps=2,
        on_step=lambda step: steps.append((step.step, len(step.tokens))),
    )
    assert steps == [(0, 3), (1, 3), (0, 2), (1, 2)]


def test_an_image_is_a_function_of_its_index(pipe: MaskGIT, out: Path) -> None:
    generate_many(pipe, out, num_images=11, part_size=4, batch_size=3, seed=5)
    images, labels = read(out)
    for row in (0, 5, 10):
        alone = pipe.generate([int(labels[row])], seed=5 + row, output_type="np")[0]
        assert np.abs(alone.astype(int) - images[row].astype(int)).max() <= 1  # rounding to bytes


def test_images_are_spread_evenly_over_the_classes_asked_for(pipe: MaskGIT, tmp_path: Path) -> None:
    def labels(count: int, classes: list[int | str] | None) -> list[int]:
        file = tmp_path / f"{count}-{classes}.npz"
        generate_many(pipe, file, num_images=count, classes=classes, num_steps=1)
        return read(file)[1].tolist()

    assert labels(5, ["Trouser", 0]) == [2, 2, 2, 0, 0]
    assert labels(2, None) == [0, 1]
    assert labels(6, None) == [0, 0, 1, 1, 2, 2]


def test_colour_stays_and_no_class_is_one(tmp_path: Path) -> None:
    pipe = MaskGIT.from_pretrained(save_tiny_pretrained(tmp_path / "model", in_channels=3))
    generate_many(pipe, tmp_path / "samples.npz", num_images=4, classes=[None, 1])
    images, labels = read(tmp_path / "samples.npz")
    assert labels.tolist() == [3, 3, 1, 1]
    made = pipe.generate([None, None, 1, 1], output_type="np")
    assert np.abs(made.astype(int) - images.astype(int)).max() <= 1


def test_settings_and_a_negative_class_reach_the_images(pipe: MaskGIT, tmp_path: Path) -> None:
    plain, pushed = tmp_path / "plain.npz", tmp_path / "pushed.npz"
    settings = {"num_steps": 3, "guidance": {"name": "constant", "scale": 20.0}}
    generate_many(pipe, plain, num_images=9, **settings)
    generate_many(pipe, pushed, num_images=9, negative_class="Trouser", **settings)
    made = pipe.generate(read(pushed)[1].tolist(), negative_classes="Trouser", output_type="np", **settings)
    assert np.abs(made.astype(int) - read(pushed)[0][..., :1].astype(int)).max() <= 1
    assert (read(plain)[0] != read(pushed)[0]).any()


def test_any_ranks_in_any_order_make_the_same_file(pipe: MaskGIT, tmp_path: Path) -> None:
    one, three = tmp_path / "one.npz", tmp_path / "three.npz"
    generate_many(pipe, one, num_images=23, part_size=4)
    missing = [
        generate_many(pipe, three, num_images=23, part_size=4, rank=rank, world_size=3).missing_parts
        for rank in (2, 0, 1)
    ]
    assert missing == [4, 2, 0]
    assert one.read_bytes() == three.read_bytes()


def test_a_run_goes_on_with_what_is_there(pipe: MaskGIT, tmp_path: Path, out: Path, caplog) -> None:
    class StoppedError(Exception):
        pass

    def stop_at_the_third_batch(count: int) -> None:
        made.append(count)
        if len(made) == 3:
            raise StoppedError

    made: list[int] = []
    with pytest.raises(StoppedError):
        generate_many(pipe, out, num_images=10, part_size=2, batch_size=2, on_images=stop_at_the_third_batch)
    parts = out.with_name("samples.npz.parts")
    assert sorted(path.name for path in parts.iterdir()) == ["part-000000.npz", "part-000001.npz", "plan.json"]
    damaged = parts / "part-000001.npz"
    damaged.write_bytes(damaged.read_bytes()[:100])
    starts: list[tuple[int, int]] = []
    result = generate_many(
        pipe, out, num_images=10, part_size=2, batch_size=2, on_start=lambda total, found: starts.append((total, found))
    )
    assert "part-000001.npz: damaged" in caplog.text
    assert starts == [(10, 2)]
    assert (result.made, result.found) == (8, 2)
    generate_many(pipe, tmp_path / "whole.npz", num_images=10, part_size=2, batch_size=2)
    assert (tmp_path / "whole.npz").read_bytes() == out.read_bytes()


def test_a_finished_file_is_left_as_it_is(pipe: MaskGIT, out: Path) -> None:
    generate_many(pipe, out, num_images=4)
    before = (out.stat().st_ino, out.stat().st_mtime_ns)
    out.with_name("samples.npz.parts").mkdir()  # of a run that was killed before it could take it away
    result = generate_many(pipe, out, num_images=4)
    assert (result.made, result.found, result.missing_parts) == (0, 4, 0)
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == before
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 6}, "settings: seed 5 -> 6. Use the same settings"),
        ({"num_images": 9}, "settings: count 8 -> 9"),
        ({"part_size": 3}, "settings: part_size 4 -> 3"),
        ({"classes": [0]}, r"settings: classes \[0, 1, 2\] -> \[0\]"),
        ({"num_steps": 2}, "settings: decoding.num_steps 4 -> 2"),
        ({"token_selector": "margin"}, "settings: decoding.token_selector confidence -> margin"),
        ({"negative_class": 0}, "settings: negative_class None -> 0"),
    ],
)
def test_other_images_are_not_mixed_in(pipe: MaskGIT, tmp_path: Path, changes, message) -> None:
    given = {"num_images": 8, "part_size": 4, "seed": 5}
    done, begun = tmp_path / "done.npz", tmp_path / "begun.npz"
    generate_many(pipe, done, **given)
    generate_many(pipe, begun, **given, rank=0, world_size=2)
    for file in (done, begun):
        with pytest.raises(ValueError, match=message):
            generate_many(pipe, file, **{**given, **changes})


def test_other_weights_are_another_plan(pipe: MaskGIT, tmp_path: Path) -> None:
    generate_many(pipe, tmp_path / "begun.npz", num_images=4, part_size=2, world_size=2)
    other = MaskGIT.from_pretrained(save_tiny_pretrained(tmp_path / "other", seed=1))
    with pytest.raises(ValueError, match=r"begun\.npz\.parts holds images of other settings: tokenizer .* transformer"):
        generate_many(other, tmp_path / "begun.npz", num_images=4, part_size=2, world_size=2)
    half = MaskGIT.from_pretrained(tmp_path / "other").to("cpu", dtype=torch.bfloat16)
    assert bulk_module._digest(half.transformer.network) != bulk_module._digest(other.transformer.network)


def test_a_part_of_another_plan_is_made_again(pipe: MaskGIT, tmp_path: Path) -> None:
    for seed in (0, 1):
        generate_many(pipe, tmp_path / f"{seed}.npz", num_images=4, part_size=2, seed=seed, world_size=2)
    part = (tmp_path / "1.npz.parts" / "part-000000.npz").read_bytes()
    (tmp_path / "0.npz.parts" / "part-000000.npz").write_bytes(part)
    assert generate_many(pipe, tmp_path / "0.npz", num_images=4, part_size=2).made == 4


@pytest.mark.parametrize("member", ["images", "labels"])
@pytest.mark.parametrize("own", [True, False], ids=["own part", "part of another process"])
def test_a_part_with_damaged_values_is_made_again(pipe: MaskGIT, tmp_path: Path, caplog, member, own) -> None:
    given = {"num_images": 4, "part_size": 2}
    generate_many(pipe, tmp_path / "begun.npz", **given, world_size=2)  # part 0
    part = tmp_path / "begun.npz.parts" / "part-000000.npz"
    content = bytearray(part.read_bytes())
    with zipfile.ZipFile(part) as archive:
        names = archive.namelist()
        last = archive.infolist()[names.index(f"{member}.npy") + 1].header_offset - 1
    content[last] ^= 1
    part.write_bytes(content)
    if not own:
        assert generate_many(pipe, tmp_path / "begun.npz", **given, rank=1, world_size=2).missing_parts == 1
    assert generate_many(pipe, tmp_path / "begun.npz", **given, world_size=1 if own else 2).missing_parts == 0
    assert "part-000000.npz: damaged" in caplog.text
    generate_many(pipe, tmp_path / "whole.npz", **given)
    assert (tmp_path / "whole.npz").read_bytes() == (tmp_path / "begun.npz").read_bytes()


def test_a_part_with_other_shapes_is_made_again(pipe: MaskGIT, tmp_path: Path) -> None:
    given = {"num_images": 4, "part_size": 2}
    generate_many(pipe, tmp_path / "begun.npz", **given, world_size=2)
    part = tmp_path / "begun.npz.parts" / "part-000000.npz"
    with np.load(part) as arrays:
        content = dict(arrays)
    np.savez(part, **content | {"images": content["images"][:1]})
    assert generate_many(pipe, tmp_path / "begun.npz", **given).made == 4


def test_another_process_may_be_quicker_to_put_the_file_together(pipe: MaskGIT, out: Path, monkeypatch) -> None:
    original = bulk_module._Work._put_together

    def both(work: bulk_module._Work) -> None:
        assert bulk_module._Work(work.file, work.plan).finish() == 0  # the other one
        original(work)

    calls: list[int] = []

    def first_alone(work: bulk_module._Work) -> None:
        calls.append(1)
        (both if len(calls) == 1 else original)(work)

    monkeypatch.setattr(bulk_module._Work, "_put_together", first_alone)
    assert generate_many(pipe, out, num_images=4, part_size=2).missing_parts == 0
    assert len(calls) == 2
    assert len(read(out)[1]) == 4
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 0}, r"num_images must be an integer in \[1, inf\), got 0"),
        ({"part_size": 0}, "part_size must be an integer in"),
        ({"batch_size": 0}, "batch_size must be an integer in"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, 2\), the world size, got 2"),
        ({"world_size": 0}, "world_size must be an integer in"),
        ({"seed": 2**32 - 4}, r"seed must leave room below 2\*\*32 for a seed for each image"),
        ({"classes": [1, 1]}, "classes must be different"),
        ({"classes": ["Trousers"]}, "did you mean 'Trouser'"),
        ({"num_steps": 17}, "num_steps must be <= 16"),
        ({"token_selector": "confidnce"}, "did you mean 'confidence'"),
    ],
)
def test_wrong_input_is_refused_and_nothing_written(pipe: MaskGIT, tmp_path: Path, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        generate_many(pipe, tmp_path / "samples.npz", **{"num_images": 5, **options})
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_take_the_file_are_refused(pipe: MaskGIT, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"file must end in \.npz"):
        generate_many(pipe, tmp_path / "samples.png", num_images=1)
    (tmp_path / "text").write_text("no folder")
    with pytest.raises(ValueError, match=r"cannot make the folder .* name another file"):
        generate_many(pipe, tmp_path / "text" / "samples.npz", num_images=1)
    np.savez(tmp_path / "foreign.npz", a=np.zeros(1))
    with pytest.raises(FileExistsError, match=r"foreign\.npz exists and was not written by generate_many"):
        generate_many(pipe, tmp_path / "foreign.npz", num_images=1)
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(ValueError, match=r"cannot write to the folder .*samples\.npz\.parts"):
        generate_many(pipe, tmp_path / "samples.npz", num_images=1)


def test_too_little_space_is_told_before_anything_is_made(pipe: MaskGIT, out: Path, monkeypatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    needed = 100 * 64 * (1 + 3) + (1 << 20)
    with pytest.raises(ValueError, match=f"need {size_text(needed)} of disk space, 1 kB are free"):
        generate_many(pipe, out, num_images=100)
    assert not out.parent.exists()


def test_the_file_is_put_together_in_the_memory_of_a_part(pipe: MaskGIT, tmp_path: Path) -> None:
    import tracemalloc

    options = BulkOptions(classes=[0], num_images=4000, part_size=100)
    plan = bulk_module.make_plan(pipe, options, pipe.decoding)
    work = bulk_module._Work(tmp_path / "samples.npz", plan)
    work.begin()
    for part in range(plan.num_parts):
        work.keep(part, np.full((100, 8, 8, 1), part, dtype=np.uint8))
    tracemalloc.start()
    assert work.finish() == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400_000 < 4000 * 8 * 8 * 3  # the labels, and one part
    assert read(tmp_path / "samples.npz")[0][::100, 0, 0, 0].tolist() == list(range(40))


# Real processes


def start(folder: Path, out: Path, *words: object) -> forked.Command:
    sizes = ("--num-images", 400, "--part-size", 20, "--batch-size", 7)
    launched = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    return forked.Command(["sample", folder, *sizes, "--device", "cpu", "--out", out, *words], env=environment)


def ended(process: forked.Command) -> str:
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return out


@pytest.mark.slow
def test_killed_and_shared_runs_write_the_very_same_file(tiny_pretrained: Path, tmp_path: Path) -> None:
    whole, killed, shared = (tmp_path / f"{name}.npz" for name in ("whole", "killed", "shared"))
    unbroken, process = start(tiny_pretrained, whole), start(tiny_pretrained, killed)
    parts = tmp_path / "killed.npz.parts"
    deadline = time.monotonic() + 120
    while len(list(parts.glob("part-*.npz"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not killed.exists()
    left = len(list(parts.glob("part-*.npz")))
    assert 3 <= left < 20
    assert "400 images of 3 classes in 4 steps; 400 generated by this process" in ended(unbroken)
    assert f"sampling 400 images, {20 * left} of them exist already" in ended(start(tiny_pretrained, killed))
    assert killed.read_bytes() == whole.read_bytes()
    both = [start(tiny_pretrained, shared, "--rank", rank, "--world-size", 2) for rank in (0, 1)]
    for process in both:
        ended(process)
    assert shared.read_bytes() == whole.read_bytes()
    assert not shared.with_name("shared.npz.parts").exists()
