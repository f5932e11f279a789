"""Two ranks under FSDP2 compute what one process computes, for every backbone: losses, gradients and samples."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from maskgit_pl.networks.backbone import BackboneConfig, backbones
from maskgit_pl.training.strategies import prepare_blocks, shard_blocks
from tests.forked import run_ranks
from tests.networks.backbone_cases import create, inputs, small_config

pytestmark = [pytest.mark.slow, pytest.mark.survival]

CONFIGS = [
    *map(small_config, backbones.names()),
    small_config("adaln", condition_dim=6, num_registers=2),
    small_config("bert", num_token_groups=2),
]


def step(network: torch.nn.Module, config: BackboneConfig, rows: slice) -> dict[str, torch.Tensor]:
    """Runs forward and backward pass of some rows of the batch, then decoding, and returns all results by name."""
    tokens, labels, mask, vectors = inputs(config)
    vectors = None if vectors is None else vectors[rows]
    own = tokens[rows], labels[rows]
    logits = network.forward_masked(*own, mask[rows], vectors=vectors, vocabulary=config.loss_columns("all"))
    (logits.square().sum() / len(tokens)).backward()
    found = {f"gradient of {name}": each.grad for name, each in network.named_parameters()}
    with torch.no_grad():
        positions = torch.arange(5).expand(len(own[0]), 5)
        found["logits"] = network.forward_at(*own, positions, vectors=vectors)
    return found


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    results = []
    for config in CONFIGS:
        network = create(config).train()
        prepare_blocks(network.blocks, activation_checkpointing="blocks")
        shard_blocks(network, network.blocks, mesh, precision="32-true")
        found = step(network, config, slice(2 * rank, 2 * rank + 2))
        whole = {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in found.items()}
        results.append(whole)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_of_fsdp_compute_what_one_process_computes(tmp_path):
    run_ranks(run_rank, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for config, first, second in zip(CONFIGS, *ranks, strict=True):
        one = step(create(config).train(), config, slice(None))
        assert first.keys() == second.keys() == one.keys()
        torch.testing.assert_close(torch.cat([first.pop("logits"), second.pop("logits")]), one.pop("logits"))
        for name, gradient in one.items():
            # FSDP2 averages over ranks; each rank has half of the sum.
            torch.testing.assert_close(2 * first[name], gradient, rtol=1e-4, atol=1e-6, msg=f"{name} differs")
