"""``maskgit sample``: generates images as a picture, as files, as an animation, or thousands in one ``.npz`` file.

``maskgit web`` does it on a page in the browser.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Unpack

from maskgit_pl.checks import check_integer, count_text
from maskgit_pl.cli.arguments import Output, Word, flag_of
from maskgit_pl.cli.flags import Device, Folder, ModelFlags, Run, make_folder
from maskgit_pl.cli.outputs import Generated, Pictures, record_steps
from maskgit_pl.data.folders import hold_lock
from maskgit_pl.pipeline.options import MAX_RESULTS, DecodingSettings
from maskgit_pl.processes import launcher_rank, local_rank, named_bars, progress_bars

if TYPE_CHECKING:
    from maskgit_pl.decoding import DecodingConfig
    from maskgit_pl.pipeline import MaskGIT
    from maskgit_pl.pipeline.acceptance import Acceptance
    from maskgit_pl.pipeline.bulk import BulkOptions

__all__ = ["sample", "web"]

_PER_CLASS = 8
_ANIMATED = 4  # number of images side by side in an animation
_MAX_CLASSES = 10  # number of classes that ``--classes all`` shows in a picture


@dataclass(frozen=True)
class ManyImages:
    """Many images in one .npz file, as evaluators read it.

    Args:
        num_images: Number of images, spread evenly over the classes.
        rank: Index of this process, from 0 (default: from torchrun or Slurm).
        world_size: Number of processes that share the work (default: from torchrun or Slurm).
    """

    num_images: int | None = None
    rank: int | None = None
    world_size: int | None = None


def sample(
    folder: Run,
    *,
    classes: Annotated[str, Word("A,B,...")] = "all",
    per_class: int | None = None,
    seed: int = 0,
    batch_size: int = 100,
    negative_class: str | None = None,
    accept_rate: float | None = None,
    classifier: Folder | None = None,
    vectors: Annotated[Path, Word("FILE.npy")] | None = None,
    out: Annotated[Path, Output(".png", ".npz")] = Path("samples.png"),
    pictures: Pictures = Pictures(),
    many_images: ManyImages = ManyImages(),
    model: ModelFlags = ModelFlags(),
    **decoding_settings: Unpack[DecodingSettings],
) -> None:
    """Generates images of classes.

    They are written as one picture, as single files, as an animation of the decoding, or with --num-images as
    one .npz file.

    Example: maskgit sample runs/fashion-mnist-adaln --classes Sneaker,Bag --num-steps 8 --gif bags.gif

    Args:
        folder: Run folder (runs/NAME), pretrained folder, owner/name on the Hub, or fashion-mnist-demo, a
            model in the package.
        classes: Class names or indices, or all (default: all, at most 10).
        per_class: Number of images of each class (default: 8).
        seed: Seed of the first image; image i has seed + i (default: 0).
        batch_size: Images per batch.
        negative_class: Class that guidance moves away from (default: no class).
        accept_rate: Generate 1 / X times as many images, and keep the fraction X of each class to which a
            classifier gives the highest probability of that class.
        classifier: Classifier of --accept-rate (default: that of the data of the run, runs/DATA-classifier/small).
        vectors: Array with one vector per row, for a model that was trained with vectors: makes one image of each class
            for each row, or takes the rows in turn with --num-images; one row only with --accept-rate.
        out: Picture of all images; FILE.npz with --num-images.
    """
    is_bulk = many_images.num_images is not None
    _check_flags(many_images, out, accept_rate, classifier, per_class=per_class, **asdict(pictures))
    pipe = model.open(folder, local_rank=local_rank() if is_bulk else None)
    outline = pipe.outline
    labels = outline.parse_classes(classes, max_shown=len(pipe.class_names) if is_bulk else _MAX_CLASSES)
    negative = None if negative_class is None else outline.parse_class(negative_class)
    decoding = pipe.decoding_with(**decoding_settings)
    count = _give_vectors(pipe, vectors, seed=seed)
    if accept_rate is not None and (count or 0) > 1:
        # The best candidates of a class may all have the same vector.
        raise ValueError(
            f"--vectors {vectors} must hold 1 vector with --accept-rate, which chooses among all images of a class, "
            f"got {count}; give them one at a time"
        )
    acceptance = _open_acceptance(pipe, folder, accept_rate, classifier)
    if not is_bulk:
        generated = _generate(
            pipe, labels, negative, decoding, acceptance, pictures, per_class or count or _PER_CLASS, seed, batch_size
        )
        pictures.write(generated, out, pipe=pipe, decoding=decoding)
        return
    from maskgit_pl.pipeline.bulk import BulkOptions

    # torchrun and Slurm set the ranks in the environment.
    rank, world_size = many_images.rank, many_images.world_size
    if rank is None or world_size is None:
        rank, world_size = launcher_rank()
    assert many_images.num_images is not None
    options = BulkOptions(
        num_images=many_images.num_images,
        classes=labels,
        seed=seed,
        negative_class=negative,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
    )
    _generate_many(pipe, out, options, decoding, acceptance)


def web(
    folder: Run = Path("fashion-mnist-demo"),
    *,
    host: Annotated[str, Word("ADDRESS")] = "127.0.0.1",
    port: int = 7860,
    device: Device | None = None,
) -> None:
    """Shows a page in the browser that generates and edits.

    The page generates images step by step, compares settings, and edits with a brush. Ctrl-C ends it.
    Requires the extra web: pip install 'maskgit_pl[web]'.

    Example: maskgit web runs/fashion-mnist-adaln --port 7861

    Args:
        folder: Run folder (runs/NAME), pretrained folder, owner/name on the Hub, or a model in the package.
        host: Address that the page is bound to; others than 127.0.0.1 let other machines use it, without a
            password. 0.0.0.0 and :: are all addresses of this machine.
        port: Port of the page.
        device: cpu, cuda, cuda:1, mps ... (default: a GPU if there is one).
    """
    from maskgit_pl.web.server import serve

    serve(folder, host=host, port=port, device=device)


def _check_flags(
    many: ManyImages, out: Path, accept_rate: float | None, classifier: Path | None, **of_pictures: Any
) -> None:
    """Checks flags that must or must not be given together."""
    if accept_rate is None and classifier is not None:
        raise ValueError(f"--classifier must be given with --accept-rate, got only {classifier}")
    if (many.rank is None) != (many.world_size is None):
        raise ValueError("--rank and --world-size must be given together, got only one")
    if many.num_images is None:
        if many.rank is not None:
            raise ValueError("--rank and --world-size must be given with --num-images")
        if out.suffix.lower() == ".npz":
            raise ValueError(f"--out must end in .png without --num-images, got {out}")
        if of_pictures["per_class"] is not None:
            check_integer("--per-class", of_pictures["per_class"], f"[1, {MAX_RESULTS}]")
        return
    for name, value in of_pictures.items():
        if value is not None:
            raise ValueError(f"{flag_of(name)} must not be given with --num-images")
    if out.suffix.lower() != ".npz":
        raise ValueError(f"--out must end in .npz with --num-images, got {out}")


def _give_vectors(pipe: MaskGIT, file: Path | None, *, seed: int) -> int | None:
    """Lets the image of ``seed`` take the first vector of a file, the next one the second, and so on.

    Returns:
        The number of vectors, or None for a model without vectors.

    Raises:
        ValueError: if the file is missing or must not be given, or is no array of finite vectors of the model's size.
    """
    dim = pipe.outline.condition_dim
    if not dim:
        if file is not None:
            raise ValueError(f"--vectors must be left out: the model was trained without vectors, got {file}")
        return None
    if file is None:
        raise ValueError(
            f"--vectors must be given: the model was trained with a vector of {dim} values for each image; give a .npy "
            f"file of shape (n, {dim})"
        )
    import torch

    from maskgit_pl.data.vectors import open_array
    from maskgit_pl.decoding.predictors import VectorPool

    array = open_array(file)
    if array.ndim != 2 or array.shape[1] != dim or not len(array) or array.dtype.kind != "f":
        raise ValueError(
            f"--vectors {file} must hold floats of shape (n, {dim}), one vector a row, got {array.dtype} {array.shape}"
        )
    vectors = torch.from_numpy(array.astype("float32"))
    if not vectors.isfinite().all():
        raise ValueError(f"--vectors {file} must be finite, got NaN or infinity")
    pipe.vector_pool = VectorPool(vectors, first_seed=seed)
    return len(vectors)


def _open_acceptance(
    pipe: MaskGIT, folder: Path, accept_rate: float | None, classifier: Path | None
) -> Acceptance | None:
    """Reads the classifier of rejection sampling; returns None without ``--accept-rate``."""
    if accept_rate is None:
        return None
    from maskgit_pl.evaluation.opening import find_run
    from maskgit_pl.pipeline.acceptance import Acceptance

    if classifier is None:
        try:
            classifier = find_run(folder).classifier
        except FileNotFoundError as error:
            raise FileNotFoundError(f"--accept-rate: {error}; or name a classifier with --classifier") from error
    if not (classifier / "config.json").is_file():
        raise FileNotFoundError(
            f"--classifier {classifier}: no classifier there; `maskgit train-classifier --data DATA` trains one"
        )
    acceptance = Acceptance.load(classifier, accept_rate, device=pipe.device)
    acceptance.check_classes(pipe.class_names)
    return acceptance


def _generate(
    pipe: MaskGIT,
    classes: list[int],
    negative: int | None,
    decoding: DecodingConfig,
    acceptance: Acceptance | None,
    pictures: Pictures,
    per_class: int,
    seed: int,
    batch_size: int,
) -> Generated:
    """Generates ``per_class`` images of each class, and the steps that an animation shows."""
    from maskgit_pl.pipeline.grids import image_grid

    # One row of the picture for each class.
    labels = [label for label in classes for _ in range(per_class)]
    options: dict[str, Any] = {"negative_classes": negative, "decoding": decoding}
    seeds = [seed + row for row in range(len(labels))]
    if acceptance is not None:
        seeds = _choose_seeds(pipe, labels, acceptance, seed=seed, batch_size=batch_size, **options)
    with record_steps("sampling", len(labels) * pipe.outline.num_tokens, is_recording=False) as (after_step, _):
        images = pipe.generate(
            labels, output_type="pt", seed=seeds, batch_size=batch_size, callback=after_step, **options
        )
    # The first images of the classes lie in different batches, so they are decoded again for the animation.
    recorded = range(0, len(labels), per_class if len(classes) > 1 else 1)[:_ANIMATED]
    first = [seeds[row] for row in recorded]
    steps = pipe.steps([labels[row] for row in recorded], seed=first, **options) if pictures.show_decoding else ()
    what = f"{count_text(len(images), 'image')} of {count_text(len(classes), 'class')}"
    return Generated(
        images,
        labels,
        seeds,
        image_grid(images, columns=per_class, row_captions=[pipe.class_names[label] for label in classes]),
        f"{what} in {count_text(decoding.num_steps, 'step')}",
        list(steps),
        [pipe.class_names[labels[row]] for row in recorded],
        first,
    )


def _choose_seeds(
    pipe: MaskGIT, labels: list[int], acceptance: Acceptance, *, seed: int, batch_size: int, **options: Any
) -> list[int]:
    """Chooses the seeds of accepted images and prints them."""
    from maskgit_pl.pipeline.acceptance import choose_seeds

    with progress_bars() as bars:
        total = sum(acceptance.num_candidates(labels.count(label)) for label in set(labels))
        advance = bars("candidates", total, unit="images")
        chosen = choose_seeds(pipe, labels, acceptance, seed=seed, batch_size=batch_size, on_images=advance, **options)
    print(_describe_acceptance(acceptance, len(labels), chosen.num_candidates))
    print(f"seeds: {', '.join(map(str, chosen.seeds))}")
    return chosen.seeds


def _describe_acceptance(acceptance: Acceptance, count: int, num_candidates: int) -> str:
    """Returns the number of accepted images, that of candidates, and the classifier, in one line."""
    return f"accepted {count} of {num_candidates} candidates ({count / num_candidates:.1%}) by {acceptance.name}"


def _generate_many(
    pipe: MaskGIT, out: Path, options: BulkOptions, decoding: DecodingConfig, acceptance: Acceptance | None
) -> None:
    """Generates the images of this process, writes the file when all parts are complete, and prints a summary."""
    from maskgit_pl.evaluation.generation import generate_accepted, num_candidates
    from maskgit_pl.pipeline.bulk import generate_many

    make = generate_many if acceptance is None else partial(generate_accepted, acceptance=acceptance)
    assert isinstance(options.classes, list)
    count, classes = options.num_images, len(options.classes)
    total = count if acceptance is None else num_candidates(acceptance, count, classes)
    share = -(-total // options.world_size)  # images of this process
    make_folder(out.parent)
    lock = hold_lock(out, hint="give another --out", rank=options.rank)
    with lock, named_bars("images") as advance:
        result = make(
            pipe,
            out,
            on_images=lambda count: advance("sampling", count, share),
            decoding=decoding,
            **asdict(options),
        )
    if result.missing_parts:
        others = f"{result.missing_parts} other ranks have not"
        print(f"{out}: rank {options.rank} of {options.world_size} has finished its images; {others}")
    elif result.made == 0:
        print(f"{out}: already complete with {count_text(count, 'image')}")
    else:
        summary = f"{count_text(count, 'image')} of {count_text(classes, 'class')}"
        print(f"{out}: {summary} in {count_text(decoding.num_steps, 'step')}; {result.made} generated by this process")
    if acceptance is not None and not result.missing_parts:
        print(_describe_acceptance(acceptance, count, num_candidates(acceptance, count, classes)))
