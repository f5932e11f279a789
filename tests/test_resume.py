"""A run that is killed and resumed equals an uninterrupted one: order, masks, losses and weights are bit-exact.

docs/reproducibility.md lists the cases.
"""

import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from maskgit_pl.training.checkpoints import newest_checkpoint
from tests import forked
from tests.conftest import flags, save_tiny_pretrained, save_uneven_shards
from tests.observing import KILLED, Runs, Seen, Topology, same, trained_state

HERE = Path(__file__).parent
GLOBAL_BATCH, STEPS = 12, 12
SHARDS = (1, 7, 100)  # an epoch is 9 steps
MORE = {
    "tokenizer": [
        '--model.adversarial={"discriminator": {"channel_multiplier": 0.015625}, "weight_rule": "adaptive", '
        '"start_step": 2, "r1_every": 2, "lecam_weight": 0.1}',
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
    where: str

    def __str__(self) -> str:
        return f"{self.stage}: {self.topology}, {self.where}"


ONCE, TWICE, BORDER = "within an epoch", "twice within one epoch", "at the border of two epochs"
CASES = [
    Case(stage, topology, kills, every, where)
    for stage in ("tokenizer", "transformer")
    for topology, kills, every, where in (
        (Topology(), (4, 7), 2, TWICE),
        (Topology(workers=2, accumulation=2), (10,), 3, BORDER),
        (Topology(ranks=2, workers=2, accumulation=2), (6,), 4, ONCE),
    )
] + [Case("transformer", Topology(ranks=2, cluster="fsdp"), (10,), 3, BORDER)]


class Bench:
    """The runs of both stages on the same data. Uninterrupted ones are made once."""

    def __init__(self, folder: Path) -> None:
        save_uneven_shards(folder / "shards", SHARDS)
        save_tiny_pretrained(folder / "given")
        self.runs: dict[str, Runs] = {}
        self.done: dict[tuple[str, Topology, tuple[str, ...]], Seen] = {}
        for stage in ("tokenizer", "transformer"):
            words = [
                stage,
                f"--data={folder / 'shards'}",
                *flags(yaml.safe_load((HERE / f"tiny/{stage}.yaml").read_text())),
            ]
            words += [f"--tokenizer={folder / 'given' / 'tokenizer'}"] if stage == "transformer" else []
            words += [f"--data.global_batch={GLOBAL_BATCH}", f"--trainer.max_steps={STEPS}"]
            words += ["--trainer.val_check_interval=5", "--data.validation_batch=4", "--model.flip_probability=0.5"]
            (folder / stage).mkdir()
            self.runs[stage] = Runs(folder / stage, [*words, *MORE[stage]], GLOBAL_BATCH)

    def straight(self, stage: str, topology: Topology, *more: str) -> Seen:
        """The uninterrupted run, without data workers."""
        alone = Topology(topology.ranks, 0, topology.accumulation, topology.cluster)
        key = (stage, alone, more)
        if key not in self.done:
            name = f"straight{len(self.done)}"
            self.runs[stage].leg(name, alone, *more)
            self.done[key] = self.runs[stage].seen(name)
        return self.done[key]


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("resume"))


def assert_equal(left: Seen, right: Seen) -> None:
    """Asserts that two runs of the same topology are equal."""
    one, other = left.batches(), right.batches()
    assert one.keys() == other.keys()
    for positions, batch in one.items():
        assert batch == other[positions], positions
    states = trained_state(left.state), trained_state(right.state)
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert same(value, states[1][name]), name
    assert len(left.rows()) == STEPS * GLOBAL_BATCH
    assert sum(len(batch["losses"]) for batch in one.values()) >= STEPS


@pytest.mark.slow  # 70 s, all of them, on two cores that others use too
@pytest.mark.survival
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_killed_run_goes_on_to_the_last_bit(bench, case):
    straight, runs = bench.straight(case.stage, case.topology), bench.runs[case.stage]
    name = f"case{CASES.index(case)}"
    for step in case.kills:
        runs.leg(name, case.topology, f"--checkpoint_every={case.every}", kill_at=step)
        saved = (step - 1) // case.every * case.every
        assert runs.newest(name).name == f"step-{saved:08d}"
    runs.leg(name, case.topology, f"--checkpoint_every={case.every}")
    seen = runs.seen(name)
    assert_equal(seen, straight)
    assert seen.repeated() > 0


@pytest.mark.slow  # 20 s
@pytest.mark.survival
@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_a_process_that_is_killed_from_outside_at_any_moment_goes_on(bench, stage):
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
    states = trained_state(seen.state), trained_state(straight.state)
    assert states[0].keys() == states[1].keys()
    assert all(same(value, states[1][name]) for name, value in states[0].items())


# The adaptive weight and LeCam are of the micro-batch, and so depend on the accumulation.
FIXED_WEIGHT = '--model.adversarial={"discriminator": {"channel_multiplier": 0.015625}, "start_step": 2, "r1_every": 2}'
LEGS = (Topology(), Topology(ranks=2, workers=2, accumulation=3), Topology(workers=3, accumulation=2))


@pytest.mark.slow  # 10 s
@pytest.mark.survival
@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_on_other_ranks_and_workers_the_order_and_what_is_drawn_are_the_same(bench, stage):
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


def test_a_difference_of_one_bit_is_a_difference():
    value = torch.tensor([1.0, 2.0])
    assert same(value, value.clone())
    assert not same(value, torch.nextafter(value, torch.tensor(9.0)))
    assert not same(value, value.double())
    assert not same(0.1, 0.1 + 1e-16)
    assert not same(1, True)
    state = {"state_dict": {"w": value}, "optimizer_states": [{"state": {0: {"step": value[0]}}}], "lr_schedulers": [],
             "global_step": 3, "loops": {}}  # fmt: skip
    assert list(trained_state(state)) == ["/state_dict/w", "/optimizer_states/0/state/0/step", "/global_step"]
