"""The model card takes all its facts from the files of the folder and of its run."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.card import refresh_card, write_card
from maskgit_pl.pretrained.networks import fingerprint
from maskgit_pl.text import printable
from tests.conftest import save_tiny_pretrained
from tests.hostile_words import HOSTILE
from tests.test_errors import structure


def save_run(folder: Path) -> Path:
    """Writes a run with a recipe and metrics, as training and evaluation do."""
    save_tiny_pretrained(folder / "pretrained")
    (folder / "transformer").mkdir()
    recipe = {
        "trainer": {"max_steps": 4321, "devices": 1},
        "data": {"path": "/home/someone/flowers", "global_batch": 96, "seed": 5},
        "model": {"optimizer": {"learning_rate": {"peak": 0.00123, "warmup_steps": 77}}, "ema_decay": 0.987},
    }
    (folder / "transformer" / "config.yaml").write_text(yaml.safe_dump(recipe))
    environment = {"recipe": ["paper", "log"], "data": "/home/someone/flowers", "maskgit_pl": "0.1.0", "cpus": 64}
    environment |= {"commit": "c0ffee", "torch": "2.99.1"}
    (folder / "transformer" / "environment.json").write_text(json.dumps(environment))
    metrics = {
        "protocol": {"num_images": 1000, "num_steps": 8, "seed": 3, "split": "val", "batch_size": 50},
        "reconstruction": {"psnr_db": 23.4567891},
        "samples": {"exported": {"fid/classifier": 12.345678, "guidance_scales": [0.0, 1.0]}},
        "model": {
            "tokenizer_fingerprint": fingerprint(folder / "pretrained" / "tokenizer"),
            "transformer_digest": fingerprint(folder / "pretrained" / "transformer")[:16],
        },
        "environment": {"device": "cpu", "cpus": 64},
    }
    (folder / "evaluation.json").write_text(json.dumps(metrics))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save_run(tmp_path / "flowers-paper-log")


def write_metrics(run: Path, **changes: object) -> None:
    metrics = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps({**metrics, **changes}))


def test_a_card_shows_the_facts_of_the_files_of_the_run(run: Path) -> None:
    content = write_card(run / "pretrained")
    card = (run / "pretrained" / "README.md").read_text()
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["library_name"] == "maskgit_pl"
    assert "license" not in yaml.safe_load(front)
    assert body.startswith("\n# flowers-paper-log\n")
    for line in (
        "| recipe |  | paper log |",
        "| trainer.max_steps |  | 4321 |",
        "| data.path |  | flowers |",
        "| reconstruction.psnr_db | 23.46 |",
        'pipe = MaskGIT.from_pretrained("path/to/this/folder")',
        "num_images 1000, num_steps 8, seed 3, split val, device cpu",
    ):
        assert line in body
    assert "someone" not in card  # a path of the machine
    assert content == json.loads((run / "pretrained" / "config.json").read_text())


@pytest.mark.parametrize(("key", "digits"), [("tokenizer_fingerprint", 64), ("transformer_digest", 16)])
def test_metrics_of_other_weights_are_left_out(run: Path, key: str, digits: int) -> None:
    assert write_card(run / "pretrained")["run"]["measured"] is not None
    model = json.loads((run / "evaluation.json").read_text())["model"]
    write_metrics(run, model={**model, key: "0" * digits})
    assert write_card(run / "pretrained")["run"]["measured"] is None
    assert "## Evaluation" not in (run / "pretrained" / "README.md").read_text()


def test_facts_stay_with_the_weights_when_the_run_is_gone(run: Path, tmp_path: Path) -> None:
    write_card(run / "pretrained", known={"license": "apache-2.0"})
    MaskGIT.from_pretrained(run / "pretrained").save_pretrained(tmp_path / "first")
    shutil.rmtree(run)
    again = MaskGIT.from_pretrained(tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    for file in ("config.json", "README.md"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    assert "| trainer.max_steps |  | 4321 |" in (tmp_path / "second" / "README.md").read_text()
    assert "\nlicense: apache-2.0\n" in (tmp_path / "second" / "README.md").read_text()
    shutil.rmtree(tmp_path / "first")
    again.save_pretrained(tmp_path / "third")
    assert len(MaskGIT.from_pretrained(tmp_path / "third").class_names) == 3


def test_facts_do_not_go_to_other_weights(run: Path, tmp_path: Path) -> None:
    write_card(run / "pretrained", known={"license": "mit"})
    shutil.copytree(run / "pretrained", tmp_path / "newer")
    save_tiny_pretrained(tmp_path / "newer", seed=1)  # only weights
    newer = MaskGIT.from_pretrained(tmp_path / "newer")
    cast = MaskGIT.from_pretrained(run / "pretrained", dtype=torch.bfloat16)
    for pipe in (newer, cast):
        pipe.save_pretrained(tmp_path / "copy")
        content = json.loads((tmp_path / "copy" / "config.json").read_text())
        assert (content["run"], content["license"]) == (None, None)
    card = (tmp_path / "copy" / "README.md").read_text()
    assert "## Training" not in card


def test_a_refreshed_card_has_the_new_metrics_and_the_license(run: Path, tmp_path: Path, caplog) -> None:
    write_card(run / "pretrained", known={"license": "apache-2.0"})
    write_metrics(run, reconstruction={"psnr_db": 31.25})
    refresh_card(run / "pretrained")
    card = (run / "pretrained" / "README.md").read_text()
    assert "31.25" in card
    assert "license: apache-2.0" in card
    (run / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match=r"evaluation\.json is not valid JSON"):
        write_card(run / "pretrained")
    refresh_card(run / "pretrained")  # the measurement before it must not be lost
    assert "cannot write the model card" in caplog.text
    assert (run / "pretrained" / "README.md").read_text() == card
    outside = save_tiny_pretrained(tmp_path / "outside")
    refresh_card(outside)
    assert not (outside / "README.md").exists()


def replaced(tree: object, word: str) -> object:
    """Returns a tree with a word in place of every string, and in the name of every metric."""
    if isinstance(tree, dict):
        keys = [f"{word} {key}" if "/" in key else key for key in tree]
        return {key: replaced(value, word) for key, value in zip(keys, tree.values(), strict=True)}
    if isinstance(tree, list):
        return [replaced(value, word) for value in tree]
    return word if isinstance(tree, str) else tree


def card_of(folder: Path, facts: dict, word: str) -> tuple[dict, str]:
    """Returns metadata and body of the card of a folder that has the given word in every place."""
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "class_names": [word, f"{word} 2", f"{word} 3"]}))
    write_card(folder, known={"license": word, "run": replaced(facts, word)})
    card = (folder / "README.md").read_text()
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    parsed = ModelCard(card, ignore_metadata_errors=False)
    assert parsed.text.strip() == body.strip()
    assert parsed.data.to_dict() == {key: value for key, value in yaml.safe_load(front).items() if value is not None}
    return yaml.safe_load(front), body


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Returns a folder outside of a run, and the facts of a run."""
    run = save_run(tmp_path_factory.mktemp("run") / "flowers")
    folder = save_tiny_pretrained(tmp_path_factory.mktemp("shared"))
    return folder, write_card(run / "pretrained")["run"]


