"""The contract of a backbone, for every registered name and its options; see ``networks.backbone``."""

import math
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.decoder import decode_classes
from maskgit_pl.decoding.predictors import ConditionalModel
from maskgit_pl.files import read_json
from maskgit_pl.masking import true_positions
from maskgit_pl.networks.backbone import (
    DEFAULT_BACKBONE,
    Backbone,
    BackboneConfig,
    backbones,
    build_config,
    create_network,
)
from maskgit_pl.networks.base_transformer import TransformerSizes
from maskgit_pl.networks.blocks import prepare_blocks
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pretrained.fine_tuning import weights_for
from maskgit_pl.pretrained.networks import PretrainedTransformer, fingerprint, load_transformer, save_transformer
from maskgit_pl.schedules import halton_order, mask_schedules
from maskgit_pl.training.strategies import shard_blocks
from tests.conftest import save_tiny_pretrained
from tests.forked import run_ranks
from tests.networks.backbone_cases import all_configs, create, inputs, small_config
from tests.short_runs import data, fit, masked_model

CASES = all_configs()
NAMES = backbones.names()
over_all = pytest.mark.parametrize("config", CASES)


def test_a_recipe_without_a_backbone_means_the_transformer_of_the_paper():
    assert DEFAULT_BACKBONE == "bert"
    values = {"codebook_size": 16, "num_classes": 3, "grid": [4, 4]}
    assert build_config(values, "test") == build_config({**values, "backbone": "bert"}, "test")


@over_all
def test_logits_have_a_row_for_each_token_and_a_column_for_each_code(config):
    tokens, labels, _, vectors = inputs(config)
    network = create(config)
    logits = network(tokens, labels, vectors=vectors)
    assert (logits.shape, logits.dtype) == ((4, 12, 16), torch.float32)
    every = network(tokens, labels, vectors=vectors, vocabulary="all")
    assert every.shape[:2] == (4, 12)
    torch.testing.assert_close(every[..., :16], logits, rtol=0, atol=1e-5)


@over_all
def test_some_tokens_have_the_logits_of_the_whole_forward_pass(config):
    tokens, labels, mask, vectors = inputs(config)
    network = create(config)
    for vocabulary in ("codes", "all"):
        whole = network(tokens, labels, vectors=vectors, vocabulary=vocabulary)
        masked = network.forward_selected(tokens, labels, true_positions(mask), vectors=vectors, vocabulary=vocabulary)
        torch.testing.assert_close(masked, whole[mask], rtol=0, atol=1e-5)
    positions = torch.tensor([[3, 0, 11], [1, 1, 2], [5, 4, 3], [0, 11, 7]])
    logits = network.forward_at(tokens, labels, positions, vectors=vectors)
    expected = network(tokens, labels, vectors=vectors)[torch.arange(4)[:, None], positions]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    predict = network.conditioned(labels, vectors)
    assert all(torch.equal(predict(tokens, positions), logits) for _ in range(2))


@over_all
def test_a_row_does_not_depend_on_the_rest_of_its_batch(config):
    tokens, labels, _, vectors = inputs(config)
    network = create(config)
    whole = network(tokens, labels, vectors=vectors)
    alone = network(tokens[2:3], labels[2:3], vectors=None if vectors is None else vectors[2:3])
    torch.testing.assert_close(alone, whole[2:3], rtol=0, atol=1e-5)


@over_all
def test_every_token_the_class_and_the_vector_change_the_logits(config):
    tokens, labels, _, vectors = inputs(config)
    network = create(config)
    before = network(tokens, labels, vectors=vectors)
    for position in range(config.num_tokens):
        other = tokens.clone()
        other[:, position] = (tokens[:, position] + 1) % config.codebook_size
        far = (position + 6) % config.num_tokens
        change = network(other, labels, vectors=vectors)[:, far] - before[:, far]
        assert change.abs().amax(-1).min() > 1e-6, f"token {position} must reach token {far}"
    assert (network(tokens, (labels + 1) % 3, vectors=vectors) - before).abs().amax((1, 2)).min() > 1e-4
    if vectors is not None:
        assert (network(tokens, labels, vectors=vectors + 1) - before).abs().amax((1, 2)).min() > 1e-4


