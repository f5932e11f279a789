"""Times networks of the released size end to end: import, sampling and editing, with the seconds of each part.

    python benchmarks/released_size.py --out released-size

--transformer and --tokenizer name the released files. Without them, tests/golden/recipe.py makes checkpoints with the
same names, sizes and format. Their random weights take the same time, but the images show no objects.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from measuring import format_table, read_cpu_name

from maskgit_pl.distributed import describe_environment
from maskgit_pl.importers.released import import_jax
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.grids import image_grid, save_png

_RECIPE = Path(__file__).parents[1] / "tests" / "golden" / "recipe.py"
_SEED = "31"
_CLASSES = (207, 250, 22, 387, 985, 417, 975, 88)  # golden retriever, Siberian husky, bald eagle, lesser panda ...
_EDITED_CLASS = 281  # tabby
Result = TypeVar("Result")


class Parts:
    """The seconds of each part of a task, in the order of their first use."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    @contextmanager
    def task(self, name: str) -> Iterator[dict[str, float]]:
        """Times a task; ``rest`` is the time outside its parts."""
        parts, start = self.seconds[name], time.perf_counter()
        yield parts
        parts["rest"] = time.perf_counter() - start - sum(parts.values())

    def rows(self) -> list[dict[str, str]]:
        """Returns rows of the table: task, part, seconds, share of the task."""
        return [
            {"task": task, "part": part, "s": f"{value:.1f}", "share": f"{value / sum(parts.values()):.0%}"}
            for task, parts in self.seconds.items()
            for part, value in [*parts.items(), ("all", sum(parts.values()))]
        ]


def time_calls(call: Callable[..., Result], parts: dict[str, float], part: str) -> Callable[..., Result]:
    """Returns a function that adds the seconds of each call to a part."""

    def wrapped(*args: object, **options: object) -> Result:
        start = time.perf_counter()
        result = call(*args, **options)
        parts[part] = parts.get(part, 0.0) + time.perf_counter() - start
        return result

    return wrapped


@contextmanager
def time_networks(pipe: MaskGIT, parts: dict[str, float]) -> Iterator[None]:
    """Times the calls of a pipeline to its networks."""
    transformer, tokenizer = pipe.transformer.network, pipe.tokenizer.network
    whole = [
        (transformer, "forward", "transformer"),
        (tokenizer, "encode", "encoder"),
        (tokenizer, "decode", "decoder"),
    ]
    # An attribute of the instance hides the method of the class until it is deleted.
    for network, name, part in whole:
        setattr(network, name, time_calls(getattr(network, name), parts, part))
    try:
        yield
    finally:
        for network, name, _ in whole:
            delattr(network, name)


def make_checkpoints(folder: Path) -> tuple[Path, Path]:
    """Makes checkpoints of a transformer and a tokenizer for 256 px; returns their files."""
    models = ("transformer256", "tokenizer256")
    subprocess.run([sys.executable, str(_RECIPE), _SEED, str(folder), *models], check=True, stdout=subprocess.DEVNULL)
    return folder / "transformer256.msgpack", folder / "tokenizer256.msgpack"


def run(transformer: Path, tokenizer: Path, out: Path, *, num_steps: int, dtype: torch.dtype) -> Parts:
    """Imports, samples 8 images and edits one of them; writes the images to ``out``."""
    parts = Parts()
    with parts.task("import"):
        import_jax(tokenizer, out / "pretrained", transformer=transformer)
    with parts.task("load"):
        pipe = MaskGIT.from_pretrained(out / "pretrained").to("cpu", dtype=dtype)
    with parts.task(f"sample {len(_CLASSES)} images") as split, time_networks(pipe, split):
        images = pipe.generate(_CLASSES, num_steps=num_steps, seed=0, output_type="pt")
    save_png(image_grid(images, columns=4), out / "samples.png")
    # The region to edit: the middle half of the width and of the height.
    size = images.shape[-1]
    box = (size // 4, size // 4, size * 3 // 4, size * 3 // 4)
    with parts.task("edit 1 image") as split, time_networks(pipe, split):
        edited = pipe.edit_class(images[0], box, _EDITED_CLASS, seed=0, output_type="pt")
    save_png(image_grid(torch.cat([images[:1], edited]), columns=2), out / "edited.png")
    return parts


def main() -> None:
    """Reads the flags, runs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--transformer", type=Path, help="maskgit_imagenet256_checkpoint (default: random weights)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer_imagenet256_checkpoint (default: random weights)")
    parser.add_argument("--out", type=Path, default=Path("released-size"), help="folder of the images")
    parser.add_argument("--num-steps", type=int, default=8)
    parser.add_argument("--bf16", action="store_true", help="weights and arithmetic in bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if (args.transformer is None) != (args.tokenizer is None):
        parser.error("--transformer and --tokenizer must be given together")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        made = (args.transformer, args.tokenizer) if args.transformer else make_checkpoints(Path(scratch))
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        parts = run(*made, args.out, num_steps=args.num_steps, dtype=dtype)
    # ru_maxrss is in KiB on Linux.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{read_cpu_name()}, {args.threads} threads, {str(dtype).removeprefix('torch.')}, {args.num_steps} steps")
    print(format_table(parts.rows()))
    print(f"peak memory {peak:.1f} GiB; images in {args.out}")
    if args.json is not None:
        content = {"seconds": parts.seconds, "peak_gib": peak, "environment": describe_environment()}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
