"""Measures trained models: ``evaluate``, ``evaluate_tokenizer``, ``compare``, ``tune`` and ``train_classifier``.

An ``Evaluator`` makes every measurement and keeps it in a ``Ledger``. It does not repeat a measurement that the ledger
already holds. The public names are imported on first use: importing this package imports neither torch nor Lightning
nor Matplotlib.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from maskgit_pl.lazy_names import lazy_names

if TYPE_CHECKING:
    from maskgit_pl.evaluation.classifier_config import CASConfig, ClassifierConfig
    from maskgit_pl.evaluation.comparison import ComparisonOptions, compare
    from maskgit_pl.evaluation.data_classifier import train_classifier
    from maskgit_pl.evaluation.evaluated_model import EvaluatedModel
    from maskgit_pl.evaluation.evaluator import Evaluator
    from maskgit_pl.evaluation.ledger import Ledger
    from maskgit_pl.evaluation.model_evaluation import EvaluationOptions, evaluate
    from maskgit_pl.evaluation.options import TokenizerOptions
    from maskgit_pl.evaluation.tokenizer_evaluation import evaluate_tokenizer
    from maskgit_pl.evaluation.tuning import TuningOptions, plan_trials, tune

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
    "plan_trials",
    "train_classifier",
    "tune",
]

__getattr__ = lazy_names(
    __name__,
    {
        "CASConfig": "classifier_config",
        "ClassifierConfig": "classifier_config",
        "ComparisonOptions": "comparison",
        "EvaluatedModel": "evaluated_model",
        "EvaluationOptions": "model_evaluation",
        "Evaluator": "evaluator",
        "Ledger": "ledger",
        "TokenizerOptions": "options",
        "TuningOptions": "tuning",
        "compare": "comparison",
        "evaluate": "model_evaluation",
        "evaluate_tokenizer": "tokenizer_evaluation",
        "plan_trials": "tuning",
        "train_classifier": "data_classifier",
        "tune": "tuning",
    },
)
