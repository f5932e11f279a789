"""``distill`` trains a student that needs fewer steps than a model; ``QualityMonitor`` measures it meanwhile."""

from __future__ import annotations

from pathlib import Path

from maskgit_pl import pipeline, runs
from maskgit_pl.checks import check_choice
from maskgit_pl.evaluation.run_folders import data_name, find_run
from maskgit_pl.processes import Bars, no_bars
from maskgit_pl.runs.plan import Folders
from maskgit_pl.runs.recipe import Overrides, Recipe, flag_words, list_recipes


def distill(
    model: str | Path,
    *,
    method: str = "dimo",
    num_steps: int = 1,
    data: str | Path | None = None,
    cluster: str = "single",
    run: str | Path | None = None,
    overrides: Overrides = (),
    bars: Bars = no_bars,
) -> runs.FitResult:
    """Distils a model to fewer steps. Resumes an interrupted distillation, and does nothing for a finished one.

    The student is exported to ``RUN/pretrained`` with its decoding settings, so that it is used as any other model.

    Args:
        model: The teacher: a run, a pretrained folder, or the name of a model in the package.
        method: Recipe ``distill-METHOD``: dimo or guidance.
        num_steps: T of the student, in [1, N].
        data: Data folder. Default: that of the model's training.
        cluster: A file of ``recipes/cluster``.
        run: Run of the student, see ``runs.Folders``. Default: ``MODEL-METHOD-T`` beside the model's run.
        overrides: Overrides of recipe values; see ``Recipe.read``.
        bars: Shows the progress of the token store.

    Raises:
        FileNotFoundError: if model, data, recipe or the classifier of the data do not exist.
        ValueError: if a value is out of range, or the model is autoregressive or has another tokenizer than its own.
        RunError: see ``runs.fit``.
    """
    prefix = "distill-"
    known = [name.removeprefix(prefix) for name in list_recipes("transformer") if name.startswith(prefix)]
    check_choice("method", method, known)
    found = find_run(model, data=None if data is None else Path(data))
    recipe = Recipe.read(
        "transformer",
        names=f"{prefix}{method}",
        dataset=data_name(found.data),
        cluster=cluster,
        overrides=[f"--model.decoding.num_steps={num_steps}", *flag_words(overrides)],
    )
    pipe = pipeline.MaskGIT.from_pretrained(found.pretrained)
    pipe.transformer.schedule_for("distillation")
    from maskgit_pl.evaluation.classifier import find_classifier, open_images  # Lightning takes seconds to import
    from maskgit_pl.evaluation.quality_monitor import QualityMonitor

    find_classifier(found.classifier, open_images(found.data, pipe.tokenizer.image_size, pipe.tokenizer.channels))
    folders = Folders(
        run=found.run.with_name(f"{found.run.name}-{method}-{num_steps}") if run is None else run,
        data=found.data,
        tokenizer=found.pretrained / "tokenizer",
        pretrained=found.pretrained,
    )
    runs.tokenize(recipe, **folders, bars=bars)
    return runs.fit(recipe, callbacks=[QualityMonitor(found.references, found.data)], **folders)
