"""``--vectors`` of ``maskgit sample``: a vector for each image, for models that were trained with vectors."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from maskgit_pl.pipeline import MaskGIT
    from maskgit_pl.pipeline.outline import Outline

__all__ = ["add_vectors_argument", "give_vectors", "read_vectors_flag"]


def add_vectors_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the flag."""
    parser.add_argument(
        "--vectors",
        type=Path,
        metavar="FILE.npy",
        help="array with one vector per row, for a model that was trained with vectors: makes one image of each class "
        "for each row, or takes the rows in turn with --num-images; one row only with --accept-rate",
    )


def read_vectors_flag(args: argparse.Namespace, outline: Outline) -> npt.NDArray[np.float32] | None:
    """Reads the file of ``--vectors`` without torch; returns (n, C) float32, or None for a model without vectors.

    Raises:
        ValueError: if the flag is missing or must not be given, or the file is no array of finite vectors of the
            model's size.
    """
    dim = outline.condition_dim
    if args.vectors is None:
        if dim:
            raise ValueError(
                f"--vectors must be given: the model was trained with a vector of {dim} values for each image; give a "
                f".npy file of shape (n, {dim})"
            )
        return None
    if not dim:
        raise ValueError(f"--vectors must be left out: the model was trained without vectors, got {args.vectors}")
    import numpy as np

    from maskgit_pl.data.mapped_array import map_array

    try:
        array = map_array(args.vectors)
    except ValueError as error:
        raise ValueError(f"--vectors {error}") from error
    if array.ndim != 2 or array.shape[1] != dim or not len(array) or array.dtype.kind != "f":
        raise ValueError(
            f"--vectors {args.vectors} must hold floats of shape (n, {dim}), one vector a row, got {array.dtype} "
            f"{array.shape}"
        )
    vectors: npt.NDArray[np.float32] = array.astype(np.float32)
    if not np.isfinite(vectors).all():
        raise ValueError(f"--vectors {args.vectors} must be finite, got NaN or infinity")
    return vectors


def give_vectors(pipe: MaskGIT, vectors: npt.NDArray[np.float32] | None, *, seed: int) -> None:
    """Lets the image of ``seed`` take the first vector, the next one the second, and so on."""
    if vectors is not None:
        import torch

        from maskgit_pl.decoding.vectors import VectorPool

        pipe.vector_pool = VectorPool(torch.from_numpy(vectors), first_seed=seed)
