"""What a pretrained folder says of itself: a top-level ``config.json`` for programs, a model card for people.

``config.json`` gathers what stands in the folder's files and, where it is known, in the run's; the card is drawn from
it and says nothing that is not there. Used by ``MaskGIT.save_pretrained`` and by training when it exports.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from maskgit_pl.checks import shorten
from maskgit_pl.files import write_atomically
from maskgit_pl.networks.causal import build_transformer
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.old_names import renamed_tree
from maskgit_pl.pretrained import fingerprint, read_config, read_decoding
from maskgit_pl.text import code_span, markdown, printable, python_string

__all__ = [
    "Origin",
    "check_run",
    "describe_folder",
    "describe_run",
    "fingerprints",
    "model_card",
    "refresh_card",
    "run_of",
    "write_card",
]

_log = logging.getLogger(__name__)

_STAGES = ("tokenizer", "transformer")
# Of a run's resolved recipe: what tells most of what was learned and how. The other keys stand in config.yaml.
_SETTINGS = (
    "trainer.max_steps",
    "trainer.precision",
    "data.path",
    "data.global_batch",
    "data.crop",
    "data.seed",
    "model.optimizer.learning_rate",
    "model.optimizer.weight_decay",
    "model.ema_decay",
    "model.flip_probability",
    "model.reconstruction_loss",
    "model.mask_schedule",
    "model.label_smoothing",
)
_VERSIONS = ("maskgit_pl", "commit", "python", "torch", "lightning", "accelerators", "world_size")
_PROTOCOL = ("num_images", "num_steps", "seed", "split", "reference")
_NOT_FIGURES = ("protocol", "model", "environment")  # sections of evaluation.json that say how, not how well
_NAMES_SHOWN = 20
_LONGEST_EXAMPLE = 80  # characters of a class name in the example


@dataclass(frozen=True)
class Origin:
    """What the folder that a pipeline was read from says beyond weights, for the one that it is saved to.

    Args:
        folder: The folder; None for a pipeline that was built from networks.
        known: Its ``config.json``; empty where it has none.
        tuned: How its ``decoding.json`` was found; empty where it has none.
    """

    folder: Path | None = None
    known: Mapping[str, Any] = field(default_factory=dict)
    tuned: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, *, tuned: bool) -> Origin:
        """Reads a folder; folders that were written before there was a ``config.json`` are as good.

        Args:
            folder: The folder.
            tuned: Whether its ``decoding.json`` is what the pipeline decodes by.

        Raises:
            ValueError: A file is not what it should be.
        """
        known = read_config(folder, "pipeline") if (folder / "config.json").is_file() else {}
        return cls(folder, known, (_json(folder / "decoding.json").get("tuned") or {}) if tuned else {})

    def weights(self) -> dict[str, str]:
        """The folder's ``fingerprints``; empty where it is none, or gone."""
        there = self.folder is not None and all((self.folder / stage).is_dir() for stage in _STAGES)
        return fingerprints(self.folder) if self.folder is not None and there else {}

    def facts(self, weights: Mapping[str, str]) -> Mapping[str, Any]:
        """What ``config.json`` says of just these weights."""
        return self.known if self.known.get("fingerprints") == weights else {}

    def run(self) -> Path | None:
        """The run that the folder lies in, if it does."""
        return None if self.folder is None else run_of(self.folder)


