import pytest

from maskgit_pl.runs.tokenizing import _find_rank

VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NTASKS"
)  # fmt: skip


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_place_is_told_or_torchruns_or_srunss_or_alone(environment):
    assert _find_rank(None, None) == (0, 1, 0)
    environment.setenv("SLURM_PROCID", "0")
    environment.setenv("SLURM_NTASKS", "8")  # sbatch without srun: one process for all
    assert _find_rank(None, None) == (0, 1, 0)
    for name, value in (("SLURM_STEP_NUM_TASKS", "8"), ("SLURM_PROCID", "5"), ("SLURM_LOCALID", "1")):
        environment.setenv(name, value)
    assert _find_rank(None, None) == (5, 8, 1)
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "0")):
        environment.setenv(name, value)
    assert _find_rank(None, None) == (3, 4, 0)
    assert _find_rank(1, 2) == (1, 2, 1)
