"""After any change of its weights, a pipeline gives what a new pipeline with these weights gives."""

import copy
import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from maskgit_pl.networks.backbone import backbones, build_config
from maskgit_pl.networks.kernels import PackingLinear
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.bulk import generate_many
from maskgit_pl.pipeline.pretrained import load_transformer, read_negative_model, save_decoding, save_transformer
from tests.conftest import CLASSES, peak_predictions, save_tiny_pretrained

SMALL = {"bert": {"embed_dim": 8, "depth": 1, "num_heads": 1, "mlp_dim": 8}}
SMALL["adaln"] = {"embed_dim": 16, "depth": 1, "num_heads": 1, "mlp_dim": 16}


def save_weaker(folder, strong, *, class_dropout=0.1, **changes):
    """Saves a smaller transformer for the tokens of another model: an early checkpoint without a tokenizer."""
    like = load_transformer(strong / "transformer")
    sizes = {"codebook_size": 16, "num_classes": 3, "grid": (4, 4), "attention": "bidirectional"} | {
        name: value for name, value in changes.items() if name in ("codebook_size", "num_classes", "grid", "attention")
    }
    config = TransformerConfig(**sizes, embed_dim=8, depth=1, num_heads=1, mlp_dim=8, class_dropout=class_dropout)
    if "backbone" in changes:
        config = build_config({"codebook_size": 16, "num_classes": 3, "grid": [4, 4], **changes["backbone"]}, "network")
    with torch.random.fork_rng():
        torch.manual_seed(9)
        weights = peak_predictions(config.create()).state_dict()
    save_transformer(
        folder / "transformer",
        config,
        weights,
        mask_schedule="cosine" if config.attention == "bidirectional" else None,
        decoding=like.decoding if config.attention == "bidirectional" else like.decoding.__class__(16, None),
        class_names=changes.get("class_names", CLASSES),
        tokenizer_fingerprint=changes.get("fingerprint", like.tokenizer_fingerprint),
    )
    return folder


@pytest.fixture
def weaker(tiny_pretrained, tmp_path):
    return save_weaker(tmp_path / "early", tiny_pretrained)


@pytest.fixture
def pipe(tiny_pretrained) -> MaskGIT:
    return MaskGIT.from_pretrained(tiny_pretrained)


def tokens(pipe: MaskGIT, classes=(0, 1, 2), **options) -> torch.Tensor:
    return list(pipe.steps(list(classes), **options))[-1].tokens


def test_a_model_that_guides_itself_gives_the_unguided_images(pipe, tiny_pretrained):
    plain = tokens(pipe, guidance_scale=0)
    assert not torch.equal(plain, tokens(pipe, guidance_scale=4.0))
    for same in (tiny_pretrained, str(tiny_pretrained / "transformer"), pipe):
        assert torch.equal(plain, tokens(pipe, guidance_scale=4.0, negative_model=same))


def test_a_folder_a_pipeline_and_the_default_of_the_pipeline_give_the_same_images(pipe, tiny_pretrained, weaker):
    made = tokens(pipe, guidance_scale=2.0, negative_model=weaker)
    assert not torch.equal(made, tokens(pipe, guidance_scale=2.0))
    assert torch.equal(made, tokens(pipe, guidance_scale=2.0, negative_model=load_transformer(weaker / "transformer")))
    own = MaskGIT.from_pretrained(tiny_pretrained, negative_model=weaker)
    assert torch.equal(made, tokens(own, guidance_scale=2.0))
    assert torch.equal(tokens(own, guidance_scale=2.0, negative_model=pipe), tokens(pipe, guidance_scale=0))


@pytest.mark.parametrize("name", sorted(backbones.names()))
def test_the_networks_may_be_of_any_two_backbones(pipe, tiny_pretrained, tmp_path, name):
    weak = save_weaker(tmp_path / "weak", tiny_pretrained, backbone={"backbone": name, **SMALL.get(name, {})})
    made = tokens(pipe, guidance_scale=2.0, negative_model=weak)
    assert made.max() < 16
    assert not torch.equal(made, tokens(pipe, guidance_scale=0))


