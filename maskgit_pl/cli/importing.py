"""``maskgit import-jax``, ``import-tokenizer`` and ``import-transformer``: convert checkpoints that others released.

Each writes a pretrained folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from maskgit_pl.cli.arguments import Word
from maskgit_pl.cli.flags import Folder
from maskgit_pl.importers import LayoutName

__all__ = ["import_jax", "import_tokenizer", "import_transformer"]

File = Annotated[Path, Word("FILE")]


def import_jax(
    *,
    tokenizer: File,
    transformer: File | None = None,
    out: Folder,
    image_size: Annotated[int, Word("256|512")] | None = None,
    class_names: File | None = None,
) -> None:
    """Converts released JAX checkpoints to a pretrained folder.

    They are those of google-research/maskgit. Nothing in them is executed.

    Example: maskgit import-jax --tokenizer tokenizer_imagenet256_checkpoint --transformer
    maskgit_imagenet256_checkpoint --out pretrained/imagenet256

    Args:
        tokenizer: Such as tokenizer_imagenet256_checkpoint.
        transformer: Such as maskgit_imagenet256_checkpoint.
        out: Pretrained folder to write.
        image_size: Side of the images in pixels (default: from the transformer's grid; 256 without a transformer).
        class_names: File with one class name per line (default: ImageNet's names for 1000 classes, else numbers).
    """
    from maskgit_pl.importers import released

    print(released.import_jax(tokenizer, out, transformer=transformer, image_size=image_size, class_names=class_names))


def import_tokenizer(
    file: File,
    *,
    out: Folder,
    image_size: Annotated[int, Word("PIXELS")] | None = None,
    layout: LayoutName | None = None,
    signed_images: bool | None = None,
) -> None:
    """Converts a released tokenizer, such as taming-transformers' or MaskBit's.

    DIR/tokenizer is written, and what was read is printed. Nothing in the checkpoint is executed.

    Example: maskgit import-tokenizer vqgan_imagenet_f16_1024.ckpt --out pretrained/taming

    Args:
        file: Checkpoint: .ckpt, .pt, .bin or .safetensors, or a folder that diffusers saved.
        out: Pretrained folder; DIR/tokenizer is written.
        image_size: Side of the images in pixels (default: as config.json of diffusers says, else 256).
        layout: Project that wrote the file (default: by the names of its tensors); IBQ and taming-transformers have the
            same names.
        signed_images: The network expects images in [-1, 1]; with --no-signed-images, in [0, 1] (default: as in the
            published networks; only those of taming-transformers, LlamaGen, diffusers and IBQ have the choice).
    """
    from maskgit_pl.importers import tokenizers

    print(tokenizers.import_tokenizer(file, out, image_size=image_size, layout=layout, signed_images=signed_images))


def import_transformer(
    file: File,
    *,
    tokenizer: Folder,
    out: Folder,
    num_heads: int | None = None,
    class_names: File | None = None,
) -> None:
    """Converts a transformer of Halton-MaskGIT or MaskGIL.

    A pretrained folder with it and its tokenizer is written, and what was read is printed. Nothing in the checkpoint is
    executed.

    Example: maskgit import-transformer ImageNet_384_large.pth --tokenizer pretrained/llamagen --out
    pretrained/halton-384

    Args:
        file: Checkpoint, such as ImageNet_384_large.pth.
        tokenizer: Folder of its tokenizer, as maskgit import-tokenizer writes it.
        out: Pretrained folder to write.
        num_heads: Attention heads, for a network of another size than the published ones.
        class_names: File with one class name per line (default: ImageNet's names for 1000 classes, else numbers).
    """
    from maskgit_pl.importers import transformers

    print(transformers.import_transformer(file, out, tokenizer=tokenizer, num_heads=num_heads, class_names=class_names))
