"""``maskgit sample``: generates images as a picture, as files, as an animation, or thousands in one ``.npz`` file.

``maskgit web`` does it on a page in the browser.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Unpack

from maskgit_pl.checks import check_integer
from maskgit_pl.cli.arguments import Output, Word
from maskgit_pl.cli.flags import Device, Folder, ModelFlags, Pictures, Run, check_one_of, record_steps
from maskgit_pl.files import write_atomically
from maskgit_pl.folders import hold_lock
from maskgit_pl.pipeline.options import MAX_RESULTS, DecodingSettings
from maskgit_pl.pipeline.sharing import find_folder
from maskgit_pl.processes import launcher_rank, local_rank, named_bars
from maskgit_pl.text import count_text

if TYPE_CHECKING:
    from maskgit_pl.evaluation.acceptance import Acceptance, Judge
    from maskgit_pl.pipeline import MaskGIT
    from maskgit_pl.pipeline.bulk import BulkOptions, BulkResult

_PER_CLASS = 8
_ANIMATED = 4  # number of images side by side in an animation
_MAX_CLASSES = 10  # number of classes that ``--classes all`` shows in a picture


def sample(
    folder: Run,
    *,
    classes: Annotated[str, Word("A,B,...")] = "all",
    per_class: int | None = None,
    num_images: int | None = None,
    seed: int = 0,
    batch_size: int = 100,
    negative_class: str | None = None,
    accept_rate: float | None = None,
    classifier: Folder | None = None,
    data: Folder | None = None,
    known: Annotated[Path, Word("FILE")] | None = None,
    out: Annotated[Path, Output(".png", (".npz", ".npy"))] = Path("samples.png"),
    pictures: Pictures = Pictures(),
    model: ModelFlags = ModelFlags(),
    **decoding_settings: Unpack[DecodingSettings],
) -> None:
    """Generates images of classes.

    They are written as one picture, as single files, as an animation of the decoding, or with --num-images as
    one .npz file. --out FILE.npy writes their tokens, also of a model without a tokenizer.

    Example: maskgit sample runs/fashion-mnist-adaln --classes Sneaker,Bag --num-steps 8 --gif bags.gif

    Args:
        folder: Run folder (runs/NAME), pretrained folder, owner/name on the Hub, or fashion-mnist-demo, a
            model in the package.
        classes: Class names or indices, or all (default: all, at most 10).
        per_class: Number of images of each class (default: 8).
        num_images: Number of images in one .npz file, spread evenly over the classes. Processes of torchrun or
            Slurm share the work.
        seed: Seed of the first image; image i has seed + i (default: 0).
        batch_size: Images per batch.
        negative_class: Class that guidance moves away from (default: no class).
        accept_rate: With --num-images: generate 1 / X times as many images, and keep the fraction X of each class to
            which --classifier gives the highest probability.
        classifier: Judge of --accept-rate: a classifier of the classes, such as runs/DATA-classifier/small; or
            two_sample, networks that are trained to tell the tokens of these images from those of train images.
        data: Data folder of --classifier two_sample (default: that of the training).
        known: With --out FILE.npy: tokens (S, *grid) that stay, as .npy, with -1 where tokens are generated; for one
            class, or one of each sample.
        out: Picture of all images; FILE.npz with --num-images; FILE.npy for tokens.
    """
    for name, value in {"per_class": per_class, **vars(pictures)}.items():
        check_one_of(num_images=num_images, **{name: value})
    _check_acceptance(num_images, accept_rate, classifier, data)
    suffixes, condition = ((".png", ".npy"), "without") if num_images is None else ((".npz",), "with")
    if (suffix := out.suffix.lower()) not in suffixes:
        raise ValueError(f"--out must end in {' or '.join(suffixes)} {condition} --num-images, got {out}")
    if suffix == ".npy" and any(vars(pictures).values()):
        raise ValueError(f"--images, --gif and --filmstrip must come with --out FILE.png, got {out}")
    if known is not None and (suffix != ".npy" or per_class is not None):
        raise ValueError(f"--known must come with --out FILE.npy and without --per-class, got --out {out}")
    if per_class is not None:
        check_integer("per_class", per_class, f"[1, {MAX_RESULTS}]")
    pipe = model.open(folder, local_rank=None if num_images is None else local_rank())
    labels = pipe.classes.parse_list(classes, max_shown=_MAX_CLASSES if num_images is None else len(pipe.class_names))
    negative = None if negative_class is None else pipe.classes.parse(negative_class)
    decoding = pipe.decoding_with(**decoding_settings)
    if num_images is None:
        options = {"batch_size": batch_size, "negative_class": negative, "decoding": decoding}
        if suffix == ".npy":
            _generate_tokens(pipe, labels, per_class or _PER_CLASS, known, out, seed=seed, **options)
        else:
            _generate(pipe, labels, per_class or _PER_CLASS, seed, pictures, out, **options)
        return
    from maskgit_pl.evaluation.acceptance import Acceptance
    from maskgit_pl.pipeline.bulk import BulkOptions

    rank, world_size = launcher_rank()
    bulk = BulkOptions(
        num_images=num_images,
        classes=labels,
        seed=seed,
        negative_class=negative,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        decoding=decoding,
    )
    acceptance = None
    if accept_rate is not None and classifier is not None:
        acceptance = Acceptance(accept_rate, _open_judge(pipe, folder, classifier, data))
    _generate_many(pipe, out, bulk, acceptance)


def web(
    folder: Run = Path("fashion-mnist-demo"),
    *,
    port: int = 7860,
    device: Device | None = None,
) -> None:
    """Shows a page in the browser that generates and edits.

    The page generates images step by step, compares settings, and edits with a brush. Ctrl-C ends it.
    Requires the extra web: pip install 'maskgit_pl[web]'.

    Example: maskgit web runs/fashion-mnist-adaln --port 7861

    Args:
        folder: Run folder (runs/NAME), pretrained folder, owner/name on the Hub, or a model in the package.
        port: Port of the page, which only this machine can open.
        device: cpu, cuda, cuda:1, mps ... (default: a GPU if there is one).
    """
    find_folder(folder)
    from maskgit_pl.web.server import serve  # torch takes a second to import

    serve(folder, port=port, device=device)


def _generate(
    pipe: MaskGIT, classes: list[int], per_class: int, seed: int, pictures: Pictures, out: Path, **options: Any
) -> None:
    """Generates ``per_class`` images of each class, records the decoding of some of them, and writes all files."""
    from maskgit_pl.grids import class_captions, image_grid

    # One row of the picture for each class.
    labels = [label for label in classes for _ in range(per_class)]
    seeds = [seed + row for row in range(len(labels))]
    with record_steps("sampling", len(labels)) as (after_step, steps):
        images: Any = pipe.generate(labels, output_type="pt", seed=seed, callback=after_step, **options)
    # The first images of the classes lie in different batches, so they are decoded again for the animation.
    rows = range(0, len(labels), per_class if len(classes) > 1 else 1)[:_ANIMATED]
    recording = None
    if pictures.show_decoding:
        recording = pipe.record([labels[row] for row in rows], seed=[seeds[row] for row in rows], **options)
    sheet = image_grid(images, columns=per_class, row_captions=class_captions(pipe.class_names, classes))
    what = f"{count_text(len(images), 'image')} of {count_text(len(classes), 'class')}"
    summary = f"{what} in {count_text(len(steps), 'step')}"
    pictures.write(out, sheet, summary, images=images, labels=labels, seeds=seeds, recording=recording)


def _generate_tokens(
    pipe: MaskGIT, classes: list[int], per_class: int, known: Path | None, out: Path, **options: Any
) -> None:
    """Writes the tokens of ``per_class`` samples of each class, or of a file of known tokens, (S, *grid)."""
    import numpy as np

    from maskgit_pl.data.arrays import map_any_array

    array, labels = None, [label for label in classes for _ in range(per_class)]
    if known is not None:
        array = map_any_array(known)
        labels = classes * len(array) if len(classes) == 1 else classes
        if len(labels) != len(array):
            raise ValueError(f"--classes must be one class, or one of each of the {len(array)} samples of {known}")
    with record_steps("sampling", len(labels)) as (after_step, _):
        tokens = pipe.generate_tokens(labels, known=array, callback=after_step, **options).numpy()
    dtype = np.min_scalar_type(pipe.transformer.network.config.codebook_size - 1)
    out.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(out) as file:
        np.save(file, tokens.astype(dtype), allow_pickle=False)
    print(f"{out}: {tokens.shape} {dtype} in {count_text(options['decoding'].num_steps, 'step')}")


def _check_acceptance(
    num_images: int | None, accept_rate: float | None, classifier: Path | None, data: Path | None
) -> None:
    if (accept_rate is None) != (classifier is None) or (num_images is None and accept_rate is not None):
        raise ValueError("--accept-rate, --classifier and --num-images must be given together, got not all of them")
    if data is not None and classifier != Path("two_sample"):
        raise ValueError(f"--data must come with --classifier two_sample, got {data} without it")


def _open_judge(pipe: MaskGIT, folder: Path, classifier: Path, data: Path | None) -> Judge:
    from maskgit_pl.evaluation.acceptance import ClassJudge, TokenJudge
    from maskgit_pl.evaluation.folders import open_data
    from maskgit_pl.evaluation.run_folders import find_run

    if classifier == Path("two_sample"):
        return TokenJudge(pipe.tokenizer, open_data(find_run(folder, data=data), pipe))
    return ClassJudge.load(classifier, device=pipe.device)


def _generate_many(pipe: MaskGIT, out: Path, options: BulkOptions, acceptance: Acceptance | None) -> None:
    """Generates the images of this process, writes the file when all parts are complete, and prints a summary."""
    from maskgit_pl.evaluation.acceptance import generate_accepted
    from maskgit_pl.pipeline.bulk import generate_many

    make: Callable[..., BulkResult] = generate_many
    count, classes, total = options.num_images, len(options.classes or ()), options.num_images
    if acceptance is not None:
        make, total = partial(generate_accepted, acceptance=acceptance), acceptance.num_candidates(count, classes)
    share = -(-total // options.world_size)  # images of this process
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = hold_lock(out, hint="give another --out", rank=options.rank)
    with lock, named_bars("images") as advance:
        result = make(pipe, out, options, on_images=lambda count: advance("sampling", count, share))
    if result.missing_parts:
        others = f"{result.missing_parts} other ranks have not"
        print(f"{out}: rank {options.rank} of {options.world_size} has finished its images; {others}")
        return
    if result.made == 0:
        print(f"{out}: already complete with {count_text(count, 'image')}")
    else:
        summary = f"{count_text(count, 'image')} of {count_text(classes, 'class')}"
        print(f"{out}: {summary}; {result.made} generated by this process")
    if acceptance is not None:
        print(f"accepted {count} of {total} candidates ({count / total:.1%}) by {acceptance.judge.name}")