def fingerprints(folder: Path) -> dict[str, str]:
    """sha256 of the weights of both stages."""
    return {stage: fingerprint(folder / stage) for stage in _STAGES}


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
        folder: With ``tokenizer/`` and ``transformer/``.
        run: The run that made it; None looks beside it (``run_of``).
        known: What an older ``config.json`` of these weights says, kept where no run says it anew.
        license: Of the weights, as the Hub spells it, such as ``apache-2.0``; left open where nobody knows it.
        name: What the card says to load it by, such as ``owner/name``.

    Returns:
        What ``config.json`` holds.

    Raises:
        FileNotFoundError: A stage is missing, or no such run.
        ValueError: A file of the folder is not what it should be.
    """
    folder = Path(folder)
    run = run_of(folder) if run is None else Path(run)
    known = known or {}
    content = describe_folder(folder)
    content["license"] = license or known.get("license")
    content["run"] = (
        _checked(known.get("run")) if run is None else describe_run(run, tokenizer=content["fingerprints"]["tokenizer"])
    )
    for file, text in (
        ("config.json", json.dumps(content, indent=2) + "\n"),
        ("README.md", model_card(folder, content, name=name)),
    ):
        with write_atomically(folder / file) as stream:
            stream.write(text.encode())
    return content


def refresh_card(folder: Path) -> None:
    """Writes a run's card anew after its figures or its way of decoding changed; elsewhere there is none to refresh.

    What was measured is written by then, and no fault of a text may lose it: it becomes a warning.
    """
    if run_of(folder) is None:
        return
    try:
        config = folder / "config.json"
        written = json.loads(config.read_text()) if config.is_file() else {}
        write_card(folder, license=written.get("license"))
    except Exception as error:
        _log.warning("%s: no model card (%s: %s)", folder, type(error).__name__, error)


def run_of(folder: Path) -> Path | None:
    """The run that a pretrained folder lies in, as ``RUN/pretrained``; None where it lies elsewhere."""
    return folder.parent if (folder.parent / "transformer" / "config.yaml").is_file() else None


def describe_folder(folder: Path) -> dict[str, Any]:
    """What a folder with both stages holds, in plain values.

    Raises:
        FileNotFoundError: A stage is missing.
        ValueError: A file is not what it should be.
    """
    tokenizer, transformer = (read_config(folder / stage, stage) for stage in ("tokenizer", "transformer"))
    sizes, network = VQGANConfig(**tokenizer["network"]), TransformerConfig(**transformer["network"])
    tuned = read_decoding(folder)
    return {
        "format": "maskgit_pl.pipeline",
        "version": 1,
        "image_size": tokenizer["image_size"],
        "in_channels": sizes.in_channels,
        "grid": list(sizes.grid(tokenizer["image_size"])),
        "num_codes": sizes.num_codes,
        "num_classes": network.num_classes,
        "class_dropout": network.class_dropout,
        "parameters": {
            "tokenizer": _parameters(lambda: VQGAN(sizes)),
            "transformer": _parameters(lambda: build_transformer(network)),
        },
        "attention": network.attention,
        "mask_schedule": transformer["mask_schedule"],
        "decoding": transformer["decoding"] if tuned is None else asdict(tuned),
        "decoding_is_tuned": tuned is not None,
        "fingerprints": fingerprints(folder),
    }


def _parameters(build: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):  # shapes alone, without memory
        network = build()
    return sum(parameter.numel() for parameter in network.parameters())


def check_run(run: Path) -> None:
    """Refuses a run that is not there, before weights are written.

    Raises:
        FileNotFoundError: No such folder.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"run {run}: no such folder; name the one that training wrote, or leave it out")


def describe_run(run: Path, *, tokenizer: str) -> dict[str, Any]:
    """What a run's files say of how its weights were made and measured; a file that is not there says nothing.

    Args:
        run: ``runs/RUN``.
        tokenizer: Fingerprint of the folder's tokenizer: figures that were measured with another are left out.

    Raises:
        FileNotFoundError: No such folder.
    """
    check_run(run)
    stages = {stage: _stage(run / stage) for stage in _STAGES}
    return {"name": run.resolve().name, **stages, "measured": _measured(run / "evaluation.json", tokenizer)}


def _checked(run: Any) -> Mapping[str, Any] | None:
    """Returns what an older ``config.json`` says of a run, if it is of the form of ``describe_run``.

    Raises:
        ValueError: if it is of another form.
    """

    def has(tree: Any, **kinds: type) -> bool:
        return isinstance(tree, Mapping) and all(isinstance(tree.get(key), kind) for key, kind in kinds.items())

    if run is None:
        return None
    good = has(run, name=str) and all(has(run.get(s), recipe=list, settings=dict, environment=dict) for s in _STAGES)
    if not good or (run.get("measured") is not None and not has(run["measured"], protocol=dict, figures=dict)):
        raise ValueError(f"config.json: run must be as save_pretrained writes it, got {shorten(run)}; leave it out")
    return {**run, "measured": run.get("measured")}


def _stage(folder: Path) -> dict[str, Any]:
    """Settings, recipe and versions of a stage."""
    file = folder / "config.yaml"
    recipe = yaml.safe_load(file.read_text()) if file.is_file() else None
    recipe = renamed_tree(recipe, f"recipe {file}") if isinstance(recipe, dict) else {}
    values = {key: _value(recipe, key) for key in _SETTINGS}
    if values["data.path"] is not None:  # where it lay on that machine is nobody's business
        values["data.path"] = Path(values["data.path"]).name
    environment = _json(folder / "environment.json")
    return {
        "recipe": _words_after("--recipe", environment.get("command", [])),
        "settings": {key: value for key, value in values.items() if value is not None},
        "environment": {key: environment[key] for key in _VERSIONS if environment.get(key)},
    }


def _measured(file: Path, tokenizer: str) -> dict[str, Any] | None:
    metrics = _json(file)
    if not metrics or metrics.get("model", {}).get("tokenizer_fingerprint") != tokenizer:
        return None
    figures = {key: value for key, value in metrics.items() if key not in _NOT_FIGURES}
    protocol = metrics.get("protocol", {})
    return {
        "protocol": {key: protocol[key] for key in _PROTOCOL if key in protocol},
        "device": metrics.get("environment", {}).get("device"),
        "figures": dict(_figures(figures)),
    }


