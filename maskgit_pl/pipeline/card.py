"""The model card of a pretrained folder: ``config.json`` with all facts of the model, and ``README.md`` from it.

The facts come from the files of the folder and of its run. Used by ``MaskGIT.save_pretrained``, by training
when it exports, and by the commands that measure a run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from maskgit_pl.checks import pixels_text
from maskgit_pl.files import parse_any_json, read_yaml, write_text
from maskgit_pl.networks.backbone import build_config, create_network
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.networks.weights import skeletons
from maskgit_pl.pipeline.sharing import STAGES, stages_of
from maskgit_pl.pretrained.networks import fingerprint, read_config, read_decoding
from maskgit_pl.text import code_span, list_some, markdown, printable, python_string, shorten

PLACEHOLDER = "path/to/this/folder"
"""The name of the model in the example of a card; `maskgit push` puts that of the repository in its place."""
# Keys of the recipe that a card shows. The files of the run have all of them.
_SETTINGS = (
    "trainer.max_steps",
    "trainer.precision",
    "data.path",
    "data.global_batch",
    "data.augmentations",
    "data.seed",
    "model.optimizer.learning_rate",
    "model.optimizer.weight_decay",
    "model.ema_decay",
    "model.flip_probability",
    "model.losses",
    "model.mask_schedule",
    "model.label_smoothing",
)
_PROTOCOL = ("num_images", "num_steps", "seed", "split", "reference")
_NOT_FIGURES = ("protocol", "model", "environment")  # sections of evaluation.json that hold no metrics
_NAMES_SHOWN = 20  # number of class names in the table
_log = logging.getLogger(__name__)


def write_card(folder: Path | str, *, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Writes ``config.json`` and ``README.md`` into a pretrained folder.

    Args:
        folder: Folder with ``transformer/`` and, for images, ``tokenizer/``. In ``RUN/pretrained``, the run gives its
            facts.
        known: Content of an older ``config.json`` of the same weights: its license, and its facts outside of a run.

    Returns:
        The content of ``config.json``.
    """
    folder = Path(folder)
    run, known = _run_of(folder), known or {}
    content = describe_folder(folder)
    content["license"] = known.get("license")
    content["run"] = known.get("run") if run is None else _describe_run(run, weights=content["fingerprints"])
    card = model_card(folder, content)
    write_text(folder / "config.json", json.dumps(content, indent=2) + "\n")
    write_text(folder / "README.md", card)
    return content


def refresh_card(folder: Path) -> None:
    """Rewrites the card of a run after its metrics or decoding settings changed; does nothing for other folders.

    An error is logged as a warning, because the measurement before it must not be lost.
    """
    if _run_of(folder) is None:
        return
    try:
        write_card(folder, known=_json(folder / "config.json"))
    except Exception as error:
        _log.warning("%s: cannot write the model card (%s: %s)", folder, type(error).__name__, error)


