import pytest

from maskgit_pl.processes import launcher_rank, local_rank


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, (3, 4)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}, (2, 8)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1)),  # a batch script: nobody has started 7 others
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2"}, (1, 2)),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8"},
            (1, 2),
        ),  # torchrun in srun
        ({"RANK": "3"}, (0, 1)),
    ],
)
def test_ranks_are_those_of_whoever_started_the_processes(environment, expected):
    assert launcher_rank(environment) == expected


@pytest.mark.parametrize(
    ("environment", "rank"), [({}, 0), ({"SLURM_LOCALID": "2"}, 2), ({"LOCAL_RANK": "1", "SLURM_LOCALID": "0"}, 1)]
)
def test_the_rank_on_a_machine_is_that_of_torchrun_or_else_of_slurm(environment, rank):
    assert local_rank(environment) == rank


def test_a_rank_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="RANK must be a whole number, got 'one'"):
        launcher_rank({"RANK": "one", "WORLD_SIZE": "2"})