def test_the_null_label_hides_the_vector():
    config = small_config("adaln", condition_dim=6)
    tokens, labels, _, vectors = inputs(config)
    network, hidden = create(config), labels.clone()
    hidden[::2] = config.null_label
    logits, others = (network(tokens, hidden, vectors=each) for each in (vectors, vectors * 3 + 1))
    assert torch.equal(logits[::2], others[::2])
    assert not torch.allclose(logits[1::2], others[1::2], atol=1e-3)
    # The null vector is learned, so it is not the same as a vector of zeros.
    zeros = network(tokens, labels, vectors=torch.zeros_like(vectors))
    assert not torch.allclose(zeros[::2], logits[::2], atol=1e-3)


@over_all
def test_gradients_reach_every_parameter(config):
    tokens, labels, mask, vectors = inputs(config)
    network = create(config).train()
    if config.null_label is not None:
        labels[0] = config.null_label
    logits = network.forward_selected(tokens, labels, true_positions(mask), vectors=vectors, vocabulary="all")
    torch.nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long)).backward()
    missing = [name for name, each in network.named_parameters() if each.grad is None or not each.grad.any()]
    assert missing == []


@over_all
def test_weights_start_the_same_and_are_all_in_the_state_dict(config):
    torch.manual_seed(0)
    first = config.create()
    torch.manual_seed(0)
    second = config.create()
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    with torch.device("meta"):
        empty = config.create()
    empty.load_state_dict(first.state_dict(), assign=True)
    tensors = [*empty.parameters(), *empty.buffers()]
    tensors += [each for part in empty.modules() for each in vars(part).values() if isinstance(each, torch.Tensor)]
    assert not any(tensor.is_meta for tensor in tensors)
    tokens, labels, _, vectors = inputs(config)
    assert torch.equal(empty.eval()(tokens, labels, vectors=vectors), first.eval()(tokens, labels, vectors=vectors))


@over_all
def test_bfloat16_weights_give_finite_logits_near_those_of_float32(config):
    tokens, labels, _, vectors = inputs(config)
    network = create(config)
    whole = network(tokens, labels, vectors=vectors)
    half = network.to(torch.bfloat16)(tokens, labels, vectors=vectors)
    assert half.isfinite().all()
    assert (half.float() - whole).abs().max() < 0.1 * whole.abs().max()


@over_all
def test_dropout_acts_in_training_only(config):
    tokens, labels, _, vectors = inputs(config)
    network = create(replace(config, dropout=0.5))
    assert torch.equal(*(network(tokens, labels, vectors=vectors) for _ in range(2)))
    network.train()
    assert not torch.allclose(*(network(tokens, labels, vectors=vectors) for _ in range(2)))


@pytest.mark.parametrize("config", [case for case in CASES if isinstance(case.values[0], TransformerSizes)])
@pytest.mark.parametrize("part", ["attention weights", "attention", "mlp"])
def test_dropout_acts_in_each_part_of_a_block_of_a_transformer(config, part):
    tokens, labels, _, vectors = inputs(config)
    network, seen = create(config).train(), []  # without the dropout of embeddings
    for block in network.blocks:
        block.dropout = 0.5
        for parameter in (block.proj if part == "mlp" else block.fc2).parameters():
            nn.init.zeros_(parameter)  # nothing comes from the other branch
        if part == "attention":  # its output only: the weights give ones
            block.proj.register_forward_pre_hook(lambda _, args: torch.ones_like(args[0]))
    network.blocks[0].proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    outputs = [network(tokens, labels, vectors=vectors) for _ in range(2)]
    assert not torch.allclose(*(seen if part == "attention weights" else outputs))


