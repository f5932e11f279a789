"""``maskgit push``: what is checked, what is sent, and what is said when the Hub refuses."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants

from maskgit_pl.cli import main
from maskgit_pl.files import sha256_of
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.card import write_card
from maskgit_pl.runs import pushing
from tests.local_hub import LocalHub, local_hub

SECRET = "hf_" + "Q" * 34


@pytest.fixture
def folder(tiny_pretrained: Path, tmp_path: Path) -> Path:
    """A pretrained folder with config.json and a card that names its license."""
    MaskGIT.from_pretrained(tiny_pretrained).save_pretrained(tmp_path / "model")
    write_card(tmp_path / "model", known={"license": "mit"})
    return tmp_path / "model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A Hub on this machine, whose token is set."""
    with local_hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", found.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", found.token)
        yield found


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pushing, "HfApi", None)


def test_a_model_is_pushed_and_loaded_by_its_name(folder: Path, hub: LocalHub, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["push", str(folder), "alice/tiny", "--private"]) == 0
    assert capsys.readouterr().out == f"{hub.address}/alice/tiny\n"
    assert hub.private == {"alice/tiny": True}
    sent = hub.repositories["alice/tiny"]
    here = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert {*sent} == {*here, ".gitattributes"}
    assert {path for path in here if sent[path] != here[path]} == {"README.md"}  # which names the repository
    assert 'MaskGIT.from_pretrained("alice/tiny")' in sent["README.md"].decode()
    assert "\nlicense: mit\n" in sent["README.md"].decode()
    again = MaskGIT.from_pretrained("alice/tiny", cache_dir=tmp_path / "cache")
    expected = MaskGIT.from_pretrained(folder).generate([0, 1], output_type="pt")
    assert torch.equal(again.generate([0, 1], output_type="pt"), expected)
    # A second push updates the repository, in one commit again.
    assert main(["push", str(folder), "alice/tiny", "--license=apache-2.0"]) == 0
    assert ModelCard(sent["README.md"].decode()).data.license == "apache-2.0"
    assert hub.requests.count("POST /api/models/alice/tiny/commit/main") == 2


def test_files_of_an_older_model_are_deleted_and_others_stay(folder: Path, hub: LocalHub):
    older = ("decoding.json", "negative/model.safetensors", "LICENSE.txt")
    others = ("notes.txt", "negative/notes.txt", ".gitattributes")
    (folder / "decoding.json").unlink(missing_ok=True)
    (folder / "inspect.html").write_text("of no model")  # not sent
    hub.repositories["alice/tiny"] = dict.fromkeys((*older, *others, "transformer/config.json"), b"older")
    hub.repositories["lab/tiny"] = hub.repositories.pop("alice/tiny")  # of an organization
    assert main(["push", str(folder), "lab/tiny"]) == 0
    here = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} - {"inspect.html"}
    assert {*hub.repositories["lab/tiny"]} == {*here, *others}
    assert hub.requests.count("POST /api/models/lab/tiny/commit/main") == 1


def test_a_dry_run_lists_files_and_card_without_network(folder: Path, no_network, capsys):
    assert main(["push", str(folder), "alice/tiny", "--private", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("alice/tiny (private): 6 files, ")
    for file in folder.rglob("*.safetensors"):
        assert re.search(rf"^{file.relative_to(folder)} +{file.stat().st_size} +{sha256_of(file)}$", out, re.MULTILINE)
    assert 'pipe = MaskGIT.from_pretrained("alice/tiny")' in out


def _cut_the_weights(folder: Path) -> None:
    file = folder / "transformer" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


@pytest.mark.parametrize(
    ("damage", "words", "wanted"),
    [
        (lambda folder: (folder / "LICENSE").symlink_to("/etc/passwd"), [], "must hold no links, got LICENSE"),
        (_cut_the_weights, [], "model.safetensors"),
        (lambda folder: (folder / "README.md").write_text("# Mine\n"), [], "must name the license of the weights"),
        (lambda folder: (folder / "README.md").write_text("---\n: [\n---\n"), [], "the YAML metadata is wrong: while"),
        (None, ["tiny"], "hub_id must be"),
        (None, ["alice/my model", "--dry-run"], "hub_id must be accepted by the Hub, such as alice/maskgit-flowers: "),
    ],
)
def test_a_wrong_folder_is_refused_before_any_request(folder: Path, hub: LocalHub, capsys, damage, words, wanted):
    if damage is not None:
        damage(folder)
    assert main(["push", str(folder), *(words or ["alice/tiny"])]) == 2
    err = capsys.readouterr().err
    assert wanted in err
    assert hub.requests == []


REFUSED = "the Hub refused the upload, or cannot be reached ("
OTHER = {"alice/tiny": {"pytorch_model.bin": b"", ".gitattributes": b""}}


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (lambda hub, patch: patch.delenv("HF_TOKEN"), "no access token found; log in with `hf auth login`, or set"),
        (lambda hub, patch: patch.setenv("HF_TOKEN", SECRET), REFUSED),
        (lambda hub, patch: patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9"), REFUSED),
        (lambda hub, patch: patch.setattr(hub, "may_write", False), REFUSED),
        (
            lambda hub, patch: hub.repositories.update(OTHER),
            "the name is taken by a repository with other files, such as 'pytorch_model.bin'",
        ),
    ],
    ids=["no login", "a wrong token", "no network", "no rights", "another model"],
)
def test_a_refusal_of_the_hub_is_one_line(folder, hub: LocalHub, monkeypatch, capsys, damage, wanted):
    damage(hub, monkeypatch)
    before = json.dumps({name: sorted(files) for name, files in hub.repositories.items()})
    assert main(["push", str(folder), "alice/tiny"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"maskgit push: hub alice/tiny: {wanted}")
    assert err.count("\n") == 1
    assert hub.token not in err
    assert SECRET not in err
    assert json.dumps({name: sorted(files) for name, files in hub.repositories.items()}) == before
