"""The commands of the pages and of ``make paper``: the scripts take them."""

import argparse
import re
import shlex
from importlib import import_module
from pathlib import Path

from maskgit_pl.cli.arguments import fill_parser, read_call
from tests.test_makefile import run_make
from tests.test_readme import PAGES, ROOT

COMMAND = re.compile(r"^ *\S*python -m paper\.(\w+)(.*)$", re.MULTILINE)


def test_the_scripts_take_the_commands_of_the_pages_and_of_make():
    texts = [(ROOT / page).read_text() for page in PAGES] + [
        run_make(target).stdout for target in ("paper", "schedule-table")
    ]
    found = [match for text in texts for match in COMMAND.findall(text.replace("\\\n", " "))]
    assert {name for name, _ in found} == {"table_1", "table_2", "table_3", "figure_2", "figure_4"}
    for name, words in found:
        function = getattr(import_module(f"paper.{name}"), name)
        parser = argparse.ArgumentParser(prog=name, exit_on_error=False)
        fill_parser(parser, function)
        call = read_call(function, vars(parser.parse_args(shlex.split(words, comments=True))))
        assert name == "table_3" or isinstance(call["report"].results, Path)


def test_the_scripts_use_public_names_only():
    for file in (ROOT / "paper").glob("*.py"):
        for module, names in re.findall(r"^from (maskgit_pl\S*) import \(?([^)]*?)(?:\)|$)", file.read_text(), re.M):
            public = getattr(import_module(module), "__all__", None)
            if public is not None:  # else a module without private names in its page of the reference
                assert set(re.findall(r"\w+", names)) <= {*public}, f"{file.name}: {module}"
