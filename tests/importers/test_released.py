import re
from pathlib import Path

import msgpack
import numpy as np
import pytest

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.importers.checkpoints import read_flax
from maskgit_pl.importers.released import (
    import_jax,
    parameters,
    tokenizer_config,
    tokenizer_weights,
    transformer_config,
    transformer_weights,
)
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pretrained.networks import load_tokenizer, load_transformer

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENIZER, TRANSFORMER = GOLDEN / "vqvae_checkpoint.msgpack", GOLDEN / "transformer_n16_checkpoint.msgpack"
QUERY = "TransformerLayer_1/Attention_0/self_attention/query"


def arrays_of(file: Path) -> dict[str, np.ndarray]:
    return parameters(read_flax(file))


def write(file: Path, arrays: dict[str, np.ndarray], collection: str = "params", **others: object) -> Path:
    """Writes a checkpoint as flax does."""
    tree: dict = {}
    for name, values in arrays.items():
        *folders, last = name.split("/")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[last] = msgpack.ExtType(1, msgpack.packb((values.shape, values.dtype.name, values.tobytes())))
    file.write_bytes(msgpack.packb({collection: tree, **others}))
    return file


def test_the_sizes_of_a_transformer_are_read_from_its_arrays():
    config = transformer_config(arrays_of(TRANSFORMER), codebook_size=64)
    assert config == TransformerConfig(64, 10, (4, 4), 64, 2, 4, 128, dropout=0.1, class_dropout=0.0)
    assert transformer_config(arrays_of(TRANSFORMER), codebook_size=60).num_classes == 14


def test_the_sizes_of_a_tokenizer_are_read_from_its_arrays():
    sizes = {"base_channels": 32, "channel_multipliers": (1, 2), "num_res_blocks": 1, "num_middle_blocks": 1}
    assert tokenizer_config(arrays_of(TOKENIZER)) == VQGANConfig(3, **sizes, codebook_size=64, code_dim=32)


WIDE = "TransformerLayer_0/Mlp_0/intermediate_output/kernel"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{QUERY}/bias": np.full((4, 16), np.nan, np.float32)}, "query/bias' must hold finite numbers, got nan"),
        ({f"{QUERY}/bias": np.ones((64, 1))}, rf"{QUERY}/bias must have shape \(4, 1\d*\), got \(64, 1\)"),
        ({"Embed_0/position_embeddings/embedding": np.ones((16, 64))}, r"must have shape \(10, 64\), got"),
        ({"Embed_0/word_embeddings/embedding": np.ones((1 << 30, 0))}, r"of sizes >= 1, got shape \(1073741824, 0\)"),
        ({"TransformerLayer_2000/x": np.ones(1)}, "TransformerLayer_2/.* is missing"),
        (  # a network of 13 GB, which is not built
            {WIDE: np.zeros((64, 1 << 18), np.float32), **{f"TransformerLayer_{n}/x": np.ones(1) for n in range(200)}},
            r"must have shape .* and \d+ more",
        ),
    ],
)  # fmt: skip
def test_a_transformer_with_a_wrong_array_is_refused_by_name(changes, message):
    arrays = {name: array for name, array in (arrays_of(TRANSFORMER) | changes).items() if array is not None}
    with pytest.raises(ValueError, match=message):
        transformer_weights(arrays, transformer_config(arrays, codebook_size=64))


@pytest.mark.parametrize("name", ["encoder/ResBlock_1/Conv_2/kernel", "decoder/Conv_2/bias", "quantizer/codebook"])
def test_a_tokenizer_with_a_wrong_array_is_refused_by_name(name):
    arrays = arrays_of(TOKENIZER)
    config, array = tokenizer_config(arrays), arrays.pop(name)
    for wrong in ({}, {name: array[..., :-1]}):
        with pytest.raises(ValueError, match=re.escape(name)):
            tokenizer_weights(arrays | wrong, config)


