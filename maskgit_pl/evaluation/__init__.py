"""Measures trained models: ``evaluate``, ``evaluate_tokenizer``, ``tune`` and ablations.

::

    from maskgit_pl import evaluation

    report = evaluation.evaluate("runs/fashion-mnist-adaln", evaluation.EvaluationOptions(num_images=2000))
    report.content                            # what evaluation.json has

An ``Evaluator`` makes every measurement once, and keeps it in a ``Ledger``. The public names are imported on first use:
importing this package imports neither torch nor Lightning nor Matplotlib.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from maskgit_pl.registry import lazy_names

if TYPE_CHECKING:
    from maskgit_pl.evaluation.ablation import run_ablation
    from maskgit_pl.evaluation.classifier import check_cas, train_classifier
    from maskgit_pl.evaluation.distilling import distill
    from maskgit_pl.evaluation.evaluator import EvaluatedModel, Evaluator
    from maskgit_pl.evaluation.folders import check_model_decoding, open_models
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
    from maskgit_pl.evaluation.run_folders import trained_recipe
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
    "check_cas",
    "check_model_decoding",
    "distill",
    "evaluate",
    "evaluate_tokenizer",
    "open_models",
    "run_ablation",
    "train_classifier",
    "trained_recipe",
    "tune",
]

_HOMES = {
    "ablation": ("run_ablation",),
    "classifier": ("check_cas", "train_classifier"),
    "distilling": ("distill",),
    "evaluator": ("EvaluatedModel", "Evaluator"),
    "ledger": ("Ledger",),
    "metrics": ("ComparedImages", "FeatureMetric"),
    "model_evaluation": ("evaluate",),
    "folders": ("check_model_decoding", "open_models"),
    "options": (
        "CASConfig",
        "ClassifierConfig",
        "EvaluationOptions",
        "ReportOptions",
        "TokenizerOptions",
        "TuningOptions",
    ),
    "reconstruction": ("evaluate_tokenizer",),
    "run_folders": ("trained_recipe",),
    "tuning": ("tune",),
}
__getattr__ = lazy_names(__name__, {name: module for module, names in _HOMES.items() for name in names})
