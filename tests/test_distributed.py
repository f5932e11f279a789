"""Two processes on one machine give the results of one process.

docs/resume.md lists what was measured.
"""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maskgit_pl.pretrained.networks import load_tokenizer
from maskgit_pl.training import health
from maskgit_pl.training.checkpoints import FolderCheckpointIO, newest_checkpoint
from tests.conftest import flags
from tests.observing import Runs, Seen, StageRuns, Topology, run_on_ranks

pytestmark = [pytest.mark.slow, pytest.mark.survival]

TINY = Path(__file__).parent / "tiny"
STEPS = 6
EXACT = "--trainer.precision=32-true"


@pytest.mark.parametrize("kind", ["autoregressive", "distillation"])
def test_ranks_train_the_other_kinds_of_stage_2_like_one_process(kind, tiny_shards, tiny_pretrained, tmp_path):
    tiny = yaml.safe_load((TINY / "transformer.yaml").read_text())
    tiny["trainer"] |= {"max_steps": STEPS, "val_check_interval": STEPS}
    del tiny["model"]["decoding"]  # of a masked model
    words = ["train", "transformer", f"--data={tiny_shards}", f"--tokenizer={tiny_pretrained / 'tokenizer'}", EXACT]
    if kind == "distillation":
        del tiny["model"]["network"]  # that of the teacher
        words += ["--recipe=distill-dimo", f"--pretrained={tiny_pretrained}", "--model.decoding.num_steps=3"]
    else:
        words += ["--recipe=autoregressive"]
    words += [f"--runs-folder={tmp_path}", *flags(tiny)]
    states, pictures = {}, {}
    for cluster, ranks in (("single", 1), ("ddp", 2), ("fsdp", 2)):
        run_on_ranks([*words, f"--run={cluster}", f"--cluster={cluster}", f"--trainer.devices={ranks}"], ranks)
        folder = tmp_path / cluster / "transformer"
        states[cluster] = FolderCheckpointIO().load_checkpoint(newest_checkpoint(folder / "checkpoints"))["state_dict"]
        pictures[cluster] = (folder / "samples.png").read_bytes()
        assert (tmp_path / cluster / "pretrained" / "transformer" / "model.safetensors").is_file()
    for cluster in ("ddp", "fsdp"):
        assert max(apart(states["single"], states[cluster]).values()) < NEAR
        assert pictures["single"] == pictures[cluster]


# Over 50 steps, with kills and other ranks in between.

LONG, GLOBAL_BATCH, KILL_AT = 50, 12, 23
NEAR = 1e-5
WHOLE = Topology()
STRAIGHT = {
    "2 ranks of DDP": Topology(ranks=2),
    "2 ranks of FSDP2": Topology(ranks=2, cluster="fsdp"),
    "2 ranks of FSDP2, accumulating 2": Topology(ranks=2, accumulation=2, cluster="fsdp"),
}
DDP, FSDP = STRAIGHT["2 ranks of DDP"], STRAIGHT["2 ranks of FSDP2"]
MOVES = {
    "DDP, FSDP2, DDP": (DDP, FSDP, DDP),
    "FSDP2, 1 process, FSDP2 accumulating 2": (FSDP, WHOLE, STRAIGHT["2 ranks of FSDP2, accumulating 2"]),
}
# Of the micro-batch, and so of the ranks: the adaptive weight and LeCam's averages of logits.
SMALL = "discriminator: {name: stylegan, channel_multiplier: 0.015625}"
ADVERSARIAL = f"--model.adversarial={{{SMALL}, start_step: 3, r1_every: 2}}"


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> StageRuns:
    """Runs of both stages in float32 and without dropout."""
    words = [f"--trainer.max_steps={LONG}", f"--trainer.val_check_interval={LONG}", "--checkpoint_every=10", EXACT]
    words += ["--keep_last=9", "--model.flip_probability=0.5"]
    more = {"tokenizer": [ADVERSARIAL, "--model.gradient_clip=1.0"], "transformer": ["--model.network.dropout=0"]}
    return StageRuns(tmp_path_factory.mktemp("distributed"), words, more, GLOBAL_BATCH)


