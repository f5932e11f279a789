"""Exports a model as ONNX or ``torch.export`` files, for programs without this package.

A graph is one network call as a file, with fixed shapes except for the batch: the tokenizer's decoder and
encoder, and the transformer's logits. The decoding loop stays outside; ``docs/export.md`` has one in NumPy.

``onnx``: ``torch.onnx.export`` of a ``torch.export`` program, for ONNX Runtime. Weights over 1 GB are in a
second file, because a protobuf holds at most 2 GB.

``pt2``: ``torch.export.save``, for ``torch.export.load``. A file of somebody else can hold pickles, which run code when
they are loaded. Those written here hold none, and only files that were just written are loaded here.

Shapes: B images, N tokens, K codes, C channels, H W pixels, D size of a conditioning vector.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from maskgit_pl.checks import height_width
from maskgit_pl.decoding.guidance import step_progress
from maskgit_pl.decoding.sampling import CodeSampling
from maskgit_pl.files import sha256_of, write_text
from maskgit_pl.folders import check_new_folder, write_folder
from maskgit_pl.networks.backbone import Backbone, BackboneConfig
from maskgit_pl.pipeline.model import MaskGIT
from maskgit_pl.pipeline.sharing import find_folder
from maskgit_pl.pretrained.networks import PretrainedTokenizer, PretrainedTransformer, read_config
from maskgit_pl.text import size_text

Format = Literal["onnx", "pt2"]
Call: TypeAlias = Callable[[Mapping[str, Tensor]], Tensor]

PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # of the format ``onnx``
DESCRIPTION = "export.json"  # the file that describes the graphs of a folder
_FORMAT, _VERSION = "maskgit_pl.graphs", 1
_FILES = {
    f"{graph}.{suffix}"
    for graph in ("tokenizer-decoder", "tokenizer-encoder", "transformer")
    for suffix in ("onnx", "onnx.data", "pt2")
}
_MOST_IN_ONE_FILE = 10**9  # bytes of weights
_TRACED_BATCH = 2  # torch.export treats 0 and 1 as special
_COMPARED_BATCHES = (1, 3)
_LARGEST_BATCH = 65536
_MASKED = 0.5  # fraction of masked tokens in random inputs
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
    """
    if kind == "onnx":
        check_packages("onnx")
    check = partial(check_new_folder, replace=replace, description=DESCRIPTION, known=_FILES)
    # The folder is locked and checked before the model is loaded.
    with write_folder(Path(out), name="--out", check=check) as fresh:
        # 1.
        folder = find_folder(model)
        pipe = MaskGIT.from_pretrained(folder, pack_weights=False)
        if pipe.negative_model is not None:
            _log.warning(
                "%s: the negative model of guidance is not exported; guide with the null class instead", folder
            )
        description = describe_model(pipe, folder)  # first, since it refuses what no file can hold
        # 2.
        graphs = {each.name: write_checked(each, fresh, kind) for each in graphs_of(pipe.tokenizer, pipe.transformer)}
        # 3.
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "kind": kind,
            "graphs": graphs,
            **description,
        }
        write_text(fresh / DESCRIPTION, json.dumps(content, indent=2) + "\n")
        # 4. On leaving the block.
    return content