def gradients(network: Backbone, config: BackboneConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tokens, labels, mask, vectors = inputs(config)
    network.zero_grad()
    torch.manual_seed(3)
    logits = network.forward_selected(tokens, labels, true_positions(mask), vectors=vectors, vocabulary="all")
    loss = logits.square().mean()
    loss.backward()
    return loss.detach(), {name: each.grad.clone() for name, each in network.named_parameters()}


def same(one, other, **options) -> None:
    torch.testing.assert_close(one[0], other[0], **options)
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], **options)


@over_all
def test_checkpointed_blocks_give_bit_equal_losses_and_gradients(config):
    config = replace(config, dropout=0.1)
    network = create(config).train()
    plain = gradients(network, config)
    prepare_blocks(network.blocks, activation_checkpointing="blocks")
    same(gradients(network, config), plain, rtol=0, atol=0)


@pytest.mark.slow
@over_all
def test_gradients_are_bit_equal_with_several_threads(config):
    """Sums of several threads in the order in which they finish, as of ``x[index]``, differ from run to run."""
    tokens, labels, mask, vectors = (
        None if each is None else each.repeat_interleave(300, dim=0) for each in inputs(config)
    )  # 300 rows of one image in a row: torch divides sums of 32,768 numbers or more among threads
    network = create(config)
    torch.set_num_threads(4)
    try:
        runs = []
        for _ in range(3):
            network.zero_grad()
            network.forward_selected(tokens, labels, true_positions(mask), vectors=vectors).logsumexp(
                1
            ).square().mean().backward()
            runs.append({name: each.grad.clone() for name, each in network.named_parameters()})
    finally:
        torch.set_num_threads(1)
    for run in runs[1:]:
        assert [name for name, each in run.items() if not torch.equal(each, runs[0][name])] == []


@pytest.mark.exports
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns of its own imports and views
@over_all
def test_compiled_blocks_give_the_same_losses_and_gradients(config, monkeypatch):
    network = create(config).train()
    plain = gradients(network, config)
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiled(function, backend="aot_eager"))
    prepare_blocks(network.blocks, compiled="blocks")
    same(gradients(network, config), plain, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@over_all
def test_a_forward_in_another_mode_leaves_nothing_behind(config):
    for mode, grid in ((torch.inference_mode(), (5, 2)), (FakeTensorMode(allow_non_fake_inputs=True), (2, 5))):
        other = replace(config, grid=grid)  # of its own: whatever is kept for a grid is made in this mode
        network = create(other).train()
        tokens, labels, _, vectors = inputs(other)
        with mode:
            network(tokens, labels, vectors=vectors)
        assert all(each.isfinite().all() for each in gradients(network, other)[1].values())


def save(folder: Path, network: Backbone) -> Path:
    save_tiny_pretrained(folder)
    save_transformer(
        folder / "transformer",
        network.config,
        network.state_dict(),
        mask_schedule="cosine",
        decoding=DecodingConfig(num_steps=4),
        class_names=("a", "b", "c"),
        tokenizer_fingerprint=fingerprint(folder / "tokenizer"),
    )
    return folder


@pytest.mark.parametrize(("name", "num_groups"), [*((name, 1) for name in NAMES), ("bert", 2), ("adaln", 4)])
def test_two_steps_of_training_export_a_model_that_generates_and_edits(name, num_groups, tmp_path, tiny_shards):
    config = small_config(name, grid=[4, 4], dropout=0.1, num_token_groups=num_groups)
    given = save(tmp_path / "given", create(config))
    module = masked_model(config, given / "tokenizer", decoding=DecodingConfig(num_steps=4))
    before = {key: value.clone() for key, value in module.transformer.state_dict().items()}
    fit(module, data(tiny_shards), steps=2, folder=tmp_path / "checkpoints")
    assert any(not torch.equal(value, before[key]) for key, value in module.transformer.state_dict().items())
    module.export(tmp_path / "out", class_names=("a", "b", "c"))
    pipe = MaskGIT.from_pretrained(tmp_path / "out")
    images = pipe.generate([0, 1, 2], num_steps=3, seed=0)
    assert [image.size for image in images] == [(8, 8)] * 3
    left_half = torch.arange(64).reshape(8, 8) % 8 < 4
    (edited,) = pipe.inpaint(images[0], left_half, classes=[1], seed=0, num_steps=2)
    assert edited.size == (8, 8)


GRIDS = [(3, 4), (6, 8), (5, 3)]


@pytest.fixture(scope="module", params=CASES)
def trained(request, tmp_path_factory):
    """Returns a network and the same one read from a pretrained folder; tests must not change them."""
    network = create(request.param)
    return network, load_transformer(save(tmp_path_factory.mktemp("trained"), network) / "transformer")


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS)
def test_weights_follow_to_another_grid(trained, grid):
    network, given = trained
    config = network.config
    other = replace(config, grid=grid)
    resized_network = other.create().eval()
    resized_network.load_state_dict(weights_for(other, given))
    tokens, labels, _, vectors = inputs(other)
    logits = resized_network(tokens, labels, vectors=vectors)
    assert logits.shape == (4, grid[0] * grid[1], 16)
    assert logits.isfinite().all()
    if grid == config.grid:
        assert torch.equal(logits, network(tokens, labels, vectors=vectors))
        return
    # All tokens masked: the larger grid predicts what the smaller one predicts at the same place of the image.
    tokens, everywhere = torch.full_like(tokens, other.mask_token_id), torch.full((4, 12), config.mask_token_id)
    small = network(everywhere, labels, vectors=vectors).transpose(1, 2).unflatten(2, config.grid)
    resized = nn.functional.interpolate(small, size=grid, mode="bilinear").flatten(2).transpose(1, 2)
    large = resized_network(tokens, labels, vectors=vectors)
    assert nn.functional.cosine_similarity(large.flatten(1), resized.flatten(1)).min() > 0.5


