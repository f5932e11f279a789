import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from maskgit_pl.shards.images import (
    UnreadableImageError,
    decode_image,
    encode_png,
    fit_square,
    from_pil,
    load_square,
    read_header,
)
from tests.hostile_images import chunk, png, zeros

RED = (200, 30, 40)


def save(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int, width: int, channels: int) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_gives_its_own_pixels_back(channels):
    pixels = noise(9, 7, channels)
    image = decode_image(save(Image.fromarray(pixels), "PNG"), channels=channels, name="x")
    assert image.shape == (channels, 9, 7)
    assert np.array_equal(image.permute(1, 2, 0).squeeze(-1).numpy(), pixels)
    assert torch.equal(decode_image(encode_png(image), channels=channels, name="x"), image)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_format_agrees_with_pil(kind, mode, channels):
    data = save(Image.fromarray(noise(16, 24, 3)).convert(mode), kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("L" if channels == 1 else "RGB"))
    image = decode_image(data, channels=channels, name="x").permute(1, 2, 0).squeeze(-1).numpy()
    assert np.array_equal(image, expected)


@pytest.mark.parametrize(
    "data",
    [
        save(Image.new("RGB", (8, 8), RED).convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        save(Image.new("RGBA", (8, 8), (*RED, 255)), "PNG"),
        save(Image.new("RGBA", (8, 8), (*RED, 255)), "WEBP", lossless=True),
    ],
    ids=["palette", "alpha", "webp"],
)
def test_palette_and_alpha_become_the_right_rgb(data):
    image = decode_image(data, channels=3, name="x")
    assert image[:, 4, 4].tolist() == list(RED)


def test_cmyk_jpeg_becomes_the_right_rgb():
    data = save(Image.new("RGB", (16, 16), RED).convert("CMYK"), "JPEG", quality=100)
    pixel = decode_image(data, channels=3, name="x")[:, 8, 8]
    assert (pixel.int() - torch.tensor(RED)).abs().max() <= 6


def test_transparent_pixels_become_white():
    data = save(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "PNG")
    assert decode_image(data, channels=3, name="x").min() == 255


def test_sixteen_bit_grey_is_scaled_not_clipped():
    data = save(Image.fromarray(np.full((8, 8), 0x80FF, np.uint16)), "PNG")
    assert decode_image(data, channels=3, name="x").unique().tolist() == [0x80]


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
    image, header = decode_image(data, channels=channels, name="x"), read_header(data, name="x")
    assert tuple(image.shape[-2:]) == (header.height, header.width) == ((32, 16) if orientation > 4 else (16, 32))
    assert np.array_equal(image.permute(1, 2, 0).squeeze(-1).numpy(), np.asarray(expected))


def test_spoilt_exif_means_upright():
    data = save(Image.new("RGB", (16, 8), RED), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff spoilt")
    assert decode_image(data, channels=3, name="x").shape == (3, 8, 16)
    assert read_header(data, name="x").width == 16


@pytest.mark.parametrize(
    ("data", "pixel"),
    [
        (save(Image.new("1", (8, 8), 1), "PNG"), (255, 255, 255)),
        (save(Image.new("LA", (8, 8), (77, 255)), "PNG"), (77, 77, 77)),
        (save(Image.new("P", (8, 8), 0), "PNG", transparency=0), (255, 255, 255)),
        (save(Image.new("RGBA", (8, 8), (*RED, 0)), "WEBP", lossless=True), (255, 255, 255)),
        (save(Image.new("L", (8, 8), 77), "JPEG"), (77, 77, 77)),
        (save(Image.new("RGB", (8, 8), RED), "JPEG", keep_rgb=True, quality=100), RED),
        (save(Image.new("RGB", (8, 8), RED), "JPEG", progressive=True, quality=100, subsampling=0), RED),
    ],
    ids=["1 bit", "grey + alpha", "palette + alpha", "WebP + alpha", "grey JPEG", "RGB JPEG", "progressive JPEG"],
)
def test_every_mode_becomes_the_right_rgb(data, pixel):
    image = decode_image(data, channels=3, name="x")
    assert (image[:, 4, 4].int() - torch.tensor(pixel)).abs().max() <= 1


def test_sixteen_bit_colour_keeps_its_upper_byte():
    pixels = struct.pack(">HHH", 0xC811, 0x1EFE, 0x2880) * 8
    rows = (b"\0" + pixels) * 8
    data = png(8, 8, zlib.compress(rows), depth=16, colour=2)
    assert decode_image(data, channels=3, name="x")[:, 4, 4].tolist() == [0xC8, 0x1E, 0x28]


def packed(values: list[int], depth: int) -> bytes:
    """One row of a PNG: no filter, then the values, the first in the highest bits."""
    bits = "".join(format(value, f"0{depth}b") for value in values)
    bits = bits.ljust(-(-len(bits) // 8) * 8, "0")
    return b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")


def colour_key(depth: int, colour: int) -> tuple[bytes, list[int]]:
    """A PNG of four pixels whose second is transparent, and what the others are in RGB's first channel."""
    top = 2**depth - 1
    kept = [0, top, top - 1]  # the transparent value is next to the first: it differs in the lowest bit alone
    clear = 1
    shown = [value * 255 // top if depth <= 8 else value >> 8 for value in kept]
    words = [kept[0], clear, *kept[1:]]
    if depth == 1:
        words, shown = [0, 1, 0, 0], [0, 0, 0]
    if colour in (0, 3):
        values, chunk = words, struct.pack(">H", clear)
    elif colour == 2:
        values = [each for value in words for each in (value, 0, top)]
        chunk = struct.pack(">HHH", clear, 0, top)
    else:  # alpha of its own
        grey = colour == 4
        values = [e for n, value in enumerate(words) for e in ([value] * (1 if grey else 3) + [0 if n == 1 else top])]
        chunk = b""
    chunks = {"tRNS": chunk} if chunk else {}
    if colour == 3:
        palette = [word * 255 // top for word in range(top + 1)]
        chunks = {"PLTE": bytes(each for value in palette for each in (value, 0, 255)), "tRNS": b"\xff\x00"}
    return png(4, 1, zlib.compress(packed(values, depth)), depth=depth, colour=colour, **chunks), shown


PNG_KINDS = [(depth, 0) for depth in (1, 2, 4, 8, 16)] + [(depth, 3) for depth in (1, 2, 4, 8)]
PNG_KINDS += [(depth, colour) for colour in (2, 4, 6) for depth in (8, 16)]


@pytest.mark.parametrize(("depth", "colour"), PNG_KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_pixel_of_every_kind_of_png_is_white_and_no_other(depth, colour, channels):
    data, shown = colour_key(depth, colour)
    image = decode_image(data, channels=channels, name="x")[:, 0]  # (C, 4)
    assert image[:, 1].tolist() == [255] * channels
    if channels == 3 or colour not in (2, 3):
        assert image[0, [0, 2, 3]].tolist() == shown
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = data.replace(chunk(b"IEND", b""), chunk(b"eXIf", exif.tobytes()[6:]) + chunk(b"IEND", b""))
    assert torch.equal(decode_image(turned, channels=channels, name="x")[:, 0], image.flip(1))


def test_a_sixteen_bit_picture_of_pil_keeps_its_transparency():
    picture = Image.open(io.BytesIO(colour_key(16, 0)[0]))
    assert from_pil(picture, channels=1)[0, 0].tolist() == [0, 255, 255, 0xFF]


@pytest.mark.parametrize("shape", [(1, 60000), (60000, 1)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_strip_of_one_pixel_is_decoded(kind, shape):
    data = save(Image.new("RGB", shape, RED), kind, quality=100)
    image = load_square(data, image_size=16, channels=3, crop=None, name="x")
    assert image.shape == (3, 16, 16)
    assert (image.int() - torch.tensor(RED)[:, None, None]).abs().max() <= 6


def test_of_several_pictures_in_a_jpeg_the_first_is_the_photo():
    data = save(Image.new("RGB", (8, 8), RED), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    assert (decode_image(data, channels=3, name="x")[:, 4, 4].int() - torch.tensor(RED)).abs().max() <= 6
    assert read_header(data, name="x").format == "JPEG"


def frames(kind: str) -> bytes:
    pictures = [Image.new("RGB", (8, 8), value) for value in ("red", "blue")]
    return save(pictures[0], kind, save_all=True, append_images=pictures[1:])


def large_jpeg() -> bytes:
    data = bytearray(save(Image.new("RGB", (8, 8)), "JPEG", progressive=True))
    size = data.index(b"\xff\xc2") + 5
    data[size : size + 4] = struct.pack(">HH", 65000, 65000)
    return bytes(data)


def large_webp() -> bytes:
    data = bytearray(save(Image.new("RGB", (8, 8)), "WEBP"))  # its size: 14 bits each, 10 bytes into the VP8 chunk
    start = data.index(b"VP8 ") + 14
    data[start : start + 4] = struct.pack("<HH", 16383, 16383)
    return bytes(data)


REFUSED = {
    "empty.jpg": (b"", "empty"),
    "page.jpg": (b"<html><body>404 Not Found</body></html>", "not an image"),
    "drawing.jpg": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9"/>', "not an image"),
    "still.gif": (save(Image.new("RGB", (8, 8)), "GIF"), "not an image"),
    "animated.gif": (frames("GIF"), "not an image"),
    "photo.bmp": (save(Image.new("RGB", (8, 8)), "BMP"), "not an image"),
    "animated.png": (frames("PNG"), "animated"),
    "animated.webp": (frames("WEBP"), "animated"),
    "large.png": (png(13000, 13000, zeros(13000 * 13001), colour=0), "too large"),
    "large.jpg": (large_jpeg(), "too large"),
    "large.webp": (large_webp(), "too large"),
    "signature.png": (b"\x89PNG\r\n\x1a\n", "damaged"),
    "two-bytes.jpg": (b"\xff\xd8\xff", "damaged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_still_image_of_ours_is_refused_by_name_and_reason(name):
    data, reason = REFUSED[name]
    with pytest.raises(UnreadableImageError, match=f"shard.tar:{name}") as caught:
        decode_image(data, channels=3, name=f"shard.tar:{name}")
    assert caught.value.reason == reason
    with pytest.raises(UnreadableImageError, match=f"shard.tar:{name}"):
        read_header(data, name=f"shard.tar:{name}")


_MEASURE = """
import json, sys
from pathlib import Path
from maskgit_pl.shards.images import UnreadableImageError, load_square

def kilobytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

def load(path):
    try:
        load_square(path.read_bytes(), image_size=64, channels=3, crop=None, name=path.name)
    except UnreadableImageError:
        pass

for path in sorted(Path(sys.argv[1]).glob("good.*")):
    load(path)  # imports what decoding needs
grown = {}
for path in sorted(Path(sys.argv[1]).glob("bad-*")):
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins again
    before = kilobytes("VmRSS")
    load(path)
    grown[path.name] = (kilobytes("VmHWM") - before) // 1024
print(json.dumps(grown))
"""


def _can_measure() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@pytest.mark.slow  # 4 s; imports torch in a fresh process
@pytest.mark.skipif(not _can_measure(), reason="the high-water mark of memory cannot be reset here")
def test_no_hostile_image_takes_200_mb(tmp_path):
    bad = {name: data for name, (data, _) in REFUSED.items()}
    bad["strip.png"] = png(60000, 1, zeros(180001))
    bomb = zeros(300 * 2**20)
    bad["profile.png"] = png(8, 8, zeros(200), iCCP=b"x\0\0" + bomb)
    bad["text.png"] = png(8, 8, zeros(200), zTXt=b"x\0\0" + bomb)
    bad["palette.png"] = png(8, 8, zeros(72), colour=3, PLTE=bytes(768), iCCP=b"x\0\0" + bomb, zTXt=b"x\0\0" + bomb)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    bad["profile.jpg"] = save(Image.new("RGB", (8, 8)), "JPEG", icc_profile=profile + bytes(15 * 2**20))
    bad["short.png"] = png(8000, 7999, zeros(8000))  # within the limit, without the pixels
    for name, data in bad.items():
        (tmp_path / f"bad-{name}").write_bytes(data)
    for kind in ("JPEG", "PNG", "WEBP"):
        (tmp_path / f"good.{kind}").write_bytes(save(Image.fromarray(noise(80, 90, 3)), kind))
    (tmp_path / "bad-control.png").write_bytes(png(7000, 7000, zeros(7000 * 7001), colour=0))  # 147 MB of RGB pixels
    (tmp_path / "good.P").write_bytes(save(Image.new("P", (80, 80)), "PNG"))
    command = [sys.executable, "-c", _MEASURE, str(tmp_path)]
    grown = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
    print(grown)
    assert grown.pop("bad-control.png") > 130, "this measures nothing"
    assert grown.keys() == {f"bad-{name}" for name in bad}
    assert max(grown.values()) < 200, grown


def photo(**options) -> bytes:
    """A JPEG of soft shapes, 256 x 256."""
    soft = torch.nn.functional.interpolate(torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0)), 256)
    return save(Image.fromarray((soft[0].permute(1, 2, 0) * 255).byte().numpy()), "JPEG", quality=90, **options)


def flipped(data: bytes, generator: np.random.Generator) -> bytes:
    spoilt = bytearray(data)
    for place in generator.integers(700, len(data) - 2, 8):
        spoilt[place] ^= int(generator.integers(1, 256))
    return bytes(spoilt)


def zeroed(data: bytes, generator: np.random.Generator) -> bytes:
    place = int(generator.integers(700, len(data) - 1026))
    return data[:place] + bytes(1024) + data[place + 1024 :]


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("spoil", [flipped, zeroed])
def test_flipped_and_zeroed_bytes_of_a_jpeg_are_mostly_found(spoil, progressive, capfd):
    generator, data = np.random.default_rng(0), photo(progressive=progressive)
    found = 0
    for _ in range(40):
        try:
            decode_image(spoil(data, generator), channels=3, name="x")
        except UnreadableImageError as error:
            found += error.reason == "damaged"
    print(f"{spoil.__name__}, {'progressive' if progressive else 'baseline'}: {found} of 40")
    assert found >= 28  # PIL and torchvision find 0 to 3
    assert "Corrupt" not in capfd.readouterr().err  # libjpeg does not write to the terminal


@pytest.mark.parametrize("spoil", [flipped, zeroed])
def test_flipped_and_zeroed_bytes_of_a_png_are_all_found(spoil):
    generator, data = np.random.default_rng(0), save(Image.fromarray(noise(64, 64, 3)), "PNG")
    for _ in range(20):
        with pytest.raises(UnreadableImageError):
            decode_image(spoil(data, generator), channels=3, name="x")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_pixels_are_refused_by_name(kind):
    data = save(Image.fromarray(noise(64, 64, 3)), kind)
    with pytest.raises(UnreadableImageError, match="shard:x"):
        decode_image(data[: len(data) // 2], channels=3, name="shard:x")


def test_image_that_fits_is_untouched():
    image = torch.from_numpy(noise(8, 8, 3)).permute(2, 0, 1)
    assert torch.equal(fit_square(image, image_size=8, crop=(0.9, 0.9)), image)


def test_crop_cuts_the_square_that_was_asked_for():
    image = torch.arange(4 * 10, dtype=torch.uint8).reshape(1, 4, 10)
    assert torch.equal(fit_square(image, image_size=4, crop=None), image[:, :, 3:7])
    assert torch.equal(fit_square(image, image_size=4, crop=(0.5, 0.0)), image[:, :, :4])
    assert torch.equal(fit_square(image, image_size=4, crop=(0.5, 1 - 2**-24)), image[:, :, 6:])


@pytest.mark.parametrize("shape", [(40, 60), (5, 9)])
def test_other_sizes_are_resized(shape):
    image = torch.full((3, *shape), 77, dtype=torch.uint8)
    resized = fit_square(image, image_size=16, crop=None)
    assert resized.shape == (3, 16, 16)
    assert resized.unique().tolist() == [77]


@pytest.mark.parametrize("source", [(500, 375), (300, 400), (64, 64)])
def test_resampling_is_pil_s_bicubic(source):
    data = save(Image.fromarray(noise(*source[::-1], 3)).resize(source), "JPEG", quality=95)
    side = min(source)
    left, top = (source[0] - side) // 2, (source[1] - side) // 2
    square = Image.open(io.BytesIO(data)).crop((left, top, left + side, top + side))
    expected = np.asarray(square.resize((96, 96), Image.Resampling.BICUBIC), dtype=int)
    image = load_square(data, image_size=96, channels=3, crop=None, name="x")
    assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_size_follow_one_another_through_the_same_memory(channels):
    for size in ((64, 48), (500, 375), (30, 30), (2400, 2400), (96, 96)):
        for orientation in (1, 6):
            exif = Image.Exif()
            exif[0x0112] = orientation
            data = save(Image.fromarray(noise(*size, 3)), "JPEG", exif=exif.tobytes())
            image = load_square(data, image_size=32, channels=channels, crop=(0.3, 0.6), name="x")
            whole = decode_image(data, channels=channels, name="x")
            assert torch.equal(image, fit_square(whole, image_size=32, crop=(0.3, 0.6)))
