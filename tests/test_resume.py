"""A run that is killed and resumed equals an uninterrupted one: order, masks, losses and weights are bit-exact.

docs/resume.md lists the cases.
"""

import signal
import time
from dataclasses import dataclass, replace

import pytest

from maskgit_pl.training.checkpoints import newest_checkpoint
from tests import forked
from tests.observing import KILLED, StageRuns, Topology, assert_same_state

GLOBAL_BATCH, STEPS = 12, 12  # an epoch is 9 steps
MORE = {
    "tokenizer": [
        "--model.adversarial={discriminator: {name: stylegan, channel_multiplier: 0.015625}, weight_rule: adaptive, "
        "start_step: 2, r1_every: 2, lecam_weight: 0.1}",
        "--model.gradient_clip=1.0",
    ],
    "transformer": ["--model.network.dropout=0.1"],
}


@dataclass(frozen=True)
class Case:
    """A run that is killed after some steps. Steps after its last checkpoint are repeated."""

    stage: str
    topology: Topology
    kills: tuple[int, ...]
    every: int


CASES = {
    f"{stage}, {name}": Case(stage, topology, kills, every)
    for stage in ("tokenizer", "transformer")
    for name, topology, kills, every in (
        ("at the border of two epochs", Topology(workers=2, accumulation=2), (4, 10), 3),
        ("two ranks within an epoch", Topology(ranks=2, workers=2, accumulation=2), (6,), 4),
    )
} | {"transformer, fsdp": Case("transformer", Topology(ranks=2, cluster="fsdp"), (10,), 3)}


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> StageRuns:
    words = [f"--trainer.max_steps={STEPS}", "--trainer.val_check_interval=5", "--data.validation_batch=4"]
    return StageRuns(tmp_path_factory.mktemp("resume"), [*words, "--model.flip_probability=0.5"], MORE, GLOBAL_BATCH)


@pytest.mark.slow  # 70 s, all of them, on two cores that others use too
@pytest.mark.survival
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_killed_run_resumes_bit_exact(bench, case):
    straight = bench.straight(case.stage, replace(case.topology, workers=0))
    runs = bench.runs[case.stage]
    name = f"case{list(CASES.values()).index(case)}"
    for step in case.kills:
        runs.leg(name, case.topology, f"--checkpoint_every={case.every}", kill_at=step)
        saved = (step - 1) // case.every * case.every
        assert runs.newest(name).name == f"step-{saved:08d}"
    runs.leg(name, case.topology, f"--checkpoint_every={case.every}")
    seen = runs.seen(name)
    assert seen.batches() == straight.batches()
    assert_same_state(seen, straight)
    assert len(seen.rows()) == STEPS * GLOBAL_BATCH
    assert seen.repeated() > 0


@pytest.mark.slow  # 20 s
@pytest.mark.survival
@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_a_process_that_is_killed_from_outside_resumes_bit_exact(bench, stage):
    runs, alone = bench.runs[stage], Topology()
    straight = bench.straight(stage, alone)
    words = runs.words("outside", alone, "--checkpoint_every=1")
    checkpoints = runs.folder / "outside" / stage / "checkpoints"
    with forked.Command(words) as process:
        while process.poll() is None and newest_checkpoint(checkpoints) is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == KILLED, process.communicate()
    stopped = int(runs.newest("outside").name.removeprefix("step-"))
    assert 0 < stopped < STEPS
    runs.leg("outside", alone, "--checkpoint_every=1")
    seen = runs.seen("outside")
    batches = seen.batches()
    assert set(batches) == {p for p in straight.batches() if p[0] >= stopped * GLOBAL_BATCH}
    assert all(batch == straight.batches()[positions] for positions, batch in batches.items())
    assert_same_state(seen, straight)


# The adaptive weight and LeCam are of the micro-batch, and so depend on the accumulation.
SMALL = "discriminator: {name: stylegan, channel_multiplier: 0.015625}"
FIXED_WEIGHT = f"--model.adversarial={{{SMALL}, start_step: 2, r1_every: 2}}"
LEGS = (Topology(), Topology(ranks=2, workers=2, accumulation=3), Topology(workers=3, accumulation=2))


@pytest.mark.slow  # 10 s
@pytest.mark.survival
@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_order_and_draws_are_the_same_on_other_ranks_and_workers(bench, stage):
    more = ("--model.network.dropout=0",) if stage == "transformer" else (FIXED_WEIGHT,)
    straight, runs = bench.straight(stage, Topology(), *more), bench.runs[stage]
    for topology, kill_at in zip(LEGS, (5, 9, None), strict=True):
        runs.leg("moved", topology, *more, "--checkpoint_every=2", kill_at=kill_at)
    seen = runs.seen("moved")
    assert seen.rows() == straight.rows()
    if stage == "transformer":
        wanted = dict(straight.step_losses(GLOBAL_BATCH))
        losses = seen.step_losses(GLOBAL_BATCH)
        assert {step for step, _ in losses} == set(range(STEPS))
        assert losses == [(step, pytest.approx(wanted[step], rel=1e-5)) for step, _ in losses]
    else:
        ends = (seen.state["state_dict"], straight.state["state_dict"])
        names = [name for name in ends[0] if ".quantizer." not in name]
        apart = max(float((ends[0][name] - ends[1][name]).abs().max()) for name in names)
        assert apart < 1e-3
