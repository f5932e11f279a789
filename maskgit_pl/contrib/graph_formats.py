"""The two formats of exported graphs: writes a graph to a file, and loads the file as a function.

``onnx``: ``torch.onnx.export`` of a ``torch.export`` program, for ONNX Runtime. Weights over 1 GB are in a second file,
because a protobuf holds at most 2 GB.

``pt2``: ``torch.export.save``, for ``torch.export.load``. A file of somebody else can hold pickles, which run code when
they are loaded. Those written here hold none, and only files that were just written are loaded here.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from maskgit_pl.contrib.graph_kinds import Format
from maskgit_pl.contrib.graphs import Graph
from maskgit_pl.text import printable

__all__ = ["PACKAGES", "Call", "NotExportableError", "check_packages", "load_graph", "write_graph"]

Call: TypeAlias = Callable[[Mapping[str, Tensor]], Tensor]

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""The packages of the format ``onnx``."""

_MOST_IN_ONE_FILE = 10**9  # bytes of weights
_TRACED_BATCH = 2  # torch.export treats 0 and 1 as special
_LARGEST_BATCH = 65536


class NotExportableError(ValueError):
    """A network that ``torch.export`` or the ONNX exporter cannot translate."""


def check_packages(kind: Format) -> None:
    """Checks that the packages of a format are installed.

    Raises:
        ValueError: if one is missing.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None] if kind == "onnx" else []
    if missing:
        raise ValueError(
            f"--format onnx must have the packages {', '.join(PACKAGES)}, and {missing[0]} is missing; install them "
            "with `pip install 'maskgit_pl[export]'`, or use --format pt2"
        )


def write_graph(graph: Graph, file: Path, kind: Format) -> None:
    """Writes a graph to a file whose batch size is free.

    Args:
        graph: Graph to write.
        file: File to write, with the suffix of the format.
        kind: Format.

    Raises:
        NotExportableError: if ``torch.export`` or the ONNX exporter cannot translate the network.
        ValueError: if ONNX Runtime cannot open a file of this name.
    """
    if kind == "onnx":
        _utf8_path(file)
    with _quiet(), torch.no_grad():
        try:
            program = _trace(graph)
            write = _write_onnx if kind == "onnx" else _write_pt2
            write(graph, program, file)
        except OSError:  # such as a full disk
            raise
        except Exception as error:  # the exporters raise many types
            raise NotExportableError(f"{graph.part} cannot be exported as {kind}: {_reason(error)}") from error


def load_graph(graph: Graph, file: Path, kind: Format) -> Call:
    """Loads a file that ``write_graph`` has just written, as a function of the graph's inputs by name."""
    return _load_onnx(graph, file) if kind == "onnx" else _load_pt2(file)


def _trace(graph: Graph) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)
    inputs = tuple(graph.draw(_TRACED_BATCH, torch.Generator().manual_seed(0)).values())
    # A graph has fewer inputs than arguments if the network takes no vectors.
    program = torch.export.export(graph.module, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
    _remove_paths(program)
    return program


def _remove_paths(program: torch.export.ExportedProgram) -> None:
    """Removes the stack traces, which would publish the paths of this machine."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)


def _reason(error: BaseException) -> str:
    """Returns the first line of the error that the others followed from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _write_pt2(graph: Graph, program: torch.export.ExportedProgram, file: Path) -> None:
    program.example_inputs = None  # they would be saved as a pickle
    with open(file, "wb") as stream:  # torch aborts the process if a path is not in UTF-8
        torch.export.save(program, stream)
    _check_no_pickle(file)


def _check_no_pickle(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            content = archive.read(name) if name.endswith("_config.json") else b""
            assert b'"use_pickle": true' not in content, f"{file}: {name} names a pickle"
            assert not name.endswith((".pkl", ".pickle")), f"{file}: {name} is a pickle"


def _load_pt2(file: Path) -> Call:
    with open(file, "rb") as stream:
        module = torch.export.load(stream).module()

    def call(inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            found: Tensor = module(*inputs.values())
        return found

    return call


def _write_onnx(graph: Graph, program: torch.export.ExportedProgram, file: Path) -> None:
    names = list(graph.draw(1, torch.Generator()))
    exported = torch.onnx.export(program, dynamo=True, input_names=names, output_names=[graph.output], verbose=False)
    assert exported is not None
    for value in (*exported.model.graph.inputs, *exported.model.graph.outputs):
        shape = value.shape
        assert shape is not None
        value.shape = type(shape)(["batch", *shape[1:]])
    num_bytes = sum(tensor.nbytes for tensor in program.state_dict.values())
    exported.save(file, external_data=num_bytes > _MOST_IN_ONE_FILE)


def _load_onnx(graph: Graph, file: Path) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(_utf8_path(file), options, providers=["CPUExecutionProvider"])

    def call(inputs: Mapping[str, Tensor]) -> Tensor:
        (found,) = session.run([graph.output], {name: tensor.numpy() for name, tensor in inputs.items()})
        return torch.from_numpy(found)

    return call


def _utf8_path(file: Path) -> str:
    """Returns a path for ONNX Runtime, which takes UTF-8 in every locale.

    Raises:
        ValueError: if the path is not in UTF-8.
    """
    try:
        return os.fsencode(file).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"--out must be a path in UTF-8, got {printable(file)}; give another path") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences progress, warnings and deprecations of the exporters; their errors are raised."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)
