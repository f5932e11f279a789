"""``maskgit export --format diffusers``: diffusers itself loads the folder and makes the images of ``MaskGIT``."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from maskgit_pl import MaskGIT
from maskgit_pl.cli import main
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.files import sha256_of
from maskgit_pl.pipeline.sharing import DIFFUSERS_FILES
from maskgit_pl.pretrained.networks import save_decoding
from tests.conftest import save_tiny_pretrained
from tests.local_hub import local_hub
from tests.networks.backbone_cases import save_model_of_vectors

ROOT = Path(__file__).parents[2]
diffusers = pytest.importorskip("diffusers")

from maskgit_pl.pipeline import diffusers_pipeline  # noqa: E402  # needs diffusers
from maskgit_pl.pipeline.diffusers_pipeline import MaskGITPipeline  # noqa: E402  # needs diffusers

PUSH = "from maskgit_pl.cli import main; assert main(['push', 'out', 'alice/tiny', '--license=mit']) == 0"
OF_THE_HUB = """
import numpy as np
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("alice/tiny", trust_remote_code=True)
np.save("images.npy", pipe([0, 2], seed=5, output_type="np").images)
from maskgit_pl.pipeline.diffusers_pipeline import MaskGITPipeline
np.save("class.npy", MaskGITPipeline.from_pretrained("alice/tiny")([0, 2], seed=5, output_type="np").images)
"""


def run_process(code: str, *, folder: Path, **environment: str) -> str:
    """Runs code in a new process, whose caches of the Hub and of its code are in a folder, and returns its output."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "cache"), **environment}
    environment = {**os.environ, **own}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_images(folder: Path, out: Path, classes, **options) -> None:
    """Exports a folder, and checks that diffusers generates the images of ``MaskGIT``."""
    diffusers_pipeline.export_diffusers(folder, out)
    images = load(out)(classes, output_type="np", **options).images
    expected = MaskGIT.from_pretrained(folder).generate(classes, output_type="np", **options)
    assert np.array_equal((images * 255).round(), expected)


def digests(folder: Path) -> dict[str, str]:
    return {file.relative_to(folder).as_posix(): sha256_of(file) for file in folder.rglob("*") if file.is_file()}


