"""Wrong commands: each is answered with one line that names the thing, the rule and the way out, and writes nothing."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.cli.conftest import Answer, pixels, refused
from tests.conftest import save_tiny_pretrained, tiny_flags

GOLDEN = Path(__file__).parents[1] / "golden"
WHERE = "--data shards --run one"
TRAIN = {  # words with which the tiny trainings begin
    "TOKENIZER": ["train", "tokenizer", *shlex.split(WHERE), *tiny_flags("tokenizer")],
    "TRANSFORMER": [
        "train", "transformer", *shlex.split(WHERE), "--tokenizer", "model/tokenizer", *tiny_flags("transformer")
    ],
}  # fmt: skip
SUBMIT = f"slurm submit tokenizer {WHERE} --nodes 2 --devices 1 --dry-run"
JUDGED = "sample model --num-images 6 --accept-rate 0.5 --classifier two_sample"
BOX = "edit model image.png --class 1 --box 0,0,4,2"
JAX = "import-jax --tokenizer vqvae --out new"


@pytest.fixture(scope="module")
def workplace(tiny_pretrained: Path, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data and files, good and bad, which all commands of the tables name."""
    folder = tmp_path_factory.mktemp("workplace")
    for name, target in {
        "model": tiny_pretrained,
        "shards": tiny_shards,
        "photos": tiny_shards.parent / "images",
    }.items():
        (folder / name).symlink_to(target)
    (folder / "vqvae").symlink_to(GOLDEN / "vqvae_checkpoint.msgpack")
    save_tiny_pretrained(folder / "causal", attention="causal")
    Image.fromarray(pixels().numpy()).save(folder / "image.png")
    Image.new("L", (8, 8), 0).save(folder / "black.png")
    (folder / "text.jpg").write_text("hello")
    (folder / "other.json").write_text('{"steps": 8}')
    (folder / "empty").mkdir()
    (folder / "lfs").write_text("version https://git-lfs.github.com/spec/v1")
    return folder


@pytest.fixture
def is_refused(
    workplace: Path, maskgit: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], None]:
    """Checks that a command is answered with one line that has a text, and writes nothing."""

    def check(command: str, text: str) -> None:
        monkeypatch.chdir(workplace)
        monkeypatch.setenv("PATH", "")  # no Slurm
        files = sorted(workplace.rglob("*"))
        words = [part for word in shlex.split(command) for part in TRAIN.get(word, [word])]
        answer = maskgit(*words)
        refused(answer, text)
        assert answer.error.startswith("maskgit"), answer.error
        assert sorted(workplace.rglob("*")) == files

    return check


# Words: commands, flags and choices


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("sampel model", "maskgit: unknown command 'sampel': did you mean 'sample'? commands: demo, models, data, "),
        ("import-taming x", "unknown command 'import-taming': did you mean 'import-tokenizer'?"),
        ("generate x", "unknown command 'generate': did you mean 'sample'?"),
        ("train", "the following arguments are required: tokenizer|transformer; see maskgit train --help"),
        ("sample model --num-inference-steps 8", "--num-inference-steps 8; did you mean '--num-steps'?"),
        ("--verison", "maskgit: unknown argument --verison; did you mean '--version'?; see maskgit --help"),
        ("models --runs-folder nowhere", "--runs-folder nowhere: no such folder; name the folder of your runs"),
        ("data make photos --out new --image-size 8x8", "--image-size S|H,W must be an integer, got '8x8'"),
        ("sample model --seed", "--seed: expected one argument; give a value that begins with - as FLAG=VALUE; see"),
        ("sample model --seed abc", "--seed must be an integer, got 'abc'"),
        ("plugins quantisers", "KIND must be one of mask_schedules, "),
        ("schedules --schedules '{name'", "--schedules must be a name or a mapping such as"),
        ("doctor transformer --device-memory=much", "--device-memory must be a size such as 80GB"),
    ],
)
def test_a_wrong_command_flag_or_choice_is_one_line_with_the_nearest(is_refused, command: str, text: str) -> None:
    is_refused(command, text)


