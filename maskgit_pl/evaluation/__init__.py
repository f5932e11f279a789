"""Measures trained models: ``evaluate``, ``evaluate_tokenizer``, ``compare``, ``tune`` and ``train_classifier``.

An ``Evaluator`` makes every measurement and keeps it in a ``Ledger``. It does not repeat a measurement that the ledger
already holds. The public names are imported on first use: importing this package imports neither torch nor Lightning
nor Matplotlib.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from maskgit_pl.registry import lazy_names

if TYPE_CHECKING:
    from maskgit_pl.evaluation.comparison import compare
    from maskgit_pl.evaluation.evaluator import EvaluatedModel, Evaluator
    from maskgit_pl.evaluation.ledger import Ledger
    from maskgit_pl.evaluation.model_evaluation import evaluate, evaluate_tokenizer, train_classifier
    from maskgit_pl.evaluation.options import (
        CASConfig,
        ClassifierConfig,
        ComparisonOptions,
        EvaluationOptions,
        TokenizerOptions,
        TuningOptions,
    )
    from maskgit_pl.evaluation.tuning import tune

__all__ = [
    "CASConfig",
    "ClassifierConfig",
    "ComparisonOptions",
    "EvaluatedModel",
    "EvaluationOptions",
    "Evaluator",
    "Ledger",
    "TokenizerOptions",
    "TuningOptions",
    "compare",
    "evaluate",
    "evaluate_tokenizer",
    "train_classifier",
    "tune",
]

__getattr__ = lazy_names(
    __name__,
    {
        "CASConfig": "options",
        "ClassifierConfig": "options",
        "ComparisonOptions": "options",
        "EvaluatedModel": "evaluator",
        "EvaluationOptions": "options",
        "Evaluator": "evaluator",
        "Ledger": "ledger",
        "TokenizerOptions": "options",
        "TuningOptions": "options",
        "compare": "comparison",
        "evaluate": "model_evaluation",
        "evaluate_tokenizer": "model_evaluation",
        "train_classifier": "model_evaluation",
        "tune": "tuning",
    },
)
