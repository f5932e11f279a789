"""The model card takes all its facts from the files of the folder and of its run."""

import ast
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from maskgit_pl.errors import printable
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.card import refresh_card, write_card
from maskgit_pl.pipeline.pretrained import fingerprint
from tests.conftest import save_tiny_pretrained
from tests.hostile_words import HOSTILE
from tests.test_errors import structure


def save_run(folder: Path) -> Path:
    """A run with papers of the transformer and figures, as training and evaluation leave them."""
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


def numbers(text: str) -> set[float]:
    return {float(word.replace(",", "")) for word in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?![\w.])", text)}


def test_a_card_says_what_the_runs_files_say(run: Path) -> None:
    content = write_card(run / "pretrained", name="owner/flowers")
    card = (run / "pretrained" / "README.md").read_text()
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["library_name"] == "maskgit_pl"
    assert "license" not in yaml.safe_load(front)
    assert body.startswith("\n# flowers-paper-log\n")
    for line in (
        "| recipe |  | paper log |",
        "| trainer.max_steps |  | 4321 |",
        "| data.path |  | flowers |",
        "| model.optimizer.learning_rate |  | peak 0.00123, warmup_steps 77 |",
        "| commit |  | c0ffee |",
        "| reconstruction.psnr_db | 23.46 |",
        "| samples.exported.fid/classifier | 12.35 |",
        'pipe = MaskGIT.from_pretrained("owner/flowers")',
        "num_images 1000, num_steps 8, seed 3, split val, device cpu",
    ):
        assert line in body
    assert "someone" not in card  # where the data lay on that machine
    assert content == json.loads((run / "pretrained" / "config.json").read_text())


def test_no_number_of_a_card_is_invented(run: Path) -> None:
    write_card(run / "pretrained")
    body = (run / "pretrained" / "README.md").read_text().split("\n---\n", 1)[1]
    body = re.sub(r"```.*?```|\[arXiv.*?\)|`[0-9a-f]{64}`", "", body, flags=re.DOTALL)
    files = [path for path in run.rglob("*") if path.suffix in (".json", ".yaml") and path.name != "evaluation.json"]
    known = set().union(*(numbers(path.read_text()) for path in files if path.parent != run / "pretrained"))
    known |= {float(f"{value:.4g}") for value in numbers((run / "evaluation.json").read_text())}
    pipe = MaskGIT.from_pretrained(run / "pretrained")
    for network in (pipe.tokenizer.network, pipe.transformer.network):
        known.add(sum(parameter.numel() for parameter in network.parameters()))
    known |= {len(pipe.class_names), *pipe.tokenizer.grid}
    assert numbers(body) - known == set()
    assert {4321, 96, 23.46} <= numbers(body)


def test_figures_of_inception_have_the_name_that_the_hub_lists_and_others_that_of_their_network(run: Path) -> None:
    metrics = json.loads((run / "evaluation.json").read_text())
    metrics["samples"] = {
        "exported_guidance": {
            "fid/classifier": 1.5,
            "fid/inception": 6.25,
            "diversity": 0.8,
            "kid/inception": math.nan,
        },
        "without_guidance": {"fid/inception": 9.0},
    }
    (run / "evaluation.json").write_text(json.dumps(metrics))
    write_card(run / "pretrained")
    data = ModelCard.load(run / "pretrained" / "README.md").data
    assert data.model_name == "flowers-paper-log"
    listed = {each.metric_type: each for each in data.eval_results}
    assert {name: each.metric_value for name, each in listed.items()} == {"fid/classifier": 1.5, "fid": 6.25}
    assert listed["fid"].metric_name == "fid of 1000 images in the features of inception"
    assert (listed["fid"].dataset_name, listed["fid"].dataset_split) == ("flowers", "val")


