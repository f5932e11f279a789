"""Every registered backbone and quantizer is exported with parity, or refused by name with a reason."""

import importlib.util

import pytest
import torch
from torch import nn

from maskgit_pl.contrib.graph_export import compare_graph
from maskgit_pl.contrib.graph_formats import NotExportableError, write_graph
from maskgit_pl.contrib.graph_kinds import FORMATS
from maskgit_pl.contrib.graphs import Graph, graphs_of
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.networks.quantizers import quantizers
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.pretrained import PretrainedTokenizer, PretrainedTransformer
from tests.networks.backbone_cases import all_configs, create, small_config
from tests.networks.test_quantizers_contract import CASES

REFUSED = {  # part and class of vector-quantize-pytorch -> reason, in both formats; its code is not of this package
    ("encoder of quantizer 'vq_pytorch'", "VectorQuantize"): "data-dependent",
    ("encoder of quantizer 'vq_pytorch'", "SimVQ"): "batch",  # it works for one batch size only
    ("quantizer 'vq_pytorch'", "SimVQ"): "batch",
}
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(kind == "onnx" and not HAS_ONNX, reason="onnx is not installed"))
    for kind in FORMATS
]
# Their options, such as a way to estimate gradients, change training only.
QUANTIZERS = [*quantizers.names(), "vq_pytorch SimVQ"]
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


def assert_exported(graph: Graph, kind: str, folder, *, class_name: str | None = None) -> None:
    file = folder / f"{graph.name}.{kind}"
    reason = REFUSED.get((graph.part, class_name))
    if reason is not None:
        with pytest.raises(NotExportableError, match=f"{graph.part} cannot be exported as {kind}: .*{reason}"):
            write_graph(graph, file, kind)
        return
    write_graph(graph, file, kind)
    assert compare_graph(graph, file, kind) <= graph.tolerance
    assert b"site-packages" not in file.read_bytes()  # a path of this machine


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [*all_configs(), *(
    pytest.param(small_config(name, **options), id=f"{name}-causal")
    for name, options in {"bert": {"attention": "causal"}, "adaln": {"attention": "causal", "num_registers": 0}}.items()
)])  # fmt: skip
def test_the_logits_of_every_backbone_are_exported(config, kind, tmp_path):
    graph = graphs_of(tokenizer("ema", 16, 4), transformer(config))[2]
    assert_exported(graph, kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", QUANTIZERS)
def test_encoder_and_decoder_of_every_quantizer_are_exported(case, kind, tmp_path):
    class_name = None
    if "vq_pytorch" in case:
        pytest.importorskip("vector_quantize_pytorch")
        class_name = "SimVQ" if "SimVQ" in case else "VectorQuantize"
    shallow = {"channel_multipliers": (1,), "num_middle_blocks": 0}
    for graph in graphs_of(tokenizer(*CASES[case], **shallow), transformer(small_config("bert")))[:2]:
        assert_exported(graph, kind, tmp_path, class_name=class_name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_tokenizer_is_exported(layout, kind, tmp_path):
    for graph in graphs_of(tokenizer("ema", 16, 4, **LAYOUTS[layout]), transformer(small_config("bert")))[:2]:
        assert_exported(graph, kind, tmp_path)


class OnTheHost(nn.Module):
    """A network that a plug-in might have: its path depends on the values of the tokens."""

    def forward(self, tokens, labels):
        return tokens.float() if tokens.sum() > 5 else -tokens.float()


def test_what_cannot_be_traced_is_refused_by_name(tmp_path):
    def draw(batch, chance):
        return {"tokens": torch.randint(9, (batch, 4), generator=chance), "labels": torch.zeros(batch)}

    graph = Graph("transformer", "backbone 'mine'", OnTheHost(), "logits", draw, 1e-3)
    with pytest.raises(ValueError, match=r"backbone 'mine' cannot be exported as pt2: .*data-dependent"):
        write_graph(graph, tmp_path / "mine.pt2", "pt2")
    assert list(tmp_path.iterdir()) == []
