"""A vector for each image conditions the network: training, decoding with guidance, and the pipeline."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch.utils.data import Dataset

from maskgit_pl import MaskGIT
from maskgit_pl.data import Batch, IndexedDataModule, IndexedDataset
from maskgit_pl.decoding import ConditionalModel, FirstStepLogits
from maskgit_pl.decoding.predictors import build_class_predictor
from maskgit_pl.evaluation.likelihood import negative_elbo
from maskgit_pl.networks.adaln import AdaLNConfig, AdaLNTransformer
from maskgit_pl.training.optimizers import LearningRate
from tests.networks.backbone_cases import save_model_of_vectors
from tests.short_runs import masked_model

DIM, CPU = 4, torch.device("cpu")


def config(**options: object) -> AdaLNConfig:
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32, "dropout": 0.0, "condition_dim": DIM}
    return AdaLNConfig(16, 3, (4, 4), **{**sizes, **options})


def test_a_batch_without_the_vectors_of_the_network_is_refused() -> None:
    index = torch.arange(2)
    batch = Batch(torch.zeros(2, 16), index, index, index, index, index >= 0)
    assert batch.vectors_for(0) is None
    with pytest.raises(ValueError, match=r"condition_dim of the network must be 0, .* got 4; the third item"):
        batch.vectors_for(DIM)
    with pytest.raises(ValueError, match="condition_dim of the network must be 3"):
        batch._replace(vectors=torch.zeros(2, 3)).vectors_for(DIM)


@pytest.fixture(scope="module")
def network() -> AdaLNTransformer:
    """A frozen network with peaked random weights, in which every condition matters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = config().create()
        for parameter in network.parameters():
            parameter.data = torch.randn_like(parameter) * 0.3
    return network.eval().requires_grad_(False)


def conditional(network: AdaLNTransformer, **options: object) -> ConditionalModel:
    return ConditionalModel(network, CPU, **options)


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(16, (3, 16), generator=generator)
    positions = torch.stack([torch.randperm(16, generator=generator)[:5] for _ in range(3)])
    return tokens.scatter(1, positions, 16), positions, torch.randn(3, DIM, generator=generator)


@pytest.mark.parametrize("negative", [None, [0, 0, 1]])
def test_guidance_is_the_two_forwards_by_hand(network, batch, negative: list[int] | None) -> None:
    tokens, positions, vectors = batch
    labels, null = torch.tensor([2, 1, 2]), torch.full((3,), network.config.null_label)
    predictor = build_class_predictor(
        conditional(network).bind(vectors), labels.tolist(), negative_labels=negative, scales=[0.0, 1.5, 1.5]
    )
    given = network.forward_at(tokens, labels, positions, vectors=vectors)
    # A negative class keeps the vector; the null label hides it, whatever it is.
    others, kept = (null, torch.randn(3, DIM)) if negative is None else (torch.tensor(negative), vectors)
    hidden = network.forward_at(tokens, others, positions, vectors=kept)
    torch.testing.assert_close(predictor(tokens, positions), given)
    for _ in range(2):
        torch.testing.assert_close(predictor(tokens, positions), given + 1.5 * (given - hidden))


def test_the_first_step_is_never_shared_between_images_of_a_class(network, batch) -> None:
    *_, vectors = batch
    cache = FirstStepLogits(network)
    model = conditional(network, first_step_logits=cache).bind(vectors)
    predictor = build_class_predictor(model, [1, 1, 1], scales=[2.0], all_masked=True)
    everything = torch.arange(16).expand(3, 16)
    logits = predictor(torch.full((3, 16), 16), everything)
    assert (logits[0] - logits[1]).abs().max() > 0.1
    assert not cache._known


def test_a_negative_model_trained_with_vectors_gets_them(network, batch) -> None:
    tokens, positions, vectors = batch
    plain = config(condition_dim=0).create().eval()
    labels = torch.tensor([0, 1, 2])
    for weaker, arguments in ((network, {"vectors": vectors}), (plain, {})):
        model = conditional(network)
        model = ConditionalModel(**{**vars(model), "negative": conditional(weaker)}).bind(vectors)
        predictor = build_class_predictor(model, labels.tolist(), scales=[1.0])
        given = network.forward_at(tokens, labels, positions, vectors=vectors)
        other = weaker.forward_at(tokens, labels, positions, **arguments)
        torch.testing.assert_close(predictor(tokens, positions), 2 * given - other)


@pytest.fixture(scope="module")
def pretrained(tiny_pretrained, tmp_path_factory) -> Path:
    return save_model_of_vectors(tiny_pretrained, tmp_path_factory.mktemp("pipe") / "pretrained", dim=DIM)