def losses_apart(bench: StageRuns, seen: Seen) -> float:
    """Returns the largest relative difference of a loss from that of one process (stage 2), over all steps."""
    expected = dict(bench.straight("transformer", WHOLE).step_losses(GLOBAL_BATCH))
    losses = seen.step_losses(GLOBAL_BATCH)
    assert {step for step, _ in losses} == set(expected) == set(range(LONG))
    return max(abs(loss / expected[step] - 1) for step, loss in losses)


def apart(state: dict, other: dict) -> dict[str, float]:
    """Returns the largest difference of each tensor of weights, averages and buffers."""
    assert state.keys() == other.keys()
    return {name: float((value.double() - other[name].double()).abs().max()) for name, value in state.items()}


def near_to_one_process(bench: StageRuns, name: str) -> None:
    """Asserts that a run equals that of one process."""
    one, seen = bench.straight("transformer", WHOLE), bench.runs["transformer"].seen(name)
    assert seen.rows() == one.rows()
    losses, weights = losses_apart(bench, seen), max(apart(one.state["state_dict"], seen.state["state_dict"]).values())
    assert max(losses, weights) < NEAR


@pytest.mark.parametrize("where", STRAIGHT)
def test_ranks_train_like_one_process_over_50_steps_with_a_kill(bench, where):
    runs, topology, name = bench.runs["transformer"], STRAIGHT[where], f"straight{list(STRAIGHT).index(where)}"
    runs.leg(name, topology, kill_at=KILL_AT)
    runs.leg(name, topology)
    near_to_one_process(bench, name)


@pytest.mark.parametrize("where", MOVES)
def test_a_run_that_changes_ranks_and_strategy_trains_like_one_process(bench, where):
    runs, name = bench.runs["transformer"], f"moves{list(MOVES).index(where)}"
    for topology, kill_at in zip(MOVES[where], (14, 33, None), strict=True):
        runs.leg(name, topology, kill_at=kill_at)
    near_to_one_process(bench, name)


def test_ranks_train_the_tokenizer_of_one_process_over_10_steps(bench):
    one = bench.straight("tokenizer", WHOLE)
    bench.runs["tokenizer"].leg("ddp", DDP)
    assert bench.runs["tokenizer"].seen("ddp").rows() == one.rows()
    for step in range(10, LONG + 1, 10):
        folders = (bench.runs["tokenizer"].folder / f"{name}/tokenizer/checkpoints" for name in ("straight-0", "ddp"))
        read = FolderCheckpointIO().load_checkpoint
        states = (read(folder / f"step-{step:08d}")["state_dict"] for folder in folders)
        found = apart(*states)
        assert any("discriminator" in name for name in found)
        sums = max(value for name, value in found.items() if ".quantizer." in name and ".codebook" not in name)
        weights = max(value for name, value in found.items() if ".quantizer." not in name or ".codebook" in name)
        assert step > 10 or max(weights, sums) < NEAR


MIXED = "--trainer.precision=bf16-mixed"


def test_the_loss_under_fsdp_falls_in_mixed_precision(bench):
    bench.runs["transformer"].leg("mixed", FSDP, MIXED)
    seen = bench.runs["transformer"].seen("mixed")
    assert 0 < losses_apart(bench, seen) < 0.01
    losses = [loss for _, loss in sorted(seen.step_losses(GLOBAL_BATCH))]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert {value.dtype for value in seen.state["state_dict"].values()} == {torch.float32}


def without_inductor() -> None:
    """Replaces the inductor's compiler, which takes minutes on two cores, by the traced graph."""
    torch.compile = partial(torch.compile, backend="aot_eager")


def test_a_compiled_run_under_fsdp_resumes_without_compilation(bench):
    runs = bench.runs["transformer"]
    runs.leg("compiled", FSDP, "--model.compiled=blocks", kill_at=KILL_AT, prepare=without_inductor)
    runs.leg("compiled", WHOLE)
    near_to_one_process(bench, "compiled")


# The health of a tokenizer, and its frozen parts.

