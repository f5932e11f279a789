"""Benchmarks at tiny sizes: they compare the same work, count it by the formula, and print whole tables."""

import subprocess
import sys
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch

from maskgit_pl.data import ShardData, ShardDataConfig
from maskgit_pl.networks.vqgan import VQGANConfig
from tests.benchmark_scripts import BENCHMARKS, benchmark_script

STAGE_2 = {
    "batch": 3, "depth": 2, "embed_dim": 32, "mlp_dim": 64, "num_heads": 4, "grid": (4, 4), "codebook_size": 16,
    "num_classes": 3,
}  # fmt: skip
STAGE_1 = {
    "batch": 2, "image_size": 16, "base_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1,
    "num_groups": 4, "codebook_size": 16, "code_dim": 4, "discriminator": 1 / 64,
}  # fmt: skip


@pytest.fixture
def script(request):
    with benchmark_script(request.param) as module:
        yield module


def uses(name: str):
    """The script that a test gets."""
    return pytest.mark.parametrize("script", [name], indirect=True, ids=[""])


# Training steps


@uses("stage2_step")
def test_our_step_of_stage_2_and_plain_pytorch_have_equal_gradients(script):
    task, results = script.Task(**STAGE_2), []
    for name in ("ours", script.PLAIN):
        step = script.build(name, task, "fp32")
        network, gradients = step.module.transformer if name == "ours" else step.network, {}
        step.optimizer.register_step_post_hook(
            lambda *_, network=network, gradients=gradients: gradients.update(
                {key: weight.grad.clone() for key, weight in network.named_parameters()}
            )
        )
        results.append((step(), gradients))
    (our_loss, ours), (plain_loss, plain) = results
    torch.testing.assert_close(our_loss, plain_loss, rtol=1e-6, atol=1e-6)
    assert ours.keys() == plain.keys()
    for name, gradient in plain.items():
        assert gradient.norm() > 0, name
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@uses("stage2_step")
def test_the_counted_work_of_a_training_step_is_that_of_the_formula(script):
    """The formula: 6 FLOPs per weight of a linear layer and row; 3 x 4 S S D for attention."""
    task = script.Task(**STAGE_2)
    rows, masked, width = 3 * 17, int(task.mask().sum()), task.embed_dim
    assert 0 < masked < 3 * 16
    attention = 3 * 4 * 17 * 17 * width * 3 * task.depth
    projections, feed_forward = 3 * width**2, width**2 + 2 * width * task.mlp_dim
    head = width**2 + width * task.network.vocabulary_size
    block = 6 * rows * (projections + feed_forward)
    plain, ours, adaln = (script.build_contender(name, task, "fp32").work for name in (script.PLAIN, *script.NAMES[:2]))
    assert plain.flops == attention + task.depth * block + 6 * rows * head
    last = 6 * rows * projections + 6 * masked * feed_forward
    assert ours.flops == attention + (task.depth - 1) * block + last + 6 * masked * head
    assert ours.kernels > 100
    assert plain.waits == ours.waits == adaln.waits == {}


@pytest.mark.slow
@uses("stage1_step")
def test_our_step_of_stage_1_and_the_plain_one_have_equal_gradients(script):
    results = []
    for name in ("ours", "plain"):
        step, gradients = script.build(name, script.Task(**STAGE_1), "fp32"), {}
        networks = (step.module.network, step.module.discriminator) if name == "ours" else step.networks
        weights = {f"{i}.{key}": weight for i, each in enumerate(networks) for key, weight in each.named_parameters()}

        def take_gradients(optimizer, *_, weights=weights, gradients=gradients):
            """Keeps the gradients and removes them, so that the weights stay equal."""
            trained = {weight for group in optimizer.param_groups for weight in group["params"]}
            for key, weight in weights.items():
                if weight in trained and weight.grad is not None:
                    gradients[key], weight.grad = weight.grad, None

        for optimizer in step.trainer.optimizers if name == "ours" else step.optimizers:
            optimizer.register_step_pre_hook(take_gradients)
        results.append((gradients, script.count_work(step).flops))
    (ours, our_flops), (plain, plain_flops) = results
    assert ours.keys() == plain.keys()
    # A gradient that is 0 except for rounding, such as that of a key's bias, is compared to the largest one.
    scale = 1e-3 * max(gradient.norm() for gradient in plain.values())
    for key, gradient in plain.items():
        assert (ours[key] - gradient).norm() < 1e-3 * max(gradient.norm(), scale), key
    # The plain step has one more forward pass of the generator, and differentiates each loss twice.
    assert 0 < our_flops < 0.85 * plain_flops


