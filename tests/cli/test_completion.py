"""``maskgit completion``: the script, in a real shell."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from maskgit_pl.cli import main
from maskgit_pl.cli.completion import SHELLS

ROOT = Path(__file__).parents[2]
TAB = """
source "$1"; shift
function=$(complete -p maskgit | sed -E 's/.*-F ([^ ]+) .*/\\1/')
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); $function
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completion")
    with open(folder / "maskgit.bash", "w") as file:
        subprocess.run([sys.executable, "-m", "maskgit_pl", "completion", "bash"], check=True, stdout=file, cwd=ROOT)
    return folder / "maskgit.bash"


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["sam"], {"sample"}),
        (["data", "fe"], {"fetch"}),
        (["train", ""], {"tokenizer", "transformer"}),
        (["train", "tokenizer", "--dry"], {"--dry-run"}),
        (["sample", "--num-"], {"--num-steps", "--num-images"}),
        (["export", "recipes/tok"], {"recipes/tokenizer"}),  # files and folders
        (["tokenize", "--precision", ""], {"float32", "bfloat16"}),
    ],
)
def test_bash_completes_commands_choices_flags_and_files(words: list[str], wanted: set[str], script: Path) -> None:
    command = ["bash", "-c", TAB, "tab", str(script), "maskgit", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert set(done.stdout.split()) == wanted, done.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_has_a_script_with_every_command(shell: str, capsys) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert all(f"{command}" in text for command in ("evaluate-tokenizer", "data", "recipes", "completion"))
    assert ("#compdef maskgit" in text) is (shell == "zsh")


def test_another_shell_is_refused(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["completion", "fish"])
    assert stop.value.code == 2
