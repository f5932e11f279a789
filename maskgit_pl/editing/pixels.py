"""Images and masks of any source as pixels of the model's size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from einops import rearrange

from maskgit_pl.text import printable

if TYPE_CHECKING:
    import numpy.typing as npt
    from PIL import Image
    from torch import Tensor

    from maskgit_pl.shards.images import ImageHeader

__all__ = [
    "ImageLike",
    "MaskLike",
    "check_fits",
    "check_mask_file",
    "fit_to_model",
    "image_pixels",
    "mask_pixels",
    "read_image_header",
]

ImageLike: TypeAlias = Union[str, Path, "Image.Image", "Tensor", "npt.NDArray[Any]"]
MaskLike: TypeAlias = ImageLike

_WHITE = 128  # from this grey value on, a pixel of a mask picture is to be generated


def read_image_header(path: Path, *, name: str = "image") -> ImageHeader:
    """Reads what the header of an image file says, without torch.

    Args:
        path: A JPEG, PNG or WebP file.
        name: What to call it in an error.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an image.
    """
    from maskgit_pl.shards import images

    shown = printable(path)
    if not path.exists():
        raise FileNotFoundError(f"{name} {shown}: no such file; name a JPEG, PNG or WebP file")
    return images.parse_image_header(images.read_image_file(path, name=shown), name=shown)


def check_mask_file(path: Path, image: ImageHeader) -> None:
    """Refuses a picture of a mask whose size is not the image's, without torch.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an image, or has another size.
    """
    mask = read_image_header(path, name="mask")
    if (mask.height, mask.width) != (image.height, image.width):
        raise ValueError(
            f"mask {path}: the image's {image.width} x {image.height} pixels are needed, got "
            f"{mask.width} x {mask.height}; resize the mask"
        )


def image_pixels(image: ImageLike, *, channels: int, name: str = "image") -> Tensor:
    """Reads an image as the tokenizer sees it: upright, grey or RGB, alpha laid over white.

    Args:
        image: A JPEG, PNG or WebP file; a PIL picture; uint8 pixels as a tensor (C, H, W) or an array (H, W) or
            (H, W, C), C up to 4.
        channels: 1 for grey, 3 for RGB.
        name: What to call it in an error where it is no file.

    Returns:
        (channels, H, W) uint8.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an image, too large to be read, or not uint8 pixels of such a shape.
    """
    from PIL import Image

    from maskgit_pl.shards.images import decode_image, from_pil, read_image_file

    if isinstance(image, str | Path):
        shown = printable(image)
        if not Path(image).exists():
            raise FileNotFoundError(f"image {shown}: no such file; name a JPEG, PNG or WebP file")
        return decode_image(read_image_file(image, name=shown), channels=channels, name=shown)
    picture = image if isinstance(image, Image.Image) else Image.fromarray(_pixels(image, name))
    return from_pil(picture, channels=channels, name=f"({name})")


def mask_pixels(mask: MaskLike, *, name: str = "mask") -> Tensor:
    """Reads a mask as (H, W) bool, True = to be generated.

    Args:
        mask: A file or PIL picture, white where pixels are to be generated (from grey value 128 on); or a bool tensor
            or array (H, W).
        name: What to call it in an error where it is no file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an image, or an array that is not (H, W) bool.
    """
    import torch
    from PIL import Image

    if isinstance(mask, str | Path | Image.Image):
        return image_pixels(mask, channels=1, name=name)[0] >= _WHITE
    made = torch.as_tensor(mask).cpu()
    if made.dtype != torch.bool or made.ndim != 2:
        raise ValueError(
            f"{name}: (H, W) bool is needed, got {tuple(made.shape)} {made.dtype}; of grey values take mask >= {_WHITE}"
        )
    return made


def check_fits(height: int, width: int, *, image_size: int, fit: bool, name: str = "image") -> None:
    """Refuses an image of another size than the model's, unless it is to be fit_to_model.

    Args:
        height: H of the image.
        width: W of the image.
        image_size: Height and width that are needed.
        fit: True allows another size; see ``fit_to_model``.
        name: What to call the image in an error.

    Raises:
        ValueError: if the sizes differ and ``fit`` is False.
    """
    if not fit and (height, width) != (image_size, image_size):
        raise ValueError(
            f"{name}: the model's {image_size} x {image_size} pixels are needed, got {width} x {height}; fit=True "
            "(--fit) cuts out the middle and resizes it"
        )


def fit_to_model(
    image: Tensor, mask: Tensor, *, image_size: int, fit: bool, name: str = "image"
) -> tuple[Tensor, Tensor]:
    """Returns an image and its mask at the size of the model.

    Args:
        image: (C, H, W) uint8.
        mask: (H, W) bool.
        image_size: Height and width that are needed.
        fit: True cuts the largest square out of the middle of both and resizes it.
        name: What to call the image in an error.

    Returns:
        (C, image_size, image_size) uint8 and (image_size, image_size) bool; a pixel of the mask is True where any of
        those that it stands for is.

    Raises:
        ValueError: if the two sizes differ, they are not the model's without ``fit``, or the mask is False everywhere.
    """
    import torch.nn.functional as F

    from maskgit_pl.shards.images import fit_square

    height, width = image.shape[-2:]
    if mask.shape != image.shape[-2:]:
        raise ValueError(
            f"mask of {name}: the image's {width} x {height} pixels are needed, got {mask.shape[1]} x {mask.shape[0]}"
        )
    check_fits(height, width, image_size=image_size, fit=fit, name=name)
    if not bool(mask.any()):
        raise ValueError(f"mask of {name}: something to generate is needed, got none; paint it white, or name a box")
    square = fit_square(mask[None].to(image.dtype), image_size=min(height, width), crop=None)
    cut = F.adaptive_max_pool2d(square.float(), image_size)[0] > 0
    if not bool(cut.any()):
        raise ValueError(f"mask of {name}: all of it lies outside the square in the middle; crop the image yourself")
    return fit_square(image, image_size=image_size, crop=None), cut


def _pixels(image: Tensor | npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    """Converts a tensor (C, H, W) or array (H, W) or (H, W, C) to an array (H, W) or (H, W, C > 1), checked."""
    import numpy as np
    from torch import Tensor

    shown = f"{tuple(image.shape)} {image.dtype}"
    if isinstance(image, Tensor):
        image = image.cpu().numpy()
        image = rearrange(image, "c h w -> h w c") if image.ndim == 3 else image
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4) or pixels.size == 0:
        raise ValueError(
            f"{name}: uint8 pixels are needed, a tensor (C, H, W) or an array (H, W, C) with C = 1, 3 or 4, got {shown}"
        )
    return np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
