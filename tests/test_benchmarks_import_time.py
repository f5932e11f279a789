"""The benchmark of the import, and what an import may load: inference needs no training."""

import json
import subprocess
import sys
from statistics import median

import pytest

from tests import forked
from tests.benchmark_scripts import benchmark_script

INFERENCE = [
    "import maskgit_pl",
    "from maskgit_pl import MaskGIT",
    "from maskgit_pl import ParallelDecoder",
    *(f"import maskgit_pl.{name}" for name in ("pipeline", "pipeline.regions", "pipeline.grids", "decoding")),
    "from maskgit_pl.importers.released import import_jax",
    "from maskgit_pl.importers.tokenizers import import_tokenizer",
    "from maskgit_pl.importers.transformers import import_transformer",
    "from maskgit_pl.pipeline.bulk import generate_many",
]
OF_TRAINING_AND_REPORTS = {
    "huggingface_hub",
    "lightning",
    "matplotlib",
    "tensorboard",
    "timm",
    "torchmetrics",
    "torchvision",
}


@pytest.fixture
def import_time():
    with benchmark_script("import_time") as script:
        yield script


LOADED = """
import json, sys
loaded = {}
for statement in json.loads(sys.argv[1]):
    exec(statement)
    loaded[statement] = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps(loaded))
"""


@pytest.mark.slow
def test_inference_loads_nothing_of_training() -> None:
    words = [sys.executable, "-c", LOADED, json.dumps(INFERENCE)]  # one process: the first that loads too much is named
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    for statement, roots in json.loads(done.stdout).items():
        assert "maskgit_pl" in roots
        assert set(roots) & OF_TRAINING_AND_REPORTS == set(), statement


@pytest.mark.slow
def test_training_loads_timm_only_for_networks_of_timm() -> None:
    done = forked.run("import sys; import maskgit_pl.runs.fitting; print('timm' in sys.modules)")
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


@pytest.mark.slow
@pytest.mark.benchmarks
def test_importing_the_pipeline_takes_little_more_than_torch(import_time) -> None:
    measured = import_time.measure(repeats=3)
    torch, ours = measured["import torch"], measured["MaskGIT"]
    assert median(ours.seconds) < 1.3 * median(torch.seconds)
    assert ours.packages - torch.packages <= {"cython_runtime", "einops", "filelock", "safetensors", "yaml"}
    assert median(measured["maskgit sample, one image"].seconds) < 1.5 * median(torch.seconds)  # 1.3 on a quiet machine


@pytest.mark.benchmarks
@pytest.mark.slow
def test_a_sample_loads_no_compiler(import_time) -> None:
    """torch loads its compiler and sympy for a normal draw on the meta device and for the shape of a broadcast."""
    measured = import_time.measure({"sample": import_time.IMPORTS["maskgit sample, one image"]}, repeats=1)
    assert "sympy" not in measured["sample"].packages
    assert "torch._dynamo" not in measured["sample"].modules
    assert "maskgit_pl.cli.sample" in measured["sample"].modules
    assert "maskgit_pl.cli.reports" not in measured["sample"].modules  # only the parser of the command is built


def test_the_table_says_what_is_loaded_beyond_the_first_import(import_time) -> None:
    measured = import_time.measure({"nothing": "pass", "ours": "import maskgit_pl.schedules, einops"}, repeats=1)
    assert measured["nothing"].own == set()
    assert {"maskgit_pl", "maskgit_pl.schedules"} <= measured["ours"].own
    assert "einops" in measured["ours"].packages - measured["nothing"].packages
    lines = import_time.format_report(measured).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
