"""Two processes on one machine give the results of one process.

docs/reproducibility.md lists what was measured.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from maskgit_pl.cli import main
from maskgit_pl.training.checkpoints import FolderCheckpointIO, newest_checkpoint
from tests.conftest import flags, save_tiny_pretrained, save_uneven_shards
from tests.observing import Runs, Seen, Topology, run_on_ranks, same, trained_state

pytestmark = [pytest.mark.slow, pytest.mark.survival]

TINY = Path(__file__).parent / "tiny"
STEPS = 6
EXACT = "--trainer.precision=32-true"
CLUSTERS = {"single": [], "ddp": ["--trainer.devices=2"], "fsdp": ["--trainer.devices=2", EXACT]}


def words(stage: str, cluster: str, shards: Path, runs: Path, *more: str, tokenizer: Path | None = None) -> list[str]:
    """Returns the words of a command that trains a few steps."""
    tiny = yaml.safe_load((TINY / f"{stage}.yaml").read_text())
    tiny["trainer"] |= {"max_steps": STEPS, "val_check_interval": STEPS}
    if "--recipe=autoregressive" in more:
        del tiny["model"]["decoding"]  # steps that it has no use for
    named = ["--tokenizer", str(tokenizer)] if tokenizer else []
    return [
        "train", stage, "--cluster", cluster, "--data", str(shards), "--runs-folder", str(runs), "--run", cluster,
        *named,
        *flags(tiny), *CLUSTERS[cluster], *more,
    ]  # fmt: skip


def train(stage: str, cluster: str, shards: Path, runs: Path, *more: str, tokenizer: Path | None = None) -> dict:
    """Trains a few steps on one rank or two, and returns the last checkpoint."""
    command = words(stage, cluster, shards, runs, *more, tokenizer=tokenizer)
    run_on_ranks(command, ranks=1 if cluster == "single" else 2)
    return last_checkpoint(runs / cluster / stage)


def last_checkpoint(folder: Path) -> dict:
    return FolderCheckpointIO().load_checkpoint(newest_checkpoint(folder / "checkpoints"))


def assert_close(state: dict, other: dict) -> None:
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_two_ranks_train_the_tokenizer_of_one(tiny_shards, tmp_path):
    one = train("tokenizer", "single", tiny_shards, tmp_path)
    two = train("tokenizer", "ddp", tiny_shards, tmp_path)
    assert one["global_step"] == two["global_step"] == STEPS
    assert_close(one["state_dict"], two["state_dict"])


def test_ddp_and_fsdp_train_the_transformer_of_one_process(tiny_shards, tiny_pretrained, tmp_path):
    tokenizer = tiny_pretrained / "tokenizer"
    one = train("transformer", "single", tiny_shards, tmp_path, tokenizer=tokenizer)
    for cluster in ("ddp", "fsdp"):
        other = train("transformer", cluster, tiny_shards, tmp_path, tokenizer=tokenizer)
        assert_close(one["state_dict"], other["state_dict"])
        assert one["optimizer_states"][0]["param_groups"] == other["optimizer_states"][0]["param_groups"]
        assert (tmp_path / cluster / "transformer" / "samples.png").is_file()
        assert (tmp_path / cluster / "pretrained" / "transformer" / "model.safetensors").is_file()


def test_fsdp_trains_and_samples_the_autoregressive_baseline_of_one_process(tiny_shards, tiny_pretrained, tmp_path):
    given = (tiny_shards, tmp_path, "--recipe=autoregressive")
    assert main(words("transformer", "single", *given, tokenizer=tiny_pretrained / "tokenizer")) == 0
    one = last_checkpoint(tmp_path / "single" / "transformer")
    other = train("transformer", "fsdp", *given, tokenizer=tiny_pretrained / "tokenizer")
    assert_close(one["state_dict"], other["state_dict"])
    pictures = [(tmp_path / cluster / "transformer" / "samples.png").read_bytes() for cluster in ("single", "fsdp")]
    assert pictures[0] == pictures[1]
    assert (tmp_path / "fsdp" / "pretrained" / "transformer" / "model.safetensors").is_file()


def test_a_checkpoint_of_ddp_goes_on_under_fsdp(tiny_shards, tiny_pretrained, tmp_path):
    more = (f"--trainer.max_steps={2 * STEPS}",)
    options = {"tokenizer": tiny_pretrained / "tokenizer"}
    straight = train("transformer", "single", tiny_shards, tmp_path, *more, **options)
    train("transformer", "ddp", tiny_shards, tmp_path, *more, "--checkpoint_every=4", **options)
    folder = tmp_path / "ddp" / "transformer" / "checkpoints"
    FolderCheckpointIO().remove_checkpoint(newest_checkpoint(folder))
    (tmp_path / "ddp").rename(tmp_path / "fsdp")
    resumed = train("transformer", "fsdp", tiny_shards, tmp_path, *more, **options)
    assert resumed["global_step"] == 2 * STEPS
    assert_close(straight["state_dict"], resumed["state_dict"])


def test_fsdp_is_refused_for_the_tokenizer_by_name(tiny_shards, tmp_path):
    with pytest.raises(AssertionError, match=r"trainer\.strategy"):
        train("tokenizer", "fsdp", tiny_shards, tmp_path)


# Over 50 steps, with kills and other ranks in between.

LONG, GLOBAL_BATCH, KILL_AT = 50, 12, 23
NEAR = 1e-5
WHOLE = Topology()
STRAIGHT = {
    "2 ranks of DDP": Topology(ranks=2),
    "2 ranks of FSDP2": Topology(ranks=2, cluster="fsdp"),
    "2 ranks of DDP, accumulating 3": Topology(ranks=2, accumulation=3),
    "2 ranks of FSDP2, accumulating 2": Topology(ranks=2, accumulation=2, cluster="fsdp"),
}
DDP, FSDP = STRAIGHT["2 ranks of DDP"], STRAIGHT["2 ranks of FSDP2"]
MOVES = {
    "DDP, 1 process, DDP": (DDP, WHOLE, DDP),
    "DDP, FSDP2, DDP": (DDP, FSDP, DDP),
    "FSDP2, 1 process, FSDP2 accumulating 2": (FSDP, WHOLE, STRAIGHT["2 ranks of FSDP2, accumulating 2"]),
}
# Of the micro-batch, and so of the ranks: the adaptive weight and LeCam's averages of logits.
ADVERSARIAL = '--model.adversarial={"discriminator": {"channel_multiplier": 0.015625}, "start_step": 3, "r1_every": 2}'


class Bench:
    """Runs of both stages on the same data, in float32 and without dropout. The uninterrupted one is made once."""

    def __init__(self, folder: Path) -> None:
        save_uneven_shards(folder / "shards", (1, 7, 100))
        save_tiny_pretrained(folder / "given")
        self.runs: dict[str, Runs] = {}
        self.straight: dict[str, Seen] = {}
        more = {
            "tokenizer": [ADVERSARIAL, "--model.gradient_clip=1.0"],
            "transformer": ["--model.network.dropout=0", f"--tokenizer={folder / 'given' / 'tokenizer'}"],
        }
        for stage in more:
            words = [stage, f"--data={folder / 'shards'}"]
            words += flags(yaml.safe_load((TINY / f"{stage}.yaml").read_text()))
            words += [f"--data.global_batch={GLOBAL_BATCH}", f"--trainer.max_steps={LONG}"]
            words += [f"--trainer.val_check_interval={LONG}", "--checkpoint_every=10", "--keep_last=9", EXACT]
            words += ["--model.flip_probability=0.5", *more[stage]]
            (folder / stage).mkdir()
            self.runs[stage] = Runs(folder / stage, words, GLOBAL_BATCH)

    def of_one_process(self, stage: str) -> Seen:
        """The run of one process, the reference."""
        if stage not in self.straight:
            self.runs[stage].leg("straight", WHOLE)
            self.straight[stage] = self.runs[stage].seen("straight")
        return self.straight[stage]

    def losses_apart(self, seen: Seen) -> float:
        """Returns the largest relative difference of a loss from that of one process (stage 2), over all steps."""
        wanted = dict(self.of_one_process("transformer").step_losses(GLOBAL_BATCH))
        losses = seen.step_losses(GLOBAL_BATCH)
        assert {step for step, _ in losses} == set(wanted) == set(range(LONG))
        return max(abs(loss / wanted[step] - 1) for step, loss in losses)

    def checkpoint(self, stage: str, name: str, step: int) -> dict:
        """A checkpoint in the middle of a run."""
        folder = self.runs[stage].folder / name / stage / "checkpoints" / f"step-{step:08d}"
        return FolderCheckpointIO().load_checkpoint(folder)


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("distributed"))


def apart(state: dict, other: dict) -> dict[str, float]:
    """Returns the largest difference of each tensor of weights, averages and buffers."""
    assert state.keys() == other.keys()
    return {name: float((value.double() - other[name].double()).abs().max()) for name, value in state.items()}


def near_to_one_process(bench: Bench, name: str) -> None:
    """Asserts that a run equals that of one process."""
    one, seen = bench.of_one_process("transformer"), bench.runs["transformer"].seen(name)
    assert seen.rows() == one.rows()
    losses, weights = bench.losses_apart(seen), max(apart(one.state["state_dict"], seen.state["state_dict"]).values())
    assert max(losses, weights) < NEAR


@pytest.mark.parametrize("where", STRAIGHT)
def test_ranks_train_as_one_process_over_50_steps_with_a_kill(bench, where):
    runs, topology, name = bench.runs["transformer"], STRAIGHT[where], f"straight{list(STRAIGHT).index(where)}"
    runs.leg(name, topology, kill_at=KILL_AT)
    runs.leg(name, topology)
    near_to_one_process(bench, name)


@pytest.mark.parametrize("where", MOVES)
def test_a_run_that_moves_between_ranks_and_strategies_trains_as_one_process(bench, where):
    runs, name = bench.runs["transformer"], f"moves{list(MOVES).index(where)}"
    for topology, kill_at in zip(MOVES[where], (14, 33, None), strict=True):
        runs.leg(name, topology, kill_at=kill_at)
    near_to_one_process(bench, name)


def test_ranks_train_the_tokenizer_of_one_process_over_10_steps_and_drift_is_reported(bench):
    one = bench.of_one_process("tokenizer")
    bench.runs["tokenizer"].leg("ddp", DDP)
    assert bench.runs["tokenizer"].seen("ddp").rows() == one.rows()
    for step in range(10, LONG + 1, 10):
        states = (bench.checkpoint("tokenizer", name, step)["state_dict"] for name in ("straight", "ddp"))
        found = apart(*states)
        assert any("discriminator" in name for name in found)
        sums = max(value for name, value in found.items() if ".quantizer." in name and ".codebook" not in name)
        weights = max(value for name, value in found.items() if ".quantizer." not in name or ".codebook" in name)
        assert step > 10 or max(weights, sums) < NEAR


SHORT = ("--trainer.max_steps=6", "--checkpoint_every=6")
MIXED = "--trainer.precision=bf16-mixed"


@pytest.mark.parametrize("more", [(), (MIXED,)], ids=["float32", "mixed"])
@pytest.mark.parametrize("cluster", ["ddp", "fsdp"])
def test_checkpointed_blocks_train_the_same_to_the_last_bit_on_ranks(bench, cluster, more):
    runs, topology = bench.runs["transformer"], Topology(ranks=2, accumulation=2, cluster=cluster)
    found = []
    for kind in ("none", "blocks"):
        name = f"{cluster}-{kind}-{len(more)}"
        execution = f"--model.activation_checkpointing={kind}"
        runs.leg(name, topology, "--model.network.dropout=0.1", execution, *SHORT, *more)
        found.append(runs.seen(name))
    assert found[0].batches() == found[1].batches()
    states = [trained_state(seen.state) for seen in found]
    assert states[0].keys() == states[1].keys()
    assert all(same(value, states[1][name]) for name, value in states[0].items())


def test_mixed_precision_under_fsdp_falls_as_float32_does_and_keeps_float32_weights(bench):
    bench.runs["transformer"].leg("mixed", FSDP, MIXED)
    seen = bench.runs["transformer"].seen("mixed")
    assert 0 < bench.losses_apart(seen) < 0.01
    losses = [loss for _, loss in sorted(seen.step_losses(GLOBAL_BATCH))]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert {value.dtype for value in seen.state["state_dict"].values()} == {torch.float32}


def without_inductor() -> None:
    """Replaces the inductor's compiler, which takes minutes on two cores, by the traced graph."""
    torch.compile = partial(torch.compile, backend="aot_eager")


def test_a_compiled_run_under_fsdp_trains_as_one_process_and_goes_on_uncompiled(bench):
    runs = bench.runs["transformer"]
    runs.leg("compiled", FSDP, "--model.compiled=blocks", kill_at=KILL_AT, prepare=without_inductor)
    runs.leg("compiled", WHOLE)
    near_to_one_process(bench, "compiled")
