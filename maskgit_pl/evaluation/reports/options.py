"""The options of tables and figures, and the protocol of an ablation. Imports no torch.

The protocol is a part of each ledger row of an ablation, so that a page can be made from the rows only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from maskgit_pl.checks import build_dataclass, check_integer, check_seed
from maskgit_pl.evaluation.ledger import Row
from maskgit_pl.evaluation.options import CAS_TRAINING, FEATURES, CASConfig, MeasurementOptions, Spec

__all__ = ["NUM_TOKENS", "AblationProtocol", "ReportOptions", "cas_flags", "select_rows"]

NUM_TOKENS = (16, 64, 256, 1024)  # paper, Figure 4


@dataclass(frozen=True)
class ReportOptions(MeasurementOptions):
    """Options of tables and figures.

    Args:
        data: Data folder (default: that of the training).
        seed: Seed of the first image; image i has seed + i (default: 0).
        num_images: Images generated for each row.
        features: Feature networks: classifier, lite0, inception[=FILE], timm:MODEL=FILE, or mappings; the first one
            ranks results.
        reference: Statistics or images of ADM in a .npz file, in place of the val split.
        results: Folder of the pages and the ledger, whose measurements are reused.

    Raises:
        ValueError: if a number is out of range.
    """

    data: Path | None = None
    seed: int = 0
    num_images: int = 1000
    features: Sequence[Spec] = FEATURES
    reference: Path | None = None
    results: Path = Path("results")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("num_images", self.num_images, "[2, inf)")
        check_seed("seed", self.seed)

    def check_classes(self, num_classes: int) -> None:
        """Checks that there is at least one image for each class.

        Raises:
            ValueError: if there is not.
        """
        if self.num_images < num_classes:
            raise ValueError(f"num_images must be >= {num_classes}, one per class, got {self.num_images}")

    def flags(self) -> dict[str, object]:
        """Returns the flags that determine the values of every table; None stands for a default."""
        return {
            "features": None if tuple(self.features) == FEATURES else self.features,
            "num_images": self.num_images,
            "seed": self.seed or None,
            "reference": self.reference,
        }


def cas_flags(cas: CASConfig | None, num_images: int | None) -> dict[str, object]:
    """Returns the flags that determine the classification accuracy score; None stands for a default.

    Args:
        cas: Training of the score; None leaves it out.
        num_images: Number of training images.
    """
    if cas is None:
        return {"cas_model": "none"}
    # Only what differs from the default is repeated on the page.
    given = {name: value for name, value in vars(cas).items() if value != getattr(CAS_TRAINING, name)}
    return {
        "cas_model": given.get("model"),
        "cas_images": num_images,
        "cas_max_steps": given.get("max_steps"),
        "cas_batch_size": given.get("batch"),
        "cas_learning_rate": given.get("peak_rate"),
        "cas_precision": given.get("precision"),
    }


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
