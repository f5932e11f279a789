"""The protocol of an ablation: a part of each of its ledger rows, so that a page can be made from the rows only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from maskgit_pl.checks import build_dataclass
from maskgit_pl.evaluation.ledger import Row

__all__ = ["AblationProtocol", "select_rows"]


@dataclass(frozen=True)
class AblationProtocol:
    """Everything that the variants of an ablation share, in plain values.

    Args:
        command: Command that repeats the ablation.
        dataset: Name of the data.
        stage: Stage that was trained.
        variants: Labels in the order of the table.
        reference: Label of the variant that the others are compared with.
        base: Values of the base for the varied keys.
        seeds: Training seeds.
        budget: Training budget, as in ``--budget``.
        threads: CPU threads of every training; None for those of the recipes.
        num_images: Number of images per variant and seed.
        first: Label of the feature network whose FID ranks the variants.
        compared: Real images that the variants are compared with.
        decoding: Decoding of the base, in words; empty if no images were generated.
        machine: Machine and versions, in words.
    """

    command: str
    dataset: str
    stage: str
    variants: tuple[str, ...]
    reference: str
    base: dict[str, Any]
    seeds: tuple[int, ...]
    budget: str
    threads: int | None
    num_images: int
    first: str
    compared: str
    decoding: str
    machine: str

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> AblationProtocol:
        """Reads the protocol of a ledger row.

        Raises:
            ValueError: if a key is unknown or missing, or a value has a wrong type.
        """
        values = {name: tuple(each) if isinstance(each, list) else each for name, each in row["protocol"].items()}
        return build_dataclass(cls, values, f"ledger: ablation {row['ablation']}: protocol")

    def to_row(self) -> dict[str, Any]:
        """Returns the value of the ledger column ``protocol``."""
        return asdict(self)

    @property
    def key(self) -> dict[str, Any]:
        """The values that distinguish two ablations of the same name: all except those of machine and command."""
        return {name: value for name, value in asdict(self).items() if name not in ("command", "machine")}


def select_rows(rows: Sequence[Row], name: str) -> list[Row]:
    """Returns the rows of the newest ablation of a name, the last one of each variant and seed.

    Args:
        rows: Rows of the kind ``ablation``, in the order of the ledger.
        name: Name of the ablation.

    Returns:
        Rows sorted by variant and seed.
    """
    own = [row for row in rows if row["ablation"] == name]
    if not own:
        return []
    # A command with other variants, seeds or images has another plan; its rows are not mixed with these.
    newest = [row for row in own if row["plan"] == own[-1]["plan"]]
    last = {(row["place"], row["seed"]): row for row in newest}
    return [last[key] for key in sorted(last)]
