import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from maskgit_pl.cli import main
from maskgit_pl.cli.sample import sample
from maskgit_pl.networks.feature_networks import ClassifierSizes, create_classifier, describe_classifier
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.options import SETTINGS
from tests.cli.commands import call_command
from tests.conftest import CLASSES


def call(*words: object) -> int:
    return call_command("sample", *words, "--device", "cpu")


def test_writes_a_picture_single_files_and_an_animation(tiny_pretrained: Path, tmp_path: Path, capsys) -> None:
    out, images, gif = tmp_path / "samples.png", tmp_path / "images", tmp_path / "decoding.gif"
    code = call(
        tiny_pretrained, "--classes", "2,T-shirt", "--per-class", 3, "--num-steps", 5, "--seed", 7,
        "--out", out, "--images", images, "--gif", gif,
    )  # fmt: skip
    assert code == 0
    names = sorted(path.name for path in images.iterdir())
    assert names[0] == "class-0001-seed-000010.png"
    assert len(names) == 6
    pipe = MaskGIT.from_pretrained(tiny_pretrained)
    expected = pipe.generate([2, 2, 2, 1, 1, 1], seed=7, num_steps=5, output_type="np")
    with Image.open(images / "class-0002-seed-000008.png") as picture:
        assert picture.mode == "L"
        assert (np.asarray(picture) == expected[1, ..., 0]).all()
    with Image.open(gif) as animation:
        assert animation.n_frames == 5
    assert out.is_file()
    assert "6 images of 2 classes in 5 steps" in capsys.readouterr().out


