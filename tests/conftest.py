import ctypes
import gc
import io
import logging
import os
import re
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import yaml

from maskgit_pl.checks import ImageSize
from maskgit_pl.data.images import encode_png
from maskgit_pl.data.index import find_shards, index_shards
from maskgit_pl.data.sources.shards import open_source
from maskgit_pl.data.writer import make_shards
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.config import AutoregressiveDecoding
from maskgit_pl.networks.backbone import Attention
from maskgit_pl.networks.transformer import MaskedTransformer, TransformerConfig
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.pretrained.networks import PretrainedTokenizer, fingerprint, save_tokenizer, save_transformer

sys.path.insert(0, str(Path(__file__).parent / "golden"))  # modules of check.py, which runs from this folder
os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # which returns what is freed
torch.set_num_threads(1)  # tensors are small, and other tests run at the same time
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell; processes would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Hides the objects of all imported libraries from the garbage collector.

    The Trainer collects garbage at the end of each run, which would visit them all, again and again.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _return_memory() -> Iterator[None]:
    """Returns freed memory to the system: large tensors, and the 1 GiB that commands keep."""
    yield
    ctypes.CDLL(None).malloc_trim(0)


def pytest_xdist_auto_num_workers() -> int:
    """Returns the number of workers: at most 8, one for each core and for each 2 GB of memory; a worker takes 1 GB."""
    (available,) = re.findall(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    limits = [int(limit.read_text())] if limit.is_file() and limit.read_text().strip().isdigit() else []
    return max(1, min(8, len(os.sched_getaffinity(0)), min([int(available) * 1024, *limits]) // (2 * 10**9)))


@pytest.fixture(autouse=True)
def _own_logger() -> Iterator[None]:
    """Restores our logger: a command that runs in a test gives it a handler that writes to the test's terminal."""
    ours = logging.getLogger("maskgit_pl")
    before = list(ours.handlers), ours.propagate, ours.level
    yield
    ours.handlers, ours.propagate = before[:2]
    ours.setLevel(before[2])


CLASSES = ("Ankle boot", "T-shirt", "Trouser")


def flags(tree: dict, path: str = "") -> list[str]:
    """Returns the values of a YAML tree as flags of ``maskgit train``."""
    found: list[str] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            found += flags(value, f"{path}{key}.")
        elif value is not None:
            found.append(f"--{path}{key}={value}")
    return found


def tiny_flags(stage: str) -> list[str]:
    """Returns the sizes of ``tests/tiny/STAGE.yaml`` as flags of ``maskgit train``."""
    return flags(yaml.safe_load((Path(__file__).parent / "tiny" / f"{stage}.yaml").read_text()))


def peak_predictions(network: MaskedTransformer) -> MaskedTransformer:
    """Scales the weights so that predictions are far from uniform, and classes and guidance matter."""
    for parameter in network.parameters():
        parameter.data.mul_(4)
    return network


def random_transformer(config: TransformerConfig) -> MaskedTransformer:
    """Builds a frozen network with peaked random weights of seed 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peak_predictions(config.create()).eval().requires_grad_(False)


def tiny_tokenizer() -> PretrainedTokenizer:
    """Builds a tokenizer of 14 px images; its 4 x 4 tokens cover 16 px."""
    config = VQGANConfig(
        1, base_channels=8, channel_multipliers=(1, 1, 1), num_res_blocks=1, num_groups=2, codebook_size=8, code_dim=4
    )
    return PretrainedTokenizer(VQGAN(config).eval(), 14, "f" * 64)


def save_tiny_pretrained(
    folder: Path,
    *,
    in_channels: int = 1,
    class_dropout: float = 0.1,
    seed: int = 0,
    attention: Attention = "bidirectional",
    image_size: ImageSize = 8,
    patch_size: int = 1,
) -> Path:
    """Saves a model with random weights and 3 classes, of 8 px images and 4 x 4 tokens if no other size is given."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vqgan = VQGANConfig(
            in_channels,
            base_channels=8,
            channel_multipliers=(1, 1),
            num_res_blocks=1,
            num_groups=2,
            codebook_size=16,
            code_dim=4,
            patch_size=patch_size,
        )
        tokenizer = VQGAN(vqgan)
        grid = vqgan.grid(image_size)
        config = TransformerConfig(16, 3, grid, 16, 1, 2, 32, class_dropout=class_dropout, attention=attention)
        transformer = peak_predictions(config.create())
    save_tokenizer(folder / "tokenizer", vqgan, tokenizer.state_dict(), image_size=image_size)
    guidance = {"name": "linear", "scale": 1.0} if class_dropout else "constant"
    causal = attention == "causal"
    save_transformer(
        folder / "transformer",
        config,
        transformer.state_dict(),
        mask_schedule=None if causal else {"name": "pow", "exponent": 2.0},
        decoding=AutoregressiveDecoding(guidance).to_config(16)
        if causal
        else DecodingConfig(num_steps=4, guidance=guidance),
        class_names=CLASSES,
        tokenizer_fingerprint=fingerprint(folder / "tokenizer"),
    )
    return folder


@pytest.fixture(scope="session")
def tiny_pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a pretrained folder with random weights; tests must not write to it."""
    return save_tiny_pretrained(tmp_path_factory.mktemp("tiny") / "pretrained")


@pytest.fixture(scope="session")
def tiny_autoregressive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a pretrained folder of an autoregressive model; tests must not write to it."""
    return save_tiny_pretrained(tmp_path_factory.mktemp("tiny") / "pretrained", attention="causal")


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns shards of grey 8 px images of three classes that differ in brightness: 60 train, 24 val."""
    folder = tmp_path_factory.mktemp("tiny-data")
    generator = torch.Generator().manual_seed(0)
    for split, each in (("train", 20), ("val", 8)):
        for label, name in enumerate(CLASSES):
            (folder / "images" / split / name).mkdir(parents=True)
            for number in range(each):
                image = torch.randint(90 * label, 90 * label + 70, (1, 8, 8), dtype=torch.uint8, generator=generator)
                (folder / "images" / split / name / f"{number}.png").write_bytes(encode_png(image))
    make_shards(open_source(folder / "images"), folder / "shards")
    return folder / "shards"


def save_uneven_shards(folder: Path, train: Sequence[int], val: Sequence[int] = (3, 8)) -> Path:
    """Writes shards with the given numbers of distinct grey 8 px images; the three classes take turns."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for split, counts in (("train", train), ("val", val)):
        for number, count in enumerate(counts):
            with tarfile.open(folder / f"{split}-{number:06d}.tar", "w") as shard:
                for key in range(count):
                    low = 90 * (key % 3)
                    image = torch.randint(low, low + 70, (1, 8, 8), dtype=torch.uint8, generator=generator)
                    for extension, content in (("png", encode_png(image)), ("cls", str(key % 3).encode())):
                        member = tarfile.TarInfo(f"{number:03d}{key:05d}.{extension}")
                        member.size = len(content)
                        shard.addfile(member, io.BytesIO(content))
    index_shards(folder, {split: find_shards(folder, f"{split}-*.tar") for split in ("train", "val")})
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints one line per folder of recorded arrays with the number that agree."""
    counted: dict[str, list[tuple[int, int]]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, value in report.user_properties if report.when == "call" else ():
                if name.startswith("golden"):
                    counted.setdefault(name, []).append(value)
    for name, counts in counted.items():
        agreeing, total = (sum(column) for column in zip(*counts, strict=True))
        terminalreporter.write_line(f"{name}: {agreeing} of {total} arrays agree")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns an empty folder on ``sys.path`` for ``installed_packages.install``."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", "--recursive", "--lazy", folder], check=True)