def fingerprints(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of the weights of each stage, in hex."""
    return {stage: fingerprint(folder / stage) for stage in stages_of(folder)}


def describe_folder(folder: Path) -> dict[str, Any]:
    """Describes a pretrained folder in plain values."""
    # Only the JSON files are read: the description needs no weights in memory.
    transformer, tuned = read_config(folder / "transformer", "transformer"), read_decoding(folder)
    network, of_images = build_config(transformer["network"], f"{folder}: network"), {}
    parameters = {"transformer": _parameters(lambda: create_network(network))}
    if "tokenizer" in stages_of(folder):
        tokenizer = read_config(folder / "tokenizer", "tokenizer")
        sizes = VQGANConfig(**tokenizer["network"])
        of_images = {"image_size": tokenizer["image_size"], "in_channels": sizes.in_channels}
        parameters = {"tokenizer": _parameters(lambda: VQGAN(sizes)), **parameters}
    return {
        "format": "maskgit_pl.pipeline",
        "version": 1,
        **of_images,
        "grid": list(network.grid),
        "codebook_size": network.codebook_size,
        "num_classes": network.num_classes,
        "class_dropout": network.class_dropout,
        "parameters": parameters,
        "backbone": network.backbone,
        "attention": network.attention,
        "mask_schedule": transformer["mask_schedule"],
        "decoding": transformer["decoding"] if tuned is None else asdict(tuned),
        "decoding_is_tuned": tuned is not None,
        "fingerprints": fingerprints(folder),
    }


def _describe_run(run: Path, *, weights: Mapping[str, str]) -> dict[str, Any]:
    """Describes the training of a run, and its evaluation with these weights, from those of its files that exist."""
    stages = {stage: _stage(run / stage) for stage in STAGES}
    return {"name": run.resolve().name, **stages, "measured": _read_figures(run / "evaluation.json", weights)}


def model_card(folder: Path, content: Mapping[str, Any]) -> str:
    """Returns the text of ``README.md``, which begins with the YAML metadata of the Hub.

    Words from data or weights (class names, license, names of runs and recipes) are escaped, so that they
    cannot act as markup or as metadata keys.

    Args:
        folder: Pretrained folder, which names the classes.
        content: Content of ``config.json``.
    """
    classes: list[str] = read_config(folder / "transformer", "transformer")["class_names"]
    try:
        return "\n".join([*_metadata(content), *_introduction(content, classes), *_run(content)])
    except (AttributeError, KeyError, TypeError) as error:
        run = shorten(content.get("run"))
        raise ValueError(
            f"config.json: run must be an entry that save_pretrained wrote, got {run}; delete it"
        ) from error


def _run_of(folder: Path) -> Path | None:
    """Returns the run folder of ``RUN/pretrained``; None for any other pretrained folder."""
    return folder.parent if (folder.parent / "transformer" / "config.yaml").is_file() else None


def _parameters(build: Callable[[], nn.Module]) -> int:
    with skeletons():  # parameters with shapes only, without memory
        network = build()
    return sum(parameter.numel() for parameter in network.parameters())


def _stage(folder: Path) -> dict[str, Any]:
    """Returns the recipe names and settings of a stage of a run."""
    file = folder / "config.yaml"
    recipe = read_yaml(file) if file.is_file() else {}
    # Settings that a stage does not have are None here and left out below.
    values = {key: _value(recipe, key) for key in _SETTINGS}
    if values["data.path"] is not None:  # a card must not publish paths of the machine
        values["data.path"] = Path(str(values["data.path"])).name
    return {
        "recipe": _json(folder / "environment.json").get("recipe", []),
        "settings": {key: value for key, value in values.items() if value is not None},
    }


def _read_figures(file: Path, weights: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns protocol, device and metrics of ``evaluation.json``; None if it was measured with other weights."""
    if not file.is_file():
        return None
    metrics = _json(file)
    model, protocol = metrics["model"], metrics["protocol"]
    has_transformer = weights["transformer"].startswith(model["transformer_digest"])  # the first digits
    if not has_transformer or model["tokenizer_fingerprint"] != weights.get("tokenizer"):
        return None
    # What remains after the sections about the protocol are metrics.
    figures = {key: value for key, value in metrics.items() if key not in _NOT_FIGURES}
    return {
        "protocol": {key: protocol[key] for key in _PROTOCOL if key in protocol},
        "device": metrics["environment"]["device"],
        "figures": {
            key: value
            for key, value in flatten(figures)
            if isinstance(value, int | float) and not isinstance(value, bool)
        },
    }


def flatten(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each value of nested mappings with its dotted key."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _value(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _json(file: Path) -> dict[str, Any]:
    """Returns the content of a JSON file; an empty mapping if there is no file."""
    content: dict[str, Any] = parse_any_json(file.read_bytes(), str(file)) if file.is_file() else {}
    return content


def _metadata(content: Mapping[str, Any]) -> list[str]:
    from huggingface_hub import ModelCardData

    license_name = content.get("license")
    data = ModelCardData(
        library_name="maskgit_pl",
        pipeline_tag="unconditional-image-generation",  # the Hub has no task for class-conditional images
        license=printable(license_name) if license_name else None,
        tags=["maskgit", "vqgan", "masked-generative-transformer", "class-conditional"],
    )
    return ["---", data.to_yaml(), "---", ""]


def _introduction(content: Mapping[str, Any], classes: list[str]) -> list[str]:
    title = markdown((content.get("run") or {}).get("name", "MaskGIT"))
    images, call = (
        f"tokens of {len(classes)} classes, to decode with the tokenizer that made them",
        "generate_tokens([0])",
    )
    if "image_size" in content:
        colour = "grey" if content["in_channels"] == 1 else "colour"
        images = f"images of {len(classes)} classes, {pixels_text(content['image_size'])} pixels in {colour}"
        call = 'generate([0], seed=0)[0].save("image.png")'
    # Class names come from the data: markdown() escapes them.
    names = list_some([markdown(name) for name in classes], most=_NAMES_SHOWN)
    parameters = content["parameters"]
    origin = "tuned for these weights" if content["decoding_is_tuned"] else "from the training recipe"
    is_autoregressive = content["attention"] == "causal"
    kind = "The autoregressive baseline of MaskGIT" if is_autoregressive else "MaskGIT"
    steps = (
        "one token after the other" if is_autoregressive else f"in {content['decoding']['num_steps']} parallel steps"
    )
    return [
        f"# {title}",
        "",
        f"{kind} ([arXiv:2202.04200](https://arxiv.org/abs/2202.04200)): {images}, decoded {steps}.",
        "",
        "```python",
        "from maskgit_pl import MaskGIT",
        "",
        f"pipe = MaskGIT.from_pretrained({python_string(PLACEHOLDER)})",
        f"pipe.{call}",
        "```",
        "",
        "| property | value |",
        "|---|---|",
        f"| classes | {names} |",
        f"| no class | {'yes, `None`' if content['class_dropout'] else 'no, trained without class dropout'} |",
        f"| tokens per image | {' x '.join(map(str, content['grid']))}, of {content['codebook_size']} codes |",
        *(f"| parameters, {stage} | {parameters[stage]:,} |" for stage in parameters),
        f"| backbone | {content['backbone']} |",
        f"| attention | {content['attention']} |",
        *([] if is_autoregressive else [f"| mask schedule | {_format_value(content['mask_schedule'])} |"]),
        f"| decoding ({origin}) | {_format_value(content['decoding'])} |",
        *(f"| fingerprint, {stage} | {code_span(content['fingerprints'][stage])} |" for stage in parameters),
        "",
    ]


def _run(content: Mapping[str, Any]) -> list[str]:
    run = content.get("run")
    if not run:
        return []
    lines = ["## Training", "", "| | tokenizer | transformer |", "|---|---|---|"]
    lines += _row("recipe", [run[stage]["recipe"] or None for stage in STAGES])
    for key in _SETTINGS:
        lines += _row(key, [run[stage]["settings"].get(key) for stage in STAGES])
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