def test_editing_takes_a_negative_model(pipe, weaker):
    image = Image.fromarray(np.full((8, 8), 90, np.uint8))
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:, 4:] = True
    options = {"classes": [1, 2], "output_type": "pt", "guidance_scale": 3.0, "blend": 0.0, "dilation": 0}
    guided = pipe.inpaint(image, mask, negative_model=weaker, **options)
    plain = pipe.inpaint(image, mask, **options)
    assert not torch.equal(guided, plain)
    assert torch.equal(guided[..., :4], plain[..., :4])
    assert torch.equal(
        pipe.inpaint(image, mask, negative_model=pipe, **options),
        pipe.inpaint(image, mask, **options | {"guidance_scale": 0}),
    )


def test_a_model_without_a_null_class_can_be_guided(tmp_path):
    folder = save_tiny_pretrained(tmp_path / "strong", class_dropout=0.0)
    pipe = MaskGIT.from_pretrained(folder)
    with pytest.raises(ValueError, match="no null class"):
        tokens(pipe, guidance_scale=1.0)
    assert tokens(pipe, guidance_scale=1.0, negative_model=save_weaker(tmp_path / "weak", folder)).max() < 16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "f" * 64}, "negative_model must have the tokenizer .*, got 'ffffffffffff'"),
        ({"codebook_size": 8}, "negative_model must have codebook_size 16, .* got 8"),
        ({"grid": (2, 4)}, r"negative_model must have grid \(4, 4\), .* got \(2, 4\)"),
        ({"backbone": {"backbone": "adaln", "condition_dim": 5}}, "negative_model must have condition_dim 0, .* got 5"),
        ({"class_names": ("Bag", "T-shirt", "Trouser")}, "negative_model must have class_names .*Ankle boot.*got.*Bag"),
        ({"attention": "causal"}, "negative_model must have attention 'bidirectional', .* got 'causal'"),
    ],
)
def test_refuses_a_model_of_other_tokens(pipe, tiny_pretrained, tmp_path, changes, message):
    other = save_weaker(tmp_path / "other", tiny_pretrained, **changes)
    with pytest.raises(ValueError, match=message):
        pipe.generate([0], negative_model=other)
    with pytest.raises(ValueError, match=message):
        MaskGIT.from_pretrained(tiny_pretrained, negative_model=other)


def test_refuses_what_is_no_model(pipe, tmp_path, tiny_autoregressive, weaker):
    with pytest.raises(FileNotFoundError, match=r"negative_model .*nowhere must be a run .*maskgit export RUN"):
        pipe.generate([0], negative_model=tmp_path / "nowhere")
    with pytest.raises(TypeError, match=r"negative_model must be a folder, .* got int"):
        pipe.generate([0], negative_model=3)
    with pytest.raises(ValueError, match="negative_model requires a model with bidirectional attention"):
        MaskGIT.from_pretrained(tiny_autoregressive).generate([0], negative_model=weaker)


def test_no_class_needs_a_null_class_in_the_negative_model(pipe, tiny_pretrained, tmp_path):
    weak = save_weaker(tmp_path / "weak", tiny_pretrained, class_dropout=0.0)
    with pytest.raises(ValueError, match="negative_model must have a null class"):
        pipe.generate([None], negative_model=weak)
    with pytest.raises(ValueError, match="negative_model must have a null class"):
        pipe.generate([0], negative_model=weak, negative_classes=[None])
    assert len(pipe.generate([0], negative_model=weak, negative_classes=[1])) == 1


def test_decoding_json_records_the_negative_model_and_moves_with_the_folders(tiny_pretrained, weaker, tmp_path):
    shutil.copytree(tiny_pretrained, tmp_path / "pretrained")
    pipe = MaskGIT.from_pretrained(tmp_path / "pretrained", negative_model=weaker)
    decoding = pipe.decoding_with(guidance_scale=2.0)
    save_decoding(tmp_path / "pretrained", decoding, negative_model=pipe.negative_model.folder)
    content = json.loads((tmp_path / "pretrained" / "decoding.json").read_text())
    assert content["negative_model"]["folder"] == "../early/transformer"
    expected = tokens(pipe, guidance_scale=2.0)
    (tmp_path / "moved").mkdir()
    for name in ("pretrained", "early"):
        shutil.move(tmp_path / name, tmp_path / "moved" / name)
    again = MaskGIT.from_pretrained(tmp_path / "moved" / "pretrained")
    assert torch.equal(tokens(again), expected)
    shutil.rmtree(tmp_path / "moved" / "early")
    with pytest.raises(FileNotFoundError, match=r"negative_model: no transformer in .*early.*delete the file"):
        MaskGIT.from_pretrained(tmp_path / "moved" / "pretrained")


