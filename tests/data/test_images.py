"""Pixels of every format and mode, hostile images, crops and resizing."""

import io
import json
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from maskgit_pl.data.image_bytes import UnreadableImageError, check_complete, read_image_file
from maskgit_pl.data.images import crop_to_shape, decode_image, fit_image, parse_image_header
from tests.hostile_images import (
    REFUSED,
    SPECIAL,
    many_chunks,
    many_scans,
    many_segments,
    png,
    save,
    sparse,
    write_refused,
    zeros,
)

RED = (200, 30, 40)


def noise(height: int, width: int, channels: int) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("L", 3), ("RGB", 1), ("RGB", 3)])
def test_every_format_agrees_with_pil(kind, mode, channels):
    data = save(Image.fromarray(noise(16, 24, 3)).convert(mode), kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("L" if channels == 1 else "RGB"))
    image = decode_image(data, channels=channels, name="x").permute(1, 2, 0).squeeze(-1).numpy()
    assert np.array_equal(image, expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("channels", [1, 3])
def test_exif_rotation_is_applied(kind, orientation, channels):
    quarters = np.zeros((16, 32, 3), np.uint8)
    quarters[:8, :16], quarters[8:, :16], quarters[:8, 16:] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(Image.fromarray(quarters), kind, exif=exif.tobytes())
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("L" if channels == 1 else "RGB")
    image, header = decode_image(data, channels=channels, name="x"), parse_image_header(data, name="x")
    assert tuple(image.shape[-2:]) == (header.height, header.width) == ((32, 16) if orientation > 4 else (16, 32))
    assert np.array_equal(image.permute(1, 2, 0).squeeze(-1).numpy(), np.asarray(expected))


DEEP = png(8, 8, zlib.compress(bytes(8 * 17)), depth=16, colour=0, tRNS=b"\0\0")  # black, which is transparent
BROKEN_EXIF = b"Exif\0\0MM\0*\0\0\xff\xff spoilt"
MODES = {  # an image of one colour, the colour in RGB, and the largest difference
    "1 bit": (save(Image.new("1", (8, 8), 1), "PNG"), (255, 255, 255), 0),
    "16 bits": (save(Image.fromarray(np.full((8, 8), 0x80FF, np.uint16)), "PNG"), (0x80, 0x80, 0x80), 0),
    "palette": (save(Image.new("RGB", (8, 8), RED).convert("P", palette=Image.Palette.ADAPTIVE), "PNG"), RED, 0),
    "palette + alpha": (save(Image.new("P", (8, 8), 0), "PNG", transparency=0), (255, 255, 255), 0),
    "transparent grey": (save(Image.new("L", (8, 8), 77), "PNG", transparency=77), (255, 255, 255), 0),
    "transparent colour of 16 bits": (DEEP, (0, 0, 0), 0),
    "broken EXIF": (save(Image.new("RGB", (8, 8), RED), "JPEG", exif=BROKEN_EXIF, quality=100), RED, 1),
    "transparent WebP": (save(Image.new("RGBA", (8, 8), (*RED, 0)), "WEBP", lossless=True), (255, 255, 255), 0),
    "RGB JPEG": (save(Image.new("RGB", (8, 8), RED), "JPEG", keep_rgb=True, quality=100), RED, 1),
    "CMYK JPEG": (save(Image.new("RGB", (8, 8), RED).convert("CMYK"), "JPEG", quality=100), RED, 6),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_the_right_rgb(mode):
    data, pixel, difference = MODES[mode]
    image = decode_image(data, channels=3, name="x")
    assert (image[:, 4, 4].int() - torch.tensor(pixel)).abs().max() <= difference


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_every_hostile_image_is_refused_by_name_and_reason(name):
    make, reason, words = REFUSED[name]
    data, called = make(), f"shard.tar:{name}"
    for read in (
        lambda: decode_image(data, channels=3, name=called),
        lambda: parse_image_header(data, name=called),
        lambda: decode_image(data, channels=1, name=called, reuse_memory=True),
    ):
        with pytest.raises(UnreadableImageError, match=rf"image shard\.tar:{name} .*{re.escape(words)}") as caught:
            read()
        assert caught.value.reason == reason
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", SPECIAL, ids=lambda make: make.__name__)
def test_a_file_that_has_no_end_is_refused_before_it_is_read(make, tmp_path):
    path = make(tmp_path)
    with pytest.raises(UnreadableImageError, match=f"image x {SPECIAL[make]}"):
        read_image_file(path, name="x")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("progressive", [False, True])
def test_every_cut_of_an_image_is_found_without_decoding_it(kind, progressive):
    data = save(Image.fromarray(noise(24, 24, 3)), kind, progressive=progressive)
    check_complete(data, name="x")
    check_complete(data + b"\n", name="x")
    for length in (*range(12, len(data), 37), len(data) - 1):
        with pytest.raises(UnreadableImageError, match=rf"x is truncated after {length} bytes"):
            check_complete(data[:length], name="x")


MEASURE = """
import json, sys, time
from pathlib import Path
from maskgit_pl.data.image_bytes import UnreadableImageError, read_image_file
from maskgit_pl.data.images import decode_image, fit_image, parse_image_header
from maskgit_pl.pipeline.regions import image_pixels

def kilobytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

def load(read):
    try:
        read()
    except UnreadableImageError:
        pass

def all_ways(path):
    name = path.name
    header = lambda: parse_image_header(read_image_file(path, name=name), name=name)
    square = lambda: fit_image(decode_image(path.read_bytes(), channels=3, name=name), image_size=64, crop=None)
    ways = [header, lambda: image_pixels(path, channels=3)]
    return ways if path.stat().st_size > 2**30 else [*ways, square]

for path in sorted(Path(sys.argv[1]).glob("good.*")):
    list(map(load, all_ways(path)))  # imports what decoding needs
measured = {}
for path in sorted(Path(sys.argv[1]).glob("bad-*")):
    for number, read in enumerate(all_ways(path)):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins again
        before, start = kilobytes("VmRSS"), time.process_time()
        load(read)
        megabytes = (kilobytes("VmHWM") - before) // 1024
        measured[f"{path.name} {number}"] = megabytes, round(time.process_time() - start, 2)
print(json.dumps(measured))
"""


def _can_measure() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@pytest.mark.slow  # 10 s; imports torch in a fresh process
@pytest.mark.skipif(not _can_measure(), reason="the high-water mark of memory cannot be reset here")
def test_no_hostile_image_takes_200_mb_or_2_s_however_it_is_opened(tmp_path):
    for name in REFUSED:
        write_refused(tmp_path, name).rename(tmp_path / f"bad-{name}")
    sparse(tmp_path).rename(tmp_path / "bad-sparse.png")
    bomb = zeros(300 * 2**20)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    bad = {
        "strip.png": png(60000, 1, zeros(180001)),
        "profile.png": png(8, 8, zeros(200), iCCP=b"x\0\0" + bomb),
        "text.png": png(8, 8, zeros(200), zTXt=b"x\0\0" + bomb),
        "palette.png": png(8, 8, zeros(72), colour=3, PLTE=bytes(768), iCCP=b"x\0\0" + bomb, zTXt=b"x\0\0" + bomb),
        "texts.png": many_chunks(b"tEXt", 90_000),
        "exif.jpg": many_segments(0xE1, b"Exif\0\0" + bytes(2**16 - 10), 600),
        "filler.jpg": b"\xff\xd8" + b"\xff" * 2 * 10**6 + save(Image.new("RGB", (8, 8)), "JPEG")[2:],
        "profile.jpg": save(Image.new("RGB", (8, 8)), "JPEG", icc_profile=profile + bytes(15 * 2**20)),
        "short.png": png(8000, 7999, zeros(8000)),  # within the limit, without the pixels
        "scans.jpg": many_scans(4000, 100),  # as many as are read
        "control.png": png(7000, 7000, zeros(7000 * 7001), colour=0),  # 147 MB of RGB pixels
    }
    for name, data in bad.items():
        (tmp_path / f"bad-{name}").write_bytes(data)
    for kind in ("JPEG", "PNG", "WEBP"):
        (tmp_path / f"good.{kind}").write_bytes(save(Image.fromarray(noise(80, 90, 3)), kind))
    (tmp_path / "good.P").write_bytes(save(Image.new("P", (80, 80)), "PNG"))
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)
    control = [measured.pop(f"bad-control.png {way}")[0] for way in range(3)]
    assert max(control) > 130, "this measures nothing"
    assert len(measured) == 3 * (len(REFUSED | bad) - 1) + 2
    assert max(megabytes for megabytes, _ in measured.values()) < 200, measured
    assert max(seconds for _, seconds in measured.values()) < 2, measured


def photo(**options) -> bytes:
    """Returns a JPEG of soft shapes, 256 x 256."""
    soft = torch.nn.functional.interpolate(torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0)), 256)
    return save(Image.fromarray((soft[0].permute(1, 2, 0) * 255).byte().numpy()), "JPEG", quality=90, **options)


