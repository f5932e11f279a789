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

from maskgit_pl.checks import build_dataclass, check_integer, check_keys, check_number, shorten
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.decodings import plain, same_decoding
from maskgit_pl.evaluation.digests import differing
from maskgit_pl.evaluation.protocol import METRICS
from maskgit_pl.files import parse_json, size_text, write_atomically
from maskgit_pl.provenance import describe_environment

__all__ = ["Ledger"]

_FORMAT, _VERSION = "maskgit_pl.trials", 1
_MAX_LINE, _MAX_BYTES = 1_000_000, 100_000_000
_log = logging.getLogger(__name__)


class Ledger:
    """Every measurement, a line each, appended when it is made.

    Args:
        file: ``trials.jsonl``.
        protocol: What decides the numbers beside decoding, number of images and seed, in plain values.

    Raises:
        ValueError: if the file is not a ledger, a line of it is none, or it has another protocol. The message names
            the file and the line.
    """

    def __init__(self, file: Path, protocol: Mapping[str, Any]) -> None:
        self.file = file
        self._lines: list[dict[str, Any]] = []
        self._head = {"format": _FORMAT, "version": _VERSION, "protocol": json.loads(json.dumps(protocol))}
        if file.exists():
            self._read()
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._append(self._head)

    def first(self) -> DecodingConfig | None:
        """The decoding that was measured first: what trial 0 was; None where there is none yet, or it is no more."""
        try:
            return build_dataclass(DecodingConfig, self._lines[0]["decoding"], "trial 0") if self._lines else None
        except ValueError:
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
        lines, rest = self._split()
        if not lines and json.dumps(self._head).encode().startswith(rest):  # it was cut off in its first line
            self.file.unlink()
            self._append(self._head)
            return
        where = f"ledger {self.file}: line"
        try:
            head, *trials = [parse_json(line, f"{where} {place}") for place, line in enumerate(lines, start=1)] or [{}]
            if (head.get("format"), head.get("version")) != (_FORMAT, _VERSION):
                raise ValueError(f"ledger {self.file}: must be of the format {_FORMAT} {_VERSION}")
            if not isinstance(head.get("protocol"), dict):
                raise ValueError(f"{where} 1 must have a mapping 'protocol'")
            for place, line in enumerate(trials, start=2):
                _check_line(f"{where} {place}", line)
        except ValueError as error:
            raise ValueError(f"{error}; name another --out, or move the file away") from error
        changed = differing(head["protocol"], self._head["protocol"])
        if changed:
            raise ValueError(
                f"ledger {self.file}: measured with another {', '.join(changed)}, or it does not say with which; name "
                "another --out, or move it away"
            )
        self._lines = trials
        if rest:
            _log.info("%s: its last line was cut off and is measured again", self.file)
            with write_atomically(self.file) as stream:
                stream.writelines(line + b"\n" for line in lines)

    def _split(self) -> tuple[list[bytes], bytes]:
        """Returns the whole lines, and what follows the last one."""
        if not self.file.is_file() or self.file.stat().st_size > _MAX_BYTES:
            raise ValueError(
                f"ledger {self.file} must be a regular file of at most {size_text(_MAX_BYTES)}; name another --out"
            )
        lines: list[bytes] = []
        with self.file.open("rb") as stream:
            while line := stream.readline(_MAX_LINE):
                if not line.endswith(b"\n"):
                    if len(line) == _MAX_LINE:
                        raise ValueError(
                            f"ledger {self.file}: line {len(lines) + 1} must have at most {size_text(_MAX_LINE)}; name "
                            "another --out, or move the file away"
                        )
                    return lines, line
                lines.append(line[:-1])
        return lines, b""


def _check_line(where: str, line: Mapping[str, Any]) -> None:
    required = ("num_images", "seed", "decoding", "numbers")
    check_keys(where, line, known=[*line, *required], required=required)
    check_integer(f"{where}: num_images", line["num_images"], "[1, inf)")
    check_integer(f"{where}: seed", line["seed"], "[0, inf)")
    numbers = line["numbers"]
    for name in ("decoding", "numbers"):
        if not isinstance(line[name], dict):
            raise ValueError(f"{where}: {name} must be a mapping, got {shorten(line[name])}")
    check_keys(f"{where}: numbers", numbers, known=[*numbers, *METRICS], required=[*METRICS, "seconds_per_image"])
    for name, value in numbers.items():
        check_number(f"{where}: numbers.{name}", value, "(-inf, inf)")
