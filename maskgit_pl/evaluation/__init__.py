"""Measures trained models: ``evaluate``, ``evaluate_tokenizer``, ``tune``, tables, figures, ablations.

::

    from maskgit_pl import evaluation

    page = evaluation.table_1(["runs/fashion-mnist-adaln"], evaluation.ReportOptions(num_images=2000))
    page.write()                              # results/fashion-mnist/table-1.md, .csv and .png

An ``Evaluator`` makes every measurement once, and keeps it in a ``Ledger``. The public names are imported on first use:
importing this package imports neither torch nor Lightning nor Matplotlib.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from maskgit_pl.registry import lazy_names

if TYPE_CHECKING:
    from maskgit_pl.evaluation.ablation import run_ablation
    from maskgit_pl.evaluation.classifier import train_classifier
    from maskgit_pl.evaluation.distilling import distill
    from maskgit_pl.evaluation.evaluator import EvaluatedModel, Evaluator
    from maskgit_pl.evaluation.figures import figure_2
    from maskgit_pl.evaluation.ledger import Ledger
    from maskgit_pl.evaluation.metrics import ComparedImages, FeatureMetric
    from maskgit_pl.evaluation.model_evaluation import evaluate
    from maskgit_pl.evaluation.options import (
        CASConfig,
        ClassifierConfig,
        EvaluationOptions,
        ReportOptions,
        TokenizerOptions,
        TuningOptions,
    )
    from maskgit_pl.evaluation.reconstruction import evaluate_tokenizer
    from maskgit_pl.evaluation.tables import table_1, table_2
    from maskgit_pl.evaluation.timing import figure_4
    from maskgit_pl.evaluation.tuning import tune

__all__ = [
    "CASConfig",
    "ClassifierConfig",
    "ComparedImages",
    "EvaluatedModel",
    "EvaluationOptions",
    "Evaluator",
    "FeatureMetric",
    "Ledger",
    "ReportOptions",
    "TokenizerOptions",
    "TuningOptions",
    "distill",
    "evaluate",
    "evaluate_tokenizer",
    "figure_2",
    "figure_4",
    "run_ablation",
    "table_1",
    "table_2",
    "train_classifier",
    "tune",
]

_HOMES = {
    "ablation": ("run_ablation",),
    "classifier": ("train_classifier",),
    "distilling": ("distill",),
    "evaluator": ("EvaluatedModel", "Evaluator"),
    "figures": ("figure_2",),
    "ledger": ("Ledger",),
    "metrics": ("ComparedImages", "FeatureMetric"),
    "model_evaluation": ("evaluate",),
    "options": (
        "CASConfig",
        "ClassifierConfig",
        "EvaluationOptions",
        "ReportOptions",
        "TokenizerOptions",
        "TuningOptions",
    ),
    "tables": ("table_1", "table_2"),
    "timing": ("figure_4",),
    "reconstruction": ("evaluate_tokenizer",),
    "tuning": ("tune",),
}
__getattr__ = lazy_names(__name__, {name: module for module, names in _HOMES.items() for name in names})
