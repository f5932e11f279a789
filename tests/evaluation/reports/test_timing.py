import json
from dataclasses import replace

import pytest
import torch

from maskgit_pl.decoding import DecodingStep
from maskgit_pl.evaluation.ledger import Ledger
from maskgit_pl.evaluation.reports import timing
from maskgit_pl.evaluation.reports.timing import Timing, measure_timings
from maskgit_pl.networks.transformer import TransformerConfig
from tests.networks.backbone_cases import small_config

TINY = TransformerConfig(16, 3, (4, 4), embed_dim=16, depth=1, num_heads=2, mlp_dim=32)
METHODS = list(timing.METHODS)


@pytest.fixture(autouse=True)
def _few_runs(monkeypatch):
    monkeypatch.setattr(timing, "_MAX_RUNS", 2)


def measure(file, **how) -> list[Timing]:
    return measure_timings(Ledger(file), **how)


def test_every_method_is_timed_at_every_n_and_a_second_call_measures_nothing(tmp_path, monkeypatch):
    file, told = tmp_path / "results" / "ledger.jsonl", []
    made = measure(file, sizes=TINY, num_tokens=(16, 4), on_point=told.append)
    assert [(each.num_tokens, each.method) for each in made] == [(n, method) for n in (4, 16) for method in METHODS]
    assert sorted(told, key=made.index) == made
    assert [each.num_steps for each in made] == [4, 4, 4, 8, 16, 16]
    assert all(0 < each.least <= each.seconds and each.runs == 2 for each in made)
    assert made[0].network == "1 layers x 16, MLP 32, 2 heads, 16 codes, 3 classes"
    assert (made[0].torch, made[0].dtype, made[0].kind) == (torch.__version__, "float32", "cpu")
    monkeypatch.setattr(timing, "_build_decoders", lambda *given: pytest.fail("measured again"))
    again = []
    assert measure(file, sizes=TINY, num_tokens=(4, 16), on_point=again.append) == again == made


def test_each_point_is_written_immediately_and_a_second_call_measures_the_rest(tmp_path):
    file = tmp_path / "ledger.jsonl"

    def stop(point: Timing) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(file, sizes=TINY, num_tokens=(4,), on_point=stop)
    kept = json.loads(file.read_text())
    made = measure(file, sizes=TINY, num_tokens=(4,))
    assert [each.method for each in made] == METHODS
    assert kept["seconds_per_image"] in [each.seconds for each in made]
    other = measure(file, sizes=replace(TINY, depth=2), num_tokens=(4,))
    assert {each.network for each in other}.isdisjoint(each.network for each in made)
    assert len(file.read_text().splitlines()) == 6


def test_slow_methods_have_fewer_runs_in_turn_with_fast_ones(tmp_path, monkeypatch):
    order: list[str] = []
    costs = dict(zip(METHODS, (0.75, 4.0, 30.0), strict=True))
    monkeypatch.setattr(timing, "_MAX_RUNS", 15)
    monkeypatch.setattr(
        timing, "_build_decoders", lambda *given: {name: lambda name=name: iter([name]) for name in costs}
    )
    monkeypatch.setattr(timing, "_time_run", lambda decode, device: order.append(next(decode())) or costs[order[-1]])
    made = measure(tmp_path / "ledger.jsonl", sizes=TINY, num_tokens=(4,))
    assert [each.runs for each in made] == [13, 2, 1]
    assert order[:5] == [*METHODS, METHODS[0], METHODS[1]]


def test_all_methods_decode_whole_images_and_a_cache_changes_none():
    last: dict[str, DecodingStep] = {}
    for name, decode in timing._build_decoders(TINY, 16, torch.device("cpu")).items():
        *_, last[name] = decode()
    assert all(step.tokens.shape == (1, 16) and not step.still_masked.any() for step in last.values())
    assert torch.equal(last[METHODS[1]].tokens, last[METHODS[2]].tokens)


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["torch", "dtype", "device", "network"])
def test_a_point_of_another_machine_version_or_network_is_measured_again(tmp_path, changed):
    file = tmp_path / "ledger.jsonl"
    measure(file, sizes=TINY, num_tokens=(4,))
    rows = list(map(json.loads, file.read_text().splitlines()))
    file.write_text("".join(json.dumps({**row, changed: "another"}) + "\n" for row in rows))
    measure(file, sizes=TINY, num_tokens=(4,))
    assert len(file.read_text().splitlines()) == 6


def test_the_sizes_of_a_pretrained_transformer_are_timed(tiny_pretrained, tmp_path):
    assert timing.read_sizes(tiny_pretrained / "transformer") == TransformerConfig(
        16, 3, (4, 4), 16, 1, 2, 32, class_dropout=0.1
    )


@pytest.mark.parametrize("count", [0, -4, 2, 50])
def test_a_number_of_tokens_that_is_not_a_square_is_refused(tmp_path, count):
    with pytest.raises(ValueError, match=f"num_tokens must be squares, such as 16 or 256, got {count}"):
        measure(tmp_path / "ledger.jsonl", sizes=TINY, num_tokens=(4, count))
    assert not (tmp_path / "ledger.jsonl").exists()


def test_other_backbones_are_timed_if_they_have_a_causal_form():
    sizes = small_config("adaln", num_registers=0)
    for name, decode in timing._build_decoders(sizes, 16, torch.device("cpu")).items():
        *_, last = decode()
        assert last.tokens.shape == (1, 16), name
    others = small_config("adaln", num_registers=0, depth=3), replace(TINY, num_token_groups=2)
    assert len({timing._describe(each) for each in (TINY, sizes, *others)}) == 4


def test_a_backbone_without_a_causal_form_is_refused_before_anything_is_timed(tmp_path):
    with pytest.raises(ValueError, match="figure 4 must have a backbone with causal attention, got 'adaln'"):
        measure(tmp_path / "ledger.jsonl", sizes=small_config("adaln", num_registers=1), num_tokens=(4,))
    assert not (tmp_path / "ledger.jsonl").exists()