def check_packages(kind: str) -> None:
    """Checks that the packages of ONNX are installed, for a format."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--format {kind} must have the packages {', '.join(PACKAGES)}, and {missing[0]} is missing; install them "
            "with `pip install 'maskgit_pl[export]'`, or use --format pt2"
        )


def compare_graph(graph: Graph, file: Path, kind: Format) -> float:
    """Returns the largest difference between a file and the graph on random inputs of 1 and 3 images.

    It is the largest absolute difference of floats, or the fraction of other tokens.
    """
    call, largest = load_graph(graph, file, kind), 0.0
    for batch in _COMPARED_BATCHES:
        inputs = graph.draw(batch, torch.Generator().manual_seed(batch))
        with torch.no_grad():
            ours, theirs = graph.module(*inputs.values()), call(inputs)
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise ValueError(
                f"{file.name}: the output must be {ours.dtype} {tuple(ours.shape)}, got {theirs.dtype} "
                f"{tuple(theirs.shape)}"
            )
        is_float = ours.is_floating_point()
        difference = ((ours - theirs).abs().max() if is_float else (ours != theirs).float().mean()).item()
        if not difference <= graph.tolerance:  # also NaN
            raise ValueError(
                f"{file.name} must compute what {graph.part} computes here to {graph.tolerance:g}, got a difference of "
                f"{difference:.3g} for {batch} image{'s' * (batch > 1)}; nothing was written"
            )
        largest = max(largest, difference)
    return largest


def write_checked(graph: Graph, folder: Path, kind: Format) -> dict[str, Any]:
    """Writes and compares a graph, and returns its description for ``export.json``."""
    file = folder / f"{graph.name}.{kind}"
    write_graph(graph, file, kind)
    difference = compare_graph(graph, file, kind)
    parts = sorted(folder.glob(f"{file.name}*"))  # weights over 1 GB have a second file
    size = size_text(sum(each.stat().st_size for each in parts))
    _log.info("%s: %s, largest difference %.2g (tolerance %g)", file.name, size, difference, graph.tolerance)
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


def describe_model(pipe: MaskGIT, folder: Path) -> dict[str, Any]:
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
        "image_size": list(height_width(tokenizer.image_size)),
        "attention": config.attention,
        "mask_schedule": transformer_file["mask_schedule"],
        "decoding": asdict(pipe.decoding),
        "steps": _describe_steps(pipe),
        "license": license_,
    }


def _describe_steps(pipe: MaskGIT) -> Mapping[str, list[float]]:
    """Returns the numbers of each decoding step, which follow from the schedules that the decoding names."""
    decoding, num_tokens = pipe.decoding, pipe.transformer.network.config.num_tokens
    num_steps, sampling = decoding.num_steps, CodeSampling(decoding.sampling_temperature)
    numbers = {
        "guidance_scale": list(decoding.scales()),
        "sampling_temperature": [sampling.temperature_at(step_progress(step, num_steps)) for step in range(num_steps)],
    }
    if decoding.is_autoregressive:
        return numbers
    decoder = decoding.build_decoder(pipe.transformer.mask_schedule)
    if decoder.token_selector.counts_in_loop:
        raise ValueError(
            f"token_selector must follow the counts of the schedule to be exported, got {decoding.token_selector!r}; "
            "choose another one in the decoding of the model"
        )
    if pipe.transformer.corruption is not None:
        raise ValueError(
            f"corruption must be of training only to be exported, got {pipe.transformer.corruption!r}, of decoding, "
            "too; train with another one"
        )
    counts = [step.before[0] for step in decoder.plan([num_tokens], num_tokens)]
    return {"num_masked": [*counts, 0], **numbers}


@dataclass(frozen=True)
class Graph:
    """A network call that becomes a file.

    Args:
        name: Name of the file without its suffix.
        part: Registered part that decides whether it can be exported, such as ``quantizer 'ema'``, for errors.
        module: The call, in evaluation mode on the CPU.
        output: Name of its output.
        draw: Draws random inputs (B, ...) by name, in the order of the arguments, for a batch size B.
        tolerance: Largest difference to the module that is accepted; see ``compare_graph``.
    """

    name: str
    part: str
    module: nn.Module
    output: str
    draw: Callable[[int, torch.Generator], Mapping[str, Tensor]]
    tolerance: float


class _TokenDecoder(nn.Module):
    """Decodes tokens (B, N) int64 to images (B, C, H, W) float32 in [0, 255], clipped and not rounded."""

    def __init__(self, tokenizer: PretrainedTokenizer) -> None:
        super().__init__()
        self.network, self.grid = tokenizer.network, tokenizer.grid
        self.height, self.width = height_width(tokenizer.image_size)

    def forward(self, tokens: Tensor) -> Tensor:
        images = self.network.decode(tokens, self.grid)[..., : self.height, : self.width]
        return images.clamp(0, 1) * 255


class _ImageEncoder(nn.Module):
    """Encodes images (B, C, H, W) float32 in [0, 255] to tokens (B, N) int64."""

    def __init__(self, tokenizer: PretrainedTokenizer) -> None:
        super().__init__()
        self.network = tokenizer.network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.encode(images / 255)


class _Logits(nn.Module):
    """Computes the logits (B, N, K) float32 of tokens (B, N) and labels (B,) int64, and of vectors (B, D) if any."""

    def __init__(self, network: Backbone) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor, labels: Tensor, vectors: Tensor | None = None) -> Tensor:
        logits: Tensor = self.network(tokens, labels, vectors=vectors)
        return logits


def graphs_of(tokenizer: PretrainedTokenizer, transformer: PretrainedTransformer) -> list[Graph]:
    """Returns the graphs of a model: ``tokenizer-decoder``, ``tokenizer-encoder`` and ``transformer``.

    Args:
        tokenizer: Tokenizer on the CPU.
        transformer: Transformer on the CPU, with weights that are not packed.
    """
    sizes, config = tokenizer.network.config, transformer.network.config
    spec = sizes.quantizer if isinstance(sizes.quantizer, str) else sizes.quantizer["name"]
    shape = sizes.in_channels, *height_width(tokenizer.image_size)
    num_tokens = tokenizer.grid[0] * tokenizer.grid[1]

    def draw_tokens(batch: int, chance: torch.Generator) -> dict[str, Tensor]:
        return {"tokens": torch.randint(sizes.codebook_size, (batch, num_tokens), generator=chance)}

    def draw_images(batch: int, chance: torch.Generator) -> dict[str, Tensor]:
        return {"images": torch.rand(batch, *shape, generator=chance) * 255}

    return [
        Graph("tokenizer-decoder", f"quantizer {spec!r}", _TokenDecoder(tokenizer).eval(), "images", draw_tokens, 0.25),
        Graph("tokenizer-encoder", f"quantizer {spec!r}", _ImageEncoder(tokenizer).eval(), "tokens", draw_images, 0.01),
        Graph(
            "transformer",
            f"backbone {config.backbone!r}",
            _Logits(transformer.network).eval(),
            "logits",
            lambda batch, chance: _draw_partly_masked(config, batch, chance),
            1e-3,
        ),
    ]


def _draw_partly_masked(config: BackboneConfig, batch: int, chance: torch.Generator) -> dict[str, Tensor]:
    """Draws the inputs of a transformer. Half of the tokens are masked, except with causal attention."""
    tokens = torch.randint(config.codebook_size, (batch, config.num_tokens), generator=chance)
    if config.attention == "bidirectional":
        is_masked = torch.rand(tokens.shape, generator=chance) < _MASKED
        tokens = tokens.masked_fill(is_masked, config.mask_token_id)
    num_labels = config.num_classes + (config.null_label is not None)
    inputs = {"tokens": tokens, "labels": torch.randint(num_labels, (batch,), generator=chance)}
    if config.condition_dim:
        inputs["vectors"] = torch.randn(batch, config.condition_dim, generator=chance)
    return inputs


def write_graph(graph: Graph, file: Path, kind: Format) -> None:
    """Writes a graph to a file whose batch size is free.

    Args:
        graph: Graph to write.
        file: File to write, with the suffix of the format.
        kind: Format.
    """
    with _quiet(), torch.no_grad():
        try:
            program = _trace(graph)
            if kind == "onnx":
                _write_onnx(graph, program, file)
            else:
                _write_pt2(program, file)
        except OSError:  # such as a full disk
            raise
        except Exception as error:  # the exporters raise many types
            raise ValueError(f"{graph.part} cannot be exported as {kind}: {_reason(error)}") from error


def _trace(graph: Graph) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)
    inputs = tuple(graph.draw(_TRACED_BATCH, torch.Generator().manual_seed(0)).values())
    # A graph has fewer inputs than arguments if the network takes no vectors.
    program = torch.export.export(graph.module, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # it would publish the paths of this machine
    return program


def _reason(error: BaseException) -> str:
    """Returns the first line of the error that the others followed from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _write_pt2(program: torch.export.ExportedProgram, file: Path) -> None:
    program.example_inputs = None  # they would be saved as a pickle
    with open(file, "wb") as stream:  # torch aborts the process if a path is not in UTF-8
        torch.export.save(program, stream)
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            content = archive.read(name) if name.endswith("_config.json") else b""
            assert b'"use_pickle": true' not in content, f"{file}: {name} names a pickle"
            assert not name.endswith((".pkl", ".pickle")), f"{file}: {name} is a pickle"


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


def load_graph(graph: Graph, file: Path, kind: Format) -> Call:
    """Loads a file that ``write_graph`` has just written, as a function of the graph's inputs by name."""
    if kind == "pt2":
        with open(file, "rb") as stream:
            module = torch.export.load(stream).module()
        return torch.no_grad()(lambda inputs: module(*inputs.values()))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(os.fsencode(file).decode(), options, providers=["CPUExecutionProvider"])

    def call(inputs: Mapping[str, Tensor]) -> Tensor:
        (output,) = session.run([graph.output], {key: tensor.numpy() for key, tensor in inputs.items()})
        return torch.from_numpy(output)

    return call


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
