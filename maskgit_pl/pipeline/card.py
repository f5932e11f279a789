"""The model card of a pretrained folder: writes ``config.json`` with all facts of the model, and ``README.md`` from it.

Used by ``MaskGIT.save_pretrained``, by training when it exports, and by the commands that measure a run.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit_pl.files import read_json, write_text
from maskgit_pl.image_format import pixels_text
from maskgit_pl.pipeline.description import (
    SETTINGS,
    STAGES,
    VERSIONS,
    check_run_facts,
    describe_folder,
    describe_run,
    run_of,
)
from maskgit_pl.pipeline.pretrained import read_config
from maskgit_pl.text import code_span, markdown, printable, python_string

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

__all__ = ["model_card", "refresh_card", "write_card"]

_log = logging.getLogger(__name__)

_TASK = "unconditional-image-generation"  # the Hub has no task for class-conditional images
_NAMES_SHOWN = 20  # number of class names in the table
_LONGEST_EXAMPLE = 80  # characters of a class name in the example
# Figures of evaluation.json that the Hub lists: metric and feature network of the exported settings.
_SHARED_FIGURE = re.compile(
    r"samples\.exported[a-z_]*\.(fid|sfid|kid|is|precision|recall|density|coverage)/([\w.:-]+)", re.ASCII
)


def write_card(
    folder: Path | str,
    *,
    run: Path | str | None = None,
    known: Mapping[str, Any] | None = None,
    license: str | None = None,  # noqa: A002  # the Hub's word
    name: str | None = None,
) -> dict[str, Any]:
    """Writes ``config.json`` and ``README.md`` into a folder that has both stages.

    Args:
        folder: Folder with ``tokenizer/`` and ``transformer/``.
        run: Run folder that the weights come from; None looks beside the folder (``run_of``).
        known: Content of an older ``config.json`` of the same weights. Its facts are kept if there is no run.
        license: License of the weights as the Hub spells it, such as ``apache-2.0``; None leaves it open.
        name: Name for ``from_pretrained`` in the example on the card, such as ``owner/name``.

    Returns:
        The content of ``config.json``.

    Raises:
        FileNotFoundError: if a stage or the run is missing.
        ValueError: if a file of the folder has another format.
    """
    folder = Path(folder)
    # Facts of a run come from the run itself, if there is one, else from the older config.json.
    run = run_of(folder) if run is None else Path(run)
    known = known or {}
    content = describe_folder(folder)
    content["license"] = license or known.get("license")
    content["run"] = (
        check_run_facts(known.get("run")) if run is None else describe_run(run, weights=content["fingerprints"])
    )
    for file, text in (
        ("config.json", json.dumps(content, indent=2) + "\n"),
        ("README.md", model_card(folder, content, name=name)),
    ):
        write_text(folder / file, text)
    return content


def refresh_card(folder: Path) -> None:
    """Rewrites the card of a run after its metrics or decoding settings changed; does nothing for other folders.

    An error is logged as a warning, because the measurement before it must not be lost.
    """
    if run_of(folder) is None:
        return
    try:
        config = folder / "config.json"
        written = read_json(config) if config.is_file() else {}
        write_card(folder, license=written.get("license"))
    except Exception as error:
        _log.warning("%s: cannot write the model card (%s: %s)", folder, type(error).__name__, error)


def model_card(folder: Path, content: Mapping[str, Any], *, name: str | None = None) -> str:
    """Returns the text of ``README.md``, which begins with the YAML metadata of the Hub.

    Words from data or weights (class names, license, names of runs and recipes) are escaped, so that they cannot act
    as markup or as metadata keys.

    Args:
        folder: Pretrained folder, which names the classes.
        content: Content of ``config.json``.
        name: See ``write_card``.
    """
    classes: list[str] = read_config(folder / "transformer", "transformer")["class_names"]
    return "\n".join(
        [*_metadata(content), *_introduction(content, classes, name or "path/to/this/folder"), *_run(content)]
    )


def _metadata(content: Mapping[str, Any]) -> list[str]:
    from huggingface_hub import ModelCardData

    known, run = content.get("license"), content.get("run") or {}
    results = list(_eval_results(run))
    data = ModelCardData(
        library_name="maskgit_pl",
        pipeline_tag=_TASK,
        license=printable(known) if known else None,
        tags=["maskgit", "vqgan", "masked-generative-transformer", "class-conditional"],
        model_name=(printable(run["name"]) or "MaskGIT") if results else None,
        eval_results=results or None,
    )
    # A comment in the YAML is visible to the author of the model and ignored by the Hub.
    missing = [] if known else ["# license: unknown; add the license of the weights and of their data"]
    return ["---", *missing, data.to_yaml(), "---", ""]


def _eval_results(run: Mapping[str, Any]) -> Iterator[EvalResult]:
    """Yields the metrics that the Hub lists: those of images generated with the settings of the shared model.

    The type of a metric names its feature network, such as ``fid/classifier``. Only metrics of Inception have the plain
    type ``fid``, with which other models are listed. The name states the number of images, because FID depends on it.
    """
    from huggingface_hub import EvalResult

    measured = run.get("measured")
    dataset = run["transformer"]["settings"].get("data.path") if run else None
    if not measured or not isinstance(dataset, str):
        return
    protocol = measured["protocol"]
    for key, value in measured["figures"].items():
        found = _SHARED_FIGURE.fullmatch(key)
        # YAML and the Hub have no use for NaN and infinity.
        if found is None or not isinstance(value, float) or not math.isfinite(value):
            continue
        metric, network = found.groups()
        yield EvalResult(
            task_type=_TASK,
            dataset_type=printable(dataset),
            dataset_name=printable(dataset),
            dataset_split=printable(protocol.get("split", "val")),
            metric_type=metric if network == "inception" else f"{metric}/{network}",
            metric_name=f"{metric} of {printable(protocol.get('num_images'))} images in the features of {network}",
            metric_value=value,
        )


def _introduction(content: Mapping[str, Any], classes: list[str], name: str) -> list[str]:
    size, grid = content["image_size"], content["grid"]
    title = markdown((content.get("run") or {}).get("name", "MaskGIT"))
    channels = content["in_channels"]
    colour = "grey" if channels == 1 else "colour"
    # Class names come from the data: markdown() escapes them.
    shown = ", ".join(markdown(each) for each in classes[:_NAMES_SHOWN])
    more = f" and {len(classes) - _NAMES_SHOWN} more" if len(classes) > _NAMES_SHOWN else ""
    parameters = content["parameters"]
    origin = "tuned for these weights" if content["decoding_is_tuned"] else "from the training recipe"
    is_autoregressive = content["attention"] == "causal"
    kind = "The autoregressive baseline of MaskGIT" if is_autoregressive else "MaskGIT"
    steps = (
        "one token after the other" if is_autoregressive else f"in {content['decoding']['num_steps']} parallel steps"
    )
    # A long class name would not fit into the code block: the index 0 names the same class.
    example = python_string(classes[0]) if len(classes[0]) <= _LONGEST_EXAMPLE else "0"
    return [
        f"# {title}",
        "",
        f"{kind} ([arXiv:2202.04200](https://arxiv.org/abs/2202.04200)): images of {len(classes)} classes, "
        f"{pixels_text(size)} pixels in {colour}, decoded {steps}.",
        "",
        "```python",
        "from maskgit_pl import MaskGIT",
        "",
        f"pipe = MaskGIT.from_pretrained({python_string(name)})",
        f'pipe.generate([{example}], seed=0)[0].save("image.png")',
        "```",
        "",
        "| property | value |",
        "|---|---|",
        f"| classes | {shown}{more} |",
        f"| no class | {'yes, `None`' if content['class_dropout'] else 'no, trained without class dropout'} |",
        f"| tokens per image | {grid[0]} x {grid[1]}, of {content['codebook_size']} codes |",
        *(f"| parameters, {stage} | {parameters[stage]:,} |" for stage in STAGES),
        f"| backbone | {content['backbone']} |",
        f"| attention | {content['attention']} |",
        *([] if is_autoregressive else [f"| mask schedule | {_format_value(content['mask_schedule'])} |"]),
        f"| decoding ({origin}) | {_format_value(content['decoding'])} |",
        *(f"| fingerprint, {stage} | {code_span(content['fingerprints'][stage])} |" for stage in STAGES),
        "",
    ]


def _run(content: Mapping[str, Any]) -> list[str]:
    run = content.get("run")
    if not run:
        return []
    lines = ["## Training", "", "| | tokenizer | transformer |", "|---|---|---|"]
    lines += _row("recipe", [run[stage]["recipe"] or None for stage in STAGES])
    for part, keys in (("settings", SETTINGS), ("environment", VERSIONS)):
        for key in keys:
            lines += _row(key, [run[stage][part].get(key) for stage in STAGES])
    measured = run["measured"]
    if measured:
        protocol = _format_value({**measured["protocol"], "device": measured.get("device")})
        lines += [
            "",
            "## Evaluation",
            "",
            f"Measured by `maskgit evaluate`: {protocol}.",
            "",
            "| metric | value |",
            "|---|---|",
        ]
        lines += [f"| {markdown(key)} | {_format_value(value)} |" for key, value in measured["figures"].items()]
    return [*lines, ""]


def _row(title: str, values: list[Any]) -> list[str]:
    """Returns a table row with a cell for each stage; no row if neither stage has a value."""
    cells = ["" if value is None else _format_value(value) for value in values]
    return [f"| {title} | {' | '.join(cells)} |"] if any(cells) else []


def _format_value(value: Any) -> str:
    """Returns a value as Markdown: floats with four digits, a registered name before its arguments, no None."""
    if isinstance(value, Mapping):
        parts = [
            f"{markdown(key)} {_format_value(part)}"
            for key, part in value.items()
            if part is not None and key != "name"
        ]
        if "name" not in value:
            return ", ".join(parts)
        name = markdown(value["name"])
        return f"{name} ({', '.join(parts)})" if parts else name
    if isinstance(value, list | tuple):
        return " ".join(map(_format_value, value))
    return f"{value:.4g}" if isinstance(value, float) else markdown(value)