# Decoding and tokenizers


DECODED = {**STAGE_2, "batch": 2, "mlp_dim": 96}


@pytest.mark.parametrize("backbone", ["ours", "ours, adaln"])
@uses("decode")
def test_a_class_that_was_seen_saves_one_step_of_eight(script, backbone):
    cold, seen = (
        script.build_contender(name, script.Task(**DECODED), torch.float32)
        for name in (backbone, f"{backbone}, class seen")
    )
    assert torch.equal(cold.run(), seen.run())
    assert 0.8 < seen.work.flops / cold.work.flops < 7 / 8  # later steps ask for fewer logits
    assert seen.work.kernels < cold.work.kernels
    assert cold.work.waits == seen.work.waits == {}


@uses("decode")
def test_every_decoder_returns_the_tokens_of_whole_images(script):
    task = script.Task(**DECODED)
    tokens = {name: script.build(name, task, torch.float32)() for name in script.list_available(script.NAMES)}
    for name, drawn in tokens.items():
        assert drawn.shape == (2, 16), name
        assert ((drawn >= 0) & (drawn < task.codebook_size)).all(), name
    assert torch.equal(tokens["ours"], tokens["ours, weights not packed"])


@uses("measuring")
def test_waits_are_counted(script):
    x = torch.tensor([1.0, 0.0])
    for wait in (lambda: x.sum().item(), lambda: bool(x[0] > 0), lambda: x.nonzero(), lambda: x[x > 0]):
        assert script.count_work(wait).waits == {f"tests/{Path(__file__).name}:{wait.__code__.co_firstlineno}": 1}
    assert script.count_work(lambda: x[torch.tensor([0])] + x.argsort()).waits == {}
    weight = torch.nn.Parameter(x)
    weight.grad = x
    assert script.count_work(torch.optim.AdamW([weight], foreach=False).step).waits == {}  # its counter is on the CPU


@uses("tokenizer")
def test_a_tokenizer_is_measured_in_both_halves_and_precisions(script):
    task = script.Task(**STAGE_1)
    for name in script.list_available(list(script.BUILDERS)):
        contenders = [each for precision in ("fp32", "bf16") for each in script.list_contenders(task, name, precision)]
        assert [contender.group for contender in contenders] == [
            "encode, fp32", "decode, fp32", "encode, bf16", "decode, bf16",
        ]  # fmt: skip
        assert [contender.run().shape for contender in contenders] == 2 * [(2, 64), (2, 3, 16, 16)]


@uses("precision")
def test_bfloat16_is_compared_with_float32(script, tiny_pretrained):
    rows = script.measure(tiny_pretrained, num_images=6)
    assert [(row["precision"], row["equal tokens"] == "-") for row in rows] == [("float32", True), ("bfloat16", False)]


# Data and metrics


@uses("data")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset
def test_both_loaders_see_each_image_and_each_sequence_once(script, tmp_path):
    script.write_images(tmp_path / "images", (300, 280), 5)
    assert [read(tmp_path / "images") for _, _, read in script.IMAGE_READERS] == [5] * 6
    reader = script.write_tokens(tmp_path / "tokens", 10)
    assert script.read_our_tokens(reader, 4) >= 10
    assert script.read_item_by_item(reader, 4) == 10
    contenders = script.list_contenders(tmp_path / "contenders", images=2, rows=300)
    assert [contender.items for contender in contenders[:14]] == [*[6] * 12, 512, 300]
    for contender in contenders[16:]:
        contender.run()  # the start of a run that resumes