def pretrained(network: Backbone) -> PretrainedTransformer:
    return PretrainedTransformer(network, None, DecodingConfig(num_steps=1), ("a", "b", "c"), "")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((12,), (30,)),
        ((12,), (5,)),
        ((3, 4), (2, 3, 4)),
        ((4, 3, 4), (2, 9, 4)),
        ((2, 3, 4), (5, 6, 8)),
        ((2, 3, 4), (5, 6)),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_positions_of_another_grid_are_resized_along_their_own_axes(name, old, new):
    network = create(config := small_config(name, grid=[*old]))
    (table,) = network.position_tables
    # column a of the table is the coordinate along axis a of (t, h, w), from 0 to 1
    axes = [torch.linspace(0, 1, size) if size > 1 else torch.zeros(1) for size in (*(1,) * (3 - len(old)), *old)]
    network.state_dict()[table][-config.num_tokens :, :3] = torch.cartesian_prod(*axes)
    other = replace(config, grid=new)
    rows = weights_for(other, pretrained(network))[table][-other.num_tokens :, :3]
    sizes = *(1,) * (3 - len(new)), *new
    for axis, column in enumerate(rows.T):
        lines = column.view(sizes).movedim(axis, 0).flatten(1)  # (size of the axis, others)
        torch.testing.assert_close(lines, lines[:, :1].expand_as(lines))
        if sizes[axis] > 1 and len(axes[axis]) > 1:
            assert (lines.diff(dim=0) > 0.01).all()


def test_positions_of_a_sequence_are_none_of_a_picture():
    config = small_config("bert", grid=[3, 4])
    message = (
        r"^model\.network\.grid must have as many axes as that of the pretrained transformer, \[3, 4\], got \[12\]"
    )
    with pytest.raises(ValueError, match=message):
        weights_for(replace(config, grid=(12,)), pretrained(create(config)))


