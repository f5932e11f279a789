"""Exports a model as a page that generates and edits images in the browser of a visitor, without a server.

The folder holds static files: a page (``web_page/``), the networks as ONNX graphs, and ``model.json`` with all numbers
that the script needs. ONNX Runtime Web runs the graphs. It is copied from a folder, or the page fetches it: the pinned
version with its hash, so that no other code runs.

The random numbers and the counts of the script are those of ``randomness`` and ``decoding.decoder``: a seed gives the
same tokens, except where two scores differ by less than the rounding of float32.
"""

from __future__ import annotations

import base64
import json
from dataclasses import replace as with_values
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from maskgit_pl.contrib.graph_export import Graph, check_packages, describe_model, graphs_of, write_checked
from maskgit_pl.decoding.guidance import guidance_scales, guidance_schedules
from maskgit_pl.decoding.sampling import CodeSampling
from maskgit_pl.decoding.selectors import Confidence, Random, token_selectors
from maskgit_pl.files import sha256_of, write_text
from maskgit_pl.folders import check_new_folder, write_folder
from maskgit_pl.grids import MASKED, NEW, REQUESTED
from maskgit_pl.pipeline.model import MaskGIT
from maskgit_pl.pipeline.sharing import find_folder
from maskgit_pl.randomness import stream_key
from maskgit_pl.registry import describe
from maskgit_pl.schedules import MaskSchedule, mask_schedules
from maskgit_pl.text import shorten

DESCRIPTION = "model.json"
PAGE = ("index.html", "page.js", "style.css")
VERSION = "1.31.1"  # of onnxruntime-web on npm
RUNTIME = {  # file in its folder dist: SHA-256, base64, as browsers spell it
    "ort.wasm.bundle.min.mjs": "Ub1xaBdXZzJKsKz8/EypSglqOCbj66yczE8ZXrhl+N0=",
    "ort-wasm-simd-threaded.wasm": "S4hMIDsPpI0Fe+MzLGVRP/hao8W93WlGrMD6t+zaAB0=",
}
_GRAPHS = ("transformer.onnx", "tokenizer-decoder.onnx", "student.onnx")
_STREAMS = ("decode/codes", "decode/codes/second", "decode/choice", "decode/start", "decode/start/codes")
_SELECTORS = {Confidence: "confidence", Random: "random"}  # that the script has
_MOST_STEPS = 32  # that the page offers, if there are as many tokens


def export_page(
    model: str | Path,
    out: str | Path,
    *,
    student: Path | None = None,
    runtime: Path | None = None,
    replace: bool = False,
) -> dict[str, Any]:
    """Writes a model as a page of static files, which any web server can serve, such as ``python -m http.server``.

    Each graph is loaded and compared with this package, as by ``contrib.graph_export``. After an error there is no new
    folder, and an older one is unchanged.

    Args:
        model: Run, pretrained folder, name of a model in the package, or ``owner/name`` on the Hub.
        out: Folder to write.
        student: A distilled model with the same tokenizer, to stand beside the model.
        runtime: Folder ``dist`` of the npm package onnxruntime-web, to copy it from; None lets the page fetch it.
        replace: True replaces an earlier page in ``out``.

    Returns:
        The content of ``model.json``.

    Raises:
        ValueError: if a package is missing, the script cannot decode as the model does, the student has another
            tokenizer, the runtime is of another version, or a graph computes something else.
    """
    check_packages("web")
    copied = {} if runtime is None else {name: _read_runtime(runtime / name) for name in RUNTIME}
    check = partial(check_new_folder, replace=replace, description=DESCRIPTION, known={*PAGE, *RUNTIME, *_GRAPHS})
    with write_folder(Path(out), name="--out", check=check) as fresh:
        folder = find_folder(model)
        pipe = MaskGIT.from_pretrained(folder, pack_weights=False)
        decoder, _, transformer = graphs_of(pipe.tokenizer, pipe.transformer)
        models, graphs = [_describe_decoding(pipe, folder)], [decoder, transformer]
        if student is not None:
            second = MaskGIT.from_pretrained(student, pack_weights=False)
            if second.tokenizer.fingerprint != pipe.tokenizer.fingerprint:
                raise ValueError(
                    f"--student must have the tokenizer of {model}, got {student}; distill it from {model}"
                )
            models.append(_describe_decoding(second, student))
            graphs.append(with_values(graphs_of(second.tokenizer, second.transformer)[2], name="student"))
        cdn = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{VERSION}/dist/"
        content = {
            **describe_model(pipe, folder),
            "name": folder.parent.name if folder.name == "pretrained" else folder.name,
            "channels": pipe.tokenizer.channels,
            "token_size": pipe.tokenizer.token_size,
            "colors": {"masked": f"rgb{MASKED}", "new": f"rgb{NEW}", "painted": f"rgb{REQUESTED}"},
            "streams": {stream: stream_key(stream) for stream in _STREAMS},
            "models": models,
            "graphs": {graph.name: _write(graph, fresh) for graph in graphs},
            "runtime": {"folder": "" if copied else cdn, "files": RUNTIME},
        }
        for name in PAGE:
            write_text(fresh / name, files("maskgit_pl.contrib").joinpath("web_page", name).read_text("utf-8"))
        for name, code in copied.items():
            (fresh / name).write_bytes(code)
        write_text(fresh / DESCRIPTION, json.dumps(content) + "\n")
    return content