@pytest.fixture(scope="module")
def pipe(pretrained: Path) -> MaskGIT:
    return MaskGIT.from_pretrained(pretrained)


def test_an_image_follows_its_vector_in_any_batch(pipe: MaskGIT) -> None:
    vectors = np.random.default_rng(0).normal(size=(4, DIM)).astype(np.float16)
    classes = [0, 1, 2, 0]
    images = pipe.generate(classes, vectors=vectors, output_type="np", seed=3)
    alone = pipe.generate([2], vectors=vectors[2:3], output_type="np", seed=5)
    assert np.abs(images[2].astype(int) - alone[0]).max() <= 1
    parts = pipe.generate(classes, vectors=torch.from_numpy(vectors), output_type="np", seed=3, batch_size=3)
    assert np.abs(images.astype(int) - parts).max() <= 1
    others = pipe.generate(classes, vectors=vectors[::-1].copy(), output_type="np", seed=3)
    assert not np.array_equal(images[0], others[0])
    shared = pipe.generate([0, 1], vectors=vectors[1], output_type="np")
    assert np.array_equal(shared, pipe.generate([0, 1], vectors=vectors[[1, 1]], output_type="np"))


def test_no_class_needs_no_vector(pipe: MaskGIT) -> None:
    assert len(pipe.generate([None, None])) == 2


@pytest.mark.parametrize(
    ("classes", "vectors", "message"),
    [
        ([0], None, r"vectors must be given: .* a vector of 4 values for each image, got none; .* shape \(1, 4\)"),
        ([0], np.zeros((1, 5)), r"vectors must have shape \(1, 4\), .* got \(1, 5\)"),
        ([0, 1], np.zeros((1, 4)), r"vectors must have shape \(2, 4\), .* got \(1, 4\)"),
        ([0], np.full((1, 4), np.nan), "vectors must be finite"),
        ([None], np.zeros((1, 4)), "classes must be given with vectors"),
    ],
)
def test_wrong_vectors_are_refused_with_what_to_give(pipe: MaskGIT, classes, vectors, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe.generate(classes, vectors=vectors)


def test_a_model_without_vectors_refuses_them(tiny_pretrained: Path) -> None:
    with pytest.raises(ValueError, match="trained without vectors; leave them out"):
        MaskGIT.from_pretrained(tiny_pretrained).generate([0], vectors=np.zeros((1, 4)))


def test_edits_follow_a_vector(pipe: MaskGIT) -> None:
    image, mask = Image.new("L", (8, 8), 90), Image.new("L", (8, 8), 0)
    mask.paste(255, (0, 0, 4, 8))
    edits = [
        np.array(pipe.inpaint(image, mask, classes=[0], vectors=np.full((1, DIM), value), blend=0)[0])
        for value in (-3.0, 3.0)
    ]
    assert not np.array_equal(*edits)
    assert np.array_equal(edits[0][:, 6:], np.array(image)[:, 6:])
    assert pipe.panorama([0], 16, vectors=np.ones((1, DIM)))[0].size == (16, 8)


class Flat(Dataset):
    """Grey images of one class that are dark or bright, which only the vector says."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, list[float]]:
        bright = index % 2
        return torch.full((8, 8), 40 + 170 * bright, dtype=torch.uint8), 0, [2.0 * bright - 1.0] * DIM


def test_a_training_on_a_data_set_learns_what_its_vectors_say(tiny_pretrained: Path) -> None:
    torch.manual_seed(0)
    module = masked_model(config(class_dropout=0.1), tiny_pretrained / "tokenizer", rate=LearningRate(3e-3))
    data = IndexedDataModule(IndexedDataset(Flat(), image_size=8, in_channels=1), global_batch=8)
    parts = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    Trainer(max_steps=40, accelerator="cpu", limit_val_batches=0, **dict.fromkeys(parts, False)).fit(module, data)
    batch = data.train.__getitems__(range(8))
    tokens = module.tokenizer.encode(batch.content)
    network, vectors = module.transformer.eval(), batch.vectors
    right, wrong = (negative_elbo(network, tokens, batch.labels, given).mean() for given in (vectors, -vectors))
    assert right < wrong - 1


def test_likelihoods_use_the_vector_of_each_image(network, batch) -> None:
    *_, vectors = batch
    tokens, labels = torch.randint(16, (3, 16), generator=torch.Generator().manual_seed(2)), torch.tensor([0, 1, 2])
    bounds = [negative_elbo(network, tokens, labels, of_images) for of_images in (vectors, -vectors)]
    assert bounds[0].mean() != bounds[1].mean()
    one_by_one = negative_elbo(network, tokens, labels, vectors, batch_size=1)  # the vector is that of the index
    torch.testing.assert_close(one_by_one, bounds[0], rtol=1e-6, atol=0)