def test_a_file_of_the_other_part_is_refused_with_its_flag():
    tokenizer, transformer = arrays_of(TOKENIZER), arrays_of(TRANSFORMER)
    with pytest.raises(ValueError, match="those of a transformer; name that file with --transformer"):
        tokenizer_config(transformer)
    with pytest.raises(ValueError, match="those of a tokenizer; name that file with --tokenizer"):
        transformer_config(tokenizer, codebook_size=64)
    with pytest.raises(ValueError, match=r"those of a released tokenizer, got Conv_0, .* more"):
        tokenizer_config(arrays_of(GOLDEN / "discriminator_checkpoint.msgpack"))
    with pytest.raises(ValueError, match=r"1024 codes .* got 75; this transformer was not trained with this tokenizer"):
        transformer_config(transformer, codebook_size=1024)


def test_an_imported_folder_decodes_as_the_released_code_does(tmp_path):
    folder = import_jax(TOKENIZER, tmp_path / "out", transformer=TRANSFORMER).folder
    pipe = MaskGIT.from_pretrained(folder)
    assert pipe.class_names == tuple("0123456789")
    assert pipe.generate([0, "9", 3], seed=5, output_type="np").shape == (3, 8, 8, 3)
    assert load_transformer(folder / "transformer").decoding == DecodingConfig(
        8,
        {"name": "confidence", "choice_temperature": 4.5},
        {"name": "constant", "scale": 0.0},
        1.0,
    )
    assert '"mask_schedule": "cosine"' in (folder / "transformer" / "config.json").read_text()


@pytest.mark.parametrize(("edge", "steps"), [(16, 8), (32, 12)])
def test_large_grids_have_more_steps(edge, steps, tmp_path):
    arrays = arrays_of(TRANSFORMER)
    arrays["Embed_0/position_embeddings/embedding"] = np.ones((edge**2 + 1, 64), np.float32)
    transformer = write(tmp_path / "transformer", arrays, batch_stats={"a": 1}, step=3)
    import_jax(TOKENIZER, tmp_path / "out", transformer=transformer)
    assert load_transformer(tmp_path / "out" / "transformer").decoding.num_steps == steps
    assert load_tokenizer(tmp_path / "out" / "tokenizer").image_size == 2 * edge


def test_a_tokenizer_can_be_imported_without_a_transformer(tmp_path):
    import_jax(TOKENIZER, tmp_path / "out", image_size=32)
    assert load_tokenizer(tmp_path / "out" / "tokenizer").image_size == 32
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tokenizer"]


def test_a_strided_tokenizer_is_recognised_and_written(tmp_path):
    arrays = arrays_of(TOKENIZER)
    for kind in ("kernel", "bias"):
        arrays[f"encoder/Conv_2/{kind}"] = arrays.pop(f"encoder/Conv_1/{kind}")
    arrays["encoder/Conv_1/kernel"] = np.full((4, 4, 32, 32), 1e-3, np.float32)
    arrays["encoder/Conv_1/bias"] = np.zeros(32, np.float32)
    import_jax(write(tmp_path / "tokenizer", arrays), tmp_path / "out")
    assert load_tokenizer(tmp_path / "out" / "tokenizer").network.config.downsampling == "strided"


def test_a_failed_import_names_the_file_and_leaves_nothing(tmp_path):
    cut, model = tmp_path / "cut", write(tmp_path / "model", arrays_of(TRANSFORMER), collection="model")
    cut.write_bytes(TRANSFORMER.read_bytes()[:200_000])
    broken = write(tmp_path / "broken", arrays_of(TRANSFORMER) | {"MlmLayer_0/mlm_ln/scale": np.full(64, np.nan)})
    for file, message in (
        (cut, "cut off"),
        (model, "those of a released transformer, got none"),
        (broken, "finite numbers"),
    ):
        with pytest.raises(ValueError, match=f"checkpoint {file}: .*{message}") as refusal:
            import_jax(TOKENIZER, tmp_path / "out", transformer=file)
        assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()