# Files that are read: data and weights


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("data make empty --out new", "source empty must "),  # SOURCE is no flag
        ("data make photo --out new", "photo: No such file or directory; did you mean 'photos'?"),
        (
            "data make text.jpg --out new",
            "got: not an uncompressed tar, or its first header is damaged; it begins with b'hello'",
        ),
        ("data make photos --out new --val-fraction 0.5", "--val-fraction must not be set for source photos"),
        ("data index shards --val ''", "shard pattern '': no file in shards matches ''"),
        ("data index shards --label-field x --no-labels", "--label-field must not be given with --no-labels"),
        (f"{JAX} --tokenizer nowhere", "nowhere: no such file; download it, or name another"),
        (f"{JAX} --out model", "must be a new or empty folder, got one with content"),
        ("import-tokenizer lfs --out new", "for a pointer of Git LFS: `git lfs pull`"),
        ("export empty", "has no stage with checkpoints"),
        (
            "export model --format onnx",
            "--out must name the folder to write with --format onnx, such as --out exported",
        ),
        ("export model --format pt2 --step 3 --out new", "--step must be left out with --format pt2"),
    ],
)
def test_wrong_data_or_weights_are_one_line_and_leave_nothing(is_refused, command: str, text: str) -> None:
    is_refused(command, text)


