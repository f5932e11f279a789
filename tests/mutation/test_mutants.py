from pathlib import Path

import pytest

from tests.mutation.mutants import MUTANTS

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in MUTANTS}))
def test_every_mutation_fits_the_package_and_changes_valid_python_to_valid_python(file):
    source = (REPOSITORY / file).read_text()
    for mutant in MUTANTS:
        if mutant.file == file:
            assert not mutant.misfit(REPOSITORY)
            compile(mutant.applied(source), file, "exec")


def test_no_mutation_is_there_twice():
    assert len({(mutant.file, mutant.applied((REPOSITORY / mutant.file).read_text())) for mutant in MUTANTS}) == len(
        MUTANTS
    )