@pytest.mark.parametrize("grid", [(49,), (7, 7), (4, 7, 7)])
@pytest.mark.parametrize("name", NAMES)
def test_a_network_of_one_to_three_axes_decodes_and_is_saved(name, grid, tmp_path):
    network = create(config := small_config(name, grid=[*grid]))
    logits = network(torch.full((1, config.num_tokens), config.mask_token_id), torch.tensor([0]))
    assert logits.shape == (1, math.prod(grid), 16)
    assert nn.functional.pdist(logits[0]).min() > 0.01  # equal tokens, but each place has a position of its own
    assert read_json(save(tmp_path, network) / "transformer/config.json")["network"]["grid"] == [*grid]
    loaded = load_transformer(tmp_path / "transformer").network
    assert loaded.config == config
    for selector in ("confidence", "halton"):
        decoder = DecodingConfig(num_steps=4, token_selector=selector).build_decoder(mask_schedules.build("cosine"))
        steps, others = (
            list(decode_classes(ConditionalModel(each, "cpu"), [0, 2], [5, 6], decoder=decoder, scales=[1.0] * 4))
            for each in (network, loaded)
        )
        assert torch.equal(steps[-1].tokens, others[-1].tokens)
        assert steps[-1].tokens.shape == (2, config.num_tokens)
        assert steps[-1].tokens.max() < 16
        if selector == "halton":
            kept = halton_order(grid)[: int((~steps[0].still_masked[0]).sum())]
            assert set((~steps[0].still_masked[0]).nonzero()[:, 0].tolist()) == set(kept)


def test_weights_follow_to_other_classes_and_to_class_dropout(trained):
    network, given = trained
    config = network.config
    other = replace(config, num_classes=5, class_dropout=0.1 if config.null_label is None else 0.0)
    weights = weights_for(other, given)
    tables = {*network.vocabulary_tables, *network.class_tables}
    kept = {name: tensor for name, tensor in network.state_dict().items() if name in weights and name not in tables}
    assert len(kept) > 10
    assert all(torch.equal(weights[name], tensor) for name, tensor in kept.items())
    fine_tuned = other.create().eval()
    fine_tuned.load_state_dict(weights)
    tokens, _, _, vectors = inputs(other)
    logits = [fine_tuned(tokens, torch.full((4,), label), vectors=vectors) for label in range(5)]
    assert all(torch.equal(each, logits[0]) for each in logits)  # each class starts as the mean of the old ones


@pytest.mark.parametrize("name", NAMES)
def test_another_backbone_or_size_is_refused_by_its_key(name, tmp_path):
    config = small_config(name)
    given = load_transformer(save(tmp_path, create(config)) / "transformer")
    if "depth" in {each.name for each in fields(config)}:
        with pytest.raises(ValueError, match=r"model\.network\.depth must be 2, as in .*, got 3"):
            weights_for(replace(config, depth=3), given)
    for other in set(NAMES) - {name}:
        with pytest.raises(ValueError, match=rf"model\.network\.backbone must be {name}, as in the .* got {other};"):
            weights_for(small_config(other), given)


@dataclass(frozen=True)
class LinearConfig(BackboneConfig):
    """A network of one matrix, with faults to choose from."""

    backbone: str = "linear"
    fault: str = ""

    def create(self) -> Any:
        return Linear(self)


