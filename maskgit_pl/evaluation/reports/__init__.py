"""The tables and figures of the paper with our measurements, as functions.

::

    from maskgit_pl.evaluation import reports

    page = reports.table_1(["runs/fashion-mnist-adaln"], reports.ReportOptions(num_images=2000))
    page.write()                              # results/fashion-mnist/table-1.md, .csv and .png

The rows that the ledger lacks are measured. The names are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from maskgit_pl.registry import lazy_names

if TYPE_CHECKING:
    from maskgit_pl.evaluation.reports.api import (
        ablation,
        compare_tokenizers,
        figure_4,
        figure_8,
        table_1,
        table_2,
        table_3,
    )
    from maskgit_pl.evaluation.reports.options import ReportOptions

__all__ = [
    "ReportOptions",
    "ablation",
    "compare_tokenizers",
    "figure_4",
    "figure_8",
    "table_1",
    "table_2",
    "table_3",
]

__getattr__ = lazy_names(
    __name__,
    {
        "ReportOptions": "options",
        "ablation": "api",
        "compare_tokenizers": "api",
        "figure_4": "api",
        "figure_8": "api",
        "table_1": "api",
        "table_2": "api",
        "table_3": "api",
    },
)
