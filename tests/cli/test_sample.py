"""``maskgit sample``: pictures, many images in a file, rejection sampling, and models that take vectors."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from maskgit_pl.cli.sample import sample
from maskgit_pl.networks.feature_networks import ClassifierSizes, create_classifier, describe_classifier
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.options import SETTINGS
from tests.cli.conftest import Answer, refused
from tests.conftest import CLASSES
from tests.networks.backbone_cases import save_model_of_vectors


@pytest.fixture
def call(maskgit: Callable[..., Answer], tiny_pretrained: Path) -> Callable[..., str]:
    """Samples from the tiny model on a CPU, and returns the output."""

    def run(*words: object) -> str:
        answer = maskgit("sample", tiny_pretrained, *words, "--device", "cpu")
        assert answer.code == 0, answer
        return answer.out

    return run


def read(folder: Path) -> np.ndarray:
    """Returns the grey images of a folder, in the order of their names."""
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.iterdir())])


def test_sample_writes_a_picture_single_files_and_an_animation(call, tiny_pretrained, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = call(
        "--classes", "2,T-shirt", "--per-class", 3, "--num-steps", 5, "--seed", 7, "--out", "one/samples.PNG",
        "--images", "images", "--gif", "one/two/decoding.gif",
    )  # fmt: skip
    names = sorted(path.name for path in Path("images").iterdir())
    assert names == [f"class-{label:04d}-seed-{seed:06d}.png" for label, seed in
                     [(1, 10), (1, 11), (1, 12), (2, 7), (2, 8), (2, 9)]]  # fmt: skip
    expected = MaskGIT.from_pretrained(tiny_pretrained).generate(
        [2, 2, 2, 1, 1, 1], seed=7, num_steps=5, output_type="np"
    )
    assert (read(Path("images"))[[3, 4, 5, 0, 1, 2]] == expected[..., 0]).all()
    with Image.open("one/two/decoding.gif") as animation:
        assert animation.n_frames == 5
    assert Path("one/samples.PNG").is_file()
    assert "6 images of 2 classes in 5 steps" in said


def test_a_command_is_a_function_of_the_same_names(call, tiny_pretrained: Path, tmp_path: Path) -> None:
    words = ("--classes", "2", "--per-class", 2, "--num-steps", 3, "--token-selector", "margin")
    call(*words, "--out", tmp_path / "flags.png")
    sample(tiny_pretrained, classes="2", per_class=2, num_steps=3, token_selector="margin", out=tmp_path / "call.png")
    assert (tmp_path / "call.png").read_bytes() == (tmp_path / "flags.png").read_bytes()


def test_each_flag_reaches_the_decoding(call, tiny_pretrained: Path, tmp_path: Path) -> None:
    selector = {"name": "remdm", "eta": 0.1}
    settings = {
        "guidance_scale": 2.0, "guidance": "cosine", "choice_temperature": 1.5, "token_selector": selector,
        "sampling_temperature": (1.2, 0.7), "top_k": 5, "tokens_per_step": (1, 3, 12),
        "random_start": 0.4,
    }  # fmt: skip
    assert {*settings, "num_steps", "mask_schedule"} == {*SETTINGS}
    words = [
        f"--{name.replace('_', '-')}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in (settings | {"token_selector": json.dumps(selector)}).items()
    ]
    schedule = {"mask_schedule": {"name": "pow", "exponent": 3.0}, "num_steps": 4}
    flags = ['--mask-schedule={"name": "pow", "exponent": 3.0}', "--num-steps=4"]
    pipe = MaskGIT.from_pretrained(tiny_pretrained)
    for number, (given, options) in enumerate([(words, settings), (flags, schedule)]):
        images = tmp_path / str(number)
        call(*given, "--classes=0", "--per-class=4", "--images", images, "--out", tmp_path / "a.png")
        assert (read(images) == pipe.generate([0] * 4, output_type="np", **options)[..., 0]).all()


def test_a_negative_class_changes_picture_and_filmstrip(call, tmp_path: Path) -> None:
    words = ["--classes", "1", "--per-class", 4, "--guidance-scale", 30, "--guidance", "constant"]
    for name, more in (("plain", []), ("pushed", ["--negative-class", "Trouser"])):
        call(*words, *more, "--out", tmp_path / f"{name}.png", "--filmstrip", tmp_path / f"{name}-steps.png")
    for name in (".png", "-steps.png"):
        assert (tmp_path / f"plain{name}").read_bytes() != (tmp_path / f"pushed{name}").read_bytes()


@pytest.mark.slow
def test_a_baseline_samples_with_an_animation_in_time_and_a_filmstrip(maskgit, tiny_autoregressive, tmp_path) -> None:
    answer = maskgit(
        "sample", tiny_autoregressive, "--classes=0,1", "--per-class=2", "--out", tmp_path / "all.png",
        "--gif", tmp_path / "decoding.gif", "--filmstrip", tmp_path / "strip.png",
    )  # fmt: skip
    assert "4 images of 2 classes in 16 steps" in answer.out
    with Image.open(tmp_path / "decoding.gif") as frames:
        assert frames.n_frames == 16
    assert (tmp_path / "strip.png").is_file()


# Many images


def test_many_images_go_into_one_file(call, maskgit, tiny_pretrained: Path, tmp_path: Path, monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    out = tmp_path / "samples.npz"
    words = ["--num-images=13", "--classes=Trouser,0", "--seed=3", "--num-steps=2", "--out", out]
    assert f"{out}: 13 images of 2 classes; 13 generated by this process" in call(*words)
    with np.load(out, allow_pickle=False) as arrays:
        assert arrays["arr_0"].shape == (13, 8, 8, 3)
        assert arrays["arr_1"].tolist() == [2] * 7 + [0] * 6
    assert "already complete with 13 images" in call(*words)
    refused(maskgit("sample", tiny_pretrained, *words, "--num-steps=3"), "holds images of other settings: decoding.num")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    said = call("--num-images=8", "--num-steps=1", "--out", tmp_path / "b.npz")
    assert "rank 3 of 4 has finished its images; 3 other ranks have not" in said


# Accepted images


def save_classifier(folder: Path, class_names: tuple[str, ...] = CLASSES) -> Path:
    sizes = ClassifierSizes(1, 8, 3, width=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = create_classifier(sizes).state_dict()
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(describe_classifier(sizes, class_names)))
    return folder


def test_many_accepted_images_come_with_their_seeds(call, maskgit, tiny_pretrained, tmp_path: Path) -> None:
    classifier, out = save_classifier(tmp_path / "classifier"), tmp_path / "best.npz"
    words = ("--num-images", 6, "--accept-rate", 0.25, "--out", out, "--classifier")
    assert "accepted 6 of 24 candidates (25.0%)" in call(*words, classifier)
    with np.load(out) as arrays:
        assert len(set(arrays["seeds"])) == 6
    other = save_classifier(tmp_path / "other", ("Bag", *CLASSES[1:]))
    refused(maskgit("sample", tiny_pretrained, *words, other), "must know the classes of the model")
    odd = maskgit("sample", tiny_pretrained, *words, classifier, "--num-images", 7)
    refused(odd, "--num-images must be a multiple of 3")


# Vectors


def test_wrong_vectors_are_refused(maskgit, tiny_pretrained, tmp_path) -> None:
    of_vectors = save_model_of_vectors(tiny_pretrained, tmp_path / "model", dim=3)
    np.save(tmp_path / "good.npy", np.zeros((2, 3)))
    np.save(tmp_path / "wide.npy", np.zeros((2, 4)))
    np.save(tmp_path / "words.npy", np.array(["a"]))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    for model, words, message in (
        (of_vectors, [], "--vectors must be given: the model was trained with a vector of 3 values"),
        (of_vectors, ["wide.npy"], "--vectors must have shape (6, 3)"),
        (of_vectors, ["words.npy"], "must hold floats"),
        (of_vectors, ["objects.npy"], "cannot be read"),
        (of_vectors, ["good.npy", "--accept-rate", 0.5], "--vectors must not be given with --accept-rate"),
        (tiny_pretrained, ["good.npy"], "--vectors must not be given to a model that was trained without vectors"),
    ):
        given = ["--vectors", tmp_path / words[0], *words[1:]] if words else []
        refused(maskgit("sample", model, *given, "--out", tmp_path / "s.png"), message)
