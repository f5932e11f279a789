"""Rejection sampling: the best of each class by a judge are kept, and nothing else changes."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from maskgit_pl.evaluation import acceptance
from maskgit_pl.evaluation.acceptance import Acceptance, ClassJudge, TokenJudge, choose, generate_accepted
from maskgit_pl.evaluation.classifier import open_images
from maskgit_pl.evaluation.likelihood import encode_real_images
from maskgit_pl.evaluation.reference import SampleFile
from maskgit_pl.networks.classifiers import ClassifierSizes, FrozenClassifier, create_classifier
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.bulk import BulkOptions, generate_many
from tests.conftest import CLASSES

OPTIONS = BulkOptions(num_images=6, batch_size=3, seed=5)


@pytest.fixture(scope="module")
def pipe(tiny_pretrained: Path) -> MaskGIT:
    return MaskGIT.from_pretrained(tiny_pretrained)  # 8 px, 4 x 4 tokens


@pytest.fixture(scope="module")
def judge() -> ClassJudge:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = create_classifier(ClassifierSizes(1, 8, 3, width=4))
    return ClassJudge(FrozenClassifier(network, CLASSES))


class JudgeOfTokens:
    """Prefers candidates of high tokens, and notes them."""

    name = digest = "tokens"

    def check(self, class_names, num_candidates) -> None: ...

    def log_probs(self, samples, tokens) -> torch.Tensor:
        self.seen = tokens.numpy()
        return tokens.float().mean(1)


def read(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def test_the_file_holds_the_best_candidates_with_their_seeds(pipe, judge, tmp_path):
    result = generate_accepted(pipe, tmp_path / "best.npz", OPTIONS, Acceptance(0.25, judge))
    assert (result.made, result.missing_parts) == (24, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["best.npz"]
    generate_many(pipe, tmp_path / "all.npz", replace(OPTIONS, num_images=24))
    best, everything = read(tmp_path / "best.npz"), read(tmp_path / "all.npz")
    assert best["arr_1"].tolist() == [0, 0, 1, 1, 2, 2]
    rows = best["seeds"] - 5
    assert (best["arr_0"] == everything["arr_0"][rows]).all()
    with zipfile.ZipFile(tmp_path / "best.npz") as archive:
        plan = json.loads(archive.comment)
    assert (plan["accept_rate"], plan["classifier"], plan["count"]) == (0.25, judge.digest, 6)


@pytest.mark.parametrize(("rate", "count", "candidates"), [(0.5, 4, 8), (0.3, 1, 4), (0.7, 21, 30), (1, 3, 3)])
def test_the_fewest_candidates_are_generated_that_keep_at_most_the_rate(judge, rate, count, candidates):
    assert Acceptance(rate, judge).num_candidates(3 * count, 3) == 3 * candidates


def test_the_most_probable_candidates_of_each_class_are_kept_and_the_first_of_equal_ones():
    log_probs = torch.tensor([-3.0, -1.0, -2.0, -5.0, -4.0])
    assert choose(log_probs, torch.tensor([0, 1, 0, 1, 0]), 1).tolist() == [1, 2]
    assert choose(torch.zeros(5), torch.tensor([0, 1, 0, 1, 0]), 2).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("keep_tokens", [False, True])
def test_the_judge_sees_the_tokens_of_the_candidates_which_stay_only_on_demand(pipe, tmp_path, keep_tokens):
    judge = JudgeOfTokens()
    options = replace(OPTIONS, keep_tokens=keep_tokens)
    generate_accepted(pipe, tmp_path / "best.npz", options, Acceptance(0.5, judge))
    generate_many(pipe, tmp_path / "all.npz", replace(OPTIONS, num_images=12, keep_tokens=True))
    best, everything = read(tmp_path / "best.npz"), read(tmp_path / "all.npz")
    assert np.array_equal(judge.seen, everything["tokens"])
    assert ("tokens" in best) == keep_tokens
    if keep_tokens:
        assert np.array_equal(best["tokens"], everything["tokens"][best["seeds"] - 5])


def test_the_judge_of_tokens_compares_candidates_with_the_train_split_since_evaluations_use_val(
    pipe, tiny_shards, monkeypatch
):
    seen = []
    monkeypatch.setattr(acceptance, "rate_grids", lambda grids, labels: seen.append(grids) or labels.float())
    data = open_images(tiny_shards, 8, 1)
    tokens, labels = torch.randint(0, 4, (40, 16)), torch.arange(40) % 3
    judge = TokenJudge(pipe.tokenizer, data)
    assert torch.equal(judge.log_probs(SampleFile(np.empty(0), labels, 1), tokens), labels.float())
    real, real_labels = encode_real_images(pipe.tokenizer, data, split="train")  # 60 images
    assert torch.equal(seen[0].real.flatten(1), real)
    assert torch.equal(seen[0].real_labels, real_labels)
    assert torch.equal(seen[0].sampled, tokens.reshape(40, 4, 4))
    with pytest.raises(ValueError, match="num_images must give at least 200 candidates"):
        generate_accepted(pipe, "best.npz", OPTIONS, Acceptance(0.5, judge))


def test_a_wrong_rate_and_images_of_no_class_are_refused(pipe, judge, tmp_path):
    with pytest.raises(ValueError, match="accept_rate must"):
        Acceptance(float("nan"), judge)
    with pytest.raises(ValueError, match="classes must not be None with accept_rate"):
        generate_accepted(pipe, tmp_path / "best.npz", replace(OPTIONS, classes=[0, None]), Acceptance(0.25, judge))
    assert not list(tmp_path.iterdir())