TOPOLOGIES = {"1 process": Topology(), "2 ranks": Topology(ranks=2), "accumulating": Topology(ranks=2, accumulation=3)}
COUNTED = ("codebook_usage", "perplexity", "dead_codes")
# The entropy of a micro-batch would train another network with accumulation, and restarts make codes that are equal.
QUANTIZER = '--model.network.quantizer={"name": "gradient", "entropy_weight": 0}'


def alarming():
    """Any unused code is an alarm, from the second measurement on."""
    health.LEAST_USAGE, health.LEAST_PERPLEXITY, health.PATIENCE, health.DEAD_AFTER = 1.0, 1.0, 2, 1
    health.GRACE = (0, 0)


@pytest.fixture(scope="module")
def fine_tunings(tiny_shards, tiny_pretrained, tmp_path_factory):
    """Runs of the tiny recipe that fine-tune a pretrained tokenizer."""
    tiny = yaml.safe_load((TINY / "tokenizer.yaml").read_text())
    del tiny["model"]["network"]  # its sizes are those of the pretrained tokenizer
    tiny["data"] |= {"global_batch": GLOBAL_BATCH}
    tiny["trainer"] |= {"max_steps": STEPS, "val_check_interval": STEPS}
    words = ["tokenizer", f"--data={tiny_shards}", f"--pretrained={tiny_pretrained}", *flags(tiny), EXACT]
    return Runs(tmp_path_factory.mktemp("ranks"), [*words, "--model.flip_probability=0.5"], GLOBAL_BATCH)


def logged(fine_tunings, name):
    """Returns the logged health of a run: (step, value) by name."""
    events = EventAccumulator(str(fine_tunings.folder / name / "tokenizer"))
    events.Reload()
    return {metric: [(event.step, event.value) for event in events.Scalars(f"train/{metric}")] for metric in COUNTED}


def test_two_ranks_measure_and_report_the_health_of_one_process(fine_tunings):
    alarms = []
    for name, topology in TOPOLOGIES.items():
        text, *others = fine_tunings.leg(name, topology, QUANTIZER, prepare=alarming)
        alarms.append(re.findall(r"step (\d+): health: (only|the \w+)", text))
        assert "health:" not in "".join(others)
    measured = {name: logged(fine_tunings, name) for name in TOPOLOGIES}
    one = measured["1 process"]
    assert [step for step, _ in one["codebook_usage"]] == list(range(1, STEPS + 1))
    assert len({value for _, value in one["perplexity"]}) == STEPS
    assert 0 < one["dead_codes"][-1][1] < 16
    for metric in COUNTED:
        assert measured["2 ranks"][metric] == measured["accumulating"][metric] == one[metric], metric
    assert ("2", "only") in alarms[0]  # codes are in use
    assert alarms[1] == alarms[0]
    assert {cause for _, cause in alarms[2]} == {cause for _, cause in alarms[0]}


def test_frozen_parts_keep_every_bit_on_two_ranks(fine_tunings, tiny_pretrained):
    start = load_tokenizer(tiny_pretrained / "tokenizer").network.state_dict()
    frozen = {name for name in start if name.startswith(("encoder.", "quantizer."))}
    states = {}
    for name in ("1 process", "2 ranks"):
        fine_tunings.leg(f"frozen, {name}", TOPOLOGIES[name], "--model.freeze=[encoder, quantizer]")
        seen = fine_tunings.seen(f"frozen, {name}")
        states[name] = seen.state["state_dict"]
        for part in ("network", "ema_network"):
            kept = {each for each in start if torch.equal(states[name][f"{part}.{each}"], start[each])}
            assert kept == frozen, part
        assert len(seen.state["optimizer_states"][0]["state"]) == len(start.keys() - frozen)
    first, second = (rank_weights(fine_tunings, "frozen, 2 ranks", rank) for rank in (0, 1))
    assert first == second
    for each in start:
        key = f"network.{each}"
        torch.testing.assert_close(states["2 ranks"][key], states["1 process"][key], atol=1e-5, rtol=1e-5)


def rank_weights(fine_tunings, name, rank):
    """Returns the exact sum of all weights after each micro-batch of a rank."""
    lines = (fine_tunings.folder / f"{name}-leg00-rank{rank}.jsonl").read_text().splitlines()
    assert len(lines) >= STEPS
    return [json.loads(line)["weights"] for line in lines]
