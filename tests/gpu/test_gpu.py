"""Both stages on a GPU: recorded arrays, the same tokens as on a CPU, CUDA graphs, no host waits, two cards.

``make test-gpu`` runs this file. Without a GPU, what needs none runs on the CPU, and the rest is skipped by name.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from comparators.comparison import TOLERANCE
from comparators.folder import Folder
from comparators.transformer import load_transformer, our_tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from maskgit_pl import MaskGIT
from maskgit_pl.data import Batch
from maskgit_pl.data.loader import StepDataModule
from maskgit_pl.decoding import ConditionalModel, decode_classes
from maskgit_pl.training.strategies import shard_blocks
from maskgit_pl.transformer.token_model import TokenModel
from tests.decoding.test_graph import FIRST, OTHERS, whole_run
from tests.test_host_waits import BERT, Run, batch, build

GOLDEN = Folder(Path(__file__).parents[1] / "golden")
CPU = torch.device("cpu")
BF16 = 0.03  # largest relative error of bfloat16 logits: 8 bits of precision, over some layers


@pytest.fixture
def device() -> torch.device:
    """The GPU, or the CPU without one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def card() -> torch.device:
    """A GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device("cuda")


@pytest.fixture
def two_cards() -> None:
    """Two GPUs."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, found {torch.cuda.device_count()}")


@pytest.fixture(autouse=True)
def _exact_products():
    """Computes float32 matrix products in float32, not in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def on(device: torch.device, given: Batch) -> Batch:
    return StepDataModule().transfer_batch_to_device(given, device, 0)


def loss_and_gradients(module: TokenModel, given: Batch) -> tuple[Tensor, Tensor]:
    module.zero_grad()
    loss = module._compute_training_losses(given).loss
    loss.backward()
    gradients = [each.grad.flatten() for each in module.transformer.parameters() if each.grad is not None]
    return loss.detach().cpu(), torch.cat(gradients).cpu()


def near(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return bool((one - other).norm() < tolerance * other.norm())


# Values


@pytest.mark.parametrize("tag", ["n16", "n256"])
def test_recorded_logits_of_the_released_code(tag, device):
    arrays, network = GOLDEN.arrays(f"transformer_{tag}.npz"), load_transformer(GOLDEN, tag)
    tokens, labels = (each.to(device) for each in our_tokens(arrays["tokens"], network.config))
    expected = torch.from_numpy(arrays["logits"][:, 1:])
    with torch.no_grad():
        logits = network.to(device)(tokens, labels, vocabulary="all").cpu()
        with torch.autocast(device.type, torch.bfloat16):
            rounded = network(tokens, labels, vocabulary="all").float().cpu()
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
    assert near(rounded, expected, BF16)


@pytest.mark.parametrize("backbone", ["bert", "bert-groups", "bert-causal", "adaln", "adaln-token", "adaln-causal"])
def test_a_step_has_the_loss_and_the_gradients_of_the_cpu(backbone, device):
    given = build(backbone)._with_draws(batch())
    loss, gradients = loss_and_gradients(build(backbone), given)
    module = build(backbone).to(device)
    found, own = loss_and_gradients(module, on(device, given))
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
    assert near(own, gradients, 1e-4)
    with torch.autocast(device.type, torch.bfloat16):
        found, _ = loss_and_gradients(module, on(device, given))
    torch.testing.assert_close(found, loss, rtol=0.01, atol=0)


def test_masks_and_labels_are_the_same_on_every_device(device):
    module, given = build("bert", "visible"), batch()
    for mine, expected in zip(module._draw(on(device, given)), module._draw(given), strict=True):
        if expected is not None and expected.dtype != torch.float32:
            assert torch.equal(mine.cpu(), expected)


def decode(pipe: MaskGIT, device: torch.device, dtype: torch.dtype) -> Tensor:
    network = pipe.transformer.network.to(device, dtype)
    model, labels = ConditionalModel(network, device), [number % 10 for number in range(32)]
    decoder = pipe.decoding.build_decoder(pipe.transformer.mask_schedule)
    with torch.no_grad():
        *_, last = decode_classes(model, labels, list(range(32)), decoder=decoder, scales=pipe.decoding.scales())
    return last.tokens.cpu()


def test_the_demo_decodes_the_tokens_of_the_cpu(device):
    pipe = MaskGIT.from_pretrained("fashion-mnist-demo")
    expected = decode(pipe, CPU, torch.float32)
    assert (decode(pipe, device, torch.float32) == expected).float().mean() > 0.999
    assert (decode(pipe, device, torch.bfloat16) == expected).float().mean() > 0.85


# Kernels


def test_attention_runs_in_the_flash_kernel(device):
    network = build("bert").transformer.to(device)
    given = on(device, batch())
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.autocast(device.type, torch.bfloat16):  # raises without it
        network(given.content, given.labels).float().square().mean().backward()


@contextmanager
def no_waits() -> Iterator[None]:
    """Raises where the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("objective", ["masked_cross_entropy", "visible"])
