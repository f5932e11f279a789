"""The benchmark of a GPU, at small sizes on a CPU: both tables are whole, and a CPU's figures are not kept."""

import pytest
import torch

from tests.benchmark_scripts import benchmark_script


@pytest.fixture
def gpu():
    with benchmark_script("gpu") as script:
        yield script


@pytest.mark.slow
@pytest.mark.benchmarks
def test_both_stages_and_decoding_are_measured(gpu, tmp_path, capsys):
    gpu.main(["--device", "cpu", "--repeats", "1", "--out", str(tmp_path / "new" / "gpu.md")])
    page = (tmp_path / "new" / "gpu.md").read_text()
    assert page.strip() in capsys.readouterr().out
    assert page.count("| 1, tokenizer ") == page.count("| 2, transformer ") == 2
    assert page.count("| ours, fp32 ") == page.count("| ours, bf16 ") == 2
    assert "only show that the script runs" in page


def test_a_cpu_has_no_page_of_results(gpu):
    assert gpu.file_of(torch.device("cpu")) is None


def test_a_page_is_named_after_the_card(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert gpu.file_of(torch.device("cuda")).name == "gpu-h100-80gb-hbm3.md"


def test_the_utilization_is_that_of_the_listed_peak(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    measure = gpu.Measurement(torch.device("cuda"), 1)
    assert measure.utilization(989e12 / 2, 1.0, "bf16") == "50.0"
    assert gpu.Measurement(torch.device("cpu"), 1).utilization(1e12, 1.0, "bf16") == "-"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--repeats", "0"], "--repeats must be an integer >= 1, got 0"),
        pytest.param(
            ["--device", "cuda"], "torch finds no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(gpu, words, text, capsys):
    with pytest.raises(SystemExit):
        gpu.main(words)
    assert text in capsys.readouterr().err
