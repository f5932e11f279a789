"""The benchmarks of stage 1 at tiny sizes: equal gradients, whole tables, and the same tokens and images."""

import pytest
import torch

from tests.benchmark_scripts import benchmark_script


@pytest.fixture(scope="module")
def scripts():
    with benchmark_script("stage1_step") as stage1_step, benchmark_script("tokenizer") as tokenizer:
        yield stage1_step, tokenizer


@pytest.fixture(scope="module")
def task(scripts):
    return scripts[0].Task(
        batch=2, image_size=16, base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, num_groups=4,
        codebook_size=16, code_dim=4, discriminator=1 / 64,
    )  # fmt: skip


@pytest.mark.slow
def test_ours_and_the_plain_step_have_the_same_gradients(scripts, task):
    difference, flops = scripts[0].compare_gradients(task, "fp32")
    assert difference < 1e-3
    # The plain step has one more forward pass of the generator, and differentiates each loss twice.
    assert 0 < flops["ours"] < 0.85 * flops["plain"]


@pytest.mark.slow
def test_a_measurement_trains_both_and_has_a_whole_row_for_each(scripts, task):
    stage1_step, _ = scripts
    flops = {(precision, name): 10 for precision in ("fp32", "bf16") for name in ("ours", "plain")}
    measured = stage1_step.measure(task, flops, memory={}, repeats=2, product_size=64)
    assert [(one.precision, one.name) for one in measured] == list(flops)
    assert measured[1].ratio(measured[1].reference) == measured[1].ratio(measured[1].reference_fp32) == 1
    table = stage1_step.format_table([one.row() for one in measured]).splitlines()
    assert len({line.count("|") for line in table}) == 1
    for name in ("ours", "plain"):
        step = stage1_step.build(name, task, "fp32")
        network = step.module.network if name == "ours" else step.network
        before = [weight.detach().clone() for weight in network.parameters()]
        step(stage1_step.Stopwatch())
        assert not all(map(torch.equal, before, network.parameters())), name


def test_tokenizers_are_measured_with_equal_tokens_and_images(scripts, task):
    _, tokenizer = scripts
    names = ["ours", "ours, channels_last", tokenizer.BFLOAT16, "plain"]
    measured = tokenizer.measure(task, names, repeats=2, product_size=64)
    assert [one.name for one in measured] == names
    assert measured[0].ratios == {"encode": 1, "decode": 1}
    assert measured[0].flops == measured[3].flops
    ours, plain = tokenizer.build(task, ["ours", "plain"]).values()
    images = tokenizer.to_unit_range(task.data().content)
    tokens = ours.encode(images)
    assert torch.equal(plain.encode(images), tokens)
    torch.testing.assert_close(plain.decode(tokens), ours.decode(tokens))
