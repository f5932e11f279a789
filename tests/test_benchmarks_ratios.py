"""The table of all ratios: its commands can run, and the page keeps everything around the table."""

import re
import shlex

import pytest
import torch

from tests.benchmark_scripts import BENCHMARKS, benchmark_script


@pytest.fixture
def ratios():
    with benchmark_script("ratios") as script:
        yield script


@pytest.mark.slow
def test_each_command_names_a_script_its_flags_and_its_contenders(ratios):
    for template, _ in ratios.SOURCES:
        script, *words = shlex.split(template.format(repeats=3))
        source = (BENCHMARKS / script).read_text()
        assert all(f'"{word}"' in source for word in [*words, "--json"] if word.startswith("--")), script
    with benchmark_script("decode") as decode:
        names = list(decode.list_contenders(decode.Task(batch=1, depth=1), torch.bfloat16))
    words = shlex.split(ratios.SOURCES[0][0])
    assert set(words[words.index("--only") + 1 : words.index("--dtype")]) <= set(names)


def test_a_ratio_is_the_median_over_the_rounds_with_its_range(ratios):
    row = ratios.Ratio.of("task", "other", [1.0, 2.0, 3.0], [2.0, 2.0, 2.0]).row(4)
    assert list(row.values()) == ["task", "other", "1.00", "0.50 to 1.50", "4"]


def test_the_table_replaces_the_old_one_and_the_page_stays(ratios, tmp_path):
    page = tmp_path / "README.md"
    page.write_text((BENCHMARKS / "README.md").read_text())
    before = page.read_text()
    for table in ("| a |\n|---|", "| b |\n|---|"):
        ratios.write_table(table, page)
    after = page.read_text()
    assert "| b |" in after
    assert "| a |" not in after
    cut = re.compile(f"(?s){re.escape(ratios._BEGIN)}.*{re.escape(ratios._END)}")
    assert cut.sub("", after) == cut.sub("", before)


@pytest.mark.slow  # a benchmark with six fresh interpreters
@pytest.mark.benchmarks
def test_the_ratios_of_a_benchmark_are_printed(ratios, capfd):
    ratios.main(["--only", "import_time.py", "--repeats", "1"])
    printed = capfd.readouterr().out
    assert re.search(r"\| start of a process: MaskGIT +\| import torch +\| 1\.\d\d ", printed)
    assert "1. `python benchmarks/import_time.py --repeats 1`" in printed