def test_a_command_is_a_function_of_the_same_names(tiny_pretrained: Path, tmp_path: Path) -> None:
    words = ("--classes", "2", "--per-class", 2, "--num-steps", 3, "--token-selector", "margin")
    call(tiny_pretrained, *words, "--out", tmp_path / "flags.png")
    sample(tiny_pretrained, classes="2", per_class=2, num_steps=3, token_selector="margin", out=tmp_path / "call.png")
    assert (tmp_path / "call.png").read_bytes() == (tmp_path / "flags.png").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--classes Trousers", "did you mean 'Trouser'"),
        ("--per-class 0", "--per-class must be an integer in [1, 10000], got 0"),
        ("--negative-class Trousers", "did you mean 'Trouser'"),
        ("--token-selector confidnce", "unknown token selector 'confidnce': did you mean 'confidence'"),
        ("--tokens-per-step 1,2", "--tokens-per-step must sum to 16, the tokens per image"),
        ("--num-steps 17", "--num-steps must be <= 16"),
        ("--guidance-scale nan", "--guidance-scale must be a finite number in [0, 10000], got nan"),
        ('--token-selector {"name":"remdm"', "must be a name or a mapping such as '{name: remdm, eta: 0.4}', got"),
        ("--sampling-temperature 1,2,3", "--sampling-temperature must be a number >= 0, or two"),
        ("--decoding nowhere.json", "decoding nowhere.json: no such file"),
        ("--decoding other.json", "`maskgit tune RUN` writes such a file, RUN/pretrained/decoding.json"),
        ("--num-images 0 --out a.npz", "--num-images must be an integer in [1, inf), got 0"),
        ("--num-images 5", "--out must end in .npz with --num-images, got samples.png"),
        ("--out a.npz", "--out must end in .png without --num-images, got a.npz"),
        ("--filmstrip samples.png", "--filmstrip must differ from --out, got samples.png for both"),
        ("--rank 0 --world-size 2", "--rank and --world-size must be given with --num-images"),
        ("--num-images 5 --out a.npz --rank 1", "--rank and --world-size must be given together"),
        ("--num-images 5 --out a.npz --rank 2 --world-size 2", "--rank must be in [0, 2)"),
        ("--num-images 5 --out a.npz --per-class 3", "--per-class must not be given with --num-images"),
        ("--num-images 5 --out a.npz --gif a.gif", "--gif must not be given with --num-images"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(
    words: str, message: str, tiny_pretrained: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "other.json").write_text('{"steps": 8}')
    monkeypatch.chdir(tmp_path)
    assert main(["sample", str(tiny_pretrained), *words.split()]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert [each.name for each in tmp_path.iterdir()] == ["other.json"]


def test_each_flag_reaches_the_decoding(tiny_pretrained: Path, tmp_path: Path) -> None:
    file = tmp_path / "decoding.json"
    recipe = {"num_steps": 3, "token_selector": "margin"}
    file.write_text(json.dumps({"format": "maskgit_pl.decoding", "version": 1, "decoding": recipe}))
    selector = {"name": "remdm", "eta": 0.1}
    settings = {
        "guidance_scale": 2.0, "guidance": "cosine", "choice_temperature": 1.5, "token_selector": selector,
        "sampling_temperature": (1.2, 0.7), "top_k": 5, "top_p": 0.9, "tokens_per_step": (1, 3, 12),
        "draw_method": "gumbel",
    }  # fmt: skip
    assert {*settings, "num_steps", "mask_schedule"} == {*SETTINGS}
    given = settings | {"token_selector": json.dumps(selector)}
    words = [
        f"--{name.replace('_', '-')}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in given.items()
    ]
    pipe = MaskGIT.from_pretrained(tiny_pretrained, decoding=file)
    schedule = {"mask_schedule": {"name": "pow", "exponent": 3.0}, "num_steps": 4}
    shapes = ['--mask-schedule={"name": "pow", "exponent": 3.0}', "--num-steps=4"]
    for number, (flags, wanted) in enumerate([(words, settings), (shapes, schedule), ([], {})]):
        images = tmp_path / str(number)
        call(
            tiny_pretrained, *flags, "--decoding", file, "--classes=0", "--per-class=4", "--images", images,
            "--out", tmp_path / "all.png",
        )  # fmt: skip
        expected = pipe.generate([0] * 4, output_type="np", **wanted)
        assert (np.stack([np.asarray(Image.open(each)) for each in sorted(images.iterdir())]) == expected[..., 0]).all()


def test_a_filmstrip_and_a_negative_class(tiny_pretrained: Path, tmp_path: Path) -> None:
    words = ["--classes", "1", "--per-class", 4, "--guidance-scale", 30, "--guidance", "constant"]
    for name, more in (("plain", []), ("pushed", ["--negative-class", "Trouser"])):
        files = ("--out", tmp_path / f"{name}.png", "--filmstrip", tmp_path / f"{name}-steps.png")
        call(tiny_pretrained, *words, *more, *files)
    for name in (".png", "-steps.png"):
        assert (tmp_path / f"plain{name}").read_bytes() != (tmp_path / f"pushed{name}").read_bytes()


# Many images


def test_many_images_go_into_one_file(tiny_pretrained: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    out = tmp_path / "samples.npz"
    words = ["--num-images=13", "--classes=Trouser,0", "--seed=3", "--num-steps=2", "--out", out]
    assert call(tiny_pretrained, *words) == 0
    assert f"{out}: 13 images of 2 classes in 2 steps; 13 generated by this process" in capsys.readouterr().out
    with np.load(out, allow_pickle=False) as arrays:
        assert arrays["arr_0"].shape == (13, 8, 8, 3)
        assert arrays["arr_1"].tolist() == [2] * 7 + [0] * 6
    assert call(tiny_pretrained, *words) == 0
    assert "already complete with 13 images" in capsys.readouterr().out
    assert call(tiny_pretrained, *words[:-1], tmp_path / "b.npz", "--rank", 1, "--world-size", 2) == 0
    assert "rank 1 of 2 has finished its images; 1 other ranks have not" in capsys.readouterr().out
    for more, change in (("--num-steps=3", r"decoding\.num_steps 2 -> 3"), ("--dtype=bfloat16", "")):
        with pytest.raises(ValueError, match=f"holds images of other settings: {change}"):
            call(tiny_pretrained, *words, more)


def test_a_rank_that_is_named_counts_more_than_the_environment(
    tiny_pretrained: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    words = ["--num-images", 8, "--num-steps", 1]
    assert call(tiny_pretrained, *words, "--out", tmp_path / "a.npz") == 0
    assert "rank 3 of 4 has finished its images; 3 other ranks have not" in capsys.readouterr().out
    assert call(tiny_pretrained, *words, "--out", tmp_path / "b.npz", "--rank", 0, "--world-size", 1) == 0
    assert "8 generated by this process" in capsys.readouterr().out


def save_classifier(folder: Path, class_names: tuple[str, ...] = CLASSES) -> Path:
    sizes = ClassifierSizes(1, 8, 3, width=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = create_classifier(sizes).state_dict()
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(describe_classifier(sizes, class_names)))
    return folder


def test_accepted_images_are_those_of_the_printed_seeds(tiny_pretrained: Path, tmp_path: Path, capsys) -> None:
    classifier = save_classifier(tmp_path / "classifier")
    words = (tiny_pretrained, "--per-class", 2, "--accept-rate", 0.5, "--classifier", classifier, "--device", "cpu")
    assert call_command("sample", *words, "--out", tmp_path / "best.png", "--images", tmp_path / "best") == 0
    out = capsys.readouterr().out
    assert f"accepted 6 of 12 candidates (50.0%) by {classifier}" in out
    seeds = [int(word) for word in re.search("seeds: ([0-9, ]+)", out)[1].split(",")]
    pipe = MaskGIT.from_pretrained(tiny_pretrained)
    expected = pipe.generate([0, 0, 1, 1, 2, 2], seed=seeds, output_type="np")[..., 0]
    labels = [0, 0, 1, 1, 2, 2]
    files = [
        tmp_path / "best" / f"class-{label:04d}-seed-{seed:06d}.png" for label, seed in zip(labels, seeds, strict=True)
    ]
    made = np.stack([np.asarray(Image.open(file).convert("L")) for file in files])
    assert np.abs(made.astype(int) - expected).max() <= 1


def test_many_accepted_images_come_with_their_seeds(tiny_pretrained: Path, tmp_path: Path, capsys) -> None:
    classifier = save_classifier(tmp_path / "classifier")
    words = (tiny_pretrained, "--num-images", 6, "--accept-rate", 0.25, "--device", "cpu")
    out = tmp_path / "best.npz"
    assert call_command("sample", *words, "--classifier", classifier, "--out", out) == 0
    assert "accepted 6 of 24 candidates (25.0%)" in capsys.readouterr().out
    with np.load(out) as arrays:
        assert arrays["seeds"].shape == (6,)
        assert len(set(arrays["seeds"])) == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--accept-rate", 2, "--classifier", "CLASSIFIER"), "--accept-rate must be a number in"),
        (("--classifier", "x"), "--classifier must be given with --accept-rate"),
        (("--accept-rate", 0.5), "--accept-rate: .* name a classifier with --classifier"),
        (("--accept-rate", 0.5, "--classifier", "nowhere"), "--classifier nowhere: no classifier there"),
        (
            ("--accept-rate", 0.5, "--num-images", 7, "--out", "made.npz", "--classifier", "CLASSIFIER"),
            "--num-images must be a multiple of 3",
        ),
        (("--accept-rate", 0.5, "--classifier", "OTHER"), "must know the classes of the model"),
    ],
)
def test_refuses_an_acceptance_that_cannot_be(
    tiny_pretrained: Path, tmp_path: Path, words, message, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = {
        "CLASSIFIER": save_classifier(tmp_path / "classifier"),
        "OTHER": save_classifier(tmp_path / "other", ("Bag", *CLASSES[1:])),
    }
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call_command("sample", tiny_pretrained, "--device", "cpu", *(folders.get(word, word) for word in words))
    assert not list(tmp_path.glob("*.npz")) + list(tmp_path.glob("*.png"))