def test_a_changed_negative_model_is_named_in_a_warning(tiny_pretrained, weaker, tmp_path, caplog):
    shutil.copytree(tiny_pretrained, tmp_path / "pretrained")
    pipe = MaskGIT.from_pretrained(tmp_path / "pretrained", negative_model=weaker)
    save_decoding(tmp_path / "pretrained", pipe.decoding, negative_model=pipe.negative_model.folder)
    assert read_negative_model(tmp_path / "pretrained" / "decoding.json").samefile(weaker / "transformer")
    assert not caplog.records
    shutil.copy(tiny_pretrained / "transformer" / "model.safetensors", weaker / "transformer")
    read_negative_model(tmp_path / "pretrained" / "decoding.json")
    assert "has other weights than those of the search" in caplog.text


@pytest.mark.parametrize("entry", ["early", 3, {"folder": "early"}, {"folder": 1, "transformer": "a"}])
def test_refuses_a_record_that_is_none(tmp_path, entry):
    file = tmp_path / "decoding.json"
    file.write_text(json.dumps({"negative_model": entry}))
    with pytest.raises(ValueError, match="negative_model must be a mapping with the texts folder and transformer"):
        read_negative_model(file)


@pytest.mark.slow
def test_a_saved_pipeline_holds_its_negative_model(tiny_pretrained, weaker, tmp_path):
    pipe = MaskGIT.from_pretrained(tiny_pretrained, negative_model=weaker)
    pipe.save_pretrained(tmp_path / "copy")
    shutil.rmtree(weaker)
    again = MaskGIT.from_pretrained(tmp_path / "copy")
    assert torch.equal(tokens(again, guidance_scale=3.0), tokens(pipe, guidance_scale=3.0))
    again.save_pretrained(tmp_path / "copy")  # into its own folder
    assert MaskGIT.from_pretrained(tmp_path / "copy").negative_model is not None


def test_a_negative_model_from_memory_is_saved_in_the_type_of_the_pipeline(pipe, tiny_pretrained, tmp_path):
    from_memory = MaskGIT.from_pretrained(tiny_pretrained, negative_model=pipe).to("cpu", dtype=torch.bfloat16)
    from_memory.save_pretrained(tmp_path / "copy")
    again = MaskGIT.from_pretrained(tmp_path / "copy")
    assert again.negative_model.network.state_dict().keys() == pipe.transformer.network.state_dict().keys()
    assert torch.equal(tokens(again, guidance_scale=3.0), tokens(again, guidance_scale=0))  # it is guided by itself


def test_other_files_are_found_before_anything_is_written(tiny_pretrained, weaker, tmp_path):
    pipe = MaskGIT.from_pretrained(tiny_pretrained, negative_model=weaker)
    for name in ("negative", "transformer"):
        (tmp_path / name / name).mkdir(parents=True)
        (tmp_path / name / name / "notes.txt").touch()
        with pytest.raises(FileExistsError, match=r"got also notes\.txt"):
            pipe.save_pretrained(tmp_path / name)
        assert [path.name for path in (tmp_path / name).iterdir()] == [name]


@pytest.mark.slow
def test_a_loaded_pipeline_keeps_its_images_when_its_folder_gets_another_negative_model(
    tiny_pretrained, weaker, tmp_path
):
    first = MaskGIT.from_pretrained(tiny_pretrained, negative_model=weaker)
    first.save_pretrained(tmp_path / "copy")
    loaded = MaskGIT.from_pretrained(tmp_path / "copy")
    before = tokens(loaded, guidance_scale=3.0)
    other = load_transformer(weaker / "transformer")
    for parameter in other.network.parameters():
        parameter.data.copy_(-parameter.data)
    MaskGIT(first.tokenizer, other).save_pretrained(tmp_path / "other")
    MaskGIT.from_pretrained(tiny_pretrained, negative_model=tmp_path / "other").save_pretrained(tmp_path / "copy")
    weights = list(loaded.negative_model.network.parameters())
    assert all(torch.equal(one, -two) for one, two in zip(weights, other.network.parameters(), strict=True))
    loaded.negative_model.caches.clear()
    assert torch.equal(tokens(loaded, guidance_scale=3.0), before)
    assert not torch.equal(tokens(MaskGIT.from_pretrained(tmp_path / "copy"), guidance_scale=3.0), before)


