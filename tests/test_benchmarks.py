"""Benchmarks at tiny sizes: they compare the same work, count it by the formula, and print whole tables."""

import json
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch

from maskgit_pl.data import ShardData, ShardDataConfig
from maskgit_pl.networks.vqgan import VQGANConfig
from tests import forked
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


def assert_whole(table: str, num_rows: int) -> None:
    lines = table.splitlines()
    assert len(lines) == 2 + num_rows
    assert len({line.count("|") for line in lines}) == len({len(line) for line in lines}) == 1


# Training steps


@uses("stage2_step")
def test_our_step_of_stage_2_and_the_naive_one_have_equal_gradients(script):
    task, results = script.Task(**STAGE_2), []
    for name in ("ours", "naive"):
        step = script.build(name, task, "fp32")
        network, gradients = step.module.transformer if name == "ours" else step.network, {}
        step.optimizer.register_step_post_hook(
            lambda *_, network=network, gradients=gradients: gradients.update(
                {key: weight.grad.clone() for key, weight in network.named_parameters()}
            )
        )
        results.append((step(), gradients))
    (our_loss, ours), (naive_loss, naive) = results
    torch.testing.assert_close(our_loss, naive_loss, rtol=1e-6, atol=1e-6)
    ours = script.rename_weights(ours)
    assert ours.keys() == naive.keys()
    for name, gradient in naive.items():
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
    naive, ours = (script.build_contender(name, task, "fp32").work for name in ("naive", "ours"))
    assert naive.flops == attention + task.depth * block + 6 * rows * head
    last = 6 * rows * projections + 6 * masked * feed_forward
    assert ours.flops == attention + (task.depth - 1) * block + last + 6 * masked * head
    assert ours.kernels > 100
    assert (ours.syncs, naive.syncs > 0) == (0, True)


@pytest.mark.slow
@uses("stage1_step")
def test_our_step_of_stage_1_and_the_plain_one_have_equal_gradients(script):
    task = script.Task(**STAGE_1)
    assert script.compare_gradients(task, "fp32") < 1e-3
    steps = {name: script.build(name, task, "fp32") for name in ("ours", "plain")}
    flops = {name: script.count_work(step).flops for name, step in steps.items()}
    # The plain step has one more forward pass of the generator, and differentiates each loss twice.
    assert 0 < flops["ours"] < 0.85 * flops["plain"]


@pytest.mark.slow
@uses("stage2_step")
def test_contenders_are_timed_in_turn_and_compared_with_ours(script):
    contenders = [script.build_contender(name, script.Task(**STAGE_2), "fp32", 10**9) for name in ("ours", "naive")]
    measured = script.measure(contenders, repeats=3, product_size=64)
    rows = [one.row() for one in measured]
    assert [row["name"] for row in rows] == ["ours", "naive"]
    assert (rows[0]["time / ours"], rows[0]["memory GB"]) == ("1.00", "1.00")
    assert [len(one.seconds) for one in measured] == [3, 3]
    assert measured[1].ours == measured[0].seconds


@pytest.mark.slow
@uses("measuring")
def test_peak_memory_is_that_of_the_function(script):
    peak = script.run_in_fresh_process(script.measure_peak_memory, partial(torch.ones, 50_000_000))
    assert peak is None or 150e6 < peak < 260e6  # the system may take pages of libraries back in the meantime


# Decoding and tokenizers


@pytest.fixture
def decoders(script):
    task = script.Task(**{**STAGE_2, "batch": 2, "mlp_dim": 96})
    builders = script.list_contenders(task)
    return task, lambda name: script.build_contender(name, builders[name](), torch.float32)


@uses("decode")
def test_a_class_that_was_seen_saves_one_step_of_eight(decoders):
    _, build = decoders
    names = ("ours", "ours, first step cached", "ours, weights not packed")
    cold, seen, unpacked = (build(name) for name in names)
    assert torch.equal(cold.run(), seen.run())
    assert torch.equal(cold.run(), unpacked.run())
    assert 0.8 < seen.work.flops / cold.work.flops < 7 / 8  # later steps ask for fewer logits
    assert seen.work.kernels < cold.work.kernels
    assert cold.work.flops == unpacked.work.flops
    assert cold.work.syncs == seen.work.syncs == 0
    linear, products = (build(f"only {part} of ours") for part in ("the linear layers", "linear layers and attention"))
    assert 0.8 < linear.work.flops / cold.work.flops < 1.1  # it computes all rows of the last block
    assert 0.8 < linear.work.flops / products.work.flops < 1