@pytest.mark.slow
@pytest.mark.parametrize("word", HOSTILE, ids=lambda word: ascii(word[:30]))
def test_a_word_of_a_stranger_is_neither_markup_nor_metadata(shared: tuple[Path, dict], word: str) -> None:
    folder, facts = shared
    plain_front, plain_body = card_of(folder, facts, "name")
    front, body = card_of(folder, facts, word)
    assert front.pop("license", None) == (printable(word) or None)
    plain_front.pop("license")
    assert front == plain_front
    assert all(line.isprintable() for line in body.split("\n"))
    if word.strip():
        assert structure(body) == structure(plain_body)
    example = re.search(r"```python\n(.*?)\n```\n", body, re.DOTALL)
    assert example is not None
    assert ast.dump(ast.parse(example[1])).count("Call(") == 3  # from_pretrained, generate, save


@pytest.mark.parametrize(
    "run", ["x", 3, [1], {"name": "x"}, {"name": "x", "tokenizer": {}, "transformer": {}}], ids=str
)
def test_facts_of_another_form_are_refused(shared: tuple[Path, dict], run: object) -> None:
    folder, facts = shared
    for known in (run, {**facts, "measured": {"protocol": 3}}):
        with pytest.raises(ValueError, match=r"config.json: run must be an entry that save_pretrained wrote, got"):
            write_card(folder, known={"run": known})