@pytest.mark.slow
def test_a_pipeline_without_a_negative_model_removes_that_of_the_older_one(tiny_pretrained, weaker, tmp_path):
    MaskGIT.from_pretrained(tiny_pretrained, negative_model=weaker).save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "negative").is_dir()
    MaskGIT.from_pretrained(tiny_pretrained).save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / "negative").exists()
    assert MaskGIT.from_pretrained(tmp_path / "copy").negative_model is None
    (tmp_path / "copy" / "negative").mkdir()
    (tmp_path / "copy" / "negative" / "notes.txt").touch()
    MaskGIT.from_pretrained(tiny_pretrained).save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "negative" / "notes.txt").is_file()
    shutil.rmtree(tmp_path / "copy" / "negative")
    (tmp_path / "copy" / "negative").symlink_to(weaker / "transformer")
    MaskGIT.from_pretrained(tiny_pretrained).save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / "negative").is_symlink()
    assert (weaker / "transformer" / "model.safetensors").is_file()


def test_the_folder_of_the_negative_model_may_be_replaced_by_the_pipeline(tiny_pretrained, weaker):
    pipe = MaskGIT.from_pretrained(tiny_pretrained, negative_model=weaker)
    weak = (weaker / "transformer" / "model.safetensors").read_bytes()
    pipe.save_pretrained(weaker)
    assert (weaker / "negative" / "model.safetensors").read_bytes() == weak
    again = MaskGIT.from_pretrained(weaker)
    assert torch.equal(tokens(again, guidance_scale=3.0), tokens(pipe, guidance_scale=3.0))


def test_a_cast_pipeline_keeps_its_negative_model(tiny_pretrained, weaker):
    pipe = MaskGIT.from_pretrained(tiny_pretrained, negative_model=weaker).to("cpu", dtype=torch.bfloat16)
    assert next(pipe.negative_model.network.parameters()).dtype == torch.bfloat16
    assert tokens(pipe, guidance_scale=2.0).max() < 16


def test_many_images_are_not_mixed_with_those_of_another_negative_model(pipe, tiny_pretrained, weaker, tmp_path):
    file = tmp_path / "made.npz"
    generate_many(pipe, file, num_images=6)
    guided = MaskGIT.from_pretrained(tiny_pretrained, negative_model=weaker)
    with pytest.raises(ValueError, match="negative_model None -> "):
        generate_many(guided, file, num_images=6)
    other = tmp_path / "other.npz"
    generate_many(guided, other, num_images=6)
    with np.load(file) as first, np.load(other) as second:
        assert (first["arr_0"] != second["arr_0"]).any()
    # Without guidance the negative model changes nothing, and is not part of the plan.
    generate_many(guided, tmp_path / "plain.npz", num_images=6, guidance_scale=0)
    assert generate_many(pipe, tmp_path / "plain.npz", num_images=6, guidance_scale=0).made == 0


def train(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tokens, labels = torch.zeros(3, 16, dtype=torch.int64), torch.arange(3)
    logits = network(tokens, labels).flatten(0, 1)
    F.cross_entropy(logits, torch.arange(48) % 16).backward()
    optimizer.step()
    optimizer.zero_grad()


def fused_adamw(network: nn.Module) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.3, fused=True)
    for _ in range(2):
        train(network, optimizer)


def sgd(network: nn.Module) -> None:
    train(network, torch.optim.SGD(network.parameters(), lr=3.0))


def average_through_data(network: nn.Module) -> None:
    for weight in network.parameters():
        weight.data.mul_(-0.5).add_(torch.linspace(-1, 1, weight.numel()).reshape(weight.shape), alpha=0.5)


def assign_data(network: nn.Module) -> None:
    for weight in network.parameters():
        weight.data = weight.data.roll(1, 0) * -2


def load_weights(network: nn.Module) -> None:
    network.load_state_dict({name: weight.roll(1, 0) * -2 for name, weight in network.state_dict().items()})


def write_with_numpy(network: nn.Module) -> None:
    for weight in network.parameters():
        weight.detach().numpy()[:] *= -2


def write_one_row_with_numpy(network: nn.Module) -> None:
    for layer in network.modules():
        if isinstance(layer, PackingLinear):
            layer.weight.detach().numpy()[1] += 3


