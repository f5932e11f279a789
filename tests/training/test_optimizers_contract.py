"""Every registered optimizer keeps the contract: weight decay, idle steps, closures, resuming, and two ranks."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from maskgit_pl.networks.discriminators import DiscriminatorConfig
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.training.checkpoint_files import FolderCheckpointIO
from maskgit_pl.training.learning_rates import LearningRate
from maskgit_pl.training.optimizers import (
    OptimizerConfig,
    build_optimizer,
    check_sharding,
    optimizers,
    parameter_groups,
    state_values,
)
from maskgit_pl.training.speed import weight_norm
from maskgit_pl.training.tokenizer_losses import AdversarialConfig
from tests.forked import run_ranks
from tests.modules import masked_model, tokenizer_model
from tests.short_runs import data, fit

NAMES = optimizers.names()
RATE = 0.02


class Model(nn.Module):
    """A network with a convolution, linear layers, a norm and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.table(tokens).transpose(1, 2)).transpose(1, 2)
        return self.fc(self.norm(x).relu())


def config(algorithm: str | dict, *, weight_decay: float = 0.1) -> OptimizerConfig:
    return OptimizerConfig(LearningRate(RATE), (0.9, 0.96), weight_decay, algorithm=algorithm)


def build(algorithm: str | dict, model: nn.Module, **options: float) -> torch.optim.Optimizer:
    made = config(algorithm, **options)
    return build_optimizer(parameter_groups(model, made.weight_decay), made)


