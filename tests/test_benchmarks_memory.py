"""The benchmark of memory with tiny networks: each command runs in a process of its own, and the table is whole."""

import pytest

from maskgit_pl.networks.vqgan import VQGANConfig
from tests.benchmark_scripts import benchmark_script

TINY = VQGANConfig(
    3, base_channels=8, channel_multipliers=(1, 1), num_res_blocks=1, num_groups=2, codebook_size=16, code_dim=4
)


@pytest.fixture
def memory():
    with benchmark_script("memory") as script:
        yield script


@pytest.mark.slow  # three processes
@pytest.mark.benchmarks
def test_peaks_are_those_of_each_process(memory, tmp_path):
    memory.save_model(tmp_path / "model", tokenizer=TINY, image_size=16, depth=1)
    imports, sample = (measure(memory, words, tmp_path) for words in ([], memory.list_commands("model")[1]))
    assert 1e8 < imports.resident < sample.resident
    assert sample.row()["command"].startswith("`maskgit sample model --classes 0")
    assert (tmp_path / "sampled.png").exists()
    with pytest.raises(RuntimeError, match="must succeed, got exit code 2"):
        measure(memory, ["sample", "nothing"], tmp_path)


def measure(memory, words, folder):
    return memory.measure_peak(words, folder=folder)
