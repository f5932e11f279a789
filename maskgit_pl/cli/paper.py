"""``maskgit table`` and ``maskgit figure``: the paper's tables and figures with our rows in them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from maskgit_pl.cli.measuring import (
    FEATURES,
    RunFolders,
    add_cas_arguments,
    add_feature_arguments,
    add_worker_argument,
    cas_config,
    check_cas_arguments,
    feature_specs,
    find_run,
    flag_words,
    open_data,
    open_judges,
    open_model,
    progress_bars,
    read_own_recipe,
    step_numbers,
)
from maskgit_pl.cli.model import add_device_argument, check_at_least, device_of

if TYPE_CHECKING:
    from torch import Tensor

    from maskgit_pl.evaluation.bench.bench import Bench, Subject
    from maskgit_pl.evaluation.reports.tables import Page, ScheduleResult
    from maskgit_pl.networks.transformer import TransformerConfig

__all__ = [
    "Opened",
    "add_measuring_arguments",
    "add_parser",
    "measured_schedules",
    "opened",
    "write_page",
    "write_schedules",
]

_SHOWN_CLASSES, _SHOWN_EDITS = 10, 12
_NUM_TOKENS = "16,64,256,1024"
_CAS = ("cas_model", "cas_samples", "cas_steps", "cas_batch", "cas_learning_rate", "cas_precision")
_SIZES = ("depth", "width", "num_heads", "mlp_width", "num_codes")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds both commands to ``maskgit``."""
    table = subparsers.add_parser(
        "table",
        help="the paper's Table 1, 2 or 3 with our rows",
        description="Measure what a table of the paper needs and is not in the ledger yet; write the table as Markdown "
        "and CSV, with the paper's rows, and a sheet of images. 1: class-conditional generation. 2: outpainting and "
        "inpainting. 3: mask schedules, a run for each (`maskgit ablation` trains them).",
        allow_abbrev=False,
    )
    table.add_argument("number", type=int, choices=(1, 2, 3), help="of the table")
    _add_runs(table)
    add_measuring_arguments(table)
    add_cas_arguments(table)
    table.add_argument(
        "--cas-samples", type=int, metavar="N", help="images it is trained on (default: as --num-samples)"
    )
    table.add_argument("--num-steps", metavar="T,...", help="of Table 3 (default: 2,3,4,6,8,12,16,24, up to N/2)")
    table.set_defaults(run=run_table)

    figure = subparsers.add_parser(
        "figure",
        help="the paper's Figure 4 or 8 with our measurements",
        description="Draw a figure of the paper. 4: time of an image, sequential decoding against MaskGIT, by the "
        "number of tokens, in networks of random weights; a run gives its sizes. 8: mask schedules, and quality "
        "against T, a run for each.",
        allow_abbrev=False,
    )
    figure.add_argument("number", type=int, choices=(4, 8), help="of the figure")
    _add_runs(figure)
    add_measuring_arguments(figure)
    figure.add_argument("--num-steps", metavar="T,...", help="of Figure 8 (default: 2,3,4,6,8,12,16,24, up to N/2)")
    figure.add_argument("--num-tokens", metavar="N,...", default=_NUM_TOKENS, help="of Figure 4 (default: "
                        "16,64,256,1024)")  # fmt: skip
    for name in _SIZES:
        figure.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help="of Figure 4's transformer "
                            "(default: the run's, or one small enough for a CPU)")  # fmt: skip
    figure.set_defaults(run=run_figure)


def _add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="run folders (runs/NAME) or pretrained folders"
    )


