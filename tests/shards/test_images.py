import io

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit_pl.shards.images import UnreadableImageError, decode_image, encode_png, fit_square, read_header

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
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_rotation_is_applied(kind, orientation):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(Image.fromarray(pixels), kind, exif=exif.tobytes())
    image, header = decode_image(data, channels=3, name="x"), read_header(data, name="x")
    assert tuple(image.shape[-2:]) == (header.height, header.width) == ((32, 16) if orientation > 4 else (16, 32))
    corner = {1: (0, 0), 3: (0, -1), 6: (0, 0), 8: (-1, 0)}[orientation]  # where the bright half lies now
    assert image[0][corner] > 200


def test_gif_html_empty_and_animation_are_refused_by_name():
    frames = [Image.new("RGB", (8, 8), value) for value in ("red", "blue")]
    animated = save(frames[0], "PNG", save_all=True, append_images=frames[1:])
    for data in (save(frames[0], "GIF"), b"<html>", b"", animated):
        with pytest.raises(UnreadableImageError, match="shard:x"):
            decode_image(data, channels=3, name="shard:x")


def test_huge_image_is_refused_by_its_header():
    data = bytearray(save(Image.new("L", (8, 8)), "PNG"))
    data[16:24] = (13000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(UnreadableImageError, match="shard:x"):
        decode_image(bytes(data), channels=1, name="shard:x")


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
