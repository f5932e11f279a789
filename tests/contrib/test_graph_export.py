"""``maskgit export --format``: what is written and compared, and what is left after an error.

Every registered backbone and quantizer is exported with parity, or refused by name with a reason.
"""

import importlib.util
import json
import shutil
import sys
import zipfile
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from maskgit_pl import MaskGIT
from maskgit_pl.cli import main
from maskgit_pl.contrib import graph_export
from maskgit_pl.contrib.graph_export import (
    Format,
    Graph,
    compare_graph,
    export_graphs,
    graphs_of,
    write_graph,
)
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.files import sha256_of
from maskgit_pl.networks.quantizers import quantizers
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.pretrained.networks import PretrainedTokenizer, PretrainedTransformer, save_decoding
from tests.networks.backbone_cases import all_configs, create, small_config
from tests.networks.test_quantizers import CASES

pytestmark = [pytest.mark.slow, pytest.mark.exports]

HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(kind == "onnx" and not HAS_ONNX, reason="onnx is not installed"))
    for kind in get_args(Format)
]
LAYOUTS = {
    "taming with attention": {
        "layout": "taming",
        "attention_levels": (1,),
        "num_middle_blocks": 2,
        "latent_channels": 4,
    },
    "magvit2": {"layout": "magvit2", "num_middle_blocks": 2},
    "strided, patches": {"downsampling": "strided", "patch_size": 2, "activation": "relu"},
}


@pytest.fixture(scope="module")
def exported(tiny_pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "tiny"
    export_graphs(tiny_pretrained, folder, kind="pt2")
    return folder


def test_three_graphs_and_a_description_are_written(exported: Path, tiny_pretrained: Path):
    content = json.loads((exported / "export.json").read_text())
    assert content["format"] == "maskgit_pl.graphs"
    assert {*content["graphs"]} == {"tokenizer-decoder", "tokenizer-encoder", "transformer"}
    listed = {name: each for graph in content["graphs"].values() for name, each in graph["files"].items()}
    assert {*listed, "export.json"} == {file.name for file in exported.iterdir()}
    for name, each in listed.items():
        assert each == {"bytes": (exported / name).stat().st_size, "sha256": sha256_of(exported / name)}
    pipe = MaskGIT.from_pretrained(tiny_pretrained)
    config = pipe.transformer.network.config
    assert content["class_names"] == list(pipe.class_names)
    assert (content["mask_token_id"], content["null_label"]) == (config.mask_token_id, config.null_label)
    assert (content["num_tokens"], content["grid"], content["image_size"]) == (16, [4, 4], [8, 8])
    assert content["mask_schedule"] == {"name": "pow", "exponent": 2.0}
    # gamma = 1 - (t / 4)^2 of 16 tokens
    assert content["steps"]["num_masked"] == [16, 15, 12, 7, 0]
    assert content["steps"]["guidance_scale"] == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_a_model_runs_from_its_files(exported: Path, tiny_pretrained: Path):
    load = {name: torch.export.load(exported / f"{name}.pt2").module() for name in
            ("tokenizer-decoder", "tokenizer-encoder", "transformer")}  # fmt: skip
    pipe = MaskGIT.from_pretrained(tiny_pretrained)
    images = torch.randint(256, (5, 1, 8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    tokens = load["tokenizer-encoder"](images.float())
    assert torch.equal(tokens, pipe.tokenizer.encode(images))
    assert torch.equal(load["tokenizer-decoder"](tokens).round().to(torch.uint8), pipe.tokenizer.decode(tokens))
    labels = torch.tensor([0, 1, 2, 3, 0])
    with torch.no_grad():
        expected = pipe.transformer.network(tokens, labels)
    torch.testing.assert_close(load["transformer"](tokens, labels), expected)


def test_the_files_hold_no_pickle_and_no_path(exported: Path):
    for file in exported.glob("*.pt2"):
        with zipfile.ZipFile(file) as archive:
            content = {name: archive.read(name) for name in archive.namelist()}
        assert not [name for name, each in content.items() if each and name.endswith(("pkl", "pt"))]
        assert not [name for name, each in content.items() if b'"use_pickle": true' in each]
        assert not [name for name, each in content.items() if b"site-packages" in each or b"graph_export.py" in each]


def test_an_earlier_export_is_replaced_only_when_asked_for(tiny_pretrained, exported, tmp_path, capsys):
    before = {file: sha256_of(file) for file in exported.iterdir()}
    words = ["export", str(tiny_pretrained), "--format=pt2"]
    assert main([*words, f"--out={exported}"]) == 2
    assert "has files; replace an earlier export with --replace" in capsys.readouterr().err
    assert {file: sha256_of(file) for file in exported.iterdir()} == before
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main([*words, f"--out={tmp_path}", "--replace"]) == 2
    assert "--replace replaces only the folder of an earlier export" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("damage", [0.3, torch.nan])
def test_a_file_that_computes_something_else_leaves_nothing(tiny_pretrained, tmp_path, monkeypatch, damage):
    load = graph_export.load_graph

    def load_damaged(graph: Graph, file: Path, kind: str):
        call = load(graph, file, kind)
        return lambda inputs: call(inputs) + damage

    monkeypatch.setattr(graph_export, "load_graph", load_damaged)
    with pytest.raises(ValueError, match=r"tokenizer-decoder.pt2 must compute what quantizer"):
        export_graphs(tiny_pretrained, tmp_path / "out", kind="pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "words", "text"),
    [
        (None, ["--format=onnx"], "--out must name the folder to write with --format onnx"),
        (None, ["--format=pt2", "--out=x", "--step=3"], "--step must be left out with --format pt2"),
        ("nowhere", ["--format=pt2", "--out=x"], "nowhere: no such folder"),
        (None, ["--format=onnx", "--out=x"], "is missing; install them with `pip install 'maskgit_pl[export]'`"),
    ],
)
def test_refusals(model, words, text, tiny_pretrained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["export", str(model or tiny_pretrained), *words]) == 2
    assert text in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_a_program_could_not_decode_is_refused(tiny_pretrained, tmp_path):
    counts, shows = (shutil.copytree(tiny_pretrained, tmp_path / name) for name in ("counts", "shows"))
    save_decoding(counts, DecodingConfig(4, "klass"))
    file = shows / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "corruption": "mask"}))
    for model, message in (
        (counts, "^token_selector must follow the counts"),
        (shows, "^corruption must be of training"),
    ):
        with pytest.raises(ValueError, match=message):
            export_graphs(model, tmp_path / "out", kind="pt2")
    assert not (tmp_path / "out").exists()