def batch(step: int) -> torch.Tensor:
    return torch.randint(8, (4, 6), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten() % 4)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, rows: slice = slice(None)) -> None:
    for step in steps:
        loss_of(model, batch(step)[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_the_loss_and_changes_every_weight(name):
    model = Model()
    before, first = weights(model), loss_of(model, batch(0)).item()
    train(model, build(name, model), range(30))
    assert loss_of(model, batch(0)).item() < 0.9 * first
    assert all(not torch.equal(value, before[key]) for key, value in weights(model).items())


@pytest.mark.parametrize("name", NAMES)
def test_a_step_decays_linear_and_conv_weights_by_rate_times_decay_and_nothing_else(name):
    ends = []
    for weight_decay in (0.0, 0.5):
        model = Model()
        optimizer = build(name, model, weight_decay=0.0)
        train(model, optimizer, range(2))  # the first step of some initializes their state only
        start, optimizer.param_groups[0]["weight_decay"] = weights(model), weight_decay
        train(model, optimizer, range(2, 3))
        ends.append(weights(model))
    assert build(name, model, weight_decay=0.5).param_groups[0]["weight_decay"] == 0.5
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
    optimizer = build(name, model)
    train(model, optimizer, range(after))
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())
    now = optimizer.state_dict()
    assert now["param_groups"] == state["param_groups"]
    assert now["state"].keys() == state["state"].keys()
    for key, values in state["state"].items():
        assert all(torch.equal(torch.as_tensor(now["state"][key][n]), torch.as_tensor(v)) for n, v in values.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_closure_computes_the_gradients_before_the_step(name):
    ends = []
    for uses_closure in (False, True):
        model = Model()
        optimizer = build(name, model)
        for step in range(3):

            def closure(model=model, step=step):
                loss = loss_of(model, batch(step))
                loss.backward()
                return loss

            if uses_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
            optimizer.zero_grad()
        ends.append(weights(model))
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def module(stage: str, name: str, pretrained: Path):
    torch.manual_seed(0)
    if stage == "transformer":
        network = TransformerConfig(16, 3, (4, 4), embed_dim=16, depth=1, num_heads=2, mlp_dim=32)
        return masked_model(network, pretrained / "tokenizer", algorithm=name)
    vqgan = VQGANConfig(
        1, base_channels=8, channel_multipliers=(1,), num_res_blocks=1, num_middle_blocks=0, num_groups=4,
        codebook_size=16, code_dim=4, patch_size=2, quantizer="gradient",
    )  # fmt: skip
    adversarial = AdversarialConfig(DiscriminatorConfig(channel_multiplier=1 / 64))
    return tokenizer_model(vqgan, image_size=8, adversarial=adversarial, algorithm=name)


def tensors(state: object, key: str = "") -> dict[str, object]:
    """Returns the leaves of the weights and optimizer states of a checkpoint by their keys."""
    if isinstance(state, dict):
        return {k: v for name, each in state.items() for k, v in tensors(each, f"{key}/{name}").items()}
    if isinstance(state, list | tuple):
        return {k: v for number, each in enumerate(state) for k, v in tensors(each, f"{key}/{number}").items()}
    return {key: state}


@pytest.mark.slow  # a second each
@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_bit_exact(name, stage, tiny_shards, tiny_pretrained, tmp_path):
    options = {"limit_val_batches": 0, "default_root_dir": tmp_path}
    for folder, legs in (("straight", (5,)), ("resumed", (2, 5))):
        resume = None
        for steps in legs:
            trained = module(stage, name, tiny_pretrained)
            fit(trained, data(tiny_shards), steps=steps, folder=tmp_path / folder, resume=resume, **options)
            resume = tmp_path / folder / f"step-{steps:08d}"
    ends = [FolderCheckpointIO().load_checkpoint(tmp_path / each / "step-00000005") for each in ("straight", "resumed")]
    states = [tensors({key: end[key] for key in ("state_dict", "optimizer_states")}) for end in ends]
    assert states[0].keys() == states[1].keys()
    assert sum("optimizer_states" in key for key in states[0]) > 10
    for key, value in states[0].items():
        same = torch.equal(value, states[1][key]) if isinstance(value, torch.Tensor) else value == states[1][key]
        assert same, key


def on_a_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows, found = slice(2 * rank, 2 * rank + 2), {}
    for name in NAMES:
        model = Model()
        train(DistributedDataParallel(model), build(name, model), range(4), rows)
        found[f"{name} ddp"] = weights(model)
        if config(name).spec.elementwise:
            model = Model()
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
            optimizer = build(name, model)
            train(model, optimizer, range(4), rows)
            whole = torch.cat([value.full_tensor().flatten() for value in weights(model).values()])
            torch.testing.assert_close(weight_norm(optimizer), whole.norm())
            found[f"{name} fsdp"] = {key: value.full_tensor() for key, value in weights(model).items()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_of_ddp_and_fsdp_train_as_one_process_does(tmp_path):
    run_ranks(on_a_rank, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert len(ranks[0]) > len(NAMES)
    for case, found in ranks[0].items():
        model, name = Model(), case.split()[0]
        train(model, build(name, model), range(4))
        for key, value in weights(model).items():
            assert torch.equal(found[key], ranks[1][case][key]), (case, key)
            # The sign of Lion, and the first step of others, turns a rounding near 0 into a step.
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4, msg=f"{case} {key}")


@pytest.mark.parametrize("name", NAMES)
def test_fsdp_is_refused_for_steps_of_whole_matrices(name):
    check_sharding(config(name), "ddp")
    if config(name).spec.elementwise:
        check_sharding(config(name), "fsdp")
    else:
        with pytest.raises(ValueError, match=rf"trainer\.strategy must be 'ddp' or 'auto' .*'{name}'.* got 'fsdp'"):
            check_sharding(config(name), "fsdp")


@pytest.mark.parametrize(("name", "values"), [("adamw", 2.0), ("lion", 1.0), ("sgd", 1.0), ("adan", 4.0)])
def test_the_estimates_know_the_values_that_an_optimizer_keeps(name, values):
    assert state_values(config(name)) == values


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ("lio", "unknown optimizer 'lio': did you mean 'lion'?"),
        ({"name": "lion", "betas": [0.9, 0.99]}, "optimizer 'lion': unknown key 'betas'"),
        ({"name": "sgd", "momentum": 1.0}, r"optimizer 'sgd': momentum must be a number in [0, 1), got 1.0"),
        ({"name": "sgd", "momentum": 0.0}, "optimizer 'sgd': momentum must be above 0 with nesterov, got 0"),
        ({"name": "adan", "betas": [0.9, 0.9, 1.0]}, "optimizer 'adan': betas must be a number in [0, 1), got 1.0"),
        ({"name": "muon", "ns_steps": 2.5}, "optimizer 'muon'.ns_steps must be an integer, got 2.5"),
        ({"name": "adopt", "eps": 0.0}, "optimizer 'adopt': eps must be a number in (0, 1], got 0.0"),
    ],
    ids=str,
)
def test_a_wrong_name_or_option_is_refused_with_the_rule(algorithm, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(algorithm)


def test_the_page_names_every_optimizer():
    text = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text()
    assert [name for name in NAMES if f"| `{name}` |" not in text] == []
