"""The decoding benchmark at a tiny size: it runs, its table is whole, and it counts what it says."""

import dataclasses
import importlib.util
import json

import pytest
import torch

from maskgit_pl.distributed import has_bfloat16
from tests.benchmark_scripts import benchmark_script

EXACT = ["ours", "ours, first step cached", "ours, weights not packed"]
LINEAR, PRODUCTS = "only the linear layers of ours", "only linear layers and attention of ours"
AUTOREGRESSIVE = ["autoregressive, KV cache", "autoregressive, no cache"]


@pytest.fixture(scope="module")
def decode():
    with benchmark_script("decode") as script:
        yield script


@pytest.fixture(scope="module")
def task(decode):
    return decode.Task(
        batch=2, depth=2, embed_dim=32, mlp_dim=96, num_heads=4, grid=(4, 4), codebook_size=16, num_classes=3
    )


@pytest.fixture(scope="module")
def measured(decode, task):
    names = [
        *EXACT,
        "ours, guided",
        LINEAR,
        PRODUCTS,
        "encoder layers of torch, as dome272",
        *AUTOREGRESSIVE,
    ]
    return {one.name: one for one in decode.measure(task, names, repeats=2, autoregressive_repeats=1, product_size=64)}


@pytest.mark.slow
def test_a_measurement_has_a_whole_row_for_each_contender(decode, measured):
    for name, one in measured.items():
        assert len(one.seconds) == (1 if name in AUTOREGRESSIVE else 2)
        assert one.kernels > 0
        assert json.loads(json.dumps(dataclasses.asdict(one)))["peak"] > 0
    assert measured["ours"].ratio == 1
    table = decode.format_table([one.row() for one in measured.values()]).splitlines()
    assert len(table) == 2 + len(measured)
    assert len({line.count("|") for line in table}) == 1


@pytest.mark.slow
def test_exact_decoders_give_the_same_tokens_and_wait_for_nothing(measured):
    for name in EXACT:
        assert measured[name].same == 1
        assert measured[name].syncs == 0
    assert measured["ours, guided"].same is None


def test_a_class_that_was_seen_saves_one_step_of_eight(measured):
    cold, seen, unpacked = (measured[name] for name in EXACT)
    assert 0.8 < seen.flops / cold.flops < 7 / 8  # later steps ask for fewer logits
    assert seen.kernels < cold.kernels
    assert cold.flops == unpacked.flops
    assert 0.8 < measured[LINEAR].flops / cold.flops < 1.1  # it computes all rows of the last block
    assert 0.8 < measured[LINEAR].flops / measured[PRODUCTS].flops < 1


def test_the_counted_work_is_that_of_the_formula(decode, task):
    """The formula: 2 FLOPs per weight of a linear layer and row; 4 S S D for attention."""
    width, rows = task.embed_dim, task.batch * 17
    layer = 2 * rows * (4 * width**2 + 2 * width * task.mlp_dim) + 4 * 17 * rows * width
    network = decode.MaskedTransformer(decode.build_network_config(task)).eval()
    tokens, labels = torch.zeros(2, 16, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    made = decode.count_work(lambda: network(tokens, labels))
    last = 2 * task.batch * 16 * (width**2 + width * task.codebook_size)
    assert made.flops == task.depth * layer + last
    assert (made.syncs, made.tokens.shape) == (0, (2, 16, 16))


def test_the_profile_names_the_slowest_operations(decode, task):
    lines = decode.profile_ours(task, torch.float32, most=3).splitlines()
    shares = [float(line.split("|")[3]) for line in lines[2:]]
    assert len(shares) == 3
    assert 100 >= sum(shares) > 10
    assert shares == sorted(shares, reverse=True)


def test_waits_are_counted(decode):
    x = torch.tensor([1.0, 0.0])
    for wait in (lambda: x.sum().item(), lambda: bool(x[0] > 0), lambda: x.nonzero(), lambda: x[x > 0]):
        assert decode.count_work(wait).syncs == 1
    assert decode.count_work(lambda: x[torch.tensor([0])] + x.argsort()).syncs == 0


@pytest.mark.slow
def test_the_autoregressive_decoders_compute_the_same_and_are_counted_as_if_they_had_run(decode, task):
    torch.manual_seed(0)
    network = decode.make_autoregressive(decode.MaskedTransformer(decode.build_network_config(task)))
    tokens, runs = [], []
    for cache in (True, False):
        run = decode.Autoregressive(network, task, cache=cache)
        tokens.append(run())
        whole, counted = decode.count_work(run), decode.count_autoregressive_work(run)
        assert counted.flops == whole.flops
        assert counted.kernels == whole.kernels
        assert counted.syncs == whole.syncs == 0
        runs.append(whole)
    assert tokens[0].shape == (2, 16)
    assert torch.equal(*tokens)
    assert runs[0].flops < 0.2 * runs[1].flops


@pytest.mark.parametrize(
    "name",
    [
        "muse-maskgit-pytorch",
        "diffusers aMUSEd",
        "BertModel of transformers, as 1d-tokenizer",
        "encoder layers of torch, as dome272",
    ],
)
@pytest.mark.slow  # the imports
@pytest.mark.benchmarks
@pytest.mark.filterwarnings("ignore")  # of other projects
def test_a_peer_decodes_whole_images(decode, task, name):
    if decode.filter_installed([name]) == []:
        pytest.skip(f"{name} is an extra")
    made = decode.count_work(decode.list_contenders(task)[name]())
    assert made.tokens.shape == (2, 16)
    assert ((made.tokens >= 0) & (made.tokens < decode.build_network_config(task).vocabulary_size)).all()


def test_contenders_are_chosen_by_name_and_ours_is_always_there(decode, capsys, monkeypatch):
    names = ["ours", "ours, guided", "autoregressive, KV cache", "muse-maskgit-pytorch"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert decode.choose_contenders(None, names) == ["ours", "ours, guided", "autoregressive, KV cache"]
    assert "muse-maskgit-pytorch is not installed" in capsys.readouterr().out
    assert decode.choose_contenders(["ours, guided"], names) == ["ours", "ours, guided"]


@pytest.mark.slow
@pytest.mark.skipif(not has_bfloat16("cpu"), reason="this CPU multiplies bfloat16 in software")
def test_bfloat16_is_measured_for_all_that_run_in_it(decode, task):
    names = [name for name in decode.list_contenders(task, torch.bfloat16) if "ours" in name]
    made = decode.measure(task, names, repeats=1, dtype=torch.bfloat16, product_size=64)
    assert all(one.flops > 0 for one in made)
    assert made[0].same == 1