CHANGES = [
    fused_adamw,
    sgd,
    average_through_data,
    assign_data,
    load_weights,
    write_with_numpy,
    write_one_row_with_numpy,
]
IMAGE = torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8)
CALLS = {
    "generate": lambda cached_pipe: cached_pipe.generate([0, 1, 2], seed=0, output_type="pt"),
    "inpaint": lambda cached_pipe: cached_pipe.inpaint(IMAGE, IMAGE[0] > 20, classes=[1], output_type="pt", blend=0),
    "panorama": lambda cached_pipe: cached_pipe.panorama([1], 16, output_type="pt"),
}


@pytest.fixture
def cached_pipe(tiny_pretrained) -> MaskGIT:
    made = MaskGIT.from_pretrained(tiny_pretrained)
    made.transformer.network.requires_grad_(requires_grad=True)
    return made


def renewed(cached_pipe: MaskGIT, **options) -> MaskGIT:
    """Returns a new pipeline with the present weights of another."""
    transformer = replace(cached_pipe.transformer, network=copy.deepcopy(cached_pipe.transformer.network))
    return MaskGIT(cached_pipe.tokenizer, transformer, **options)


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_pipeline_follows_its_weights(cached_pipe, change, call):
    before = call(cached_pipe)
    change(cached_pipe.transformer.network)
    after = call(renewed(cached_pipe))
    assert not torch.equal(before, after)
    assert torch.equal(call(cached_pipe), after)


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_pipeline_follows_the_weights_of_its_negative_model(cached_pipe, change):
    own = renewed(cached_pipe, negative_model=cached_pipe)
    options = {"guidance_scale": 50.0, "seed": 0, "output_type": "pt"}
    before = own.generate([0, 1, 2], **options)
    change(cached_pipe.transformer.network)
    after = own.generate([0, 1, 2], negative_model=renewed(cached_pipe), **options)
    assert not torch.equal(before, after)
    assert torch.equal(own.generate([0, 1, 2], **options), after)


def test_the_last_step_is_followed_even_if_images_are_made_between_the_gradients_and_the_step(cached_pipe):
    network = cached_pipe.transformer.network
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.3, fused=True)
    network(torch.zeros(3, 16, dtype=torch.int64), torch.arange(3)).square().mean().backward()
    CALLS["generate"](cached_pipe)
    optimizer.step()
    assert torch.equal(CALLS["generate"](cached_pipe), CALLS["generate"](renewed(cached_pipe)))


def test_unchanged_weights_are_neither_packed_nor_decoded_again(cached_pipe):
    CALLS["generate"](cached_pipe)
    layers = [layer for layer in cached_pipe.transformer.network.modules() if isinstance(layer, PackingLinear)]
    packed, logits = [dict(layer._packed) for layer in layers], dict(cached_pipe.transformer.caches.first_step._known)
    assert logits
    CALLS["inpaint"](cached_pipe)
    CALLS["generate"](cached_pipe)
    assert all(cached_pipe.transformer.caches.first_step._known[label] is each for label, each in logits.items())
    for layer, before in zip(layers, packed, strict=True):
        assert all(layer._packed[rows] is each for rows, each in before.items())


def test_a_write_to_one_entry_of_a_large_weight_needs_clear_caches(cached_pipe):
    with torch.no_grad():
        weight = nn.Parameter(torch.zeros(128, 64))
        cached_pipe.transformer.network.register_parameter("large", weight)
    CALLS["generate"](cached_pipe)
    weight.detach().numpy()[0, 1] = 1  # the comparison reads entries 0, 509, ...
    CALLS["generate"](cached_pipe)
    assert cached_pipe.transformer.caches.first_step._known
    cached_pipe.clear_caches()
    assert not cached_pipe.transformer.caches.first_step._known


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cached_pipe: pickle.loads(pickle.dumps(cached_pipe))])
def test_copies_follow_their_own_weights(cached_pipe, copied):
    before = CALLS["generate"](cached_pipe)
    other = copied(cached_pipe)
    assert torch.equal(CALLS["generate"](other), before)
    write_with_numpy(other.transformer.network)
    assert torch.equal(CALLS["generate"](other), CALLS["generate"](renewed(other)))
    assert torch.equal(CALLS["generate"](cached_pipe), before)


def test_a_pickle_holds_the_weights_once(cached_pipe):
    CALLS["generate"](cached_pipe)
    cached_pipe.transformer.caches.first_step.clear()
    assert len(pickle.dumps(cached_pipe.transformer.caches)) < 1.5 * len(pickle.dumps(cached_pipe.transformer.network))