class Linear(Backbone):
    def __init__(self, config: LinearConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(config.vocabulary_size, config.codebook_size - (config.fault == "columns"))
        self.own = nn.Embedding(config.num_tokens, config.codebook_size)

    def forward(self, tokens, labels, *, vectors=None, vocabulary="codes"):
        logits = self.table(tokens) + self.table(labels + self.config.codebook_size).unsqueeze(1)
        return logits[:, 1:] if self.config.fault == "rows" else logits


@pytest.mark.parametrize(("fault", "shape"), [("columns", "(2, 12, 15)"), ("rows", "(2, 11, 16)")])
def test_a_plugin_that_breaks_the_contract_is_refused_by_name(fault, shape):
    create_network(LinearConfig(16, 3, (3, 4)))
    message = f"backbone 'linear': forward must return logits of shape (B, N, K) = (2, 12, 16), got {shape}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        create_network(LinearConfig(16, 3, (3, 4), fault=fault))


def test_backbones_without_token_groups_refuse_them():
    with pytest.raises(ValueError, match="num_token_groups must be 1 for the backbone 'linear', got 2"):
        LinearConfig(16, 3, (3, 4), num_token_groups=2)


def test_a_network_that_defines_only_forward_has_all_methods():
    config = LinearConfig(16, 3, (3, 4))
    network = create(config)
    tokens, labels, mask, _ = inputs(config)
    whole = network(tokens, labels)
    assert torch.equal(network.forward_selected(tokens, labels, true_positions(mask)), whole[mask])
    assert torch.equal(network.forward_at(tokens, labels, torch.arange(12).expand(4, 12)), whole)
    assert len(network.blocks) == 0


def test_a_plugin_without_tables_starts_from_given_weights():
    config = LinearConfig(16, 3, (3, 4))
    assert weights_for(config, pretrained(create(config))).keys() == {"table.weight", "own.weight"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backbone": "bret"}, r"^here: unknown backbone 'bret': did you mean 'bert'\? known: "),
        ({"num_blocks": 3}, r"^here: backbone 'bert': unknown key 'num_blocks'"),
        ({"condition_dim": 4}, r"condition_dim must be 0 for the backbone bert, .* use the backbone adaln"),
        ({"class_dropout": 1.0}, r"^here: transformer class_dropout must be a number in \[0, 1\), got 1\.0"),
    ],
)
def test_wrong_values_are_refused_with_their_place(values, message):
    with pytest.raises(ValueError, match=message):
        build_config({"codebook_size": 16, "num_classes": 3, "grid": [3, 4], **values}, "here")
    with pytest.raises(ValueError, match="here must be a mapping"):
        build_config("bert", "here")


CONFIGS = [
    *map(small_config, backbones.names()),
    small_config("adaln", condition_dim=6, num_registers=2),
    small_config("bert", num_token_groups=2),
]


def step(network: torch.nn.Module, config: BackboneConfig, rows: slice) -> dict[str, torch.Tensor]:
    """Runs forward and backward pass of some rows of the batch, then decoding, and returns all results by name."""
    tokens, labels, mask, vectors = inputs(config)
    vectors = None if vectors is None else vectors[rows]
    tokens, labels, batch = tokens[rows], labels[rows], len(tokens)
    logits = network.forward_selected(
        tokens, labels, true_positions(mask[rows]), vectors=vectors, vocabulary=config.loss_columns("all")
    )
    (logits.square().sum() / batch).backward()
    results = {f"gradient of {name}": each.grad for name, each in network.named_parameters()}
    with torch.no_grad():
        positions = torch.arange(5).expand(len(tokens), 5)
        results["logits"] = network.forward_at(tokens, labels, positions, vectors=vectors)
        predict = network.conditioned(labels, vectors)
        assert all(torch.equal(predict(tokens, positions), results["logits"]) for _ in range(2))
    return results


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    results = []
    for config in CONFIGS:
        network = create(config).train()
        prepare_blocks(network.blocks, activation_checkpointing="blocks")
        shard_blocks(network, network.blocks, mesh, precision="32-true")
        parts = step(network, config, slice(2 * rank, 2 * rank + 2))
        results.append(
            {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in parts.items()}
        )
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.survival
def test_two_ranks_of_fsdp_compute_the_same_as_one_process(tmp_path):
    run_ranks(run_rank, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for config, first, second in zip(CONFIGS, *ranks, strict=True):
        alone = step(create(config).train(), config, slice(None))
        assert first.keys() == second.keys() == alone.keys()
        torch.testing.assert_close(torch.cat([first.pop("logits"), second.pop("logits")]), alone.pop("logits"))
        for name, gradient in alone.items():
            # FSDP2 averages over ranks; each rank has half of the sum. Gradients are as large as 11.
            torch.testing.assert_close(2 * first[name], gradient, rtol=1e-4, atol=1e-5, msg=f"{name} differs")