def test_an_autoregressive_model_is_exported(tiny_autoregressive, tmp_path):
    content = export_graphs(tiny_autoregressive, tmp_path / "out", kind="pt2")
    assert content["attention"] == "causal"
    assert "num_masked" not in content["steps"]


def tokenizer(spec, codebook_size: int, code_dim: int, **options) -> PretrainedTokenizer:
    """A tokenizer of 6 x 8 pixels in colour, with random weights."""
    sizes = {"channel_multipliers": (1, 2), "num_res_blocks": 1, "num_groups": 4, **options}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = VQGANConfig(3, 8, codebook_size=codebook_size, code_dim=code_dim, quantizer=spec, **sizes)
        return PretrainedTokenizer(VQGAN(config).eval().requires_grad_(False), (8, 12), "0")


def transformer(config) -> PretrainedTransformer:
    network = create(config).requires_grad_(False)
    return PretrainedTransformer(network, None, DecodingConfig(), ("a", "b", "c"), "0")


def assert_exported(graph: Graph, kind: str, folder) -> None:
    file = folder / f"{graph.name}.{kind}"
    write_graph(graph, file, kind)
    assert compare_graph(graph, file, kind) <= graph.tolerance
    assert b"site-packages" not in file.read_bytes()  # a path of this machine


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [*all_configs(), *(
    pytest.param(small_config(name, **options), id=f"{name}-causal")
    for name, options in {"bert": {"attention": "causal"}, "adaln": {"attention": "causal", "num_registers": 0}}.items()
)])  # fmt: skip
def test_the_logits_of_every_backbone_are_exported(config, kind, tmp_path):
    graph = graphs_of(tokenizer("ema", 16, 4), transformer(config))[2]
    assert_exported(graph, kind, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", quantizers.names())  # their options change training only
def test_encoder_and_decoder_of_every_quantizer_are_exported(case, kind, tmp_path):
    shallow = {"channel_multipliers": (1,), "num_middle_blocks": 0}
    for graph in graphs_of(tokenizer(*CASES[case], **shallow), transformer(small_config("bert")))[:2]:
        assert_exported(graph, kind, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_tokenizer_is_exported(layout, kind, tmp_path):
    for graph in graphs_of(tokenizer("ema", 16, 4, **LAYOUTS[layout]), transformer(small_config("bert")))[:2]:
        assert_exported(graph, kind, tmp_path)


class OnTheHost(nn.Module):
    """A network that a plug-in might have: its path depends on the values of the tokens."""

    def forward(self, tokens, labels):
        return tokens.float() if tokens.sum() > 5 else -tokens.float()


def test_a_network_that_cannot_be_traced_is_refused_by_name(tmp_path):
    def draw(batch, chance):
        return {"tokens": torch.randint(9, (batch, 4), generator=chance), "labels": torch.zeros(batch)}

    graph = Graph("transformer", "backbone 'mine'", OnTheHost(), "logits", draw, 1e-3)
    with pytest.raises(ValueError, match=r"backbone 'mine' cannot be exported as pt2: .*data-dependent"):
        write_graph(graph, tmp_path / "mine.pt2", "pt2")
    assert list(tmp_path.iterdir()) == []
