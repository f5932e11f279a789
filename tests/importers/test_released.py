import logging
import re
import shutil
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch

from maskgit_pl import importers
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.importers.flax import read_flax
from maskgit_pl.importers.released import (
    import_jax,
    parameters,
    tokenizer_config,
    tokenizer_weights,
    transformer_config,
    transformer_weights,
)
from maskgit_pl.networks.transformer import MaskedTransformer, TransformerConfig
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.pretrained import load_tokenizer, load_transformer

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENIZER, TRANSFORMER = GOLDEN / "vqvae_checkpoint.msgpack", GOLDEN / "transformer_n16_checkpoint.msgpack"
QUERY = "TransformerLayer_1/Attention_0/self_attention/query"


def arrays_of(file: Path) -> dict[str, np.ndarray]:
    return parameters(read_flax(file))


def write(file: Path, arrays: dict[str, np.ndarray], collection: str = "params", **others: object) -> Path:
    """A checkpoint as flax writes it."""
    tree: dict = {}
    for name, values in arrays.items():
        *folders, last = name.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = msgpack.ExtType(1, msgpack.packb((values.shape, values.dtype.name, values.tobytes())))
    file.write_bytes(msgpack.packb({collection: tree, **others}))
    return file


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger=importers.__name__)
    return lambda: [record.getMessage() for record in caplog.records]


# Sizes.


def test_the_sizes_of_a_transformer_are_read_off_its_arrays():
    config = transformer_config(arrays_of(TRANSFORMER), codebook_size=64)
    assert config == TransformerConfig(64, 10, (4, 4), 64, 2, 4, 128, dropout=0.1, class_dropout=0.0)
    assert transformer_config(arrays_of(TRANSFORMER), codebook_size=60).num_classes == 14


def test_the_sizes_of_a_tokenizer_are_read_off_its_arrays():
    config = tokenizer_config(arrays_of(TOKENIZER))
    sizes = {"base_channels": 32, "channel_multipliers": (1, 2), "num_res_blocks": 1, "num_middle_blocks": 1}
    assert config == VQGANConfig(3, **sizes, codebook_size=64, code_dim=32)
    spec = {"name": "gradient", "entropy_weight": 0.0}
    other = tokenizer_config(arrays_of(TOKENIZER), activation="relu", quantizer=spec)
    assert (other.activation, other.quantizer) == ("relu", spec)


def test_the_released_architecture_is_recognised():
    network = VQGAN(
        VQGANConfig(3, base_channels=32, codebook_size=8, code_dim=4)
    )  # five levels, two blocks each, and middle
    config = network.config
    assert tokenizer_config(theirs(network)) == config
    assert config.channel_multipliers == (1, 1, 2, 2, 4)


@pytest.mark.slow
@pytest.mark.parametrize("levels", [(1,), (1, 2), (1, 2, 1)])
@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("downsampling", ["average", "strided"])
def test_every_architecture_of_the_released_code_goes_there_and_back(levels, blocks, downsampling):
    config = VQGANConfig(
        3, base_channels=32, channel_multipliers=levels, num_res_blocks=blocks, num_middle_blocks=blocks,
        downsampling=downsampling if len(levels) > 1 else "average", codebook_size=8, code_dim=4,
    )  # fmt: skip
    network = VQGAN(config)
    arrays = theirs(network)
    assert tokenizer_config(arrays) == config
    weights = tokenizer_weights(arrays, config)
    assert weights.keys() == network.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in network.state_dict().items())


def theirs(network: VQGAN) -> dict[str, np.ndarray]:
    """Returns our weights by the released names, numbered by hand."""
    weights = network.state_dict()
    arrays = {"quantizer/codebook": weights.pop("quantizer.codebook").numpy()}
    for half in ("encoder", "decoder"):
        blocks, convolutions = 0, 1
        for place, block in enumerate(getattr(network, half).blocks):
            ours = f"{half}.blocks.{place}"
            if f"{ours}.norm1.weight" in weights:
                prefix = f"{half}/ResBlock_{blocks}"
                blocks += 1
                names = {"norm1": "GroupNorm_0", "conv1": "Conv_0", "norm2": "GroupNorm_1", "conv2": "Conv_1"}
                names["shortcut"] = "Conv_2"
                parts = {f"{ours}.{name}": f"{prefix}/{flax}" for name, flax in names.items()}
            elif isinstance(block, torch.nn.AvgPool2d):
                continue
            else:
                parts = {f"{ours}.conv": f"{half}/Conv_{convolutions}"}
                convolutions += 1
            arrays |= renamed(weights, parts)
        head = f"{half}/Conv_{convolutions}"
        parts = {f"{half}.stem": f"{half}/Conv_0", f"{half}.norm": f"{half}/GroupNorm_0", f"{half}.head": head}
        arrays |= renamed(weights, parts)
    assert not weights
    return arrays


