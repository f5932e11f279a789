"""``maskgit doctor``: each check against the fault that it is for, really there."""

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from maskgit_pl import runs
from maskgit_pl.cli import main
from maskgit_pl.networks.transformer import MaskedTransformer, TransformerConfig
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.runs import preflight_checks
from maskgit_pl.runs.preflight_checks import _ZeroWeights
from maskgit_pl.runs.preflight_costs import CostChecks
from tests.conftest import flags

SMALL = VQGANConfig(
    1, base_channels=8, channel_multipliers=(1, 1), num_res_blocks=1, num_groups=2, codebook_size=16, code_dim=4
)
TINY = Path(__file__).parents[1] / "tiny"
JOB = {
    "SLURM_JOB_ID": "70001",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NTASKS": "4",
    "SLURM_JOB_NODELIST": "localhost",
}


@pytest.fixture(autouse=True)
def _nothing_around(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "MASTER_", "NCCL_", "GLOO_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def doctor(capsys, tmp_path, tiny_shards, tiny_pretrained) -> Callable[..., tuple[int, str]]:
    """Examines a tiny run; words that are given later count."""

    def call(stage: str, *more: object) -> tuple[int, str]:
        tokenizer = ("--tokenizer", tiny_pretrained / "tokenizer") if stage == "transformer" else ()
        tiny = flags(yaml.safe_load((TINY / f"{stage}.yaml").read_text()))
        where = ("--data", tiny_shards, "--runs-folder", tmp_path / "runs", "--run", "one", *tokenizer)
        words = ("doctor", stage, "--device-memory", "1GB", *where, *tiny, *more)
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, " ".join(capsys.readouterr().out.split())

    return call


def fails(answer: tuple[int, str], name: str, *parts: object) -> None:
    code, text = answer
    assert code == 2, text
    assert f"FAIL {name} " in text
    for part in parts:
        assert str(part) in text, text


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_a_run_that_can_start_passes_and_nothing_is_written(doctor, stage, tmp_path):
    code, text = doctor(stage, "--cluster", "ddp", "--nodes", "2", "--devices", "2")
    assert code == 0, text
    assert "checks pass" in text
    assert "4 = 4 ranks x 1 accumulation step x 1 sample" in text
    assert "1 1 3 3" in text  # node, local rank, global rank, sample
    assert "not rescaled by the number of devices" in text
    assert re.search(r"FLOPs of a step [0-9.]+ MFLOP; [0-9.]+ MFLOP per rank the run 1 step, ", text)
    assert not (tmp_path / "runs").exists()


def test_each_check_is_printed_before_the_next_is_made(doctor, monkeypatch, capsys):
    printed = []
    for home, slow in ((preflight_checks, "build_for_preflight"), (CostChecks, "check_memory")):
        original = getattr(home, slow)

        def recorded(*args, original=original, **more):
            printed.append(" ".join(capsys.readouterr().out.split()))
            return original(*args, **more)

        monkeypatch.setattr(home, slow, recorded)
    assert doctor("transformer")[0] == 0
    before_build, before_costs = printed
    assert before_build.startswith("Checking a transformer run;")
    assert re.search(r"ok slurm .* ok network .* ok data .* ok tokenizer .* ok strategy ", before_build)
    assert re.search(r"ok recipe .* ok batch .* ok run ", before_costs)


@pytest.mark.parametrize("network", [MaskedTransformer(TransformerConfig(16, 3, (4, 4), 16, 1, 2, 32)), VQGAN(SMALL)])
def test_a_large_network_is_built_without_drawing_its_weights(network):
    with torch.random.fork_rng(), _ZeroWeights():
        before = torch.get_rng_state()
        made = type(network)(network.config)
        assert torch.equal(torch.get_rng_state(), before)
    shapes = [{name: tensor.shape for name, tensor in each.state_dict().items()} for each in (made, network)]
    assert shapes[0] == shapes[1]


def test_a_batch_that_does_not_divide_is_answered_with_what_does(doctor):
    answer = doctor("transformer", "--cluster", "ddp", "--devices", "3")
    fails(answer, "batch", "must be a multiple of the 3 ranks, got 4", "1, 2, 4 ranks")


@pytest.mark.slow
def test_memory_that_is_too_small_is_answered_with_the_batch_that_fits(doctor):
    code, text = doctor("transformer", "--data.global_batch=64", "--data.max_batch_per_device=64")
    assert code == 0, text
    answer = doctor(
        "transformer", "--data.global_batch=64", "--data.max_batch_per_device=64", "--device-memory", "600K"
    )
    fails(
        answer, "memory", "data.max_batch_per_device 64", "must fit into 552 kB", "--data.max_batch_per_device=16 fits"
    )
    fails(answer, "memory", "--model.activation_checkpointing=blocks", "--trainer.precision=bf16-mixed")
    fails(doctor("tokenizer", "--device-memory", "10K"), "memory", "not even one sample fits")


@pytest.mark.slow
def test_what_is_missing_stands_in_one_list(doctor, tmp_path):
    answer = doctor(
        "transformer", "--data", tmp_path / "nowhere", "--tokenizer", tmp_path / "none", "--data.global_batch=5",
        "--cluster", "ddp", "--devices", "2", "--pretrained", tmp_path / "no-weights", "--trainer.precision=16-mixed",
    )  # fmt: skip
    fails(answer, "data", f"data {tmp_path / 'nowhere'}: no such folder", "maskgit data make")
    fails(answer, "tokenizer", f"tokenizer {tmp_path / 'none'}: no config.json there")
    fails(answer, "pretrained", f"pretrained {tmp_path / 'no-weights'}")
    fails(answer, "batch", "must be a multiple of the 2 ranks, got 5")
    fails(answer, "strategy", "trainer.precision", "16-mixed")
    assert "5 of" in answer[1]
    fails(doctor("tokenizer", "--trainer.accelerator=gpus"), "strategy", "trainer.accelerator 'gpus'", "gpu")


@pytest.mark.parametrize("with_data", [True, False])
@pytest.mark.parametrize(
    ("flag", "part"),
    [
        ("--model.mask_sched=square", "did you mean 'model.mask_schedule'"),
        ("--trainer.max_steps=many", "max_steps"),
        ("--model.decoding.guidance=liner", "did you mean 'linear'"),
    ],
)
def test_a_wrong_recipe_is_refused_as_training_refuses_it(doctor, flag, part, with_data, tmp_path):
    where = () if with_data else ("--data", tmp_path / "nowhere")
    fails(doctor("transformer", *where, flag), "recipe", part)


def test_a_recipe_that_is_not_there(doctor):
    answer = doctor("transformer", "--recipe", "cosin")
    fails(answer, "recipe", "did you mean 'cosine'")
    assert "1 of 1 checks fail." in answer[1]


@pytest.mark.parametrize(("flag", "value"), [("--nodes", "0"), ("--net-port", "65536")])
def test_a_number_out_of_range_is_refused_before_anything_is_checked(monkeypatch, capsys, flag, value):
    monkeypatch.setattr(runs, "preflight", None)
    assert main(["doctor", "transformer", flag, value]) == 2
    assert f"{flag.rpartition('-')[2]} must be" in capsys.readouterr().err


def test_a_tokenizer_of_other_sizes_is_refused(doctor):
    fails(
        doctor("transformer", "--model.network.codebook_size=8"), "recipe", "must be 16, that of the tokenizer, got 8"
    )


def test_tokens_that_are_not_made_are_missed(doctor):
    fails(doctor("transformer", "--data.source=tokens"), "recipe", "tokenize")


@pytest.mark.slow
def test_data_that_was_cut_off_is_named(doctor, tiny_shards, tmp_path):
    shutil.copytree(tiny_shards, tmp_path / "cut")
    shard = next((tmp_path / "cut").glob("train-*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1024])
    fails(doctor("tokenizer", "--data", tmp_path / "cut"), "recipe", shard.name)
    (tmp_path / "cut" / "val.json").unlink()
    fails(doctor("tokenizer", "--data", tmp_path / "cut"), "data", "val split")


@pytest.mark.slow
def test_data_without_a_train_split_are_named(doctor, tiny_shards, tmp_path):
    shutil.copytree(tiny_shards, tmp_path / "validation")
    (tmp_path / "validation" / "train.json").unlink()
    for stage in ("tokenizer", "transformer"):
        for passes in ("null", "3"):
            answer = doctor(stage, "--data", tmp_path / "validation", f"--max_passes={passes}")
            fails(answer, "data", "no manifest train.json", "maskgit data index")


def test_a_tokenizer_whose_file_leaves_out_a_size_has_the_default(doctor, tiny_pretrained, tmp_path):
    shutil.copytree(tiny_pretrained / "tokenizer", tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "config.json"
    content = json.loads(file.read_text())
    del content["network"]["codebook_size"]
    file.write_text(json.dumps(content))
    code, text = doctor("transformer", "--tokenizer", tmp_path / "tokenizer")
    assert code in (0, 2), text
    assert "1024 codes" in text


def test_names_of_files_do_not_control_the_terminal(doctor):
    answer = doctor("tokenizer", "--data", "no\x1b[2Jwhere", "--run", os.fsdecode(b"\xff"))
    fails(answer, "data", "data no\\x1b[2Jwhere: no such folder")
    assert "\\udcff" in answer[1]
    assert "\x1b" not in answer[1]


@pytest.mark.parametrize(("text", "shown"), [((), ""), (("two\nlines",), "two lines ok strategy")])
def test_an_error_without_a_text_or_of_two_lines_is_printed(doctor, monkeypatch, text, shown):
    def refuse(*args, **more):
        raise FileNotFoundError(*text)

    monkeypatch.setattr(preflight_checks, "find_data", refuse)
    fails(doctor("tokenizer"), "data", shown)


@pytest.mark.slow
def test_a_perceptual_network_without_weights_leaves_the_rest_examined(doctor):
    network = "{network: {name: timm, model: resnet18, weights: no-such-file}, weight: 0.1}"
    answer = doctor("tokenizer", f"--model.perceptual={network}")
    fails(answer, "recipe", "must be an existing file, got no-such-file", "--model.perceptual.network.weights FILE")
    assert "without the perceptual network" in answer[1]
    assert "1 of" in answer[1]


def test_the_tokenizer_does_not_train_under_fsdp(doctor):
    fails(doctor("tokenizer", "--cluster", "fsdp", "--devices", "2"), "strategy", "'fsdp'", "--cluster ddp")


def test_several_devices_need_a_strategy(doctor):
    fails(doctor("tokenizer", "--devices", "2"), "strategy", "'auto'", "--cluster ddp")


@pytest.mark.slow
def test_a_port_in_use_is_named_with_a_free_one(doctor, monkeypatch):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        fails(
            doctor("tokenizer", "--net-port", port), "network", f"MASTER_PORT {port}", "in use", "export MASTER_PORT="
        )
        monkeypatch.setenv("MASTER_PORT", str(port))
        fails(doctor("tokenizer"), "network", f"MASTER_PORT {port}")
    assert doctor("tokenizer")[0] == 0
    for named in ("http", "99999", "0"):
        monkeypatch.setenv("MASTER_PORT", named)
        fails(doctor("tokenizer"), "network", f"got '{named}'", "[1, 65535]")
    monkeypatch.delenv("MASTER_PORT")
    monkeypatch.setenv("SLURM_JOB_ID", "abc")
    fails(doctor("tokenizer"), "network", "SLURM_JOB_ID", "got 'abc'")


@pytest.mark.slow
def test_names_that_lead_nowhere(doctor, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    fails(doctor("tokenizer"), "network", "GLOO_SOCKET_IFNAME eth77", "lo")
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    fails(doctor("tokenizer"), "network", "MASTER_ADDR no-such-host.invalid", "/etc/hosts")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value", "flag"),
    [
        ("SLURM_NNODES", "3", "--nodes"),
        ("SLURM_NTASKS_PER_NODE", "1", "--ntasks-per-node"),
        ("SLURM_GPUS_ON_NODE", "4", "--gpus-per-node"),
    ],
)
def test_slurm_variables_that_contradict_the_run(doctor, monkeypatch, variable, value, flag):
    for name, right in JOB.items():
        monkeypatch.setenv(name, right)
    words = ("tokenizer", "--cluster", "ddp", "--nodes", "2", "--devices", "2")
    assert doctor(*words)[0] == 0
    monkeypatch.setenv(variable, value)
    fails(doctor(*words), "slurm", variable, f"got {value}", flag)
    assert os.environ["SLURM_NNODES"]  # hidden while the run was built, and back


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 32 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_without_room_for_the_checkpoints(doctor, small_disk):
    answer = doctor("transformer", "--runs-folder", small_disk)
    fails(answer, "disk", small_disk, "free", "--runs-folder", "keep_last")


@pytest.mark.slow
def test_a_run_that_is_there_goes_on_or_is_refused(doctor, tmp_path, tiny_shards, tiny_pretrained):
    tiny = flags(yaml.safe_load((TINY / "transformer.yaml").read_text()))
    words = ["--data", str(tiny_shards), "--runs-folder", str(tmp_path / "runs"), "--run", "one", *tiny]
    assert main(["train", "transformer", "--tokenizer", str(tiny_pretrained / "tokenizer"), *words]) == 0
    code, text = doctor("transformer", "--trainer.max_steps=5")
    assert code == 0
    assert "resumes from step-00000001" in text
    fails(doctor("transformer", "--trainer.max_steps=5", "--model.mask_schedule=square"), "recipe", "cosine -> square")
    assert "training has nothing to do" in doctor("transformer")[1]


def test_a_size_that_is_none_is_refused(doctor, capsys):
    with pytest.raises(SystemExit):
        doctor("transformer", "--device-memory", "much")
    assert "a size such as 80GB" in capsys.readouterr().err


def test_many_ranks_are_shown_node_by_node(doctor):
    answer = doctor(
        "transformer", "--cluster", "ddp", "--nodes", "64", "--devices", "8", "--data.global_batch=1024",
        "--data.max_batch_per_device=1",
    )  # fmt: skip
    assert answer[0] == 0
    assert "0 0-7 0-7 0-7, 512-519" in answer[1]
    assert "up to rank 511" in answer[1]


@pytest.mark.parametrize(
    ("flag", "rule"),
    [
        ("--nodes=0", "--nodes must be an integer in"),
        ("--net-port=0", "--net-port must be an integer in"),
        ("--device-memory=1e999GB", "argument --device-memory: must be a size such as"),
    ],
)
def test_numbers_of_machines_are_refused_by_the_name_of_their_flag(flag: str, rule: str, capsys) -> None:
    try:
        code = main(["doctor", "tokenizer", flag])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    assert code == 2
    assert rule in capsys.readouterr().err