@pytest.mark.slow
@pytest.mark.benchmarks
@uses("fidelity")
def test_every_metric_agrees_with_torch_fidelity(script, tiny_shards: Path, monkeypatch):
    # The same LAPACK routine; numpy's threads take ten times as long for it beside other work.
    monkeypatch.setattr(np.linalg, "eigvals", lambda matrix: torch.linalg.eigvals(torch.from_numpy(matrix)).numpy())
    data = ShardData(ShardDataConfig(str(tiny_shards), image_size=8, in_channels=1))
    data.setup()
    compared = script.compare(data, 20)
    assert list(compared) == ["FID", "KID", "IS", "precision", "recall"]
    for name, (ours, theirs) in compared.items():
        assert ours == pytest.approx(theirs, rel=1e-3), name
    assert compared["FID"][1] > 0


@uses("judges")
def test_the_faults_of_the_ladder_of_judges_are_what_they_are_named_after(script):
    tokens, labels = torch.arange(5)[:, None].expand(5, 8), torch.tensor([0, 1, 0, 1, 1])
    joined = script.join_halves(tokens, labels, (2, 4)).reshape(5, 2, 4)
    assert joined[0].tolist() == [[0, 0, 2, 2]] * 2
    assert joined[1].tolist() == [[1, 1, 4, 4]] * 2
    rung = script.Rung("half copied", torch.cat([tokens[:1], tokens[:1] + 9]), labels[[0, 0]])
    assert script.nearest_share(rung, tokens, labels) == 0.5
    assert script.nearest_share(rung, tokens[1:], labels[1:]) == 0  # the grid is of another image now


@uses("blind_sheet")
def test_the_counts_of_the_sheets_are_those_of_the_page(script):
    folder = BENCHMARKS.parent / "docs/decoding"
    counts = [line.split("|")[1:] for line in script.count([folder / "blind/5", folder / "blind/6"]).splitlines()[2:]]
    counted = {name.strip(): f"| {named.strip()}, {broken.strip()} |" for name, _, named, broken, *_ in counts}
    page = (folder / "README.md").read_text().partition("### Clear or varied")[2].splitlines()
    for row, source in {
        "none": "no guidance", "**`linear` 1.5**": "guidance 1.5", "`linear` 3": "guidance 3", "real images": "real"
    }.items():  # fmt: skip
        assert next(line for line in page if line.startswith(f"| {row}")).endswith(counted[source])


# Whole commands


@pytest.mark.slow
@pytest.mark.benchmarks
@uses("gpu")
def test_the_gpu_page_measures_both_stages_and_decoding(script, tmp_path, capsys, monkeypatch):
    script.main(["--device", "cpu", "--repeats", "1", "--out", str(tmp_path / "new" / "gpu.md")])
    page = (tmp_path / "new" / "gpu.md").read_text()
    assert page.strip() in capsys.readouterr().out
    assert page.count("| 1, tokenizer ") == page.count("| 2, bert ") == page.count("| 2, adaln ") == 2
    assert page.count("| bert, fp32 ") == page.count("| adaln, bf16 ") == 2
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert script.file_of(torch.device("cuda")).name == "gpu-h100-80gb-hbm3.md"
    assert script.file_of(torch.device("cpu")) is None


@pytest.mark.slow  # three processes
@pytest.mark.benchmarks
@uses("memory")
def test_the_peak_memory_of_a_command_is_that_of_its_process(script, tmp_path):
    tiny = VQGANConfig(
        3, base_channels=8, channel_multipliers=(1, 1), num_res_blocks=1, num_groups=2, codebook_size=16, code_dim=4
    )
    script.save_model(tmp_path / "model", tokenizer=tiny, image_size=16, depth=1)
    imports, sample = (script.measure_peak(words, folder=tmp_path) for words in script.list_commands("model")[:2])
    assert 0.1 < float(imports["peak, GB"]) < float(sample["peak, GB"])
    assert sample["command"].startswith("`maskgit sample model --classes 0")
    with pytest.raises(RuntimeError, match="must succeed, got exit code 2"):
        script.measure_peak(["sample", "nothing"], folder=tmp_path)


