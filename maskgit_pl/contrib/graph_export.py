"""``export_graphs``: writes the graphs of a model, loads them again, compares them with ours, and describes them.

The folder appears only when every file in it has been compared.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskgit_pl.contrib.graph_formats import PACKAGES, NotExportableError, check_packages, load_graph, write_graph
from maskgit_pl.contrib.graph_kinds import Format
from maskgit_pl.contrib.graphs import Graph, graphs_of
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.plan import step_progress
from maskgit_pl.decoding.sampling import CodeSampling
from maskgit_pl.files import sha256_of, size_text, write_text
from maskgit_pl.folders import check_new_folder, write_folder
from maskgit_pl.image_format import height_width
from maskgit_pl.pipeline.model import MaskGIT
from maskgit_pl.pipeline.sharing import find_folder
from maskgit_pl.pretrained import read_config

__all__ = ["DESCRIPTION", "compare_graph", "export_graphs"]

DESCRIPTION = "export.json"
"""The file that describes the graphs of a folder."""

_FORMAT, _VERSION = "maskgit_pl.graphs", 1
_COMPARED_BATCHES = (1, 3)
# The second file of a graph in ONNX holds weights over 1 GB.
_FILE_NAME = re.compile(r"(tokenizer-decoder|tokenizer-encoder|transformer)\.(onnx|onnx\.data|pt2)")
_log = logging.getLogger(__name__)


def export_graphs(
    model: str | Path, out: str | Path, *, kind: Format = "onnx", replace: bool = False
) -> dict[str, Any]:
    """Writes a model as graphs, which other programs run without this package.

    1. Find and load the model, with plain layers.
    2. Write each graph beside ``out``, load the file, and compare it with ours on random inputs of 1 and 3 images.
    3. Describe the model and the files in ``export.json``.
    4. Give the folder its name.

    After an error there is no new folder, and an older one is unchanged.

    Args:
        model: Run, pretrained folder, name of a model in the package, or ``owner/name`` on the Hub.
        out: Folder to write.
        kind: ``onnx`` for ONNX Runtime and others, or ``pt2`` for ``torch.export.load``.
        replace: True replaces an earlier export in ``out``.

    Returns:
        The content of ``export.json``.

    Raises:
        FileNotFoundError: if there is no such model.
        FileExistsError: if ``out`` has files, and ``replace`` is False or not all are of an earlier export.
        ValueError: if ``out`` cannot be replaced, a package is missing, a network cannot be exported, or a file
            computes something else than ours.
    """
    check_packages(kind)
    check = partial(
        check_new_folder, replace=replace, description=DESCRIPTION, entry=("format", _FORMAT), known=_listed_files
    )
    # The folder is locked and checked before the model is loaded.
    with write_folder(Path(out), name="--out", check=check) as fresh:
        # 1.
        folder = find_folder(model)
        pipe = MaskGIT.from_pretrained(folder, pack_weights=False)
        if pipe.negative_model is not None:
            _log.warning(
                "%s: the negative model of guidance is not exported; guide with the null class instead", folder
            )
        # 2.
        graphs = dict(_write_all(graphs_of(pipe.tokenizer, pipe.transformer), fresh, kind))
        # 3.
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "kind": kind,
            "graphs": graphs,
            **_describe_model(pipe, folder),
            "versions": {
                **{name: version(name) for name in ("maskgit_pl", "torch")},
                # Of the modules: those of onnxruntime-gpu, for example, are in a package of another name.
                **{name: str(import_module(name).__version__) for name in (PACKAGES if kind == "onnx" else ())},
            },
        }
        write_text(fresh / DESCRIPTION, json.dumps(content, indent=2) + "\n")
        # 4. On leaving the block.
    return content


def compare_graph(graph: Graph, file: Path, kind: Format) -> float:
    """Returns the largest difference between a file and the graph on random inputs of 1 and 3 images.

    Raises:
        ValueError: if it is above the tolerance of the graph, or not a number.
    """
    call, largest = load_graph(graph, file, kind), 0.0
    for batch in _COMPARED_BATCHES:
        inputs = graph.draw(batch, torch.Generator().manual_seed(batch))
        with torch.no_grad():
            difference = graph.difference(graph.module(*inputs.values()), call(inputs))
        if not difference <= graph.tolerance:  # also NaN
            raise ValueError(
                f"{file.name} must compute what {graph.part} computes here to {graph.tolerance:g}, got a difference of "
                f"{difference:.3g} for {batch} image{'s' * (batch > 1)}; nothing was written"
            )
        largest = max(largest, difference)
    return largest


def _listed_files(content: Mapping[str, Any]) -> set[str]:
    """Returns the files of an export that ``export.json`` lists; it is untrusted, and a damaged one lists none."""
    graphs = content.get("graphs")
    entries = (
        [each.get("files") for each in graphs.values() if isinstance(each, dict)] if isinstance(graphs, dict) else []
    )
    listed = {name for files in entries if isinstance(files, dict) for name in files}
    return {name for name in listed if _FILE_NAME.fullmatch(name)}  # others are not ours to replace


def _write_all(graphs: Iterable[Graph], folder: Path, kind: Format) -> Iterator[tuple[str, dict[str, Any]]]:
    """Writes and compares the graphs, and yields the name and the description of each."""
    for graph in graphs:
        try:
            yield graph.name, _write_and_compare(graph, folder, kind)
        except NotExportableError as error:
            if not graph.is_optional:
                raise
            for part in folder.glob(f"{graph.name}.*"):
                part.unlink()
            _log.warning("%s is left out: %s", graph.name, error)


def _write_and_compare(graph: Graph, folder: Path, kind: Format) -> dict[str, Any]:
    """Writes a graph, compares it, and describes its files, inputs and output."""
    file = folder / f"{graph.name}.{kind}"
    write_graph(graph, file, kind)
    difference = compare_graph(graph, file, kind)
    parts = sorted(folder.glob(f"{file.name}*"))  # weights over 1 GB have a second file
    num_bytes = sum(each.stat().st_size for each in parts)
    _log.info(
        "%s: %s, largest difference %.2g (tolerance %g)", file.name, size_text(num_bytes), difference, graph.tolerance
    )
    inputs = graph.draw(1, torch.Generator())
    with torch.no_grad():
        output = graph.module(*inputs.values())
    return {
        "files": {each.name: {"bytes": each.stat().st_size, "sha256": sha256_of(each)} for each in parts},
        "inputs": {name: _describe_tensor(value) for name, value in inputs.items()},
        "outputs": {graph.output: _describe_tensor(output)},
        "largest_difference": difference,
        "tolerance": graph.tolerance,
    }


def _describe_tensor(value: Tensor) -> dict[str, Any]:
    return {"dtype": str(value.dtype).removeprefix("torch."), "shape": ["batch", *value.shape[1:]]}


def _describe_model(pipe: MaskGIT, folder: Path) -> dict[str, Any]:
    """Returns what a program needs to know to run the graphs, in plain values."""
    config, tokenizer = pipe.transformer.network.config, pipe.tokenizer
    transformer_file = read_config(folder / "transformer", "transformer")
    license_ = read_config(folder, "pipeline").get("license") if (folder / "config.json").is_file() else None
    return {
        "class_names": list(pipe.class_names),
        "null_label": config.null_label,
        "mask_token_id": config.mask_token_id,
        "codebook_size": config.codebook_size,
        "grid": list(config.grid),
        "num_tokens": config.num_tokens,
        "condition_dim": config.condition_dim,
        "image_size": list(height_width(tokenizer.image_size)),
        "channels": tokenizer.network.config.in_channels,
        "attention": config.attention,
        "mask_schedule": transformer_file["mask_schedule"],
        "decoding": asdict(pipe.decoding),
        "steps": _describe_steps(pipe, pipe.decoding),
        "license": license_,
        "source": {
            "tokenizer": tokenizer.fingerprint,
            "transformer": sha256_of(folder / "transformer" / "model.safetensors"),
        },
    }


def _describe_steps(pipe: MaskGIT, decoding: DecodingConfig) -> Mapping[str, list[float]]:
    """Returns the numbers of each decoding step, which follow from the schedules that ``decoding`` names."""
    num_steps, num_tokens = decoding.num_steps, pipe.transformer.network.config.num_tokens
    sampling = CodeSampling(decoding.sampling_temperature)
    numbers = {
        "guidance_scale": list(decoding.scales()),
        "sampling_temperature": [sampling.temperature_at(step_progress(step, num_steps)) for step in range(num_steps)],
    }
    if decoding.is_autoregressive:
        return numbers
    decoder = decoding.build_decoder(pipe.transformer.mask_schedule)
    return {"num_masked": [row[0] for row in decoder.count_masked([num_tokens], num_tokens)], **numbers}
