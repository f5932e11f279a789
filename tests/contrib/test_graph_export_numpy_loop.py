"""The decoding loop of docs/export.md: no torch, no maskgit_pl, and the same tokens as ours with the same noise."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from maskgit_pl import MaskGIT
from maskgit_pl.contrib import graph_export
from maskgit_pl.decoding.predictors import ConditionalModel, build_class_predictor
from maskgit_pl.schedules import mask_schedules
from tests.test_page_code import RUN

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = [pytest.mark.slow, pytest.mark.exports]

ALONE = "import sys\nsys.modules.update({'torch': None, 'maskgit_pl': None})\n"  # importing them is an error


class NumpyNoise:
    """The numbers that the loop of the page draws, for our decoder."""

    def __init__(self, seed: int, shape: tuple[int, int, int], num_steps: int) -> None:
        random = np.random.default_rng(seed)
        self.steps = [
            tuple(torch.from_numpy(random.gumbel(size=each).astype(np.float32)) for each in (shape, shape[:2]))
            for _ in range(num_steps)
        ]

    def draw(self, logits, positions, step):
        index = positions.unsqueeze(-1).expand(-1, -1, logits.shape[-1])
        return (logits + self.steps[step][0].gather(1, index)).argmax(-1)

    def gumbel(self, positions, step):
        return self.steps[step][1].gather(1, positions)


def test_the_same_noise_gives_the_same_tokens(tmp_path):
    content = graph_export.export_graphs("fashion-mnist-demo", tmp_path / "exported")
    (page,) = (code for code in RUN["docs/export.md"] if "onnxruntime" in code)
    code = ALONE + page + "np.save('tokens.npy', tokens)\n"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    pipe = MaskGIT.from_pretrained("fashion-mnist-demo")
    decoder = pipe.decoding.build_decoder(mask_schedules.build(content["mask_schedule"]))
    model = ConditionalModel(pipe.transformer.network, pipe.device)
    labels, scales = np.repeat(np.arange(10), 4).tolist(), content["steps"]["guidance_scale"]
    with torch.no_grad():
        predictor = build_class_predictor(model, labels, scales=scales, all_masked=True)
    mask = pipe.transformer.network.config.mask_token_id
    noise = NumpyNoise(0, (40, 49, 256), len(scales))
    *_, last = decoder.steps(predictor, torch.full((40, 49), mask), noise, mask_token_id=mask, grid=(7, 7))
    assert np.array_equal(np.load(tmp_path / "tokens.npy"), last.tokens.numpy())


def test_large_weights_are_in_a_second_file_that_moves_with_the_folder(tiny_pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr(graph_export, "_MOST_IN_ONE_FILE", 0)
    content = graph_export.export_graphs(tiny_pretrained, tmp_path / "out")
    names = {"transformer.onnx", "transformer.onnx.data"}
    assert {*content["graphs"]["transformer"]["files"]} == names
    assert names <= {file.name for file in (tmp_path / "out").iterdir()}
    moved = shutil.move(tmp_path / "out", tmp_path / "moved")
    session = onnxruntime.InferenceSession(moved / "transformer.onnx")
    tokens, labels = np.zeros((1, 16), np.int64), np.zeros(1, np.int64)
    pipe = MaskGIT.from_pretrained(tiny_pretrained)
    with torch.no_grad():
        expected = pipe.transformer.network(torch.from_numpy(tokens), torch.from_numpy(labels))
    (found,) = session.run(None, {"tokens": tokens, "labels": labels})
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