def _figures(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    """Every single number of a tree, under its path."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _figures(value, f"{path}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{path}{key}", value


def _value(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _json(file: Path) -> dict[str, Any]:
    """A mapping; empty where there is no file."""
    try:
        content = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    return content if isinstance(content, dict) else {}


def _words_after(flag: str, command: list[str]) -> list[str]:
    """The words that follow a flag of a command line, up to the next flag."""
    command = [part for word in command for part in (word.split("=", 1) if word.startswith(f"{flag}=") else [word])]
    words = command[command.index(flag) + 1 :] if flag in command else []
    until = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:until]


def model_card(folder: Path, content: Mapping[str, Any], *, name: str | None = None) -> str:
    """Returns the text of ``README.md``, YAML metadata first.

    Words that came with data or weights (class names, licence, names of runs and recipes) are escaped: they are shown
    as they are, and are never markup or metadata keys.

    Args:
        folder: Whose classes it names.
        content: What ``config.json`` holds.
        name: See ``write_card``.
    """
    classes: list[str] = read_config(folder / "transformer", "transformer")["class_names"]
    return "\n".join(
        [*_metadata(content), *_introduction(content, classes, name or "path/to/this/folder"), *_run(content)]
    )


def _metadata(content: Mapping[str, Any]) -> list[str]:
    from huggingface_hub import ModelCardData

    known = content.get("license")
    data = ModelCardData(
        library_name="maskgit_pl",
        pipeline_tag="unconditional-image-generation",  # the Hub has none for images of classes
        license=printable(known) if known else None,
        tags=["maskgit", "vqgan", "masked-generative-transformer", "class-conditional"],
    )
    missing = [] if known else ["# license: to be filled in by who knows it, of the weights and of their data"]
    return ["---", *missing, data.to_yaml(), "---", ""]


def _introduction(content: Mapping[str, Any], classes: list[str], name: str) -> list[str]:
    size, grid = content["image_size"], content["grid"]
    title = markdown((content.get("run") or {}).get("name", "MaskGIT"))
    colour = "grey" if content["in_channels"] == 1 else "colour"
    shown = ", ".join(markdown(each) for each in classes[:_NAMES_SHOWN])
    more = f" and {len(classes) - _NAMES_SHOWN} more" if len(classes) > _NAMES_SHOWN else ""
    parameters = content["parameters"]
    how = "tuned for these weights" if content["decoding_is_tuned"] else "as the model was exported"
    causal = content["attention"] == "causal"
    kind = "The sequential baseline of MaskGIT" if causal else "MaskGIT"
    steps = "one token after the other" if causal else f"in {content['decoding']['num_steps']} parallel steps"
    example = python_string(classes[0]) if len(classes[0]) <= _LONGEST_EXAMPLE else "0"
    return [
        f"# {title}",
        "",
        f"{kind} ([arXiv:2202.04200](https://arxiv.org/abs/2202.04200)): images of {len(classes)} classes, "
        f"{size} x {size} pixels in {colour}, decoded {steps}.",
        "",
        "```python",
        "from maskgit_pl import MaskGIT",
        f"pipe = MaskGIT.from_pretrained({python_string(name)})",
        f'pipe.generate([{example}], seed=0)[0].save("image.png")',
        "```",
        "",
        "| what | |",
        "|---|---|",
        f"| classes | {shown}{more} |",
        f"| no class | {'yes: `None`' if content['class_dropout'] else 'none: it was trained without class dropout'} |",
        f"| tokens of an image | {grid[0]} x {grid[1]}, of {content['num_codes']} codes |",
        *(f"| parameters, {stage} | {parameters[stage]:,} |" for stage in _STAGES),
        f"| attention | {content['attention']} |",
        *([] if causal else [f"| mask schedule | {_shown(content['mask_schedule'])} |"]),
        f"| decoding, {how} | {_shown(content['decoding'])} |",
        *(f"| sha256, {stage} | {code_span(content['fingerprints'][stage])} |" for stage in _STAGES),
        "",
    ]


def _run(content: Mapping[str, Any]) -> list[str]:
    run = content.get("run")
    if not run:
        return []
    lines = ["## Training", "", "| | tokenizer | transformer |", "|---|---|---|"]
    lines += _row("recipe", [run[stage]["recipe"] or None for stage in _STAGES])
    for part, keys in (("settings", _SETTINGS), ("environment", _VERSIONS)):
        for key in keys:
            lines += _row(key, [run[stage][part].get(key) for stage in _STAGES])
    measured = run["measured"]
    if measured:
        how = _shown({**measured["protocol"], "device": measured.get("device")})
        lines += ["", "## Measured", "", f"By `maskgit evaluate`: {how}.", "", "| figure | value |", "|---|---|"]
        lines += [f"| {markdown(key)} | {_shown(value)} |" for key, value in measured["figures"].items()]
    return [*lines, ""]


def _row(title: str, values: list[Any]) -> list[str]:
    """A row of both stages; none where neither has a value."""
    cells = ["" if value is None else _shown(value) for value in values]
    return [f"| {title} | {' | '.join(cells)} |"] if any(cells) else []


def _shown(value: Any) -> str:
    """Returns Markdown of a value: four digits, a registered name before its arguments, nothing of what is not set."""
    if isinstance(value, Mapping):
        parts = [f"{markdown(key)} {_shown(part)}" for key, part in value.items() if part is not None and key != "name"]
        if "name" not in value:
            return ", ".join(parts)
        name = markdown(value["name"])
        return f"{name} ({', '.join(parts)})" if parts else name
    if isinstance(value, list | tuple):
        return " ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else markdown(value)