# Models and their settings


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("sample fashion-mnist-dmo", "no such folder; did you mean 'fashion-mnist-demo'?"),
        ("sample runs/fashion-mnist-adaln", "no such folder; train one with `maskgit demo`, or name another folder"),
        ("evaluate fashion-mnist-demo", "it was fashion-mnist: make it with `maskgit data fetch fashion-mnist --out "),
        ("sample model --classes Trousers", "did you mean 'Trouser'"),
        ("sample model --token-selector confidnce", "unknown token selector 'confidnce': did you mean 'confidence'"),
        ("sample model --tokens-per-step 1,2", "--tokens-per-step must sum to 16, the tokens per image"),
        ("sample model --guidance-scale nan", "--guidance-scale must be a number in [0, 10000], got nan"),
        ("sample model --sampling-temperature 1,2,3", "--sampling-temperature must be a number >= 0, or two"),
        ("sample model --num-images 5", "--out must end in .npz with --num-images, got samples.png"),
        ("sample model --filmstrip samples.png", "must not overwrite another file of the command, got samples.png"),
        ("sample model --num-images 5 --out a.npz --gif a.gif", "--num-images must not be given with --gif"),
        ("sample model --classifier x", "--accept-rate, --classifier and --num-images must be given together"),
        ("sample model --data shards", "--data must come with --classifier two_sample, got shards without it"),
        (f"{JUDGED} --out a.npz", "choose them with --data"),
        (f"{JUDGED} --out a.npz --data shards", "--num-images must give at least 200 candidates to learn from"),
        ("sample causal --num-steps 8", "--num-steps must be 16 for an autoregressive model, one step per"),
        ("panorama causal --classes 0 --width 16", "panorama requires a model with bidirectional attention"),
        ("evaluate model --data shards --features inception=nowhere.pth", "no file nowhere.pth; download https://"),
        ("evaluate model --data shards --reference nowhere.npz", "reference nowhere.npz must be an existing"),
        ("evaluate model", "choose them with --data"),
        ("evaluate model --data shards --num-images 5", "--num-images must be >= 6 (2 per class), got 5"),
        (
            "evaluate model --data shards --num-images 12 --reconstruction-images 7",
            "--reconstruction-images must be an integer in [12, inf), got 7",
        ),
        ("tune model --data shards --negative-model nowhere", "negative_model nowhere must be a run"),
        ("ablation --stage tokenizer", "--vary must name a recipe key"),
        ("ablation --vary model.network.depth=2 --name ../x", "--name must be letters"),
        ("edit model image.png --class 1", "one of --box and --mask and --strength must be given, got neither"),
        ("edit model text.jpg --class 1 --box 0,0,4,2", "text.jpg must be a JPEG, PNG or WebP"),
        ("edit model image.png --class 1 --mask black.png", "must not be empty"),
        (f"{BOX} --mask m.png", "--box must not be given with --mask; choose one of the two"),
        (f"{BOX} --box 0,0,9,2", "and 0 <= top < bottom <= 8, got '0,0,9,2'"),
        ("outpaint model image.png", "one of left, right, up and down must be > 0 pixels, got none"),
    ],
)  # fmt: skip
def test_a_wrong_model_image_or_setting_is_one_line(is_refused, command: str, text: str) -> None:
    is_refused(command, text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is found")
def test_a_gpu_that_is_not_found_is_said_with_its_name(is_refused) -> None:
    text = "--device must be one of cpu, got 'gpu'; the name of a GPU is 'cuda' (torch"
    is_refused("sample model --device gpu", text)
    is_refused("TOKENIZER --trainer.accelerator=gpu", "trainer: accelerator 'gpu'")


# Runs and their recipes


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("demo --dataset mine", "data data/shards/mine: no such folder; convert your own images with --images FOLDER"),
        ("train tokenizer --config nope.yaml", "nope.yaml: No such file or directory; check the path"),
        ("TOKENIZER '--loggers=[csv,{name: csv}]'", "loggers must name each logger once, got 'csv' twice; remove"),
        ("train tokenizer", "data data/shards/fashion-mnist: no such folder; make it with `maskgit data fetch"),
        ("TOKENIZER --trainer.max_steps=-1", "trainer.max_steps must be >= 1, got -1"),
        ("TOKENIZER --loggers=wandb", "--loggers must be a list, got 'wandb'; write [wandb]"),
        ("demo --data shards --run a --budget=1h", "unknown argument --budget; did you mean '--recipe'?"),
        ("distill model --run a --data shards --num-step 3", "--num-step; did you mean '--num-steps'?"),
        ("TOKENIZER --batch-size 3", "flag --batch-size: unknown key 'batch-size': did you mean 'data.global_batch'?"),
        ("train tokenizer --data shards --print-confi", "--print-confi; did you mean '--print-config'?"),
        ("TOKENIZER --max-steps=3", "unknown key 'max-steps': did you mean 'trainer.max_steps'?"),
        ("TOKENIZER --epochs=3", "flag --epochs: unknown key 'epochs': did you mean 'trainer.max_steps'?"),
        ("TOKENIZER --model.optimizer.learning_rate=1", "must be a mapping, got 1; set a key of it, such as "),
        ("TOKENIZER --keep_every=7", "keep_every must be a multiple of checkpoint_every (1000)"),
        ("TOKENIZER --pretrained model --model.network.base_channels=16", "do not fit"),
        ("TRANSFORMER --model.network.class_dropout=0", "model.decoding.guidance"),
        ("TRANSFORMER --pretrained model --model.network.embed_dim=32", "model.network.embed_dim"),
        ("TRANSFORMER '--model.network={backbone: adaln, condition_dim: 4}'", "network.condition_dim must be 0 for"),
        ("TRANSFORMER --profiler=simpel", "profiler must be 'simple' or 'pytorch', got 'simpel'; did you mean"),
        ("TRANSFORMER --model.optimizer.algorithm=muon --trainer.strategy=fsdp", "trainer.strategy must be 'ddp' or"),
        ("TRANSFORMER --data.source=tokens", "maskgit tokenize"),
        (f"{SUBMIT} --trainer.num_nodes=4", "--trainer.num_nodes"),
        (SUBMIT.removesuffix(" --dry-run"), "sbatch must be on PATH"),  # there is no Slurm
    ],
)  # fmt: skip
def test_a_wrong_run_or_recipe_is_one_line_before_training(is_refused, command: str, text: str) -> None:
    is_refused(command, text)
