"""The options of tables and figures, and the protocol of an ablation. Imports no torch.

The protocol is a part of each ledger row of an ablation, so that a page can be made from the rows only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from maskgit_pl.checks import build_dataclass
from maskgit_pl.evaluation.ledger import Row
from maskgit_pl.evaluation.model_evaluation import FEATURES
from maskgit_pl.evaluation.options import CASConfig, MeasurementOptions

__all__ = [
    "NUM_TOKENS",
    "AblationProtocol",
    "ReportOptions",
    "TimingOptions",
    "select_rows",
]

NUM_TOKENS = (16, 64, 256, 1024)  # paper, Figure 4


@dataclass(frozen=True)
class ReportOptions(MeasurementOptions):
    """The options of a table; see ``MeasurementOptions`` for the others.

    Args:
        data: Data folder; None for the data that the first run was trained on.
        num_images: Number of images per row, >= 2 and at least one per class.
        features: Feature networks: names or mappings. The FID of the first one chooses the best T of Table 3.
        reference: File in the layout of ADM to compare with; None for the val split.
        results: Folder of the ledger; pages are written to ``results/DATASET``.
        cas: Training of the classification accuracy score of Table 1; None leaves the score out.
        cas_images: Number of training images of the score; None for ``num_images``.

    Raises:
        ValueError: if a number is out of range.
    """

    data: Path | None = None
    num_images: int = 1000
    features: Sequence[str | dict[str, Any]] = FEATURES
    reference: Path | None = None
    results: Path = Path("results")
    cas: CASConfig | None = field(default_factory=CASConfig)
    cas_images: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_images < 2:
            raise ValueError(f"num_images must be >= 2, got {self.num_images}")

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

    def cas_flags(self) -> dict[str, object]:
        """Returns the flags that determine the classification accuracy score; None stands for a default."""
        if self.cas is None:
            return {"cas_model": "none"}
        # Only what differs from the default is repeated on the page.
        usual = CASConfig()
        given = {name: value for name, value in vars(self.cas).items() if value != getattr(usual, name)}
        return {
            "cas_model": given.get("model"),
            "cas_images": self.cas_images,
            "cas_max_steps": given.get("max_steps"),
            "cas_batch_size": given.get("batch"),
            "cas_learning_rate": given.get("peak_rate"),
            "cas_precision": given.get("precision"),
        }


@dataclass(frozen=True)
class TimingOptions:
    """The options of Figure 4.

    Args:
        num_tokens: Numbers N of tokens, all squares.
        sizes: Sizes of the transformer, such as ``{"depth": 8}``, that replace those of the run or the defaults.
        results: Folder of the ledger and of the page.
        device: Device such as ``cpu``, ``cuda`` or ``cuda:1``; None for a GPU if there is one.
    """

    num_tokens: Sequence[int] = NUM_TOKENS
    sizes: Mapping[str, Any] = field(default_factory=dict)
    results: Path = Path("results")
    device: str | None = None

    def flags(self) -> dict[str, object]:
        """Returns the flags that determine the values; None stands for a default."""
        points = None if tuple(self.num_tokens) == NUM_TOKENS else self.num_tokens
        return {"num_tokens": points, **self.sizes, "device": self.device}


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