@pytest.mark.slow
@uses("decode")
def test_every_decoder_returns_the_tokens_of_whole_images(script, decoders):
    task, build = decoders
    for name in script.list_installed(list(script.list_contenders(task))):
        tokens = build(name).run()
        assert tokens.shape == (2, 16), name
        assert ((tokens >= 0) & (tokens < task.network.vocabulary_size)).all(), name


@uses("measuring")
def test_waits_are_counted(script):
    x = torch.tensor([1.0, 0.0])
    for wait in (lambda: x.sum().item(), lambda: bool(x[0] > 0), lambda: x.nonzero(), lambda: x[x > 0]):
        assert script.count_work(wait).syncs == 1
    assert script.count_work(lambda: x[torch.tensor([0])] + x.argsort()).syncs == 0


@uses("tokenizer")
def test_our_tokenizer_and_the_plain_one_give_equal_tokens_and_images(script):
    task = script.Task(**STAGE_1)
    ours, plain = script.build(task, ["ours", "plain"]).values()
    images = script.to_unit_range(task.data().content)
    tokens = ours.encode(images)
    assert torch.equal(plain.encode(images), tokens)
    torch.testing.assert_close(plain.decode(tokens), ours.decode(tokens))
    contenders = script.list_contenders(task, ["ours", script.BFLOAT16, "plain"])
    assert [contender.group for contender in contenders] == ["encode", "decode"] * 3


@uses("precision")
def test_each_precision_is_compared_with_float32_of_its_method(script, tiny_pretrained):
    rows = script.measure(tiny_pretrained, num_images=6)
    assert [(row["draw method"], row["precision"]) for row in rows] == [
        (method, name) for method in ("gumbel", "inverse_cdf") for name in ("float32", "bfloat16")
    ]
    assert [row["equal tokens"] == "-" for row in rows] == [True, False, True, False]


# Data and metrics


