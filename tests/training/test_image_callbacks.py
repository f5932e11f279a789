import weakref
from types import SimpleNamespace

from PIL import Image

from maskgit_pl.training.callbacks import ReconstructionPictures, SamplePictures
from maskgit_pl.training.loggers import TensorBoard, TolerantLogger
from tests.conftest import tiny_tokenizer
from tests.pipeline.decoding_steps import random_images, step


class FakeModel:
    """A model that decodes to its labels and counts completed generations."""

    def __init__(self) -> None:
        self.tokenizer = tiny_tokenizer()
        self.asked: list[tuple[list[int], list[int]]] = []

    def reconstructions(self):
        return random_images(20), random_images(20)

    def sample(self, labels, seeds):
        yield step(0, list(range(16)), [0], len(labels))
        yield step(1, [0], [], len(labels))
        self.asked.append((list(labels), list(seeds)))


def trainer(tmp_path, *, rank: int = 0, sanity: bool = False) -> SimpleNamespace:
    loggers = [TolerantLogger(TensorBoard(), tmp_path / "logs", name="tensorboard", settings={})] if rank == 0 else []
    return SimpleNamespace(sanity_checking=sanity, is_global_zero=rank == 0, global_step=7, loggers=loggers)


def test_callbacks_write_their_pictures_and_tensorboard_events(tmp_path) -> None:
    there = trainer(tmp_path)
    ReconstructionPictures(tmp_path).on_validation_end(there, FakeModel())
    SamplePictures(tmp_path, class_names=["a", "b"]).on_validation_end(there, FakeModel())
    with Image.open(tmp_path / "reconstructions.png") as picture:
        assert picture.height == 8 + 4 * 84 + 3 * 4 + 8  # 16 pairs, 8 a row
    assert (tmp_path / "samples.png").is_file()
    there.loggers[0].save()
    events = b"".join(file.read_bytes() for file in tmp_path.rglob("events.out*"))
    assert b"reconstructions" in events
    assert b"samples" in events


def test_every_rank_samples_the_same_but_rank_0_alone_writes(tmp_path) -> None:
    callback = SamplePictures(tmp_path, class_names=[str(number) for number in range(25)], images_per_class=99, seed=5)
    model = FakeModel()
    callback.on_validation_end(trainer(tmp_path, rank=1), model)
    ReconstructionPictures(tmp_path).on_validation_end(trainer(tmp_path, rank=1), model)
    ((labels, seeds),) = model.asked
    assert sorted(set(labels)) == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22]
    assert seeds == list(range(5, 85))
    assert list(tmp_path.glob("*.png")) == []


def test_steps_that_were_decoded_are_not_kept(tmp_path) -> None:
    """An autoregressive model has a step for each token, each with all tokens of all images."""
    alive = []

    class Long(FakeModel):
        def sample(self, labels, seeds):
            tokens = []
            for number in range(20):
                made = step(number, list(range(16)), [0], len(labels))
                tokens.append(weakref.ref(made.tokens))
                alive.append(sum(each() is not None for each in tokens))
                yield made

    SamplePictures(tmp_path, class_names=["a"]).on_validation_end(trainer(tmp_path), Long())
    assert max(alive) <= 3  # the latest one, the one before, and the one that is made


def test_nothing_is_drawn_in_the_sanity_check(tmp_path) -> None:
    model = FakeModel()
    for callback in (ReconstructionPictures(tmp_path), SamplePictures(tmp_path, class_names=["a"])):
        callback.on_validation_end(trainer(tmp_path, sanity=True), model)
    assert model.asked == []
    assert list(tmp_path.glob("*.png")) == []