def _read_runtime(file: Path) -> bytes:
    if file.is_file() and _hash(file) == RUNTIME[file.name]:
        return file.read_bytes()
    raise ValueError(
        f"--runtime must be the folder dist of onnxruntime-web {VERSION}, got {'another' if file.exists() else 'no'} "
        f"{file}; fetch it with `npm pack onnxruntime-web@{VERSION}` and unpack it, or leave --runtime out"
    )


def _hash(file: Path) -> str:
    return base64.b64encode(bytes.fromhex(sha256_of(file))).decode()


def _write(graph: Graph, folder: Path) -> dict[str, str]:
    """Writes and compares a graph, and returns its file and hash."""
    write_checked(graph, folder, "onnx")
    file = folder / f"{graph.name}.onnx"
    if (folder / f"{file.name}.data").exists():
        raise ValueError(f"--format web must have graphs below 1 GB, got {graph.part} above; use --format onnx")
    return {"file": file.name, "hash": _hash(file)}


def _describe_decoding(pipe: MaskGIT, folder: Path) -> dict[str, Any]:
    """Returns the decoding settings of a model, with tables of the schedules for each number of steps from 1."""
    trained, config = pipe.transformer.schedule_for("--format web"), pipe.transformer.network.config
    decoding = pipe.decoding
    selector = token_selectors.build(decoding.token_selector or "")
    for what, value in (
        ("token_selector", None if type(selector) in _SELECTORS else describe(decoding.token_selector)),
        ("tokens_per_step", decoding.tokens_per_step),
        ("corruption of decoding", pipe.transformer.corruption),
        ("condition_dim", config.condition_dim),
        ("negative model", pipe.negative_model),
    ):
        if value:
            raise ValueError(
                f"{folder}: the page cannot have the {what} {shorten(value)}; use `maskgit web`, or change the "
                "decoding of the model"
            )
    guidance = guidance_schedules.build(decoding.guidance)
    spec = decoding.guidance if isinstance(decoding.guidance, dict) else {"name": decoding.guidance}
    unit = guidance_schedules.build({**spec, "scale": 1.0}) if hasattr(guidance, "scale") else guidance
    own = decoding.mask_schedule or mask_schedules.spec(trained)
    schedules = {describe(own): mask_schedules.build(own), **mask_schedules.build_all()}
    steps = range(1, max(decoding.num_steps, min(config.num_tokens, _MOST_STEPS)) + 1)
    first, last = (CodeSampling(decoding.sampling_temperature).temperature_at(at) for at in (0, 1))
    return {
        "num_steps": decoding.num_steps,
        "selector": _SELECTORS[type(selector)],
        "choice_temperature": getattr(selector, "choice_temperature", 0),
        "sampling_temperature": [first, last],
        "top_k": decoding.top_k,
        "random_start": decoding.random_start,
        "guidance_scale": getattr(guidance, "scale", 1.0),
        "guidance": [guidance_scales(unit, count) for count in steps],  # of scale 1
        "schedules": {
            name: [_ratios(schedule, count, config.num_tokens) for count in steps]
            for name, schedule in schedules.items()
        },
    }


def _ratios(schedule: MaskSchedule, num_steps: int, num_tokens: int) -> list[float]:
    """Returns the fraction that is masked after each step: ``ParallelDecoder.plan_by_schedule`` takes counts of it."""
    progress = torch.arange(1, num_steps + 1, dtype=torch.float32) / num_steps
    return schedule(progress, num_tokens).clamp(1e-6, 1).tolist()