def load(folder: Path | str) -> MaskGITPipeline:
    pipe = MaskGITPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, exported by the command."""
    folder = tmp_path_factory.mktemp("exported") / "demo"
    assert main(["export", "fashion-mnist-demo", "--format=diffusers", f"--out={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def pipe(exported: Path) -> MaskGITPipeline:
    return load(exported)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "own"),
    [
        ({"seed": [9, 2]}, {"seed": [9, 2]}),
        ({"num_inference_steps": 3, "seed": 1}, {"num_steps": 3, "seed": 1}),
        ({"guidance_scale": 1.0, "seed": 1}, {"guidance_scale": 0.0, "seed": 1}),
        ({"choice_temperature": 2.0, "batch_size": 1}, {"choice_temperature": 2.0, "seed": None}),
    ],
)
def test_the_images_are_those_of_maskgit(pipe, demo, options, own):
    if own["seed"] is None:  # the seeds come from torch's default generator
        torch.manual_seed(4)
        own["seed"] = [int(torch.randint(2**32, ())) for _ in range(2)]
        torch.manual_seed(4)
    expected = demo.generate(["Bag", 3], output_type="pt", **own)
    assert torch.equal(pipe(["Bag", 3], output_type="pt", **options).images, expected.float() / 255)


def test_each_output_type_has_the_form_of_diffusers(pipe):
    pil, pt, array = (pipe(["Bag", 3], seed=0, output_type=kind).images for kind in ("pil", "pt", "np"))
    assert [(image.mode, image.size) for image in pil] == [("L", (28, 28))] * 2
    assert (tuple(pt.shape), pt.dtype) == ((2, 1, 28, 28), torch.float32)
    assert (array.shape, array.dtype) == ((2, 28, 28, 1), "f4")
    assert np.array_equal(pt[:, 0].numpy(), array[..., 0])
    assert np.array_equal((array[..., 0] * 255).round(), np.stack(pil))
    (images,) = pipe(3, seed=0, return_dict=False)
    assert len(images) == 1


def test_a_generator_draws_the_seeds(pipe):
    def images(generator):
        return pipe([1, 2], generator=generator, output_type="pt").images

    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    generator = seeded(0)
    first, second = images(generator), images(generator)
    assert torch.equal(first, images(seeded(0)))
    assert not torch.equal(first, second)
    listed = images([seeded(0), seeded(1)])
    assert torch.equal(listed[0], first[0])
    assert not torch.equal(listed[1], first[1])


def test_the_callback_gets_each_step_of_each_batch(pipe):
    seen = []
    pipe(
        [1, 2, 3], num_inference_steps=4, batch_size=2, seed=0, callback_on_step_end=lambda *values: seen.append(values)
    )
    assert [(caller, step) for caller, step, _, _ in seen] == [(pipe, step) for step in range(4)] * 2
    assert [tuple(tensors["tokens"].shape) for *_, tensors in seen] == [(2, 49)] * 4 + [(1, 49)] * 4
    assert not seen[-1][3]["still_masked"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": -1}, r"guidance_scale must be a number in \[0, inf\), got -1"),
        ({"output_type": "latent"}, "output_type must be one of pil, pt, np, got 'latent'"),
        ({"seed": 0, "generator": torch.Generator()}, "seed and generator must not be set together"),
        ({"generator": [torch.Generator()] * 2}, "generator must be one, or one for each of the 1 images"),
    ],
)
def test_wrong_arguments_are_refused(pipe, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        pipe(**{"class_labels": [1], **options})


def test_a_cast_pipeline_is_saved_and_loaded(exported, tmp_path):
    pipe = MaskGITPipeline.from_pretrained(exported, dtype=torch.bfloat16, low_cpu_mem_usage=False)
    assert pipe.dtype == torch.bfloat16
    pipe.save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again").transformer.dtype == torch.float32
    assert len(load(tmp_path / "again")([0], seed=0).images) == 1


def test_an_export_and_a_saved_pipeline_hold_no_pickle_and_no_path(exported, pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert digests(tmp_path) == digests(exported)
    stages = [
        f"{stage}/{name}" for stage in ("tokenizer", "transformer") for name in ("config.json", "model.safetensors")
    ]
    assert {*digests(exported)} == {"README.md", "config.json", *DIFFUSERS_FILES, *stages}
    for file in exported.rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            text = file.read_text()
            assert not any(path in text for path in (str(exported.parent), str(ROOT), f"{Path.home()}/"))


def test_the_class_of_the_package_runs_no_code_of_the_folder(exported, tiny_pretrained, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "copy")
    for file in folder.rglob("pipeline.py"):
        file.write_text("raise SystemExit('the code of the folder was run')")
    named = load("fashion-mnist-demo")  # a model of the package
    assert torch.equal(*(model([3], seed=1, output_type="pt").images for model in (load(folder), named)))
    with pytest.raises(ValueError, match="transformer must be used with the tokenizer that it was trained with"):
        MaskGITPipeline(load(tiny_pretrained).tokenizer, named.transformer)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        diffusers.DiffusionPipeline.from_pretrained(folder)


def test_tuned_settings_are_exported_and_a_negative_model_is_not(tiny_pretrained, tmp_path, caplog):
    folder, weak = shutil.copytree(tiny_pretrained, tmp_path / "tuned"), save_tiny_pretrained(tmp_path / "weak")
    save_decoding(folder, DecodingConfig(num_steps=3))
    shutil.copytree(weak / "transformer", folder / "negative")
    diffusers_pipeline.export_diffusers(folder, tmp_path / "out")
    assert "the negative model of guidance is not exported" in caplog.text
    assert not (tmp_path / "out" / "decoding.json").exists()
    model = MaskGIT.from_pretrained(tmp_path / "out")
    assert (model.decoding, model.negative_model) == (DecodingConfig(num_steps=3), None)


def test_an_autoregressive_model_is_exported(tiny_autoregressive, tmp_path):
    check_images(tiny_autoregressive, tmp_path / "out", [0, 2], seed=3)


def test_a_model_with_vectors_takes_them(tiny_pretrained, tmp_path):
    folder = save_model_of_vectors(tiny_pretrained, tmp_path / "vectors", dim=4)
    check_images(folder, tmp_path / "out", [0, 1], seed=3, vectors=np.ones((2, 4), np.float32))
    with pytest.raises(ValueError, match="vectors must be given"):
        load(tmp_path / "out")([0])


def test_wrong_flags_and_a_missing_package_are_named(tiny_pretrained, tmp_path, monkeypatch, capsys):
    words = ["export", str(tiny_pretrained), "--format=diffusers"]
    for more, message in (
        ([], "--out must name the folder to write with --format diffusers"),
        (["--out=x", "--step=3"], "--step must be left out with --format diffusers"),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err
    out = f"--out={tmp_path / 'out'}"
    assert main([*words, out]) == 0
    assert main([*words, out, "--replace"]) == 0
    (tmp_path / "out" / "notes.txt").write_text("years of work")
    assert main([*words, out, "--replace"]) == 2
    assert "got also notes.txt; move them" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "maskgit_pl.pipeline.diffusers_pipeline")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    capsys.readouterr()
    assert main([*words, f"--out={tmp_path / 'more'}"]) == 2
    assert "install it with `pip install 'maskgit_pl[diffusers]'`" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.exports
def test_a_folder_on_the_hub_is_loaded_by_its_name(tiny_pretrained, tmp_path):
    diffusers_pipeline.export_diffusers(tiny_pretrained, tmp_path / "out")
    with local_hub() as hub:
        names = {"HF_ENDPOINT": hub.address, "HF_TOKEN": hub.token}
        run_process(PUSH, folder=tmp_path, **names)
        card = hub.repositories["alice/tiny"]["README.md"].decode()
        run_process(OF_THE_HUB, folder=tmp_path, **names)
    assert 'DiffusionPipeline.from_pretrained("alice/tiny", trust_remote_code=True)' in card
    expected = MaskGIT.from_pretrained(tiny_pretrained).generate([0, 2], seed=5, output_type="np")
    for name in ("images", "class"):
        assert np.array_equal((np.load(tmp_path / f"{name}.npy") * 255).round(), expected)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("pipeline.py", "try:", "import os\ntry:"),
        ("transformer/pipeline.py", "try:", "import os\ntry:"),
        ("model_index.json", "pipeline", "os"),
    ],
)
def test_other_code_in_the_folder_is_not_pushed(exported, tmp_path, capsys, name, old, new):
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    words = ["push", str(folder), "alice/fashion", "--dry-run"]
    assert main(words) == 0
    assert f"\n{name} " in capsys.readouterr().out
    (folder / name).write_text((folder / name).read_text().replace(old, new, 1))
    assert main(words) == 2
    assert f"{name} must be the file that `maskgit export --format diffusers` writes" in capsys.readouterr().err