def renamed(weights: dict[str, torch.Tensor], parts: dict[str, str]) -> dict[str, np.ndarray]:
    found = {}
    for ours, flax in parts.items():
        if f"{ours}.weight" in weights:
            weight = weights.pop(f"{ours}.weight")
            found[f"{flax}/{'kernel' if weight.ndim == 4 else 'scale'}"] = (
                weight.permute(2, 3, 1, 0) if weight.ndim == 4 else weight
            ).numpy()
        if f"{ours}.bias" in weights:
            found[f"{flax}/bias"] = weights.pop(f"{ours}.bias").numpy()
    return found


# Weights and gradients.


@pytest.mark.parametrize("file", ["transformer_n16_checkpoint", "transformer_n16_grads", "transformer_n256_checkpoint"])
def test_a_transformer_has_all_its_weights_and_each_where_it_belongs(file):
    arrays = arrays_of(GOLDEN / f"{file}.msgpack")
    config = transformer_config(arrays, codebook_size=64)
    weights = transformer_weights(arrays, config)
    network = MaskedTransformer(config)
    network.load_state_dict(weights)
    assert sum(tensor.numel() for tensor in weights.values()) == sum(array.size for array in arrays.values())
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    query = weights["blocks.1.qkv.weight"][:64]
    assert query[1 * 16 + 3, 5] == arrays[f"{QUERY}/kernel"][5, 1, 3]  # head 1, its output 3, of input 5
    out = weights["blocks.1.proj.weight"]
    assert out[5, 1 * 16 + 3] == arrays["TransformerLayer_1/Attention_0/self_attention/out/kernel"][1, 3, 5]
    value = weights["blocks.0.qkv.bias"][128:]
    assert value[1 * 16 + 3] == arrays["TransformerLayer_0/Attention_0/self_attention/value/bias"][1, 3]


def test_weights_are_copies_and_the_arrays_stay():
    arrays = arrays_of(TRANSFORMER)
    before = {name: array.copy() for name, array in arrays.items()}
    weights = transformer_weights(arrays, transformer_config(arrays, codebook_size=64))
    for tensor in weights.values():
        tensor.zero_()
    assert arrays.keys() == before.keys()
    assert all((arrays[name] == before[name]).all() for name in before)


def test_the_imported_networks_compute_what_was_recorded():
    arrays = arrays_of(TRANSFORMER)
    transformer = MaskedTransformer(transformer_config(arrays, codebook_size=64))
    transformer.load_state_dict(transformer_weights(arrays, transformer.config))
    recorded = np.load(GOLDEN / "transformer_n16.npz")
    sequence = torch.from_numpy(recorded["tokens"]).long() % 75  # -1 is the last row, the mask token
    with torch.inference_mode():
        logits = transformer.eval()(sequence[:, 1:], sequence[:, 0] - 64, vocabulary="all")
    torch.testing.assert_close(logits, torch.from_numpy(recorded["logits"][:, 1:]), atol=2e-5, rtol=1e-5)
    arrays = arrays_of(TOKENIZER)
    tokenizer = VQGAN(tokenizer_config(arrays))
    tokenizer.load_state_dict(tokenizer_weights(arrays, tokenizer.config))
    recorded = np.load(GOLDEN / "vqvae.npz")
    with torch.inference_mode():
        tokens = tokenizer.encode(torch.from_numpy(recorded["images"]).permute(0, 3, 1, 2))
        images = tokenizer.decode(torch.from_numpy(recorded["random_indices"]).long().flatten(1), (16, 16))
    assert (tokens.numpy() == recorded["indices"].reshape(2, -1)).all()
    expected = torch.from_numpy(recorded["decoded_from_random_indices"]).permute(0, 3, 1, 2)
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_floating_point_types_become_float32(dtype):
    arrays = arrays_of(TRANSFORMER)
    config = transformer_config(arrays, codebook_size=64)
    exact = transformer_weights(arrays, config)
    found = transformer_weights({name: array.astype(dtype) for name, array in arrays.items()}, config)
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, exact[name], atol=2e-3 if dtype == "float16" else 0, rtol=0)


