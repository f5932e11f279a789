"""``maskgit export``: what training exports at its end, from any checkpoint of any number of ranks.

``maskgit push``: what is checked, what is sent, and what is said when the Hub refuses.
"""

import json
import logging
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import constants

from maskgit_pl.cli import main
from maskgit_pl.files import sha256_of
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.pretrained import load_tokenizer, load_transformer, save_decoding
from maskgit_pl.training.checkpoint_files import FolderCheckpointIO
from tests.conftest import flags, save_tiny_pretrained, save_uneven_shards
from tests.local_hub import LocalHub, local_hub
from tests.observing import Runs, Topology

TINY = Path(__file__).parents[1] / "tiny"
LOAD = {"tokenizer": load_tokenizer, "transformer": load_transformer}


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """Makes shards and a pretrained tokenizer."""
    folder = tmp_path_factory.mktemp("given")
    save_uneven_shards(folder / "shards", (1, 7, 22))
    save_tiny_pretrained(folder / "pretrained")
    return folder


def words(stage: str, given: Path) -> list[str]:
    named = [f"--tokenizer={given / 'pretrained' / 'tokenizer'}"] if stage == "transformer" else []
    tiny = flags(yaml.safe_load((TINY / f"{stage}.yaml").read_text()))
    steps = ["--trainer.max_steps=4", "--trainer.val_check_interval=4", "--checkpoint_every=2"]
    return [stage, f"--data={given / 'shards'}", *named, *tiny, *steps, "--trainer.precision=32-true"]


