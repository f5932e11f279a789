"""Optimizers by name, their parameter groups and the averaged weights; the contract holds for every registered name."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from maskgit_pl.networks.discriminators import DiscriminatorConfig
from maskgit_pl.tokenizer.adversarial import AdversarialConfig
from maskgit_pl.training.checkpoints import FolderCheckpointIO
from maskgit_pl.training.optimizers import (
    LearningRate,
    OptimizerConfig,
    build_optimizer,
    frozen_copy,
    optimizers,
    parameter_groups,
    state_values,
    update_ema,
)
from tests.forked import run_ranks
from tests.short_runs import assert_equal, data, fit, tiny_module

NAMES = optimizers.names()
RATE = 0.02


class Model(nn.Module):
    """A network with a convolution, linear layers, a norm, an embedding, a codebook and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 4)
        self.codebook = nn.Parameter(torch.ones(4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.table(tokens).transpose(1, 2)).transpose(1, 2)
        return self.fc(self.norm(x).relu()) * self.codebook


def config(algorithm: str | dict = "adamw", *, weight_decay: float = 0.1) -> OptimizerConfig:
    return OptimizerConfig(LearningRate(RATE), (0.9, 0.96), weight_decay, algorithm)


def build(made: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(parameter_groups(model, made.weight_decay), made)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, rows: slice = slice(None)) -> None:
    for step in steps:
        tokens = torch.randint(8, (4, 6), generator=torch.Generator().manual_seed(step))[rows]
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten() % 4).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def names(group: dict[str, object]) -> list[str]:
    return [name for name, _ in group["params"]]


def test_only_trained_linear_and_conv_weights_decay():
    model = Model()
    decayed, rest = parameter_groups(model, 0.045, prefix="network.")
    assert names(decayed) == ["network.conv.weight", "network.fc.weight"]
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.045, 0.0)
    of = ("codebook", "table.weight", "conv.bias", "norm.weight", "norm.bias", "fc.bias")
    assert names(rest) == [f"network.{name}" for name in of]
    trained = dict(model.named_parameters(prefix="network"))
    assert all(parameter is trained[name] for group in (decayed, rest) for name, parameter in group["params"])


@pytest.mark.parametrize("name", NAMES)
def test_a_step_decays_linear_and_conv_weights_by_rate_times_decay(name):
    ends = []
    for weight_decay in (0.0, 0.5):
        model = Model()
        optimizer = build(config(name, weight_decay=0.0), model)
        train(model, optimizer, range(2))  # the first step of some initializes their state only
        start, optimizer.param_groups[0]["weight_decay"] = weights(model), weight_decay
        train(model, optimizer, range(2, 3))
        ends.append(weights(model))
    assert build(config(name, weight_decay=0.5), model).param_groups[0]["weight_decay"] == 0.5
    for key, value in start.items():
        if key in ("conv.weight", "fc.weight"):
            # Some decay the weight after its step, of about RATE.
            decayed, atol = -RATE * 0.5 * value, 2 * 0.5 * RATE**2
            torch.testing.assert_close(ends[1][key] - ends[0][key], decayed, rtol=2e-2, atol=atol)
        else:
            assert torch.equal(ends[0][key], ends[1][key]), key


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_without_gradients_changes_neither_weights_nor_state(name, after):
    model = Model()
    optimizer = build(config(name), model)
    train(model, optimizer, range(after))
    before = weights(model), copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    assert_equal((weights(model), optimizer.state_dict()), before)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_bit_exact(name, stage, tiny_shards, tiny_pretrained, tmp_path):
    options = {"algorithm": name}
    if stage == "tokenizer":
        adversarial = AdversarialConfig(DiscriminatorConfig(channel_multiplier=1 / 64))
        options |= {"adversarial": adversarial, "quantizer": "gradient"}
    states = {}
    for run, legs in (("straight", (5,)), ("resumed", (2, 5))):
        resume = None
        for steps in legs:
            module, folder = tiny_module(stage, tiny_pretrained / "tokenizer", **options), tmp_path / run
            fit(module, data(tiny_shards), steps=steps, folder=folder, resume=resume, limit_val_batches=0)
            resume = folder / f"step-{steps:08d}"
        states[run] = FolderCheckpointIO().load_checkpoint(resume)
    assert states["straight"]["optimizer_states"][0]["state"]
    for key in ("state_dict", "optimizer_states"):
        assert_equal(states["resumed"][key], states["straight"][key])