@pytest.mark.parametrize("backbone", ["bert", "adaln"])
def test_no_training_step_waits_for_the_gpu(backbone, objective, card):
    module = build(backbone, objective).to(card)
    module.trainer = run = Run()
    optimizer = module.configure_optimizers()["optimizer"]
    for step in range(4):
        run.global_step = step + 1
        given = on(card, module.draw_on_host(batch(step)))
        with no_waits() if step else torch.enable_grad():  # the first step allocates
            module.training_step(given, 0).backward()
            nn.utils.clip_grad_norm_(module.transformer.parameters(), 1.0)
            module.optimizer_step(0, 0, optimizer, lambda: None)


# Graphs


def capture(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Records a function as a CUDA graph, after a warm-up on another stream, and returns the graph and its result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = run()
    return graph, made


def test_a_whole_decoding_run_is_one_cuda_graph(card):
    with torch.device(card):
        run = whole_run("confidence")
    seeds, labels = (each.to(card) for each in FIRST)

    def decode_all() -> Tensor:
        with torch.device(card), torch.no_grad():
            return run(seeds, labels)

    graph, tokens = capture(decode_all)
    for own, new in zip((seeds, labels), OTHERS, strict=True):
        own.copy_(new)
    graph.replay()
    assert torch.equal(tokens, decode_all())


# Two cards


class Loss(nn.Module):
    """The loss as ``forward``, which DDP wraps."""

    def __init__(self, module: TokenModel) -> None:
        super().__init__()
        self.transformer, self.compute = module.transformer, [module]  # not a submodule

    def forward(self, given: Batch) -> Tensor:
        return self.compute[0]._compute_training_losses(given).loss


def run_rank(rank: int, folder: Path) -> None:
    """Computes the gradients of half a batch under DDP and FSDP2, and saves those of the whole batch."""
    torch.cuda.set_device(rank)
    card = torch.device("cuda", rank)
    dist.init_process_group("nccl", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    for strategy in ("ddp", "fsdp"):
        module = build("bert").to(card)
        drawn = module._with_draws(half(batch(), rank))
        given = on(card, drawn)
        if strategy == "ddp":
            wrapped = DistributedDataParallel(Loss(module), device_ids=[rank])
            wrapped(given).backward()
        else:
            mesh = init_device_mesh("cuda", (2,))
            shard_blocks(module.transformer, module.transformer.blocks, mesh, precision="32-true")
            module._compute_training_losses(given).loss.backward()
        found = {name: each.grad for name, each in module.transformer.named_parameters() if each.grad is not None}
        whole = {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in found.items()}
        if rank == 0:
            torch.save({name: each.cpu() for name, each in whole.items()}, folder / f"{strategy}.pt")
    dist.destroy_process_group()


def half(given: Batch, rank: int) -> Batch:
    rows = slice(4 * rank, 4 * rank + 4)
    return Batch(*(each[rows] if isinstance(each, Tensor) else each for each in given))


def test_two_cards_compute_the_gradients_of_one_device(tmp_path, two_cards):
    mp.start_processes(run_rank, args=(tmp_path,), nprocs=2, start_method="spawn")
    module = build("bert")
    loss_and_gradients(module, module._with_draws(batch()))
    for strategy in ("ddp", "fsdp"):
        found = torch.load(tmp_path / f"{strategy}.pt")
        for name, weight in module.transformer.named_parameters():
            if weight.grad is not None:
                torch.testing.assert_close(found[name], weight.grad, rtol=1e-4, atol=1e-6, msg=f"{strategy} {name}")
    assert BERT.depth == 2  # with several groups of FSDP2