def zeroed(data: bytes, generator: np.random.Generator) -> bytes:
    place = int(generator.integers(700, len(data) - 1026))
    return data[:place] + bytes(1024) + data[place + 1024 :]


@pytest.mark.parametrize("progressive", [False, True])
def test_zeroed_bytes_of_a_jpeg_are_mostly_found(progressive, capfd):
    generator, data = np.random.default_rng(0), photo(progressive=progressive)
    num_refused = 0
    for _ in range(40):
        try:
            decode_image(zeroed(data, generator), channels=3, name="x")
        except UnreadableImageError as error:
            num_refused += error.reason == "damaged"
    assert num_refused >= 28  # PIL and torchvision find 0 to 3
    assert "Corrupt" not in capfd.readouterr().err  # libjpeg does not write to the terminal


@pytest.mark.parametrize("source", [(500, 375), (300, 400), (64, 64)])
def test_resampling_is_bicubic_as_in_pil(source):
    data = save(Image.fromarray(noise(*source[::-1], 3)).resize(source), "JPEG", quality=95)
    side = min(source)
    left, top = (source[0] - side) // 2, (source[1] - side) // 2
    square = Image.open(io.BytesIO(data)).crop((left, top, left + side, top + side))
    expected = np.asarray(square.resize((96, 96), Image.Resampling.BICUBIC), dtype=int)
    image = fit_image(decode_image(data, channels=3, name="x"), image_size=96, crop=None)
    assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_size_follow_one_another_through_the_same_memory(channels):
    for size in ((64, 48), (500, 375), (30, 30), (2400, 2400), (96, 96)):
        for orientation in (1, 6):
            exif = Image.Exif()
            exif[0x0112] = orientation
            data = save(Image.fromarray(noise(*size, 3)), "JPEG", exif=exif.tobytes())
            image = decode_image(data, channels=channels, name="x", reuse_memory=True)
            assert torch.equal(image, decode_image(data, channels=channels, name="x"))


SIZES = [8, (8, 16), (24, 40), (7, 3), (1, 9)]


@pytest.mark.parametrize("shape", [(40, 60), (5, 9), (1, 300), (300, 1), (24, 40)])
@pytest.mark.parametrize("size", SIZES)
def test_the_crop_is_the_largest_part_of_the_shape(shape, size):
    part = crop_to_shape(torch.zeros(1, *shape), image_size=size)
    rows, columns = (size, size) if isinstance(size, int) else size
    (height, width), (high, wide) = shape, part.shape[-2:]
    assert (high, wide) == (height, max(1, wide)) or (high, wide) == (max(1, high), width)
    # Within half a pixel of the ratio, unless the side would vanish.
    assert min(abs(high - wide * rows / columns), abs(wide - high * columns / rows)) <= 0.5 or 1 in (high, wide)
