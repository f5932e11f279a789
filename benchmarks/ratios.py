"""Runs the benchmarks that compare, and writes one table of their ratios into benchmarks/README.md.

    make benchmarks

Each ratio is our time divided by that of the alternative in the same round, as the median over the rounds: below 1,
ours is faster. All are CPU seconds of one thread, so that other programs matter little. Alternatives whose package is
not installed are left out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import format_table, read_cpu_name

from maskgit_pl.distributed import has_bfloat16

_README = Path(__file__).parent / "README.md"
_BEGIN, _END = "<!-- ratios: written by `make benchmarks` -->", "<!-- end of ratios -->"
_DECODE = "--threads 1 --clock cpu --repeats {repeats} --only 'ours, first step cached' 'ours, weights not packed' "
_DECODE += "'encoder layers of torch, as dome272' 'BertModel of transformers, as 1d-tokenizer' "


@dataclass(frozen=True)
class Ratio:
    """A ratio of the table.

    Args:
        task: The task, such as a training step of stage 1.
        alternative: Implementation that ours is compared with.
        ratios: Our time divided by that of the alternative, of each round.
    """

    task: str
    alternative: str
    ratios: Sequence[float]

    @classmethod
    def of(cls, task: str, alternative: str, ours: Sequence[float], other: Sequence[float]) -> Ratio:
        """Returns the ratio of the seconds of both in each round."""
        return cls(task, alternative, [mine / its for mine, its in zip(ours, other, strict=True)])

    def row(self, number: int) -> dict[str, str]:
        """Returns the row of the table; ``number`` is that of the command."""
        spread = f"{min(self.ratios):.2f} to {max(self.ratios):.2f}"
        return {
            "task": self.task,
            "alternative": self.alternative,
            "ours / alternative": f"{median(self.ratios):.2f}",
            "of each round": spread,
            "command": str(number),
        }


_OURS = {"ours": "", "ours, first step cached": ", class seen before", "ours, bf16": ", bf16"}
"""Our contenders, and what they add to the task; all others are alternatives."""


def read_measured(report: Mapping[str, Any], *, task: str) -> Iterator[Ratio]:
    """Yields the ratios of a benchmark: ours and the alternatives of each group."""
    seconds = {(row["group"], row["name"]): row["seconds"] for row in report["measured"]}
    settings = report["settings"]
    for (group, name), its in seconds.items():
        for ours, addition in _OURS.items() if name not in _OURS else ():
            if (group, ours) in seconds:
                yield Ratio.of(task.format(group=group, **settings) + addition, name, seconds[group, ours], its)


def read_data(report: Mapping[str, Any]) -> Iterator[Ratio]:
    """Yields the ratios of ``data.py``, whose figures are items per second."""
    for row in (*report["images"], *report["tokens"]):
        names = list(row)
        usual = names[names.index("ours / usual") - 1]
        yield Ratio(f"data: {row['items per second and core']}", usual, [1 / row["ours / usual"]])


def read_imports(report: Mapping[str, Sequence[float]]) -> Iterator[Ratio]:
    """Yields the ratios of ``import_time.py``."""
    for name, seconds in report.items():
        if name != "import torch":
            yield Ratio.of(f"start of a process: {name}", "import torch", seconds, report["import torch"])


_DECODING = partial(read_measured, task="decoding, {group}, batch {batch_size}")
_STEP = "--threads 1 --clock cpu --repeats {repeats}"
SOURCES: Sequence[tuple[str, Callable[[Mapping[str, Any]], Iterator[Ratio]]]] = (
    (f"decode.py {_DECODE}--dtype float32 --batch-size 1", _DECODING),
    (f"decode.py {_DECODE}--dtype bfloat16 --batch-size 1", _DECODING),
    (f"decode.py {_DECODE}--dtype bfloat16 --batch-size 8", _DECODING),
    (f"stage1_step.py {_STEP}", partial(read_measured, task="training step of stage 1, {group}")),
    (f"stage2_step.py {_STEP}", partial(read_measured, task="training step of stage 2, {group}")),
    (f"tokenizer.py {_STEP}", partial(read_measured, task="tokenizer, {group}")),
    ("data.py --repeats {repeats}", read_data),
    ("import_time.py --repeats {repeats}", read_imports),
)
"""Command of each benchmark, and the reader of its JSON file."""


def measure(*, repeats: int, only: Sequence[str] = ()) -> str:
    """Runs the benchmarks one after another and returns the table and the list of the commands.

    Args:
        repeats: Rounds of each benchmark.
        only: Scripts to run, such as ``data.py``; empty for all.
    """
    rows: list[dict[str, str]] = []
    commands: list[str] = []
    for template, read in SOURCES:
        command = template.format(repeats=repeats)
        script = command.split()[0]
        if (only and script not in only) or ("bfloat16" in command and not has_bfloat16("cpu")):
            continue
        print(f"python benchmarks/{command}", flush=True)
        commands.append(f"{len(commands) + 1}. `python benchmarks/{command}`")
        rows += [ratio.row(len(commands)) for ratio in read(run_benchmark(command))]
    return "\n".join([format_table(rows), "", *commands])


def run_benchmark(command: str) -> Any:
    """Runs a benchmark in a process of its own and returns the content of its JSON file."""
    script, *words = shlex.split(command)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        subprocess.run([sys.executable, str(Path(__file__).parent / script), *words, "--json", str(file)], check=True)
        return json.loads(file.read_text())


def write_table(table: str, readme: Path = _README) -> None:
    """Replaces what stands between the two comments of the page."""
    before, rest = readme.read_text().split(_BEGIN)
    after = rest.split(_END)[1]
    machine = f"{datetime.date.today().isoformat()}, {read_cpu_name()}, 1 thread, torch {torch.__version__}:"
    readme.write_text(f"{before}{_BEGIN}\n\n{machine}\n\n{table}\n\n{_END}{after}")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and writes it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each benchmark (%(default)s)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="SCRIPT", help="print the ratios of these scripts only"
    )
    arguments = parser.parse_args(argv)
    table = measure(repeats=arguments.repeats, only=arguments.only)
    print("\n" + table)
    if not arguments.only:
        write_table(table)


if __name__ == "__main__":
    main()
