"""Parts that many commands share: flags of runs, models and pictures, the progress of a decoding, tables and pages."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from maskgit_pl import pipeline
from maskgit_pl.cli.arguments import Output, Word, flag_of
from maskgit_pl.evaluation.options import FEATURES, Dtype, ReportOptions
from maskgit_pl.pipeline.sharing import find_folder
from maskgit_pl.processes import named_bars
from maskgit_pl.runs.plan import Folders, find_data_folder
from maskgit_pl.runs.recipe import DEFAULT_DATASET, Recipe, Stage, parse_specs
from maskgit_pl.text import count_text, printable

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from maskgit_pl.decoding import DecodingStep
    from maskgit_pl.evaluation.pages import Page
    from maskgit_pl.pipeline import MaskGIT
    from maskgit_pl.pipeline.display import Recording

__all__ = ["Numbers", "ReportFlags", "Run", "Runs", "write_page"]

Folder = Annotated[Path, Word("DIR")]
Run = Annotated[Path, Word("RUN")]
Runs = Annotated[tuple[Path, ...], Word("RUN")]
Device = Annotated[str, Word("NAME")]
Numbers = Annotated[tuple[int, ...], Word("T,...")]
Seeds = Annotated[tuple[int, ...], Word("N,...")]
Specs = Annotated[Sequence[str | dict[str, Any]], Word("A,B,...", parse_specs)]
ImageSize = Annotated[int | tuple[int, int], Word("S|H,W")]
_RECORDED = 4  # images of an animation


@dataclass(frozen=True)
class NewRunFlags:
    """The recipe, the data and the folders of a run.

    Args:
        recipe: Recipe, or the path of its file; of several in quotes, later ones override earlier ones:
            --recipe 'paper-256 log'.
        dataset: Name of the data set.
        data: Data folder, or a token store (default: data/shards/DATASET).
        cluster: Machines: a file of recipes/cluster.
        run: Name of the run (default: DATASET-RECIPE).
        runs_folder: Folder of all runs.
        tokenizer: Pretrained tokenizer (default: the run's own).
        pretrained: Fine-tune from the weights of this pretrained folder.
    """

    recipe: str = ""
    dataset: str = DEFAULT_DATASET
    data: Folder | None = None
    cluster: str = "single"
    run: str | None = None
    runs_folder: Folder = Path("runs")
    tokenizer: Folder | None = None
    pretrained: Folder | None = None

    def read(self, stage: Stage, overrides: Sequence[str]) -> Recipe:
        """Reads the recipe of a stage with its overrides. See ``Recipe.read`` for errors."""
        return Recipe.read(
            stage, names=self.recipe, dataset=self.dataset, cluster=self.cluster, overrides=list(overrides)
        )

    def folders(self, recipe: Recipe) -> Folders:
        """Returns the folders of the run. The recipe gives its default name."""
        name = self.run or recipe.run_name
        run = None if name is None else self.runs_folder / name
        return Folders(run=run, data=self.data, tokenizer=self.tokenizer, pretrained=self.pretrained)


@dataclass(frozen=True)
class RunFlags(NewRunFlags):
    """The recipe, the data and the folders of a run, which may repeat an earlier one.

    Args:
        config: Repeat the run of this config.yaml as a new run (--run).
    """

    config: Annotated[Path, Word("FILE")] | None = None

    def find_data(self) -> None:
        """Raises an error if there are no data. The path of an earlier run is known only once it is read."""
        if self.data is not None or self.config is None:
            find_data_folder(self.dataset, self.data)

    def read(self, stage: Stage, overrides: Sequence[str]) -> Recipe:
        """Reads the recipe from its files, or with ``config`` from an earlier run."""
        if self.config is None:
            return super().read(stage, overrides)
        if self.recipe:
            raise ValueError("--config repeats a run with its own recipe; leave out --recipe")
        # The config.yaml holds the complete recipe of the old run; only flags may change it.
        return Recipe.from_run(stage, self.config, list(overrides))


@dataclass(frozen=True)
class ModelFlags:
    """The model that generates, and its arithmetic.

    Args:
        device: cpu, cuda, cuda:1, mps ... (default: a GPU if there is one).
        dtype: Arithmetic of both networks; auto: bfloat16 on devices with instructions for it, else float32
            (default: auto on a GPU, else that of the weights).
        compiled: Compile the transformer, which takes a minute and pays off for thousands of images on a GPU.
        negative_model: Weaker model that guidance moves away from, such as an early checkpoint of the run: a
            run or a folder of `maskgit export` (default: that of the folder, or none).
    """

    device: Device | None = None
    dtype: Dtype | None = None
    compiled: bool = False
    negative_model: Folder | None = None

    def open(self, folder: Path, *, local_rank: int | None = None) -> MaskGIT:
        """Loads a model.

        Args:
            folder: The run or model that the user names. See ``MaskGIT.from_pretrained``.
            local_rank: Local rank of a process that shares the GPUs of its node with others.
        """
        folder = find_folder(folder)
        from maskgit_pl.devices import check_device, default_device, parse_dtype  # torch takes a second to import

        device = self.device or default_device(local_rank=local_rank)
        pipe = pipeline.MaskGIT.from_pretrained(
            folder,
            negative_model=self.negative_model,
            device=check_device(device),
            dtype=parse_dtype(self.dtype, device),
        )
        return pipe.compile() if self.compiled else pipe


@dataclass(frozen=True)
class ReportFlags(ReportOptions):
    """The options of a page as they are typed."""

    features: Specs = FEATURES
    results: Annotated[Path, Output("")] = Path("results")


@dataclass(frozen=True)
class Pictures:
    """Files besides the picture of all images.

    Args:
        images: Also write each image to its own file in this folder.
        gif: Also write an animation of the decoding.
        filmstrip: Also write the decoding of the first image step by step.
    """

    images: Annotated[Path, Output("")] | None = None
    gif: Annotated[Path, Output(".gif")] | None = None
    filmstrip: Annotated[Path, Output(".png")] | None = None

    @property
    def show_decoding(self) -> bool:
        """Returns True if a file shows the decoding."""
        return self.gif is not None or self.filmstrip is not None

    def write(
        self,
        out: Path,
        sheet: Image.Image,
        summary: str,
        *,
        images: Tensor,
        labels: Sequence[int | None],
        seeds: Sequence[int],
        recording: Recording | None,
    ) -> None:
        """Writes all images as one picture, and the other files.

        Args:
            out: File of the picture.
            sheet: Picture of all images.
            summary: Text beside its name.
            images: (n, C, H, W) uint8.
            labels: Class of each image; None is "no class".
            seeds: Seed of each image.
            recording: Decoding of the first images; None if no file shows it.
        """
        from maskgit_pl import grids  # which imports torch

        out.parent.mkdir(parents=True, exist_ok=True)
        grids.save_png(sheet, out)
        print(f"{out}: {summary}")
        if self.images is not None:
            self.images.mkdir(parents=True, exist_ok=True)
            grids.save_images(images, labels, self.images, seeds=seeds)
            print(f"{self.images}: {count_text(len(images), 'file')}")
        for file in (self.gif, self.filmstrip):
            if file is not None and recording is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                recording.save(file)
                count = count_text(len(recording.captions), "image")
                print(f"{file}: decoding of {count if file == self.gif else 'the first image'}")


def check_one_of(*, required: bool = False, **flags: object) -> None:
    """Checks that at most one of several flags is given: neither None nor False.

    Args:
        required: True if one must be given.
        flags: Value of each flag by its name.
    """
    names = [flag_of(name) for name, value in flags.items() if value is not None and value is not False]
    if len(names) > 1:
        raise ValueError(f"{names[0]} must not be given with {names[1]}; choose one of the two")
    if required and not names:
        raise ValueError(f"one of {' and '.join(map(flag_of, flags))} must be given, got neither")


@contextmanager
def record_steps(title: str, count: int) -> Iterator[tuple[Callable[[DecodingStep], None], list[DecodingStep]]]:
    """Shows how many tokens are decided, as a bar or as log lines, and records the decoding steps of the first images.

    Args:
        title: Text of the progress bar.
        count: Number of results, each with as many masked tokens as the first one.

    Yields:
        The ``callback`` for a method of ``MaskGIT``, and the list of recorded steps.
    """
    steps: list[DecodingStep] = []
    # The bar disappears at the end, so that only the names of the files stay on the terminal.
    with named_bars("tokens") as advance:

        def after_step(step: DecodingStep) -> None:
            if not steps or bool(steps[-1].still_masked.any()):  # else the step is of a later batch
                tensors = {name: values[:_RECORDED] for name, values in vars(step).items() if name != "step"}
                steps.append(replace(step, **tensors))
            total = count * int(steps[0].was_masked[0].sum())
            advance(title, int(step.was_masked.sum() - step.still_masked.sum()), total)

        yield after_step, steps


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows that have the same keys, the names of the columns."""
    # Names of packages and files are untrusted: no control characters.
    cells = [[column.replace("_", " ") for column in rows[0]] if rows else []]
    cells += [[printable(str(value)) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    # Only a terminal cuts a line; a file and a pipe have the whole text.
    limit = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    for line in cells:
        text = "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        print(text if len(text) <= limit else f"{text[: limit - 3]}...")


def write_page(page: Page) -> None:
    """Writes a page to its folder, and prints it."""
    page.write()
    print_page(page)


def print_page(page: Page) -> None:
    """Prints a page and the names of its files."""
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    # Rich draws tables on a terminal; a file gets the Markdown itself.
    console.print(Markdown(page.markdown)) if console.is_terminal else print(page.markdown)
    print(f"{page.folder}: {', '.join(page.contents)}")
