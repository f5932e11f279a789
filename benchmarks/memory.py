"""Measures the peak memory of commands with networks of the released size, 256 px, in a process of its own each.

    python benchmarks/memory.py --out released-size

The weights are random, which changes neither memory nor time. ``--out`` keeps them; a second run reads them again.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from measuring import children_cpu_seconds, format_table

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.devices import cpu_name
from maskgit_pl.networks.transformer import MaskedTransformer, TransformerConfig
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.networks.weights import skeletons
from maskgit_pl.pretrained.networks import fingerprint, save_tokenizer, save_transformer

RELEASED = VQGANConfig(3, base_channels=128, channel_multipliers=(1, 1, 2, 2, 4), codebook_size=1024, code_dim=256)
_RUN = """
import sys
import torch, maskgit_pl.pipeline
from maskgit_pl.cli import main
code = main(sys.argv[1:]) if sys.argv[1:] else 0
lines = open("/proc/self/status").read().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
sys.exit(code)
"""


def save_model(folder: Path, *, tokenizer: VQGANConfig = RELEASED, image_size: int = 256, depth: int = 24) -> None:
    """Writes a pretrained folder with random weights, unless there is one."""
    if (folder / "transformer").exists():
        return
    grid = tokenizer.grid(image_size)
    transformer = TransformerConfig(tokenizer.codebook_size, 1000, grid, depth=depth, class_dropout=0.1)
    with skeletons():
        networks = VQGAN(tokenizer), MaskedTransformer(transformer)
    chance = torch.Generator().manual_seed(0)
    weights = [
        {
            name: torch.randn(tensor.shape, generator=chance).mul_(0.02).to(tensor.dtype)
            for name, tensor in network.state_dict().items()
        }
        for network in networks
    ]
    save_tokenizer(folder / "tokenizer", tokenizer, weights[0], image_size=image_size)
    save_transformer(
        folder / "transformer",
        transformer,
        weights[1],
        mask_schedule="cosine",
        decoding=DecodingConfig(),
        class_names=[f"class {number}" for number in range(1000)],
        tokenizer_fingerprint=fingerprint(folder / "tokenizer"),
    )


def measure_peak(words: Sequence[str], *, folder: Path) -> dict[str, str]:
    """Runs ``maskgit`` with ``words`` in ``folder``, or only its imports without words; returns the row of the table.

    Raises:
        RuntimeError: if the command fails.
    """
    before = children_cpu_seconds()
    # The process reads its own peak: that of wait4 would start from the memory of this process.
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *words], cwd=folder, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"maskgit {shlex.join(words)} must succeed, got exit code {done.returncode}")
    seconds = children_cpu_seconds() - before
    command = f"`maskgit {shlex.join(words)}`" if words else "imports only"
    kilobytes = int(done.stdout.split()[-1])
    return {"command": command, "peak, GB": f"{1024 * kilobytes / 1e9:.2f}", "CPU s": f"{seconds:.0f}"}


def list_commands(model: str) -> list[list[str]]:
    """Returns the commands to measure, two decoding steps each: the number of steps does not change the memory."""
    sample = ["sample", model, "--classes", "0", "--num-steps", "2", "--out", "sampled.png"]
    edit = ["edit", model, "image.png", "--fit", "--box", "64,64,192,192", "--class", "1", "--num-steps", "2"]
    return [
        [],
        [*sample, "--per-class", "1"],
        [*sample, "--per-class", "16"],
        [*sample, "--per-class", "16", "--dtype", "bfloat16"],
        [*sample, "--per-class", "64"],
        [*edit, "--out", "edited.png"],
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the weights, 0.9 GB")
    folder = parser.parse_args(argv).out.resolve()
    save_model(folder / "model")
    measure_peak(["sample", "model", "--classes", "0", "--per-class", "1", "--num-steps", "1", "--out", "image.png"],
                 folder=folder)  # fmt: skip
    print(f"{cpu_name()}, torch {torch.__version__}, 256 px, 24 layers x 768")
    print(format_table([measure_peak(words, folder=folder) for words in list_commands("model")]))


if __name__ == "__main__":
    main()