@pytest.mark.parametrize(
    ("ratios", "slower"),
    [
        ([1.02] * 9, False),  # at most 1.03
        ([0.8, *[1.05] * 8], True),  # one round does not move the interval
        ([0.8, 0.9, *[1.05] * 7], False),  # the interval contains 1
        ([0.9] * 9, False),
    ],
)
@uses("checkouts")
def test_slower_is_a_median_above_the_limit_with_an_interval_above_1(script, ratios, slower):
    assert script.is_slower(ratios) == slower
    # Binomial tables: P(second smallest < median < second largest) is 0.930 for 8 values and 0.961 for 9.
    assert script.median_interval([8, 1, 7, 2, 6, 3, 5, 4]) == (1, 8)
    assert script.median_interval([9, 1, 8, 2, 7, 3, 6, 4, 5]) == (2, 8)


@uses("checkouts")
def test_the_checkouts_take_turns_and_a_slower_task_is_exit_code_1(script, monkeypatch, capsys):
    order = []

    def run(side):
        order.append(side.name)
        return {"OLD": 1.0, "NEW": 1.1}[side.name]

    monkeypatch.setattr(script, "TASKS", {"slow": run, "even": lambda side: 1.0})
    monkeypatch.setattr(script.Side, "prepare", lambda self, tasks: None)
    folder = str(BENCHMARKS.parent)
    assert script.main([folder, folder, "--rounds", "3", "--only", "slow", "even"]) == 1
    assert order == ["OLD", "NEW", "NEW", "OLD", "OLD", "NEW"]
    assert "| 1.100     | 1.100 to 1.100 | SLOWER     |" in capsys.readouterr().out
    assert script.main([folder, folder, "--rounds", "1", "--only", "even"]) == 0


# The table of all ratios


@uses("ratios")
def test_a_ratio_is_the_median_over_the_rounds_with_its_range(script):
    seconds = {"ours": [1.0, 2.0, 3.0], "ours, class seen": [1.0] * 3, "ours, adaln": [4.0] * 3, "other": [2.0] * 3}
    rows = [{"group": "float32", "name": name, "seconds": its} for name, its in seconds.items()]
    report = {"settings": {"batch_size": 8, "depth": 24}, "measured": rows}
    (row,) = script.read_ratios(report, next(iter(script.SOURCES.values())))
    assert list(row.values()) == [
        "decoding, 24 layers, float32, batch 8", "other", "1.00 (0.50 to 1.50)", "2.00 (2.00 to 2.00)",
    ]  # fmt: skip


# Imports

INFERENCE = """
import sys
import maskgit_pl.grids, maskgit_pl.pipeline.regions
from maskgit_pl import MaskGIT, ParallelDecoder
from maskgit_pl.importers import released, tokenizers, transformers
from maskgit_pl.pipeline.bulk import generate_many
print(*{name.partition(".")[0] for name in sys.modules})
"""
OF_TRAINING = {"huggingface_hub", "lightning", "matplotlib", "tensorboard", "timm", "torchmetrics", "torchvision"}


@pytest.mark.slow
def test_inference_loads_nothing_of_training():
    done = subprocess.run([sys.executable, "-c", INFERENCE], check=True, capture_output=True, text=True)
    assert set(done.stdout.split()) & {"maskgit_pl", *OF_TRAINING} == {"maskgit_pl"}


@pytest.mark.slow
@pytest.mark.benchmarks
@uses("import_time")
def test_imports_take_little_more_than_torch_and_load_no_compiler(script):
    """torch loads its compiler and sympy for a normal draw on the meta device and for the shape of a broadcast."""
    contenders = script.list_contenders()
    measuring = sys.modules["measuring"]
    measuring.measure(contenders, repeats=3, clock=measuring.children_cpu_seconds)
    seconds, ours, sample = (median(contender.seconds) for contender in contenders)
    assert ours < 1.3 * seconds
    assert sample < 1.5 * seconds  # 1.3 on a quiet machine
    of_torch, of_ours, of_sample = (contender.run() for contender in contenders)
    packages = script.list_packages(of_ours) - script.list_packages(of_torch)
    assert packages <= {"cython_runtime", "einops", "filelock", "safetensors", "yaml"}
    assert not {"sympy", "torch._dynamo", "maskgit_pl.cli.reports"} & of_sample
