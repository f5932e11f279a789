"""The comparison with torch-fidelity on a few images: every number agrees."""

from pathlib import Path

import numpy as np
import pytest
import torch

from maskgit_pl.data import ShardData, ShardDataConfig
from tests.benchmark_scripts import benchmark_script


@pytest.fixture
def fidelity():
    with benchmark_script("fidelity") as script:
        yield script


@pytest.mark.slow
@pytest.mark.benchmarks
def test_all_of_it_is_torch_fidelity_s_from_the_images_on(fidelity, tiny_shards: Path, monkeypatch) -> None:
    # The same LAPACK routine; numpy's threads take ten times as long for it beside other work.
    monkeypatch.setattr(np.linalg, "eigvals", lambda matrix: torch.linalg.eigvals(torch.from_numpy(matrix)).numpy())
    data = ShardData(ShardDataConfig(str(tiny_shards), image_size=8, in_channels=1))
    data.setup()
    compared, seconds = fidelity.compare(data, 20, None)
    assert [one.name for one in compared] == ["FID", "KID", "IS", "precision", "recall"]
    for one in compared:
        assert one.difference < 1e-3, one
    assert compared[0].theirs > 0
    assert min(seconds.values()) > 0