def on_a_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows, found = slice(2 * rank, 2 * rank + 2), {}
    for name in NAMES:
        model = Model()
        train(DistributedDataParallel(model), build(config(name), model), range(4), rows)
        found[f"{name} ddp"] = weights(model)
        if config(name).spec.elementwise:
            model = Model()
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
            optimizer = build(config(name), model)
            train(model, optimizer, range(4), rows)
            found[f"{name} fsdp"] = {key: value.full_tensor() for key, value in weights(model).items()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_of_ddp_and_fsdp_train_as_one_process_does(tmp_path):
    run_ranks(on_a_rank, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert len(ranks[0]) > len(NAMES)
    assert_equal(ranks[1], ranks[0])
    for case, found in ranks[0].items():
        model = Model()
        train(model, build(config(case.split()[0]), model), range(4))
        for key, value in weights(model).items():
            # The sign of Lion, and the first step of others, turns a rounding near 0 into a step.
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4, msg=f"{case} {key}")


def test_the_page_names_every_optimizer_with_the_values_that_it_keeps():
    page = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text()
    rows = {cells[0].strip(" `"): float(cells[2]) for line in page.splitlines() if len(cells := line.split("|")[1:]) > 3
            and cells[2].strip().replace(".", "").isdigit()}  # fmt: skip
    assert rows.keys() == set(NAMES)
    for name, values in rows.items():
        assert state_values(config(name)) == pytest.approx(values, abs=0.02), name


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (OptimizerConfig, {"learning_rate": 1e-3}, "^learning_rate must be a LearningRate, got 0.001; give its peak"),
        (OptimizerConfig, {"betas": (0.9, 1.0)}, r"^betas must be a number in \[0, 1\), got 1.0"),
        (OptimizerConfig, {"weight_decay": -1.0}, r"^weight_decay must be a number in \[0, 10\], got -1.0"),
        (OptimizerConfig, {"algorithm": "lio"}, "unknown optimizer 'lio': did you mean 'lion'?"),
        (OptimizerConfig, {"algorithm": {"name": "lion", "betas": [0.9]}}, "optimizer 'lion': unknown key 'betas'"),
        (LearningRate, {"peak": 0.0}, r"^peak must be a number in \(0, inf\), got 0.0"),
        (LearningRate, {"peak": float("nan")}, "^peak must be a number"),
        (LearningRate, {"warmup_steps": -1}, "^warmup_steps must be an integer in .*, got -1"),
        (LearningRate, {"final_fraction": 1.5}, r"^final_fraction must be a number in \[0, 1\], got 1.5"),
        (
            LearningRate,
            {"decay": "cosin"},
            "^decay must be one of constant, cosine, linear, got 'cosin'; did you",
        ),
    ],
    ids=str,
)
def test_a_wrong_name_or_value_is_refused_with_the_rule(kind, changes, message):
    first = {"learning_rate": LearningRate(0.1)} if kind is OptimizerConfig else {"peak": 0.1}
    with pytest.raises(ValueError, match=message):
        kind(**{**first, **changes})


def test_adamw_is_that_of_torch_with_the_defaults_of_the_paper():
    ours, theirs = Model(), Model()
    reference = torch.optim.AdamW(parameter_groups(theirs, 0.045), lr=RATE, betas=(0.9, 0.96), fused=True)
    train(ours, build(OptimizerConfig(LearningRate(RATE)), ours), range(5))
    train(theirs, reference, range(5))
    assert_equal(weights(ours), weights(theirs))


def test_the_warm_up_rises_in_equal_steps_from_above_0():
    rate = LearningRate(1e-4, warmup_steps=4)
    assert [rate.factor(step, 100) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rate.factor(1, 2) == 0.5  # of a run that ends within it


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_and_linear_fall_to_their_end_at_max_steps(final):
    rate = LearningRate(1e-4, warmup_steps=10, decay="cosine", final_fraction=final)
    factors = [rate.factor(step, 110) for step in range(10, 131)]
    assert factors[0] == 1.0
    assert factors[50] == pytest.approx((1 + final) / 2)
    assert factors[25] == pytest.approx(final + (1 - final) * 0.8535534)
    assert factors[100] == pytest.approx(final)
    assert factors[120] == pytest.approx(final)  # and stays there
    linear = LearningRate(1e-4, warmup_steps=10, decay="linear", final_fraction=final)
    falling = [linear.factor(step, 110) for step in (10, 60, 110, 111)]
    assert falling == pytest.approx([1, (1 + final) / 2, final, final])


@pytest.mark.parametrize("max_steps", [0, -1])
def test_only_a_schedule_with_an_end_needs_the_steps_of_the_run(max_steps):
    assert LearningRate(0.1).factor(0, max_steps) == 1.0
    with pytest.raises(ValueError, match=rf"decay 'cosine'.*max_steps.* got {max_steps}"):
        LearningRate(0.1, decay="cosine").factor(0, max_steps)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def test_a_frozen_copy_is_equal_and_stays_frozen_in_evaluation_mode():
    owner = nn.ModuleDict({"network": network()})
    owner["ema"] = frozen_copy(owner["network"])
    owner.train()
    assert owner["network"][2].training
    assert not any(part.training for part in owner["ema"].modules())
    for kept, new in zip(owner["ema"].parameters(), owner["network"].parameters(), strict=True):
        assert torch.equal(kept, new)
        assert kept.data_ptr() != new.data_ptr()
        assert (kept.requires_grad, new.requires_grad) == (False, True)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_the_average_weighs_each_step_by_a_power_of_its_age(decay):
    source = network()
    ema, seen = frozen_copy(source), []
    for step in range(5):
        with torch.no_grad():
            torch._foreach_add_(list(source.parameters()), 1.0 + step)
        seen.append(weights(source))
        update_ema(ema, source, decay=decay, step=step)
        powers = [decay**age for age in range(step, -1, -1)]
        for name, kept in ema.named_parameters():
            mean = sum(power * values[name] for power, values in zip(powers, seen, strict=True)) / sum(powers)
            torch.testing.assert_close(kept, mean)
        assert_equal(weights(source), seen[-1])


def test_buffers_are_copied_and_not_averaged():
    source = network()
    ema = frozen_copy(source)
    source.train()(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(ema[1].running_mean, source[1].running_mean)
    update_ema(ema, source, decay=0.9, step=3)
    assert torch.equal(ema[1].running_mean, source[1].running_mean)
    assert ema[1].num_batches_tracked == 1