# What is refused.


def test_missing_left_over_and_misshapen_arrays_are_listed_in_one_line():
    arrays = arrays_of(TRANSFORMER)
    config = transformer_config(arrays, codebook_size=64)
    for name in [name for name in arrays if name.startswith("TransformerLayer_1/Mlp_0")]:
        del arrays[name]
    arrays["MlmLayer_1/x"] = np.zeros(3, np.float32)
    arrays["MlmLayer_0/mlm_bias/bias"] = np.zeros(74, np.float32)
    with pytest.raises(
        ValueError, match="transformer arrays must have the names and shapes of the released code"
    ) as caught:
        transformer_weights(arrays, config)
    text = str(caught.value)
    assert "missing: TransformerLayer_1/Mlp_0/intermediate_output/bias, " in text
    assert "and 3 more" in text
    assert "superfluous: MlmLayer_1/x" in text
    assert "of another shape: MlmLayer_0/mlm_bias/bias (74,) instead of (75,)" in text
    assert "\n" not in text


def test_names_are_listed_in_their_natural_order():
    arrays = arrays_of(TRANSFORMER) | {f"Layer_{number}/x": np.zeros(1, np.float32) for number in (10, 2, 1, 30)}
    with pytest.raises(ValueError, match="superfluous: Layer_1/x, Layer_2/x, Layer_10/x and 1 more"):
        transformer_weights(arrays, transformer_config(arrays, codebook_size=64))


@pytest.mark.parametrize("name", ["encoder/ResBlock_1/Conv_2/kernel", "decoder/Conv_2/bias", "quantizer/codebook"])
@pytest.mark.parametrize("change", ["missing", "other shape", "transposed"])
def test_a_tokenizer_with_one_array_off_is_refused(name, change):
    arrays = arrays_of(TOKENIZER)
    config = tokenizer_config(arrays)
    array = arrays.pop(name)
    if change == "other shape":
        arrays[name] = array[..., :-1]
    elif change == "transposed" and array.shape != array.T.shape:
        arrays[name] = array.T
    with pytest.raises(ValueError, match=re.escape(name)):
        tokenizer_weights(arrays, config)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    arrays = arrays_of(TRANSFORMER)
    config = transformer_config(arrays, codebook_size=64)
    bias = arrays[f"{QUERY}/bias"].astype(np.float64)
    bias[1, 2] = value
    with pytest.raises(ValueError, match=f"{QUERY}/bias, .*must hold finite numbers"):
        transformer_weights(arrays | {f"{QUERY}/bias": bias}, config)


def test_weights_that_are_no_floating_point_numbers_are_refused_by_name():
    arrays = arrays_of(TRANSFORMER)
    config = transformer_config(arrays, codebook_size=64)
    with pytest.raises(ValueError, match=f"{QUERY}/bias must hold floating point numbers, got int32"):
        transformer_weights(arrays | {f"{QUERY}/bias": np.ones((4, 16), np.int32)}, config)


@pytest.mark.parametrize("codebook_size", [74, 75, 1024])
def test_a_codebook_that_leaves_no_class_is_refused(codebook_size):
    with pytest.raises(ValueError, match=f"{codebook_size} codes .* got 75; this transformer was not trained with"):
        transformer_config(arrays_of(TRANSFORMER), codebook_size=codebook_size)


@pytest.mark.parametrize("positions", [1, 2, 16, 18])
def test_a_grid_that_is_not_square_is_refused(positions):
    name = "Embed_0/position_embeddings/embedding"
    arrays = arrays_of(TRANSFORMER) | {name: np.zeros((positions, 64), np.float32)}
    if positions == 2:  # one token is a square
        assert transformer_config(arrays, codebook_size=64).grid == (1, 1)
        return
    with pytest.raises(ValueError, match=f"a square number .*, got {positions}"):
        transformer_config(arrays, codebook_size=64)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("Embed_0/word_embeddings/embedding", (75,)),
        ("Embed_0/word_embeddings/embedding", (75, 0)),
        ("Embed_0/word_embeddings/embedding", (1 << 30, 0)),
        ("TransformerLayer_0/Attention_0/self_attention/query/kernel", (64, 64)),
        ("TransformerLayer_0/Mlp_0/intermediate_output/kernel", ()),
    ],
)
def test_sizes_that_cannot_be_are_refused(name, shape):
    with pytest.raises(ValueError, match=f"{name} must have [23] axes of sizes in"):
        transformer_config(arrays_of(TRANSFORMER) | {name: np.empty(shape, np.float32)}, codebook_size=64)


