"""Memory and FLOPs of a training step, counted in a step on tensors that have shapes but no content.

``doctor`` says with them whether a run fits into a device. The counted step runs the code of the training, forward and
backward, in torch's ``FakeTensorMode``: it takes seconds for any size of network and batch, and needs no GPU. Such a
step must have no operation whose result has a size that depends on values.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from maskgit_pl.checks import ImageSize, height_width
from maskgit_pl.data import Batch
from maskgit_pl.masking import Draws
from maskgit_pl.networks.blocks import ActivationCheckpointing, prepare_blocks
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.networks.weights import ZeroWeights, skeletons
from maskgit_pl.schedules import num_masked
from maskgit_pl.tokenizer.module import Tokenizer
from maskgit_pl.training.optimizers import state_values
from maskgit_pl.transformer.distilled_model import DistilledModel
from maskgit_pl.transformer.mvtm import MaskedTokenModel
from maskgit_pl.transformer.token_model import TokenModel

Encoder = tuple[VQGANConfig, ImageSize]
"""Sizes of the tokenizer that encodes the images of stage 2, and its image size in pixels."""

_FLOAT, _HALF = 4, 2  # bytes: weights, gradients and moments are float32 in both precisions


@dataclass(frozen=True)
class Memory:
    """The peak memory of a step on the rank with the largest share, in bytes, without the device's own context.

    Attributes:
        states: Weights, gradients, optimizer, average, networks that do not train. Under FSDP2, a shard.
        gathered: Whole weights and gradients that FSDP2 holds temporarily.
        activations: Peak of everything else: what is kept for the backward pass, temporary tensors, and under
            bf16-mixed the bfloat16 copies of the weights.
    """

    states: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.states + self.gathered + self.activations


def step_memory(
    module: TokenModel | Tokenizer,
    *,
    per_device: int,
    strategy: str = "auto",
    ranks: int = 1,
    precision: str = "32-true",
    encoder: Encoder | None = None,
    encodes: bool = False,
) -> Memory:
    """Calculates the peak memory of a training step whose tokens are all masked, the largest that there can be.

    With AdamW, each trained parameter takes 20 bytes: 4 as a weight, 4 as a gradient, 8 in two moments and 4 in the
    average. ``auto`` and ``ddp`` hold all of them (DDP's buckets are the gradients themselves), ``fsdp`` holds a share.
    At its peak, FSDP2 also holds weights and gradients of the root (all parameters outside of blocks), and five blocks:
    weights of this block and of the next, the buffer of that all-gather, gradients, and the buffer of their
    reduce-scatter. Under bf16-mixed, it gathers weights in bfloat16, and autocast makes no copies.

    Stage 1 is counted in float32, an upper bound under bf16-mixed: norms and the R1 penalty stay in float32.

    Args:
        module: The module that would be trained. It stays as it is.
        per_device: Samples of a micro-batch on a rank.
        strategy: Strategy of the Trainer; stage 1 trains under ``auto`` and ``ddp`` only.
        ranks: Number of ranks.
        precision: Precision of the Trainer.
        encoder: Tokenizer of stage 2, if known.
        encodes: True if stage 2 encodes images, instead of reading tokens.
    """
    config, is_half = module.config, precision != "32-true"
    trained = _trained(module)
    copies = _HALF * sum(parameter.numel() for parameter in trained if parameter.ndim > 1) if is_half else 0
    trained_values, averaged, gathered = _count(trained), _count(module.ema_network.parameters()), 0
    if isinstance(module, TokenModel):
        with skeletons():
            frozen = 0 if encoder is None else _bytes_of(VQGAN(encoder[0]))
            frozen += _bytes_of(module.transformer) if isinstance(module, DistilledModel) else 0  # the teacher
        activations = _run_token_step(
            module, images=per_device, masked=module.config.network.num_tokens, encoder=encoder if encodes else None,
            checkpointing=config.activation_checkpointing, is_half=is_half,
        ).peak * len(_trained_networks(module))  # fmt: skip
        if strategy == "fsdp":
            block = max((_count(block.parameters()) for block in module.transformer.blocks), default=0)
            root = trained_values - sum(_count(block.parameters()) for block in module.transformer.blocks)
            gathered = (_HALF if is_half else _FLOAT) * (root + 3 * block) + _FLOAT * (root + 2 * block)
            trained_values, averaged = -(-trained_values // ranks), -(-averaged // ranks)
            activations -= copies
    else:
        step = _first_full_step(module)
        meter = _run_tokenizer_step(module, images=per_device, step=step, checkpointing=config.activation_checkpointing)
        activations = meter.peak + copies
        others = _bytes_of(*_trained_networks(module), *_perceptual_networks(module)) - _FLOAT * trained_values
        frozen = others + sum(buffer.nbytes for buffer in module.network.buffers())  # of the average
    states = _FLOAT * (trained_values * (2 + state_values(config.optimizer)) + averaged) + frozen
    return Memory(round(states), gathered, activations)


@sdpa_kernel(SDPBackend.MATH)  # torch has no formula for the fused kernel of CPUs
def useful_flops(module: TokenModel | Tokenizer, *, global_batch: int, encoder: Encoder | None = None) -> float:
    """Returns the FLOPs of a step over all ranks: matrix products and convolutions, forward and backward.

    What activation checkpointing computes again does not count, nor the networks of a distillation beside the student.
    The masked tokens are the mean of the training; the R1 penalty counts in the mean over the steps from one to the
    next.

    Args:
        module: The module that trains. It stays as it is.
        global_batch: Samples of a step.
        encoder: Tokenizer, if stage 2 encodes images instead of reading tokens.
    """
    if isinstance(module, TokenModel):
        masked = round(count_predicted(module))
        return global_batch * _run_token_step(module, images=1, masked=masked, encoder=encoder).flops
    step, config = _first_full_step(module), module.config.adversarial
    flops = float(_run_tokenizer_step(module, images=1, step=step).flops)
    if config is not None and config.r1_weight > 0 and config.r1_every > 1:
        without = _run_tokenizer_step(module, images=1, step=step + 1).flops
        flops = without + (flops - without) / config.r1_every
    return global_batch * flops


def count_predicted(module: TokenModel) -> float:
    """Returns the mean number of tokens per image at which training computes logits."""
    num_tokens = module.config.network.num_tokens
    if not isinstance(module, MaskedTokenModel) or module.objective.visible_weight > 0:
        return float(num_tokens)
    progress = (torch.arange(4096) + 0.5) / 4096
    ratios = module.mask_sampler.mask_ratio(progress, module.mask_schedule, num_tokens)
    return float(num_masked(ratios, num_tokens, rounding="ceil").double().mean())


def checkpoint_bytes(module: TokenModel | Tokenizer) -> int:
    """Returns the size of a checkpoint: weights, buffers, moments and averages, under each strategy.

    Each trained tensor adds about 1,200 bytes: its names in the header and in ``state.json``, and its step counts.
    """
    trained = _trained(module)
    moments = state_values(module.config.optimizer) * _FLOAT * _count(trained)
    return round(_bytes_of(*_trained_networks(module), module.ema_network) + moments) + 1200 * len(trained)


# The counted steps


def _run_token_step(
    module: TokenModel,
    *,
    images: int,
    masked: int,
    encoder: Encoder | None = None,
    checkpointing: ActivationCheckpointing = "none",
    is_half: bool = False,
) -> StepMeter:
    """Counts a micro-batch of stage 2, with ``masked`` tokens of each image that the network predicts.

    ``encoder`` encodes images to tokens first. With ``is_half``, dtypes are those of autocast on a CPU, which
    are those on a GPU for the layers of our backbones.
    """
    config = module.config.network
    with skeletons():
        network = config.create()
        tokenizers = [] if encoder is None else [VQGAN(encoder[0]).requires_grad_(requires_grad=False)]
    for block in network.blocks:  # no mode reaches the blocks that the backward pass runs again
        block.forward = partial(_as_on_gpu, block.forward)
    prepare_blocks(network.blocks, activation_checkpointing=checkpointing)
    with _count_step(network, *tokenizers) as meter, torch.autocast("cpu", torch.bfloat16, enabled=is_half):
        if encoder is not None:
            content = torch.empty(images, encoder[0].in_channels, *height_width(encoder[1]))
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                tokenizers[0].encode(content)
        number = torch.zeros(images, dtype=torch.int64)
        tokens = number.unsqueeze(1).repeat(1, config.num_tokens)
        vectors = torch.empty(images, config.condition_dim) if config.condition_dim else None
        draws = Draws(number, tokens == 0, torch.arange(images * masked))
        batch = Batch(tokens, number, number, number, number, number == 0, vectors=vectors, draws=draws)
        with _GPUKernels():
            losses = module.compute_losses(network, batch, tokens, smoothing=module.config.label_smoothing)
        torch.autograd.backward(losses.loss)
    return meter


def _run_tokenizer_step(
    module: Tokenizer, *, images: int, step: int, checkpointing: ActivationCheckpointing = "none"
) -> StepMeter:
    """Counts a micro-batch of a step of stage 1, with discriminator and R1 penalty if the step has them."""
    with torch.random.fork_rng(devices=[]), ZeroWeights():
        twin = Tokenizer(replace(module.config, activation_checkpointing=checkpointing))
    with _count_step(*_trained_networks(twin), *_perceptual_networks(twin)) as meter:
        size = height_width(twin.config.image_size)
        content = torch.empty(images, twin.config.network.in_channels, *size, dtype=torch.uint8)
        number = torch.zeros(images, dtype=torch.int64)
        batch = Batch(content, number, number, number, number, number == 0)
        twin.add_gradients(
            twin.prepare_images(batch, flip_probability=0.0), step=step, backward=torch.autograd.backward
        )
    return meter


def _first_full_step(module: Tokenizer) -> int:
    """Returns the first step with discriminator and R1 penalty: the most expensive kind of step."""
    config = module.config.adversarial
    return 0 if config is None else -(-config.start_step // config.r1_every) * config.r1_every


def _trained_networks(module: TokenModel | Tokenizer) -> list[nn.Module]:
    if isinstance(module, DistilledModel) and module.auxiliary is not None:
        return [module.transformer, module.auxiliary]
    if isinstance(module, TokenModel):
        return [module.transformer]
    return [module.network] if module.discriminator is None else [module.network, module.discriminator]


def _trained(module: TokenModel | Tokenizer) -> list[Tensor]:
    parameters = (parameter for network in _trained_networks(module) for parameter in network.parameters())
    return [parameter for parameter in parameters if parameter.requires_grad]


def _perceptual_networks(module: Tokenizer) -> list[nn.Module]:
    return [network for network in module.loss_terms.networks.values() if isinstance(network, nn.Module)]


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _bytes_of(*networks: nn.Module) -> int:
    return sum(tensor.nbytes for network in networks for tensor in (*network.parameters(), *network.buffers()))


@contextmanager
def _count_step(*networks: nn.Module) -> Iterator[StepMeter]:
    """Counts the step in the context, in which tensors have shapes but no content.

    The networks, which may be on the meta device, lose their weights. Weights, gradients and buffers are not counted.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors: list[Tensor] = []
        for network in networks:
            network._apply(_empty)  # type: ignore[no-untyped-call]  # torch: untyped
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
                    tensors.append(parameter.grad)
            tensors += [*network.parameters(), *network.buffers()]
        with StepMeter(tensors) as meter:
            yield meter


def _empty(old: Tensor) -> Tensor:
    return torch.empty_strided(old.shape, old.stride(), dtype=old.dtype)


class StepMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch: untyped
    """A dispatch mode that counts FLOPs, and the bytes of living tensors that were allocated in its context.

    ``FlopCounterMode`` fails in ``autograd.grad``, and torch's ``MemTracker`` counts some tensors twice.

    Args:
        tensors: Existing tensors, which are not counted.

    Attributes:
        flops: FLOPs of matrix products and convolutions.
        live: Bytes that are alive now.
        peak: Maximum of ``live``.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch: untyped
        self.flops = self.live = self.peak = 0
        self._seen: set[int] = set()
        for tensor in tensors:
            self._see(tensor, counts=False)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Calls ``func``, and counts its FLOPs and the results that do not share memory with known tensors."""
        result = func(*args, **(kwargs or {}))
        operation = func._overloadpacket
        if operation in flop_registry:
            self.flops += int(flop_registry[operation](*args, **(kwargs or {}), out_val=result))
        tree_map_only(Tensor, self._see, result)
        return result

    def _see(self, tensor: Tensor, *, counts: bool = True) -> None:
        storage = tensor.untyped_storage()  # views share it and are counted once
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes() if counts else 0
        self.live += size
        self.peak = max(self.peak, self.live)
        # Called when the last tensor that shares the storage is freed.
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


class _GPUKernels(TorchFunctionMode):
    """Dropout and attention as on a GPU: a mask is bool, and attention with dropout is fused, too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls ``func``, or what replaces it."""
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            if len(args) > 4:  # query, key, value, mask, dropout, causal
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs["dropout_p"] = 0.0
        if func is F.dropout and kwargs["training"] and kwargs["p"] > 0:
            return torch.native_dropout(args[0], kwargs["p"], train=True)[0]
        return func(*args, **kwargs)


def _as_on_gpu(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    with _GPUKernels():
        return forward(*args, **kwargs)
