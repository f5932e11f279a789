"""PNG: every kind of pixel, damage in every place, and metadata that must not matter."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit_pl.data.image_bytes import UnreadableImageError, check_complete
from maskgit_pl.data.images import decode_image, encode_png, parse_image_header
from tests.hostile_images import PNG, chunk, save, zeros

NOISE = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
ROTATED = Image.Exif()
ROTATED[0x0112] = 6


PICTURE = Image.fromarray(NOISE)
FILES = {
    **{f"PNG {mode}": save(PICTURE.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")},
    "PNG I;16": save(Image.fromarray(NOISE[..., 0].astype(np.uint16) * 251), "PNG"),
    "PNG EXIF": save(PICTURE, "PNG", exif=ROTATED),
    "JPEG": save(PICTURE, "JPEG"),
    "JPEG progressive": save(PICTURE, "JPEG", progressive=True),
    "JPEG CMYK": save(PICTURE.convert("CMYK"), "JPEG"),
    "JPEG EXIF": save(PICTURE, "JPEG", exif=ROTATED),
    "WEBP": save(PICTURE, "WEBP"),
    "WEBP animated": save(PICTURE, "WEBP", save_all=True, append_images=[PICTURE.rotate(90)]),
}
STILL_PNG = [name for name in FILES if name.startswith("PNG") and "animated" not in name]


def decode(data: bytes, channels: int = 3) -> np.ndarray:
    return decode_image(data, channels=channels, name="x").permute(1, 2, 0).numpy()


def damaged(data: bytes, generator: np.random.Generator) -> bytes:
    """Changes, removes or repeats some bytes; half of the PNGs get right checksums again."""
    spoilt = bytearray(data)
    for place in generator.integers(0, len(data), generator.integers(1, 5)):
        spoilt[place] = int(generator.choice([0, 1, 0x7F, 0xFF, generator.integers(256)]))
    start, stop = sorted(generator.integers(0, len(data), 2).tolist())
    kind = generator.integers(6)
    if kind == 0:
        spoilt = spoilt[:start]
    elif kind == 1:
        del spoilt[start : min(stop, start + 9)]
    elif kind == 2:
        spoilt[start:start] = spoilt[start : min(stop, start + 40)]
    return with_checksums(bytes(spoilt)) if generator.integers(2) else bytes(spoilt)


def with_checksums(data: bytes) -> bytes:
    """Corrects the checksums of a PNG, so that the decoder gets its damage."""
    place, out = 8, data[:8]
    while data.startswith(PNG) and place + 8 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        out += chunk(data[place + 4 : place + 8], data[place + 8 : place + 8 + length])
        place += 12 + length
    return out if data.startswith(PNG) else data


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_gives_an_image_or_our_error(name, capfd):
    generator, errors = np.random.default_rng(list(name.encode())), []
    readers = (decode, lambda data: parse_image_header(data, name="x"), lambda data: check_complete(data, name="x"))
    for _ in range(60):
        bad = damaged(FILES[name], generator)
        for read in readers:
            try:
                read(bad)
            except UnreadableImageError as error:
                errors.append(str(error))
    assert errors
    assert all("image x " in error for error in errors)
    assert capfd.readouterr() == ("", "")  # no decoder writes to the terminal


@pytest.mark.parametrize("name", STILL_PNG)
def test_a_changed_byte_of_a_png_never_changes_its_pixels(name):
    data, pixels = FILES[name], decode(FILES[name])
    metadata = data.find(b"eXIf")  # damaged EXIF is ignored, so that the image is as stored
    shapes = {pixels.shape} if metadata < 0 else {pixels.shape, (9, 11, 3)}
    for place in range(8, len(data) - 12):
        bad = bytearray(data)
        bad[place] ^= 0x5A
        try:
            image = decode(bytes(bad))
        except UnreadableImageError:
            continue
        assert metadata >= 0 or np.array_equal(image, pixels)
        assert image.shape in shapes


EXTRA = {
    "text bomb": chunk(b"zTXt", b"x\0\0" + zeros(2**26)),
    "profile bomb": chunk(b"iCCP", b"x\0\0" + zeros(2**26)),
    "profile": chunk(b"iCCP", b"nonsense"),
    "EXIF": chunk(b"eXIf", b"nonsense"),
    "checksum of a text": chunk(b"tEXt", b"Comment\0x")[:-1] + b"?",
    "no frames": chunk(b"acTL", struct.pack(">II", 0, 0)),
    "second header": chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)),
}


@pytest.mark.parametrize("extra", EXTRA.values(), ids=EXTRA)
def test_other_chunks_never_make_an_image_unreadable(extra):
    data = FILES["PNG RGB"]
    for at in (33, len(data) - 12):  # after the header, and after the pixels
        changed = data[:at] + extra + data[at:]
        assert np.array_equal(decode(changed), NOISE)
        assert (parse_image_header(changed, name="x").height, parse_image_header(changed, name="x").width) == (9, 11)


def test_the_orientation_may_be_before_or_after_the_pixels():
    data, upright = FILES["PNG RGB"], NOISE[::-1].transpose(1, 0, 2)
    for at in (33, len(data) - 12):
        changed = data[:at] + chunk(b"eXIf", ROTATED.tobytes()[6:]) + data[at:]
        assert np.array_equal(decode(changed), upright)
        assert parse_image_header(changed, name="x").height == 11


@pytest.mark.parametrize("channels", [1, 3])
def test_equal_pixels_give_equal_png_bytes_in_any_layout(channels):
    image = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (channels, 5, 7), dtype=np.uint8))
    assert encode_png(image) == encode_png(image.permute(1, 2, 0).contiguous().permute(2, 0, 1))