def test_a_network_is_not_built_before_its_arrays_are_known_to_be_there():
    arrays = arrays_of(TRANSFORMER)
    wide = {"TransformerLayer_0/Mlp_0/intermediate_output/kernel": np.broadcast_to(np.float32(0), (64, 1 << 20))}
    deep = {f"TransformerLayer_{number}/x": np.zeros(1, np.float32) for number in range(200)}
    config = transformer_config(arrays | wide | deep, codebook_size=64)  # of 50 GB
    with pytest.raises(ValueError, match=r"missing: .*superfluous: .*of another shape"):
        transformer_weights(arrays | wide | deep, config)
    broad = {"decoder/Conv_0/kernel": np.broadcast_to(np.float32(0), (3, 3, 32, 1 << 20))}
    with pytest.raises(ValueError, match=r"of another shape: decoder/Conv_0/kernel \(3, 3, 32, 1048576\)"):
        tokenizer_weights(arrays_of(TOKENIZER) | broad, tokenizer_config(arrays_of(TOKENIZER)))


@pytest.mark.parametrize("name", ["encoder/ResBlock_2", "encoder/ResBlock_1", "decoder/Conv_1", "encoder/Conv_0"])
def test_a_tokenizer_of_another_structure_is_refused(name):
    arrays = {other: array for other, array in arrays_of(TOKENIZER).items() if not other.startswith(f"{name}/")}
    with pytest.raises(ValueError, match=r"not a released tokenizer|sizes are inferred from it|channels of each level"):
        tokenizer_weights(arrays, tokenizer_config(arrays))


def test_files_of_the_wrong_part_are_named():
    tokenizer, transformer = arrays_of(TOKENIZER), arrays_of(TRANSFORMER)
    with pytest.raises(ValueError, match="those of a transformer; name that file with --transformer"):
        tokenizer_config(transformer)
    with pytest.raises(ValueError, match="those of a tokenizer; name that file with --tokenizer"):
        transformer_config(tokenizer, codebook_size=64)
    with pytest.raises(
        ValueError, match=r"must be those of a released tokenizer, got Conv_0, .* and .* more; name another file"
    ):
        tokenizer_config(arrays_of(GOLDEN / "discriminator_checkpoint.msgpack"))


def test_a_checkpoint_has_a_collection_of_parameters_and_others_are_mentioned(said):
    array = np.zeros(1, np.float32)
    assert parameters({"params/a/b": array, "batch_stats/c": array, "step": array}).keys() == {"a/b"}
    assert said() == ["not imported: batch_stats, step"]
    with pytest.raises(ValueError, match="'params', got model, step; name another file"):
        parameters({"model/a": array, "step": array})
    with pytest.raises(ValueError, match="'params', got nothing"):
        parameters({})


# The folder.


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "small"
    import_jax(TOKENIZER, out, transformer=TRANSFORMER)
    return out


def test_an_imported_folder_generates_images(imported):
    pipe = MaskGIT.from_pretrained(imported)
    assert pipe.class_names == tuple("0123456789")
    images = pipe.generate([0, "9", 3], seed=5, output_type="np")
    assert images.shape == (3, 8, 8, 3)
    assert images.std() > 1
    assert (images == pipe.generate([0, 9, 3], seed=5, output_type="np")).all()
    assert (images != pipe.generate([1, 9, 3], seed=5, output_type="np"))[0].any()
    assert [image.size for image in pipe.generate([2])] == [(8, 8)]


