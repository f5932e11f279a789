"""The decoding loop of docs/export.md: no torch, no maskgit_pl, and the same tokens as ours with the same noise."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from maskgit_pl import MaskGIT
from maskgit_pl.contrib import graph_export
from maskgit_pl.decoding.decoder import ParallelDecoder
from maskgit_pl.decoding.predictors import ConditionalModel, build_class_predictor
from maskgit_pl.decoding.sampling import CodeSampling
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.schedules import mask_schedules
from tests.test_page_code import RUN

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = [pytest.mark.slow, pytest.mark.exports]

ALONE = "import sys\nsys.modules.update({'torch': None, 'maskgit_pl': None})\n"  # importing them is an error
CASES = {  # mask schedule, temperatures, scales, choice temperature
    "as the page": None,
    "greedy with guidance": ("linear", [0.0] * 12, [1.5] * 12, 0.0),
    "slow start": ({"name": "pow", "exponent": 3.0}, [1.0] * 49, [0.0] * 49, 4.5),
    "one step": ("cosine", [1.0], [2.0], 4.5),
}


def decoder_of(mask_schedule, temperatures, choice_temperature) -> ParallelDecoder:
    return ParallelDecoder(
        mask_schedules.build(mask_schedule),
        token_selectors.build({"name": "confidence", "choice_temperature": choice_temperature}),
        len(temperatures),
        CodeSampling((temperatures[0], temperatures[-1])),
    )


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


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The folder in which the page has run, with the tokens of each case."""
    folder = tmp_path_factory.mktemp("page")
    graph_export.export_graphs("fashion-mnist-demo", folder / "exported")
    (page,) = (code for code in RUN["docs/export.md"] if "onnxruntime" in code)
    more = "np.save('as the page.npy', tokens)\n"
    for name, case in CASES.items():
        if case is not None:
            mask_schedule, temperatures, scales, choice_temperature = case
            decoder = decoder_of(mask_schedule, temperatures, choice_temperature)
            num_masked = [*(step.before[0] for step in decoder.plan([49], 49)), 0]
            settings = f"{num_masked}, {temperatures}, {scales}, {choice_temperature}"
            more += f"np.save({name!r} + '.npy', generate(labels, np.random.default_rng(0), {settings}))\n"
    done = subprocess.run(
        [sys.executable, "-c", ALONE + page + more], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("case", CASES)
def test_the_same_noise_gives_the_same_tokens(case, made):
    pipe = MaskGIT.from_pretrained("fashion-mnist-demo")
    found = json.loads((made / "exported" / "export.json").read_text())
    own = found["mask_schedule"], found["steps"]["sampling_temperature"], found["steps"]["guidance_scale"], 12.0
    mask_schedule, temperatures, scales, choice_temperature = CASES[case] or own
    num_steps, labels = len(temperatures), np.repeat(np.arange(10), 4).tolist()
    decoder = decoder_of(mask_schedule, temperatures, choice_temperature)
    model = ConditionalModel.from_network(pipe.transformer.network, pipe.device)
    with torch.no_grad():
        predictor = build_class_predictor(model, labels, scales=scales, all_masked=True)
    tokens = torch.full((40, 49), model.mask_token_id)
    noise = NumpyNoise(0, (40, 49, 256), num_steps)
    expected = decoder.decode(predictor, tokens, noise, mask_token_id=model.mask_token_id)
    assert np.array_equal(np.load(made / f"{case}.npy"), expected.numpy())


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