@uses("data")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset
def test_both_loaders_see_each_image_and_each_sequence_once(script, tmp_path, capsys, monkeypatch):
    script.write_images(tmp_path / "images", (300, 280), 5)
    assert script.read_our_images(tmp_path / "images") == script.read_webdataset_images(tmp_path / "images") == 5
    reader = script.write_tokens(tmp_path / "tokens", 10)
    assert script.read_our_tokens(reader, 4) >= 10
    assert script.read_item_by_item(reader, 4) == 10
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of the process that runs the tests
    script.main(["--images", "2", "--rows", "300", "--repeats", "1", "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert all(row["ours / usual"] > 0 for row in figures["images"] + figures["tokens"])
    assert figures["start"]["late / early"] > 0
    assert capsys.readouterr().out.count("|--") == 3 * 4  # columns of three tables


@pytest.mark.slow
@pytest.mark.benchmarks
@uses("fidelity")
def test_every_metric_agrees_with_torch_fidelity(script, tiny_shards: Path, monkeypatch):
    # The same LAPACK routine; numpy's threads take ten times as long for it beside other work.
    monkeypatch.setattr(np.linalg, "eigvals", lambda matrix: torch.linalg.eigvals(torch.from_numpy(matrix)).numpy())
    data = ShardData(ShardDataConfig(str(tiny_shards), image_size=8, in_channels=1))
    data.setup()
    compared = script.compare(data, 20, None)
    assert list(compared) == ["FID", "KID", "IS", "precision", "recall"]
    for name, (ours, theirs) in compared.items():
        assert ours == pytest.approx(theirs, rel=1e-3), name
    assert compared["FID"][1] > 0


# Whole commands


@pytest.mark.slow
@pytest.mark.benchmarks
@uses("gpu")
def test_the_gpu_page_measures_both_stages_and_decoding(script, tmp_path, capsys, monkeypatch):
    script.main(["--device", "cpu", "--repeats", "1", "--out", str(tmp_path / "new" / "gpu.md")])
    page = (tmp_path / "new" / "gpu.md").read_text()
    assert page.strip() in capsys.readouterr().out
    assert page.count("| 1, tokenizer ") == page.count("| 2, transformer ") == 2
    assert page.count("| ours, fp32 ") == page.count("| ours, bf16 ") == 2
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


@pytest.mark.slow
@uses("ratios")
def test_each_command_of_the_table_has_flags_and_contenders_of_its_script(script):
    shared = (BENCHMARKS / "measuring.py").read_text()
    for template, _ in script.SOURCES:
        name, *words = shlex.split(template.format(repeats=3))
        source = (BENCHMARKS / name).read_text() + shared
        for flag in (word for word in [*words, "--json"] if word.startswith("--")):
            size = flag[2:].replace("-", "_")
            assert re.search(rf'"{flag}"|"{size}"|\b{size}=', source), f"{name} {flag}"
    with benchmark_script("decode") as decode:
        names = list(decode.list_contenders(decode.Task(batch=1, depth=1), torch.bfloat16))
    words = shlex.split(script.SOURCES[0][0])
    assert set(words[words.index("--only") + 1 : words.index("--dtype")]) <= set(names)


@uses("ratios")
def test_a_ratio_is_the_median_over_the_rounds_with_its_range(script):
    seconds = {"ours": [1.0, 2.0, 3.0], "ours, first step cached": [1.0] * 3, "other": [2.0] * 3}
    rows = [{"group": "float32", "name": name, "seconds": its} for name, its in seconds.items()]
    report = {"settings": {"batch_size": 8}, "measured": rows}
    cold, seen = script.SOURCES[0][1](report)
    assert list(cold.row(4).values()) == ["decoding, float32, batch 8", "other", "1.00", "0.50 to 1.50", "4"]
    assert seen.task == "decoding, float32, batch 8, class seen before"


@uses("ratios")
def test_the_table_replaces_the_old_one_and_the_page_stays(script, tmp_path):
    page = tmp_path / "README.md"
    before = (BENCHMARKS / "README.md").read_text()
    page.write_text(before)
    for table in ("| a |\n|---|", "| b |\n|---|"):
        script.write_table(table, page)
    after = page.read_text()
    assert ("| a |" in after, "| b |" in after) == (False, True)
    cut = re.compile(f"(?s){re.escape(script._BEGIN)}.*{re.escape(script._END)}")
    assert cut.sub("", after) == cut.sub("", before)


# Imports

INFERENCE = [
    "import maskgit_pl",
    "from maskgit_pl import MaskGIT, ParallelDecoder",
    *(f"import maskgit_pl.{name}" for name in ("pipeline", "pipeline.regions", "pipeline.grids", "decoding")),
    "from maskgit_pl.importers.released import import_jax",
    "from maskgit_pl.importers.tokenizers import import_tokenizer",
    "from maskgit_pl.importers.transformers import import_transformer",
    "from maskgit_pl.pipeline.bulk import generate_many",
]
OF_TRAINING = {"huggingface_hub", "lightning", "matplotlib", "tensorboard", "timm", "torchmetrics", "torchvision"}
LOADED = """
import json, sys
loaded = {}
for statement in json.loads(sys.argv[1]):
    exec(statement)
    loaded[statement] = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps(loaded))
"""


@pytest.mark.slow
def test_inference_loads_nothing_of_training():
    words = [sys.executable, "-c", LOADED, json.dumps(INFERENCE)]  # one process: the first that loads too much is named
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    for statement, roots in json.loads(done.stdout).items():
        assert "maskgit_pl" in roots
        assert set(roots) & OF_TRAINING == set(), statement


@pytest.mark.slow
def test_training_loads_timm_only_for_networks_of_timm():
    done = forked.run("import sys; import maskgit_pl.runs.fitting; print('timm' in sys.modules)")
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


@pytest.mark.slow
@pytest.mark.benchmarks
@uses("import_time")
def test_imports_take_little_more_than_torch_and_load_no_compiler(script):
    """torch loads its compiler and sympy for a normal draw on the meta device and for the shape of a broadcast."""
    measured = script.measure(repeats=3)
    ours, sample = measured["MaskGIT"], measured["maskgit sample, one image"]
    seconds = median(measured["import torch"].seconds)
    assert median(ours.seconds) < 1.3 * seconds
    assert median(sample.seconds) < 1.5 * seconds  # 1.3 on a quiet machine
    further = ours.packages - measured["import torch"].packages
    assert further <= {"cython_runtime", "einops", "filelock", "safetensors", "yaml"}
    assert "sympy" not in sample.packages
    assert not {"torch._dynamo", "maskgit_pl.cli.reports"} & sample.modules
    assert_whole(script.format_report(measured), 3)