def test_an_imported_folder_decodes_as_the_released_code_does(imported):
    transformer = load_transformer(imported / "transformer")
    assert transformer.decoding == DecodingConfig(
        8,
        {"name": "confidence", "choice_temperature": 4.5},
        {"name": "constant", "scale": 0.0},
        1.0,
        draw_method="gumbel",
    )
    assert (imported / "transformer" / "config.json").read_text().count('"mask_schedule": "cosine"') == 1
    tokenizer = load_tokenizer(imported / "tokenizer")
    assert tokenizer.image_size == 8
    assert tokenizer.grid == transformer.network.config.grid == (4, 4)
    assert transformer.tokenizer_fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(("edge", "steps"), [(16, 8), (32, 12)])
def test_large_grids_have_more_steps(edge, steps, tmp_path):
    arrays = arrays_of(TRANSFORMER)
    arrays["Embed_0/position_embeddings/embedding"] = np.ones((edge**2 + 1, 64), np.float32)
    transformer = write(tmp_path / "transformer", arrays)
    import_jax(TOKENIZER, tmp_path / "out", transformer=transformer, image_size=2 * edge)
    assert load_transformer(tmp_path / "out" / "transformer").decoding.num_steps == steps
    assert load_tokenizer(tmp_path / "out" / "tokenizer").image_size == 2 * edge


def test_a_thousand_classes_are_those_of_imagenet(tmp_path):
    arrays = arrays_of(TRANSFORMER)
    arrays["Embed_0/word_embeddings/embedding"] = np.ones((1065, 64), np.float32)
    arrays["MlmLayer_0/mlm_bias/bias"] = np.zeros(1065, np.float32)
    import_jax(TOKENIZER, tmp_path / "out", transformer=write(tmp_path / "transformer", arrays))
    names = load_transformer(tmp_path / "out" / "transformer").class_names
    known = {0: "tench", 1: "goldfish", 9: "ostrich", 207: "golden retriever", 281: "tabby", 388: "giant panda"}
    assert {number: names[number] for number in known} == known
    assert (names[985], names[999], len(names)) == ("daisy", "toilet tissue", 1000)


