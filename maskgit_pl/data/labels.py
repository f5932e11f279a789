"""Labels of samples: the member that holds them, and safe parsing of its bytes. Used by ``scan`` and streams."""

from __future__ import annotations

import re
from dataclasses import dataclass

from maskgit_pl.checks import shorten
from maskgit_pl.files import parse_any_json

__all__ = ["MAX_CLASSES", "Labels", "parse_label"]

MAX_CLASSES = 100_000  # upper limit if no class names are given
_LABEL = re.compile(rb"\s*(0|[1-9][0-9]{0,8})\s*")


@dataclass(frozen=True)
class Labels:
    """The source of labels.

    Args:
        source: ``"cls"``: a ``.cls`` member with a decimal class number. ``"json:FIELD"``: that field of the ``.json``
            member, a class number or a class name. ``"none"``: no labels; all images have class 0.
        classes: Class names; None if they are unknown, then any number below 100,000 is a class.

    Raises:
        ValueError: if ``source`` is none of these.
    """

    source: str = "cls"
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"cls|none|json:.+", self.source):
            raise ValueError(f"labels must be cls, json:FIELD or none, got {shorten(self.source)}")

    @property
    def extension(self) -> str | None:
        """The extension of the members that hold labels; None without labels."""
        return None if self.source == "none" else self.source.partition(":")[0]

    def read(self, data: bytes, *, name: str) -> int:
        """Reads a class number from the bytes of a label member.

        Args:
            data: Bytes of the ``.cls`` or ``.json`` member.
            name: The member's name in error messages.

        Raises:
            ValueError: if the bytes are not a class.
        """
        if self.source == "cls":
            return parse_label(data, name=name, num_classes=self._num_classes)
        field_name = self.source.partition(":")[2]
        try:
            value = parse_any_json(data, name)[field_name]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"label {name} must be a JSON object with {field_name!r}, got {data[:40]!r}") from error
        if isinstance(value, str) and value in (self.classes or ()):
            return (self.classes or ()).index(value)
        if type(value) is not int:  # bool is a subclass of int
            raise ValueError(
                f"label {name}: {field_name!r} must be a class number or one of the class names, got {value!r:.40}"
            )
        return parse_label(str(value).encode(), name=name, num_classes=self._num_classes)

    @property
    def _num_classes(self) -> int:
        return MAX_CLASSES if self.classes is None else len(self.classes)


def parse_label(data: bytes, *, name: str, num_classes: int | None = None) -> int:
    """Reads a class number from the bytes of a ``.cls`` member; unlike ``int()``, rejects ``1_000`` and ``-1``.

    Args:
        data: Bytes of the member.
        name: The member's name in error messages.
        num_classes: Number of classes; None if unknown.

    Raises:
        ValueError: if it is not a decimal number, or not in [0, num_classes).
    """
    match = _LABEL.fullmatch(data)
    if match is None:
        raise ValueError(f"label {name} must be a decimal class number, got {data[:40]!r}")
    label = int(match[1])
    if num_classes is not None and label >= num_classes:
        raise ValueError(f"label {name} must be a class in [0, {num_classes}), got {label}")
    return label