def test_figures_of_another_transformer_are_left_out(run: Path) -> None:
    metrics = json.loads((run / "evaluation.json").read_text())
    for digest, kept in ((fingerprint(run / "pretrained" / "transformer")[:16], True), ("0" * 16, False)):
        metrics["model"]["transformer_digest"] = digest
        (run / "evaluation.json").write_text(json.dumps(metrics))
        assert (write_card(run / "pretrained")["run"]["measured"] is not None) == kept


def test_without_a_run_a_card_says_nothing_of_training(tmp_path: Path) -> None:
    folder = save_tiny_pretrained(tmp_path / "alone")
    content = write_card(folder)
    assert content["run"] is None
    card = (folder / "README.md").read_text()
    assert "# MaskGIT\n" in card
    assert "## Training" not in card
    assert "## Measured" not in card


def test_figures_of_another_tokenizer_are_left_out(run: Path) -> None:
    metrics = json.loads((run / "evaluation.json").read_text())
    metrics["model"]["tokenizer_fingerprint"] = "0" * 64
    (run / "evaluation.json").write_text(json.dumps(metrics))
    assert write_card(run / "pretrained")["run"]["measured"] is None
    assert "## Measured" not in (run / "pretrained" / "README.md").read_text()


def test_facts_go_with_the_weights_and_not_with_others(run: Path, tmp_path: Path) -> None:
    pipe = MaskGIT.from_pretrained(run / "pretrained")
    pipe.save_pretrained(tmp_path / "first", license="apache-2.0")
    shutil.rmtree(run)
    again = MaskGIT.from_pretrained(tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    for file in ("config.json", "README.md"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    assert "| trainer.max_steps |  | 4321 |" in (tmp_path / "second" / "README.md").read_text()
    assert "\nlicense: apache-2.0\n" in (tmp_path / "second" / "README.md").read_text()
    again.to("cpu", dtype=torch.bfloat16).save_pretrained(tmp_path / "other")
    content = json.loads((tmp_path / "other" / "config.json").read_text())
    assert (content["run"], content["license"]) == (None, None)


def test_facts_of_older_weights_do_not_go_with_newer_ones(run: Path, tmp_path: Path) -> None:
    write_card(run / "pretrained", license="mit")
    shutil.copytree(run / "pretrained", tmp_path / "again")
    save_tiny_pretrained(tmp_path / "again", seed=1)  # only weights
    MaskGIT.from_pretrained(tmp_path / "again").save_pretrained(tmp_path / "copy")
    content = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert (content["run"], content["license"]) == (None, None)


def test_a_pipeline_is_saved_when_its_folder_is_gone(tmp_path: Path) -> None:
    pipe = MaskGIT.from_pretrained(save_tiny_pretrained(tmp_path / "first"))
    shutil.rmtree(tmp_path / "first")
    pipe.save_pretrained(tmp_path / "second")
    assert MaskGIT.from_pretrained(tmp_path / "second").class_names == pipe.class_names


def test_papers_that_are_no_json_are_named(run: Path) -> None:
    (run / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match=r"evaluation\.json is not valid JSON"):
        write_card(run / "pretrained")


def test_a_run_may_be_named(run: Path, tiny_pretrained: Path, tmp_path: Path) -> None:
    pipe = MaskGIT.from_pretrained(tiny_pretrained)
    pipe.save_pretrained(tmp_path / "named", run=run)
    assert json.loads((tmp_path / "named" / "config.json").read_text())["run"]["name"] == run.name
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder; name a run folder that training wrote"):
        pipe.save_pretrained(tmp_path / "none", run=tmp_path / "nowhere")
    assert not (tmp_path / "none").exists()


def test_a_card_follows_figures_that_are_measured_anew_and_keeps_its_licence(run: Path, caplog) -> None:
    write_card(run / "pretrained", license="apache-2.0")
    metrics = json.loads((run / "evaluation.json").read_text())
    metrics["reconstruction"]["psnr_db"] = 31.25
    (run / "evaluation.json").write_text(json.dumps(metrics))
    refresh_card(run / "pretrained")
    card = (run / "pretrained" / "README.md").read_text()
    assert "31.25" in card
    assert "license: apache-2.0" in card
    (run / "evaluation.json").write_text("{")
    refresh_card(run / "pretrained")
    assert "cannot write the model card" in caplog.text
    assert (run / "pretrained" / "README.md").read_text() == card


def test_a_folder_outside_of_a_run_has_no_card_to_refresh(tmp_path: Path) -> None:
    save_tiny_pretrained(tmp_path / "alone")
    refresh_card(tmp_path / "alone")
    assert not (tmp_path / "alone" / "README.md").exists()


def replaced(tree: object, word: str) -> object:
    """The tree with a word in the place of every string, and as the name of every figure."""
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
    write_card(folder, known={"license": word, "run": replaced(facts, word)}, name=word)
    card = (folder / "README.md").read_text()
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    parsed = ModelCard(card, ignore_metadata_errors=False)
    assert parsed.text.strip() == body.strip()
    assert parsed.data.to_dict() == {key: value for key, value in yaml.safe_load(front).items() if value is not None}
    return yaml.safe_load(front), body


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A folder outside of a run, and what is known of its run."""
    run = save_run(tmp_path_factory.mktemp("run") / "flowers")
    folder = save_tiny_pretrained(tmp_path_factory.mktemp("shared"))
    return folder, write_card(run / "pretrained")["run"]


@pytest.mark.slow
@pytest.mark.parametrize("word", HOSTILE, ids=lambda word: ascii(word[:30]))
def test_no_word_of_a_stranger_becomes_markup_or_metadata(shared: tuple[Path, dict], word: str) -> None:
    folder, facts = shared
    plain_front, plain_body = card_of(folder, facts, "name")
    front, body = card_of(folder, facts, word)
    assert front.keys() - {"license"} == plain_front.keys() - {"license"}
    assert {key: front[key] for key in front if key != "license"} == {
        key: plain_front[key] for key in plain_front if key != "license"
    }
    assert front.get("license") == (printable(word) or None)
    assert all(line.isprintable() for line in body.split("\n"))
    if word.strip():
        assert structure(body) == structure(plain_body)
    example = re.search(r"```python\n(.*?)\n```\n", body, re.DOTALL)
    assert example is not None
    assert ast.dump(ast.parse(example[1])).count("Call(") == 3  # from_pretrained, generate, save


@pytest.mark.slow
@pytest.mark.parametrize("word", HOSTILE, ids=lambda word: ascii(word[:30]))
def test_figures_of_a_strangers_run_and_data_are_listed_under_their_printed_names(
    shared: tuple[Path, dict], word: str
) -> None:
    folder, facts = shared
    figures = {
        "samples.exported.fid/inception": 3.0,
        f"samples.exported.fid/{word}": 4.0,
        "samples.exported.is/a": word,
    }
    write_card(
        folder, known={"run": {**replaced(facts, word), "measured": {"protocol": {"split": word}, "figures": figures}}}
    )
    front = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    (listed,) = front.pop("model-index")
    assert set(front) == {"library_name", "pipeline_tag", "tags"}
    assert listed["name"] == (printable(word) or "MaskGIT")
    (result,) = [each for each in listed["results"] if each["metrics"][0]["type"] == "fid"]
    assert result["metrics"][0]["value"] == 3.0
    assert result["dataset"]["name"] == printable(word)


@pytest.mark.parametrize(
    "run", ["x", 3, [1], {"name": "x"}, {"name": "x", "tokenizer": {}, "transformer": {}}], ids=str
)
def test_facts_of_another_form_are_refused(shared: tuple[Path, dict], run: object) -> None:
    folder, facts = shared
    for known in (run, {**facts, "measured": {"protocol": 3}}):
        with pytest.raises(ValueError, match=r"config.json: run must be an entry that save_pretrained wrote, got"):
            write_card(folder, known={"run": known})
