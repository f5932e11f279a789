"""The ledger of a search: ``trials.jsonl``, every measurement a line, written when it is made.

What stands there is not measured again, so that a search that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.decodings import plain, same_decoding
from maskgit_pl.files import write_atomically
from maskgit_pl.training.environment import describe_environment

__all__ = ["Ledger"]

_FORMAT, _VERSION = "maskgit_pl.trials", 1
_log = logging.getLogger(__name__)


class Ledger:
    """Every measurement, a line each, appended when it is made.

    Args:
        file: ``trials.jsonl``.
        protocol: What decides the numbers beside decoding, number of images and seed, in plain values.

    Raises:
        ValueError: The file is not a ledger, a line of it is none, or it has another protocol.
    """

    def __init__(self, file: Path, protocol: Mapping[str, Any]) -> None:
        self.file = file
        self._lines: list[dict[str, Any]] = []
        self._head = {"format": _FORMAT, "version": _VERSION, "protocol": json.loads(json.dumps(protocol))}
        if file.is_file():
            self._read()
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._append(self._head)

    def first(self) -> DecodingConfig | None:
        """The decoding that was measured first: what trial 0 was; None where there is none yet, or it is no more."""
        try:
            return DecodingConfig(**self._lines[0]["decoding"]) if self._lines else None
        except (TypeError, ValueError):
            return None

    def find(self, decoding: DecodingConfig, *, num_images: int, seed: int) -> dict[str, Any] | None:
        """What was measured of a decoding with so many images and this seed, if it was."""
        for line in self._lines:
            if (line["num_images"], line["seed"]) == (num_images, seed) and same_decoding(line["decoding"], decoding):
                return cast("dict[str, Any]", line["numbers"])
        return None

    def add(
        self, decoding: DecodingConfig, numbers: Mapping[str, Any], *, num_images: int, seed: int, purpose: str
    ) -> None:
        """Keeps a measurement, on the disk before it returns.

        Args:
            decoding: What was measured.
            numbers: What came out.
            num_images: Images of it.
            seed: Of the first.
            purpose: What it was for, for people.
        """
        line = {
            "purpose": purpose,
            "num_images": num_images,
            "seed": seed,
            "decoding": plain(decoding),
            "numbers": dict(numbers),
            "commit": describe_environment()["commit"],
        }
        self._append(line)
        self._lines.append(line)

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _read(self) -> None:
        text = self.file.read_text()
        whole, newline, rest = text.rpartition("\n")
        if not newline and json.dumps(self._head).startswith(rest):  # it was cut off in its first line
            self.file.unlink()
            self._append(self._head)
            return
        head, *lines = [self._parsed(line, place) for place, line in enumerate(whole.splitlines(), start=1)] or [None]
        if not isinstance(head, dict) or (head.get("format"), head.get("version")) != (_FORMAT, _VERSION):
            raise ValueError(f"ledger {self.file}: not of the format {_FORMAT} {_VERSION}; name another --out")
        protocol = self._head["protocol"]
        changed = [key for key in protocol if head["protocol"].get(key) != protocol[key]]
        if changed:
            raise ValueError(
                f"ledger {self.file}: measured with another {', '.join(changed)}; name another --out, or move it away"
            )
        self._lines = lines
        if rest:
            _log.info("%s: its last line was cut off and is measured again", self.file)
            with write_atomically(self.file) as stream:
                stream.write((whole + newline).encode())

    def _parsed(self, line: str, place: int) -> Any:
        try:
            return json.loads(line)
        except ValueError as error:
            raise ValueError(f"ledger {self.file}: line {place} is not JSON ({error}); name another --out") from error