def add_measuring_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say what is measured, on what and with what."""
    parser.add_argument("--data", type=Path, metavar="DIR", help="data folder (default: what the first was trained on)")
    parser.add_argument("--num-samples", type=int, default=1000, metavar="N", help="images a row (default: 1000)")
    add_feature_arguments(parser)
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="ledger and pages; what is in the ledger is not measured again (default: results)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first image; image i has seed + i (default: 0)")
    parser.add_argument("--batch", type=int, default=100, metavar="N", help="images at a time (default: 100)")
    add_device_argument(parser)
    parser.add_argument(
        "--classifier", type=Path, metavar="DIR", help="where the judge is kept (default: runs/DATA-classifier/small)"
    )
    add_worker_argument(parser)


class Opened:
    """What a table is made with.

    Args:
        bench: Measures, and remembers.
        subjects: The models, in the order of the command line.
        pages: Where the pages go: ``results/DATASET``.
        networks: Labels of the judges.
    """

    def __init__(self, bench: Bench, subjects: Sequence[Subject], pages: Path, networks: Sequence[str]) -> None:
        self.bench, self.subjects, self.pages, self.networks = bench, subjects, pages, networks


@contextmanager
def opened(args: argparse.Namespace) -> Iterator[Opened]:
    """Opens runs, data and judges; everything that a user can get wrong is refused before anything is measured.

    Raises:
        FileNotFoundError: No such run or data.
        ValueError: No run, runs of different data or classes, an unknown network, or a number out of range.
    """
    if not args.runs:
        raise ValueError(f"{args.command} {args.number}: at least one run is needed, such as runs/fashion-mnist-cosine")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"{args.command}: one process measures it; `maskgit evaluate` is what several share, drop torchrun"
        )
    check_at_least(args, num_samples=2, batch=1, num_workers=0)
    specs = feature_specs(args.features)
    folders = [find_run(argparse.Namespace(**{**vars(args), "folder": run})) for run in args.runs]
    from maskgit_pl.evaluation.bench.bench import Bench
    from maskgit_pl.evaluation.protocol import check_data

    subjects = [_subject(each, args) for each in folders]
    first = folders[0]
    data = open_data(first, subjects[0].pipe, num_workers=args.num_workers)
    for subject in subjects[1:]:
        check_data(subject.pipe, data)
        if subject.pipe.tokenizer.image_size != data.image_size:
            raise ValueError(
                f"run {subject.run}: images of the first run's {data.image_size} pixels are needed, got "
                f"{subject.pipe.tokenizer.image_size}; make a table of its own"
            )
    if args.num_samples < data.num_classes:
        raise ValueError(
            f"--num-samples: at least one for each of the {data.num_classes} classes is needed, got {args.num_samples}"
        )
    with progress_bars() as bars:
        device, dataset = subjects[0].pipe.device, first.data.name
        judges = open_judges(specs, data, first, reference=args.reference, device=device, bars=bars)
        bench = Bench(
            data,
            dataset=dataset,
            judges=judges,
            results=args.results,
            bars=bars,
            batch_size=args.batch,
            device=device,
        )
        yield Opened(bench, subjects, args.results / dataset, list(judges))


def _subject(folders: RunFolders, args: argparse.Namespace) -> Subject:
    from maskgit_pl.evaluation.bench.bench import Subject

    return Subject(folders.home.name, open_model(folders, args), folders.pretrained, folders.evaluation)


def command_line(args: argparse.Namespace) -> str:
    """What makes the same page again."""
    words = ["maskgit", args.command, *([str(args.number)] if "number" in args else []), *map(str, args.runs)]
    given = {
        "features": None if args.features == FEATURES else args.features,
        "num_samples": args.num_samples,
        "seed": args.seed or None,
        **{name: getattr(args, name, None) for name in ("reference", "num_steps", *_CAS)},
    }
    return " ".join([*words, *flag_words(given)])


def write_page(page: Page, folder: Path, name: str, *, pictures: Sequence[str] = ()) -> None:
    """Writes ``NAME.md`` and ``NAME.csv``, shows the page, and says where it is.

    Args:
        page: Its text and numbers.
        folder: Where to.
        name: Without ending.
        pictures: Files beside it, which the page shows.
    """
    from rich.console import Console
    from rich.markdown import Markdown

    from maskgit_pl.files import write_atomically

    folder.mkdir(parents=True, exist_ok=True)
    missing = [picture for picture in pictures if f"({picture})" not in page.markdown]
    shown = "".join(f"\n![{picture.removesuffix('.png')}]({picture})\n" for picture in missing)
    for ending, text in (("md", page.markdown + shown), ("csv", page.csv)):
        with write_atomically(folder / f"{name}.{ending}") as stream:
            stream.write(text.encode())
    console = Console()
    console.print(Markdown(page.markdown)) if console.is_terminal else print(page.markdown)
    print(f"{folder}: {', '.join([f'{name}.md', f'{name}.csv', *pictures])}")


def run_table(args: argparse.Namespace) -> int:
    """Measures what is missing, and writes the table.

    Raises:
        FileNotFoundError: As of ``opened``.
        ValueError: As of ``opened``, or runs that do not belong into that table.
    """
    numbers = None if args.num_steps is None else step_numbers(args.num_steps)
    check_at_least(args, cas_samples=1)
    check_cas_arguments(args)
    with opened(args) as made:
        if args.number == 3:
            results = measured_schedules(made, args, numbers)
            write_schedules(made, results, args, command_line(args))
        elif args.number == 2:
            _table_2(made, args)
        else:
            _table_1(made, args)
    return 0


def _table_1(made: Opened, args: argparse.Namespace) -> None:
    from maskgit_pl.evaluation.reports.tables import table_1

    bench, on = made.bench, {"num_images": args.num_samples, "networks": made.networks}
    rows = [
        row
        for subject in made.subjects
        for row in bench.samples(subject, subject.pipe.decoding, seed=args.seed, **on).values()
    ]
    rows += bench.real(**on).values()
    page = table_1(rows, _accuracies(made, args), command=command_line(args))
    _write_sheet(made, args.seed, made.pages / "table-1.png")
    write_page(page, made.pages, "table-1", pictures=["table-1.png"])


def _accuracies(made: Opened, args: argparse.Namespace) -> list[dict[str, str]]:
    """Rows of the classification accuracy score: of each model, and of as many real images."""
    if args.cas_model == "none":
        return []
    config = cas_config(made.bench.data.image_size, args)
    count = args.cas_samples or args.num_samples
    count = min(count, made.bench.data.summary.samples["train"])
    rows = [
        made.bench.cas(subject, subject.pipe.decoding, config, num_images=count, seed=args.seed)
        for subject in made.subjects
    ]
    return [*rows, made.bench.cas(None, None, config, num_images=count, seed=args.seed)]


def _write_sheet(made: Opened, seed: int, path: Path) -> None:
    """A row a model and one of real images, a column a class."""
    import torch

    from maskgit_pl.imaging import image_grid, save_png

    data = made.bench.data
    shown = min(data.num_classes, _SHOWN_CLASSES)
    classes = [number * data.num_classes // shown for number in range(shown)]
    images, labels = made.bench.real_images("val", 50 * data.num_classes)
    rows = [torch.stack([_first_of(images, labels, label) for label in classes])]
    for subject in made.subjects:
        rows.append(torch.as_tensor(subject.pipe.generate(classes, seed=seed, output_type="pt")))
    captions = ["real images", *(f"{subject.kind}, T = {subject.pipe.decoding.num_steps}" for subject in made.subjects)]
    names = [data.class_names[label] for label in classes]
    save_png(image_grid(torch.cat(rows), columns=shown, row_captions=captions, column_captions=names), path)


def _first_of(images: Tensor, labels: Tensor, label: int) -> Tensor:
    import torch

    found = (labels == label).nonzero()
    return images[int(found[0])] if len(found) else torch.zeros_like(images[0])


def _table_2(made: Opened, args: argparse.Namespace) -> None:
    import torch

    from maskgit_pl.evaluation.bench.held_out import edit, masked
    from maskgit_pl.evaluation.reports.tables import TASKS, table_2
    from maskgit_pl.imaging import image_grid, save_png

    rows = [
        row
        for subject in made.subjects
        for task in TASKS
        for row in made.bench.editing(
            subject, task, num_images=args.num_samples, seed=args.seed, networks=made.networks
        )
    ]
    subject = made.subjects[0]
    images, labels = made.bench.real_images("val", _SHOWN_EDITS)
    shown, captions = [images], ["held out"]
    for task in TASKS:
        shown += [
            masked(task, subject.pipe.tokenizer, images),
            edit(task, subject.pipe, images, labels, seed=args.seed),
        ]
        captions += ["given", task]
    save_png(image_grid(torch.cat(shown), columns=len(images), row_captions=captions), made.pages / "table-2.png")
    write_page(table_2(rows, command=command_line(args)), made.pages, "table-2", pictures=["table-2.png"])


def measured_schedules(made: Opened, args: argparse.Namespace, numbers: Sequence[int] | None) -> list[ScheduleResult]:
    """What the ablation of the runs' mask schedules says.

    Raises:
        ValueError: Runs that were not trained alike, two of one schedule, or no T that can be.
    """
    from maskgit_pl.evaluation.reports.ablation import STEPS, ablate, check_budgets

    configs = {
        subject.run: read_own_recipe(subject.folder.parent / "transformer" / "config.yaml") for subject in made.subjects
    }
    check_budgets(configs)
    steps = STEPS if numbers is None else numbers
    return ablate(
        made.bench, made.subjects, steps=steps, num_images=args.num_samples, seed=args.seed, networks=made.networks
    )


def write_schedules(made: Opened, results: Sequence[ScheduleResult], args: argparse.Namespace, command: str) -> None:
    """Writes Table 3 and Figure 8, which belong together."""
    from maskgit_pl.evaluation.reports.schedule_figures import schedule_figure
    from maskgit_pl.evaluation.reports.tables import table_3
    from maskgit_pl.files import write_atomically

    metric = f"fid/{made.networks[0]}"
    floor = made.bench.real(num_images=args.num_samples, networks=made.networks[:1])[made.networks[0]]
    made.pages.mkdir(parents=True, exist_ok=True)
    figure = schedule_figure(
        results,
        num_tokens=made.subjects[0].pipe.transformer.network.config.num_tokens,
        metric=metric,
        num_images=args.num_samples,
        floor=float(floor["fid"]),
        dataset=made.bench.dataset,
    )
    with write_atomically(made.pages / "figure-8.png") as stream:
        stream.write(figure)
    write_page(table_3(results, command=command), made.pages, "table-3", pictures=["figure-8.png"])


def run_figure(args: argparse.Namespace) -> int:
    """Measures what is missing, and draws.

    Raises:
        FileNotFoundError: As of ``opened``.
        ValueError: As of ``opened``.
    """
    if args.number == 4:
        return _figure_4(args)
    numbers = None if args.num_steps is None else step_numbers(args.num_steps)
    with opened(args) as made:
        write_schedules(made, measured_schedules(made, args, numbers), args, command_line(args))
    return 0


def _figure_4(args: argparse.Namespace) -> int:
    """Times the decoders, and draws; needs no data, and of a run its sizes alone.

    Raises:
        ValueError: if several runs are named, a size is out of range, or a number of tokens is no square.
    """
    if len(args.runs) > 1:
        raise ValueError(f"figure 4 must have at most one run, whose sizes are timed, got {len(args.runs)}")
    numbers = step_numbers(args.num_tokens, flag="--num-tokens")
    check_at_least(args, **dict.fromkeys(_SIZES, 1))
    device = device_of(args)
    from dataclasses import asdict

    from maskgit_pl.evaluation.reports.figure4 import as_markdown, draw, measure
    from maskgit_pl.evaluation.reports.tables import Page, as_csv

    sizes = _timed_sizes(args)
    with progress_bars() as bars:
        bar = bars("figure 4: points", 3 * len(numbers))
        timings = measure(
            args.results / "timing.csv", sizes=sizes, num_tokens=numbers, device=device, on_point=lambda _: bar(1)
        )
    args.results.mkdir(parents=True, exist_ok=True)
    draw(timings, args.results / "figure-4.png")
    given = {"num_tokens": None if args.num_tokens == _NUM_TOKENS else args.num_tokens}
    given |= {name: getattr(args, name) for name in (*_SIZES, "device")}
    words = ["maskgit figure 4", *map(str, args.runs), *flag_words(given)]
    page = Page(as_markdown(timings, " ".join(words)), as_csv([asdict(timing) for timing in timings]))
    write_page(page, args.results, "figure-4", pictures=["figure-4.png"])
    return 0


def _timed_sizes(args: argparse.Namespace) -> TransformerConfig:
    """Returns the sizes of the flags, of the run, or the usual ones, in this order."""
    from dataclasses import replace

    from maskgit_pl.evaluation.reports.figure4 import SIZES, sizes_of
    from maskgit_pl.pipeline.sharing import local_folder

    sizes = sizes_of(local_folder(args.runs[0]) / "transformer") if args.runs else SIZES
    return replace(sizes, **{name: getattr(args, name) for name in _SIZES if getattr(args, name) is not None})