@pytest.fixture(scope="module")
def run(given, tmp_path_factory) -> Path:
    """Trains both stages to step 4, with checkpoints of steps 2 and 4."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        ours = logging.getLogger("maskgit_pl")
        for name, value in {"handlers": [], "propagate": True, "level": ours.level}.items():
            patch.setattr(ours, name, value)  # as they were, when the stages are trained
        for stage in ("tokenizer", "transformer"):
            own = [word for word in words(stage, given) if not word.startswith("--tokenizer")]
            assert main(["train", *own, f"--runs-folder={runs}", "--run=one"]) == 0
    return runs / "one"


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.suffix in (".safetensors", ".json")
    }


@pytest.mark.slow
def test_the_newest_checkpoint_becomes_what_training_exported(run, tmp_path):
    assert main(["export", str(run), "--stage=transformer", f"--out={tmp_path / 'out'}"]) == 0
    assert (tmp_path / "out" / "README.md").is_file()
    made = content(tmp_path / "out" / "transformer")
    assert made == content(run / "pretrained" / "transformer")
    assert set(made) == {"config.json", "model.safetensors"}
    assert main(["export", str(run), "--stage=tokenizer", f"--out={tmp_path / 'second'}"]) == 0
    trained = FolderCheckpointIO().load_checkpoint(run / "tokenizer" / "checkpoints" / "step-00000004")["state_dict"]
    for name, tensor in load_tokenizer(tmp_path / "second" / "tokenizer").network.state_dict().items():
        assert torch.equal(tensor, trained[f"ema_network.{name}"])


@pytest.mark.slow
def test_parts_of_the_training_that_are_gone_do_not_matter(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    config = copy / "transformer" / "config.yaml"
    tree = yaml.safe_load(config.read_text())
    missing = {"loggers": [{"name": "wandb"}, {"name": "mlflow"}], "callbacks": ["gone"], "profiler": "gone"}
    config.write_text(yaml.safe_dump(tree | missing, sort_keys=False))
    assert main(["export", str(copy), "--stage=transformer", f"--out={tmp_path / 'out'}"]) == 0
    assert content(tmp_path / "out" / "transformer") == content(run / "pretrained" / "transformer")


def test_an_older_checkpoint_is_named_by_its_step(run, tmp_path):
    assert main(["export", str(run), "--stage=transformer", "--step=2", f"--out={tmp_path}"]) == 0
    assert content(tmp_path / "transformer") != content(run / "pretrained" / "transformer")
    trained = FolderCheckpointIO().load_checkpoint(run / "transformer" / "checkpoints" / "step-00000002")["state_dict"]
    for name, tensor in load_transformer(tmp_path / "transformer").network.state_dict().items():
        assert torch.equal(tensor, trained[f"ema_network.{name}"])


def test_what_is_there_is_replaced_only_when_asked_for(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "copy")
    before = content(copy / "pretrained")
    assert main(["export", str(copy), "--step=2"]) == 2
    assert "exists; replace it with --replace" in capsys.readouterr().err
    assert content(copy / "pretrained") == before
    assert main(["export", str(copy), "--step=2", "--stage=tokenizer", "--replace"]) == 0
    assert content(copy / "pretrained") != before


def test_files_of_the_user_are_not_removed_by_an_export_or_a_training(run, given, tmp_path, capsys):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    notes = copy / "pretrained" / "tokenizer" / "notes.txt"
    notes.write_text("years of work")
    assert main(["export", str(copy), "--stage=tokenizer", "--replace"]) == 2
    assert "got also notes.txt; move them" in capsys.readouterr().err
    words_of_longer = [*words("tokenizer", given), f"--runs-folder={tmp_path}", "--run=copy", "--trainer.max_steps=6"]
    assert main(["train", *words_of_longer]) == 2
    assert "got also notes.txt; move them" in capsys.readouterr().err
    assert not (copy / "tokenizer" / "checkpoints" / "step-00000006").exists()
    # The folder of the run itself has stages with checkpoints.
    assert main(["export", str(copy), f"--out={copy}", "--stage=tokenizer", "--replace"]) == 2
    assert "must hold only files of an earlier export" in capsys.readouterr().err
    assert (copy / "tokenizer" / "checkpoints").is_dir()
    assert notes.read_text() == "years of work"


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--step=3"], "must hold a complete checkpoint of step 3, got steps: 2, 4"),
        (["--data=/nowhere"], "data /nowhere of"),
    ],
)
def test_what_is_not_there_is_named(run, tmp_path, capsys, more, match):
    assert main(["export", str(run), f"--out={tmp_path / 'out'}", *more]) == 2
    assert match in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_run_and_a_damaged_checkpoint_are_refused(run, tmp_path, capsys):
    assert main(["export", str(tmp_path)]) == 2
    assert "has no stage with checkpoints" in capsys.readouterr().err
    copy = shutil.copytree(run, tmp_path / "copy")
    file = copy / "transformer" / "checkpoints" / "step-00000004" / "tensors-00000-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert main(["export", str(copy), "--stage=transformer", f"--out={tmp_path / 'out'}"]) == 2
    assert "has changed since it was written" in capsys.readouterr().err
    assert not (tmp_path / "out" / "transformer").exists()


@pytest.mark.slow
def test_the_shards_of_two_ranks_become_one_file(given, tmp_path):
    runs = Runs(tmp_path, words("transformer", given), 4)
    runs.leg("sharded", Topology(ranks=2, cluster="fsdp"), kill_at=3)
    runs.leg("whole", Topology(), kill_at=3)
    made = {}
    for name, files in (("sharded", 2), ("whole", 1)):
        checkpoint = runs.newest(name)
        assert checkpoint.name == "step-00000002"
        assert len(list(checkpoint.glob("tensors-*"))) == files
        assert main(["export", str(tmp_path / name), f"--out={tmp_path / name / 'out'}"]) == 0
        made[name] = load_transformer(tmp_path / name / "out" / "transformer").network.state_dict()
    assert made["sharded"].keys() == made["whole"].keys()
    for key, tensor in made["whole"].items():
        torch.testing.assert_close(made["sharded"][key], tensor, atol=1e-5, rtol=1e-5)


def test_an_early_checkpoint_is_a_whole_model_that_can_be_sampled_and_guide_a_later_one(run, tmp_path):
    early = tmp_path / "early"
    assert main(["export", str(run), "--stage=transformer", "--step=2", f"--out={early}"]) == 0
    pipe, weaker = MaskGIT.from_pretrained(run), MaskGIT.from_pretrained(early)
    assert weaker.tokenizer.fingerprint == pipe.tokenizer.fingerprint
    settings = {"output_type": "pt", "guidance_scale": 3.0, "negative_model": early}
    assert torch.equal(weaker.generate([0, 1], **settings), weaker.generate([0, 1], output_type="pt", guidance_scale=0))
    words = ["sample", str(run), "--guidance-scale=3", f"--out={tmp_path / 'made.png'}", "--per-class=1"]
    assert main([*words, f"--negative-model={early}"]) == 0
    assert (tmp_path / "made.png").is_file()


SECRET = "hf_" + "Q" * 34


@pytest.fixture
def folder(tiny_pretrained: Path, tmp_path: Path) -> Path:
    """A pretrained folder with config.json and a card that names its license."""
    MaskGIT.from_pretrained(tiny_pretrained).save_pretrained(tmp_path / "model", license="mit")
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
    monkeypatch.setattr(huggingface_hub, "HfApi", None)


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
    assert sent["README.md"].decode().startswith("---\nlicense: apache-2.0\n")
    assert sent["README.md"].decode().count("license:") == 1
    assert hub.requests.count("POST /api/models/alice/tiny/commit/main") == 2


def test_files_of_an_older_model_are_deleted_and_others_stay(folder: Path, hub: LocalHub):
    older = ("decoding.json", "negative/model.safetensors", "pipeline.py", "LICENSE.txt")
    others = ("notes.txt", "negative/notes.txt", ".gitattributes")
    (folder / "decoding.json").unlink(missing_ok=True)
    hub.repositories["alice/tiny"] = dict.fromkeys((*older, *others, "transformer/config.json"), b"older")
    assert main(["push", str(folder), "alice/tiny"]) == 0
    here = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert {*hub.repositories["alice/tiny"]} == {*here, *others}
    assert hub.requests.count("POST /api/models/alice/tiny/commit/main") == 1


def test_a_model_goes_to_an_organization(folder: Path, hub: LocalHub):
    assert main(["push", str(folder), "lab/tiny"]) == 0
    assert hub.private == {"lab/tiny": False}


def test_a_dry_run_lists_files_and_card_without_network(folder: Path, no_network, capsys):
    assert main(["push", str(folder), "alice/tiny", "--private", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("alice/tiny (private): 6 files, ")
    for file in folder.rglob("*.safetensors"):
        assert re.search(rf"^{file.relative_to(folder)} +{file.stat().st_size} +{sha256_of(file)}$", out, re.MULTILINE)
    assert 'pipe = MaskGIT.from_pretrained("alice/tiny")' in out


def test_a_model_of_the_package_has_its_metrics_on_the_card(no_network, capsys):
    assert main(["push", "fashion-mnist-demo", "alice/fashion", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "license: apache-2.0" in out
    assert "type: fid/classifier" in out


def test_an_older_folder_gets_a_card_and_requires_a_license(tiny_pretrained: Path, no_network, capsys):
    words = ["push", str(tiny_pretrained.parent), "alice/tiny", "--dry-run"]
    assert main(words) == 2
    assert "must name the license of the weights; add it with --license" in capsys.readouterr().err
    assert main([*words, "--license=cc-by-4.0"]) == 0
    out = capsys.readouterr().out
    assert "---\nlicense: cc-by-4.0\n" in out
    assert "license: unknown" not in out


def test_words_of_a_card_by_hand_are_kept(folder: Path, no_network, capsys):
    (folder / "README.md").write_text("---\r\nlicense: mit\r\n---\r\n# Mine\r\nBy hand.\x1b[31m\r\n")
    assert main(["push", str(folder), "alice/tiny", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "# Mine\nBy hand.\\x1b[31m" in out


def _link_the_tokenizer(folder: Path) -> None:
    shutil.move(folder / "tokenizer", folder.parent / "elsewhere")
    (folder / "tokenizer").symlink_to(folder.parent / "elsewhere")


def _cut_the_weights(folder: Path) -> None:
    file = folder / "transformer" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def _name_a_negative_model(folder: Path) -> None:
    other = save_tiny_pretrained(folder.parent / "other")
    save_decoding(folder, MaskGIT.from_pretrained(folder).decoding, negative_model=other / "transformer")


DAMAGE = {
    "another file": lambda folder: (folder / "notes.txt").write_text("private"),
    "a link": lambda folder: (folder / "LICENSE").symlink_to("/etc/passwd"),
    "a linked folder": _link_the_tokenizer,
    "weights": _cut_the_weights,
    "a stage": lambda folder: shutil.rmtree(folder / "transformer"),
    "a token": lambda folder: (folder / "LICENSE").write_text(f"token = {SECRET}"),
    "no header": lambda folder: (folder / "README.md").write_text("# Mine\n"),
    "an alias": lambda folder: (folder / "README.md").write_text("---\nlicense: mit\na: &a [1]\nb: *a\n---\n"),
    "not text": lambda folder: (folder / "LICENSE").write_bytes(b"\xff\xfe"),
    "a negative model elsewhere": _name_a_negative_model,
}


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        ("another file", "must hold only the files of a pretrained folder, got 'notes.txt'; move it elsewhere"),
        ("a link", "must hold no links, got 'LICENSE'"),
        ("a linked folder", "must hold no links, got 'tokenizer'"),
        ("weights", "model.safetensors"),
        ("a stage", "no transformer in"),
        ("a token", "LICENSE must hold no access token of the Hub"),
        ("no header", "README.md must begin with the YAML metadata of the Hub"),
        ("an alias", "the YAML metadata is wrong: line 3, column 4: aliases are not allowed"),
        ("not text", "LICENSE must be UTF-8 text"),
        ("a negative model elsewhere", "negative_model must be in the folder that is shared"),
    ],
)
def test_a_folder_that_must_not_be_shared_is_refused_before_the_hub_is_asked(
    folder: Path, hub: LocalHub, capsys, damage, wanted
):
    DAMAGE[damage](folder)
    assert main(["push", str(folder), "alice/tiny"]) == 2
    err = capsys.readouterr().err
    assert wanted in err
    assert SECRET not in err
    assert hub.requests == []


@pytest.mark.parametrize(
    "name", ["tiny", "alice/", "a/b/c", "alice/two..dots", "alice/x--y", "alice/" + "n" * 97, "al ice/x"]
)
def test_a_name_that_the_hub_does_not_accept_is_refused_first(name, hub: LocalHub, capsys):
    assert main(["push", "fashion-mnist-demo", name]) == 2
    assert "hub_id must be" in capsys.readouterr().err
    assert hub.requests == []


def test_a_license_is_a_word_of_the_hub(folder: Path, no_network, capsys):
    assert main(["push", str(folder), "alice/tiny", "--dry-run", "--license", "mit\ntags: [x]"]) == 2
    assert "--license must be a name of the Hub" in capsys.readouterr().err


@pytest.mark.parametrize("entry", ["license: >\n  mit\n", "license:\n- mit\n", '"license": mit\n', "license: mit\n"])
def test_the_license_of_the_flag_replaces_any_of_the_card(folder: Path, no_network, capsys, entry):
    (folder / "README.md").write_text(f"---\n{entry}tags: [x]  # mine\n---\n# Mine\n")
    assert main(["push", str(folder), "alice/tiny", "--dry-run", "--license", "apache-2.0"]) == 0
    assert "---\nlicense: apache-2.0\ntags: [x]  # mine\n---\n# Mine\n" in capsys.readouterr().out


def test_the_page_of_inspect_is_not_sent(folder: Path, no_network, tiny_shards: Path, capsys):
    assert main(["inspect", str(folder), "--data", str(tiny_shards)]) == 0
    assert (folder / "inspect.html").is_file()
    capsys.readouterr()
    assert main(["push", str(folder), "alice/tiny", "--dry-run"]) == 0
    assert "inspect.html" not in capsys.readouterr().out


@pytest.mark.parametrize("token", ["bad token é", "hf_é", "hf_a b", "hf_a\x01"])
@pytest.mark.parametrize("words", [["push"], ["sample", "--classes=0", "--out=x.png"]], ids=["push", "sample"])
def test_a_token_that_no_header_can_hold_is_named_and_not_shown(
    folder: Path, hub: LocalHub, monkeypatch, capsys, token, words
):
    monkeypatch.setenv("HF_TOKEN", token)
    places = [str(folder), "alice/tiny"] if words == ["push"] else ["alice/tiny"]
    assert main([words[0], *places, *words[1:]]) == 2
    err = capsys.readouterr().err
    assert "hub alice/tiny: the access token must be printable ASCII characters without spaces" in err
    assert token not in err
    assert hub.requests == []


def _refuse(hub: LocalHub, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name == "no login":
        monkeypatch.delenv("HF_TOKEN")
    elif name == "a wrong token":
        monkeypatch.setenv("HF_TOKEN", SECRET)
    elif name == "no network":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    elif name == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif name == "another owner":
        hub.account = {"name": "bob", "orgs": []}
    elif name == "no rights":
        hub.may_write = False
    elif name == "another model":
        hub.repositories["alice/tiny"] = {"pytorch_model.bin": b"", ".gitattributes": b""}


@pytest.mark.parametrize(
    ("reason", "wanted"),
    [
        ("no login", "no access token found; log in with `hf auth login`, or set HF_TOKEN"),
        ("a wrong token", "the access token is not valid; log in again"),
        ("no network", "the Hub cannot be reached"),
        ("offline", "the Hub cannot be reached"),
        ("another owner", "the owner must be the account of the token, 'bob', or one of its organizations, got alice"),
        ("no rights", "the access token may not write to this repository"),
        ("another model", "the name is taken by a repository with other files, such as 'pytorch_model.bin'"),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_line(folder, hub: LocalHub, monkeypatch, capsys, reason, wanted):
    _refuse(hub, monkeypatch, reason)
    before = json.dumps({name: sorted(files) for name, files in hub.repositories.items()})
    assert main(["push", str(folder), "alice/tiny"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"maskgit push: hub alice/tiny: {wanted}")
    assert err.count("\n") == 1
    assert hub.token not in err
    assert SECRET not in err
    assert json.dumps({name: sorted(files) for name, files in hub.repositories.items()}) == before