def test_class_names_can_be_given(tmp_path):
    names = [f"class {number}" for number in range(10)]
    import_jax(TOKENIZER, tmp_path / "out", transformer=TRANSFORMER, class_names=names)
    assert load_transformer(tmp_path / "out" / "transformer").class_names == tuple(names)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a"] * 9, "must be 10, one for each class of the transformer, got 9"),
        (["a"] * 11, "got 11"),
        ([], "got 0"),
        (["a"] * 4 + [" "] + ["a"] * 5, "got an empty one for class 4"),
    ],
)
def test_names_that_do_not_fit_the_classes_are_refused(names, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        import_jax(TOKENIZER, tmp_path / "out", transformer=TRANSFORMER, class_names=names)
    assert list(tmp_path.iterdir()) == []


def test_class_names_need_a_transformer(tmp_path):
    with pytest.raises(ValueError, match=r"class names must come with a transformer.* add --transformer"):
        import_jax(TOKENIZER, tmp_path / "out", class_names=["a"])
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_can_be_imported_alone(tmp_path, said):
    import_jax(TOKENIZER, tmp_path / "small" / "out", image_size=32)
    tokenizer = load_tokenizer(tmp_path / "small" / "out" / "tokenizer")
    assert (tokenizer.image_size, tokenizer.grid) == (32, (16, 16))
    assert [path.name for path in (tmp_path / "small" / "out").iterdir()] == ["tokenizer"]
    assert said()[0] == "tokenizer: 390,435 parameters; 64 codes; images of 32 x 32 px are 16 x 16 tokens"
    options = f"--tokenizer {tmp_path / 'small' / 'out' / 'tokenizer'} --model.network.codebook_size 64"
    assert f"next: maskgit tokenize --dataset NAME --recipe paper-256 {options}; then: maskgit train t" in said()[1]
    assert said()[1].endswith(options)
    import_jax(TOKENIZER, tmp_path / "default")
    assert load_tokenizer(tmp_path / "default" / "tokenizer").image_size == 256


def test_a_strided_tokenizer_is_recognised_and_written(tmp_path):
    arrays = arrays_of(TOKENIZER)
    for kind in ("kernel", "bias"):
        arrays[f"encoder/Conv_2/{kind}"] = arrays.pop(f"encoder/Conv_1/{kind}")
    arrays["encoder/Conv_1/kernel"] = np.full((4, 4, 32, 32), 1e-3, np.float32)
    arrays["encoder/Conv_1/bias"] = np.zeros(32, np.float32)
    import_jax(write(tmp_path / "tokenizer", arrays), tmp_path / "out")
    assert load_tokenizer(tmp_path / "out" / "tokenizer").network.config.downsampling == "strided"


def test_what_was_imported_is_said(tmp_path, said):
    arrays = arrays_of(TRANSFORMER)
    transformer = write(tmp_path / "transformer", arrays, batch_stats={"a": 1})
    out = tmp_path / "out"
    import_jax(TOKENIZER, out, transformer=transformer)
    assert said() == [
        "not imported: batch_stats",
        "tokenizer: 390,435 parameters; 64 codes; images of 8 x 8 px are 4 x 4 tokens",
        "transformer: 77,323 parameters; 2 blocks of size 64; 10 classes, '0' to '9'",
        f"{out}: written; next: maskgit sample {out} --classes 0,9",
    ]


@pytest.mark.parametrize("size", [7, 16, 256, 0, -8])
def test_a_wrong_size_is_refused_in_one_line(size, tmp_path):
    with pytest.raises(ValueError, match=f"--image-size must be 8, for 4 x 4 tokens of this transformer, got {size}; "):
        import_jax(TOKENIZER, tmp_path / "out", transformer=TRANSFORMER, image_size=size)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_alone_needs_a_positive_size(tmp_path):
    with pytest.raises(ValueError, match="image size must be a positive multiple"):
        import_jax(TOKENIZER, tmp_path / "out", image_size=0)
    assert list(tmp_path.iterdir()) == []


def failing_imports(folder: Path) -> dict[str, dict[str, Path]]:
    cut = folder / "cut"
    cut.write_bytes(TRANSFORMER.read_bytes()[:200_000])
    broken = arrays_of(TRANSFORMER)
    broken["MlmLayer_0/mlm_ln/scale"] = np.full(64, np.nan, np.float32)
    other = arrays_of(TRANSFORMER)
    del other["MlmLayer_0/mlm_ln/scale"]
    renamed_collection = write(folder / "renamed", arrays_of(TRANSFORMER), collection="model")
    return {
        "cut off": {"transformer": cut},
        "finite numbers": {"transformer": write(folder / "broken", broken)},
        "missing: MlmLayer_0/mlm_ln/scale": {"transformer": write(folder / "missing", other)},
        "renamed: checkpoint must have a collection 'params'": {"transformer": renamed_collection},
        "no such file": {"transformer": folder / "nowhere"},
        "--transformer": {"tokenizer": TRANSFORMER},
    }


@pytest.mark.parametrize("number", range(6))
def test_a_failed_import_leaves_nothing(number, tmp_path):
    inputs, outputs = tmp_path / "inputs", tmp_path / "outputs"
    inputs.mkdir()
    outputs.mkdir()
    message, files = list(failing_imports(inputs).items())[number]
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        import_jax(**({"tokenizer": TOKENIZER, "transformer": TRANSFORMER} | files), out=outputs / "new")
    assert "\n" not in str(caught.value)
    assert list(outputs.iterdir()) == []


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def full(*args: object, **settings: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("maskgit_pl.importers.released.save_transformer", full)  # the tokenizer is written already
    with pytest.raises(OSError, match="No space left"):
        import_jax(TOKENIZER, tmp_path / "out", transformer=TRANSFORMER)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    import_jax(TOKENIZER, tmp_path / "empty")
    assert (tmp_path / "empty" / "tokenizer" / "config.json").is_file()


@pytest.mark.parametrize("kind", ["file", "link", "other folder", "run folder", "pretrained", "in a file"])
def test_what_is_something_else_is_never_overwritten(kind, imported, tmp_path):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "link":
        out.symlink_to(imported)
    elif kind == "other folder":
        (out / "tokenizer").mkdir(parents=True)
        (out / "tokenizer" / "notes.txt").write_text("mine")
    elif kind == "run folder":
        shutil.copytree(imported, out / "pretrained")
    elif kind == "pretrained":
        shutil.copytree(imported, out)
    else:
        (tmp_path / "file").write_text("mine")
        out = tmp_path / "file" / "out"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises((FileExistsError, NotADirectoryError), match=r"import .*out must .*folder"):
        import_jax(TOKENIZER, out, transformer=TRANSFORMER)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
