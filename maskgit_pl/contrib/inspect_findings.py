"""The problems of a run, from its logs and measurements, by the rules of the alarms of training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from maskgit_pl.checks import build_dataclass
from maskgit_pl.contrib.inspect_logs import Logs
from maskgit_pl.files import parse_any_json
from maskgit_pl.training.health_rules import HealthConfig, HealthContext, Problem, find_problems

if TYPE_CHECKING:
    from maskgit_pl.contrib.inspect_code_use import CodeUse

__all__ = ["find_in_tokenizer", "find_in_transformer", "read_reports"]

_MAX_BYTES = 1_000_000  # of health.json; training writes at most one report per cause
_RISE = 1.05  # of the validation loss above its minimum
_NORM_RISE = 10.0  # of the gradient norm above its median


def find_in_tokenizer(logs: Logs, recipe: Mapping[str, Any], measured: CodeUse | None) -> list[Problem]:
    """Judges the last measurements of stage 1, and the codes on validation images.

    Args:
        logs: Logs of the stage.
        recipe: The recipe of the run, unchecked; may be empty.
        measured: Measurements on validation images; None without them.
    """
    config = _health_config(recipe)
    step, max_steps = logs.last_step, _number(_at(recipe, "trainer", "max_steps")) or 0
    found: dict[str, Problem] = {}
    if measured is not None:
        context = _context(recipe, len(measured.counts))
        metrics = {"codebook_usage": measured.usage, "perplexity": measured.perplexity}
        for problem in find_problems(metrics, config, context, num_tokens=float(measured.counts.sum())):
            found[problem.cause] = problem
    size = _number(_at(recipe, "model", "network", "codebook_size"))
    if size and size >= 1 and step > config.grace(int(max_steps)):
        context, metrics = _context(recipe, int(size)), logs.last("train")
        # The number of tokens is at least that of images since the last logging step.
        every, batch = (_number(_at(recipe, *keys)) or 1 for keys in _TOKENS)
        for problem in find_problems(metrics, config, context, num_tokens=every * batch):
            found.setdefault(problem.cause, problem)
    return list(found.values())


_TOKENS = (("trainer", "log_every_n_steps"), ("data", "global_batch"))


def find_in_transformer(logs: Logs) -> list[Problem]:
    """Judges the curves of stage 2: a validation loss that rises, and a gradient norm that grows."""
    problems = []
    loss = _finite(logs.scalars.get("val/loss", {}))
    if len(loss) > 2 and loss[-1] > _RISE * min(loss):
        text = f"the validation loss has risen from {min(loss):.4g} to {loss[-1]:.4g}, so the transformer overfits"
        advice = ["stop earlier (trainer.max_steps)", "raise model.network.dropout", "use more training images"]
        problems.append(Problem("overfitting", "val/loss", loss[-1], _RISE * min(loss), text, advice))
    norms = _finite(logs.scalars.get("train/gradient_norm", {}))
    if len(norms) > 5 and norms[-1] > _NORM_RISE * median(norms):
        text = f"the gradient norm has grown to {norms[-1]:.4g}, from a median of {median(norms):.4g}"
        advice = ["set trainer.gradient_clip_val", "lower model.optimizer.learning_rate.peak"]
        limit = _NORM_RISE * median(norms)
        problems.append(Problem("gradient_norm", "train/gradient_norm", norms[-1], limit, text, advice))
    return problems


def read_reports(folder: Path) -> list[str]:
    """Returns the reports of training in ``health.json`` as sentences; damaged ones are left out."""
    from maskgit_pl.training.health import FILE_NAME

    file = folder / FILE_NAME
    try:
        if not file.is_file() or file.stat().st_size > _MAX_BYTES:
            return []
        reports = parse_any_json(file.read_bytes(), str(file))
    except (OSError, ValueError):
        return [f"{FILE_NAME} cannot be read"]
    sentences = []
    for report in reports if isinstance(reports, list) else ():
        if isinstance(report, Mapping):
            again = report.get("healthy_again")
            end = "" if again is None else f" It was healthy again at step {again}."
            sentences.append(f"Reported in training at step {report.get('step')}: {report.get('text')}.{end}")
    return sentences


def _health_config(recipe: Mapping[str, Any]) -> HealthConfig:
    values = recipe.get("health")
    try:
        return build_dataclass(HealthConfig, values, "health") if isinstance(values, Mapping) else HealthConfig()
    except ValueError:
        return HealthConfig()


def _context(recipe: Mapping[str, Any], codebook_size: int) -> HealthContext:
    from maskgit_pl.networks.quantizers import quantizers

    spec = _at(recipe, "model", "network", "quantizer")
    options = {str(key): value for key, value in spec.items()} if isinstance(spec, Mapping) else {}
    start = _number(_at(recipe, "model", "adversarial", "start_step"))
    return HealthContext(
        codebook_size,
        str(options.pop("name", "")) if isinstance(spec, Mapping) else str(spec or ""),
        options=options,
        learning_rate=_number(_at(recipe, "model", "optimizer", "learning_rate", "peak")),
        start_step=None if start is None else int(start),
        known_quantizers=quantizers.names(),
    )


def _at(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _number(value: object) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None  # type: ignore[return-value]  # the line above narrows it


def _finite(values: Mapping[int, float]) -> Sequence[float]:
    return [value for _, value in sorted(values.items()) if math.isfinite(value)]
