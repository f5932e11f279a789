"""Names of the classes of imported transformers. Used by the importers, since released checkpoints hold no names."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["choose_class_names"]

_IMAGENET_CLASSES = 1000


def choose_class_names(given: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """Returns the names of the classes of an imported transformer, whose file has none.

    Args:
        given: One name per class; None for ImageNet's names if there are 1000 classes, otherwise numbers.
        num_classes: Number of classes of the transformer.

    Raises:
        ValueError: if the number of names is wrong, or one is empty.
    """
    if given is None:
        return _imagenet_names() if num_classes == _IMAGENET_CLASSES else tuple(map(str, range(num_classes)))
    names = tuple(given)
    if len(names) != num_classes:
        raise ValueError(
            f"class names must be {num_classes}, one for each class of the transformer, got {len(names)}; change "
            "the list, or leave it out"
        )
    empty = next((number for number, name in enumerate(names) if not name.strip()), None)
    if empty is not None:
        raise ValueError(f"class names must not be empty, got an empty one for class {empty}")
    return names


def _imagenet_names() -> tuple[str, ...]:
    """Returns the first name of each class of ILSVRC 2012, in the order of its synset ids."""
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo()
    return tuple(info.index_to_description(number).partition(",")[0].strip() for number in range(_IMAGENET_CLASSES))
