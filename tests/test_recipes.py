"""Every recipe parses, says what it is, builds at full size without memory, and trains a step."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from maskgit_pl.cli import main
from maskgit_pl.contrib.inspect_page import read_logs
from maskgit_pl.data.images import encode_png
from maskgit_pl.data.sources.shards import open_source
from maskgit_pl.data.writer import make_shards
from maskgit_pl.files import read_yaml
from maskgit_pl.networks.backbone import build_config
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.pretrained.networks import load_tokenizer, load_transformer
from maskgit_pl.runs.fitting import fit_stage
from maskgit_pl.runs.plan import Plan
from maskgit_pl.runs.recipe import Recipe, merge
from maskgit_pl.schedules import mask_schedules

RECIPES = Path(__file__).parents[1] / "recipes"
TINY = Path(__file__).parent / "tiny"
TOKENIZERS = sorted(file.stem for file in (RECIPES / "tokenizer").glob("*.yaml"))
TRANSFORMERS = sorted(file.stem for file in (RECIPES / "transformer").glob("*.yaml"))
PARAMETERS = {
    ("tokenizer", "paper-256"): 54_515_587,
    ("tokenizer", "paper-512"): 54_515_587,
    ("tokenizer", "taming-f16"): 72_141_699,
    ("tokenizer", "llamagen-vq16"): 71_883_403,
    ("tokenizer", "maskbit-12bit"): 55_626_127,
    ("tokenizer", "fsq-1000"): 52_962_951,
    ("tokenizer", "fsq-4375"): 52_968_072,
    ("transformer", "adaln-t"): 23_148_929,
    ("transformer", "adaln-s"): 69_495_297,
    ("transformer", "adaln-b"): 142_450_433,
    ("transformer", "adaln-l"): 479_933_441,
    ("transformer", "adaln"): 1_246_865,
    ("tokenizer", "1h"): 280_121,
    ("tokenizer", "overnight"): 493_273,
    ("tokenizer", "64px"): 289_929,
    ("tokenizer", "collapse"): 108_081,
    ("transformer", "1h"): 2_025_292,
    ("transformer", "overnight"): 5_794_700,
    ("transformer", "maskbit-12bit"): 304_784_490,
    ("transformer", "paper-256"): 172_457_193,
    ("transformer", "paper-512"): 173_047_017,
    ("tokenizer", "photos-64"): 11_603_595,
    ("tokenizer", "gpu-1h"): 11_603_595,
    ("tokenizer", "photos-128"): 29_069_963,
    ("tokenizer", "photos-256"): 52_983_435,
    ("transformer", "photos-64"): 16_732_289,
    ("transformer", "gpu-1h"): 31_091_201,
    ("transformer", "photos-128"): 60_944_897,
    ("transformer", "photos-256"): 129_632_513,
}
BELOW = {
    "paper-512": ["paper-256"],
    "fsq-1000": ["paper-256"],
    "fsq-4375": ["paper-256"],
    "gpu-1h": ["photos-64"],
    **{f"adaln-{size}": ["adaln-b"] for size in "tsl"},
}  # what a recipe says it is laid over


def layers(stage: str, name: str) -> list[Path]:
    names = ["base", *BELOW.get(name, []), name]
    return [RECIPES / stage / f"{each}.yaml" for each in dict.fromkeys(names)]


@pytest.mark.parametrize("file", sorted(RECIPES.rglob("*.yaml")), ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_recipe_opens_with_its_four_lines(file):
    assert read_yaml(file) == yaml.safe_load(file.read_text())
    comments = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert comments
    if file.parent.name != "cluster":
        for word in ("Reproduces", "Expect", "Costs", "Run"):
            assert any(line.startswith(f"# {word} ") for line in comments), word


TAMING = ["--model.network.num_middle_blocks=2", "--model.network.attention_levels=[1]"]
PATCHES = ["--model.adversarial.discriminator.num_layers=1", "--model.adversarial.start_step=0"]
SMALLER = {  # what does not fit images of 8 px, 16 codes or the tiny network
    "taming-f16": [*TAMING, *PATCHES],
    "llamagen-vq16": [*TAMING, *PATCHES],
    "maskbit-12bit": PATCHES,
    "gan-collapse": ["--model.adversarial.discriminator.num_layers=1"],
    "fsq-1000": ["--model.network.quantizer.levels=[2,2,2,2]"],
    "fsq-4375": ["--model.network.quantizer.levels=[2,2,2,2]"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_recipe_builds_at_full_size(name):
    tree = merge(map(read_yaml, layers("transformer", name)))
    sizes = {"codebook_size": 256, "num_classes": 10, "grid": (7, 7), **tree["model"]["network"]}
    with torch.device("meta"):
        network = build_config(sizes, "network").create()
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == PARAMETERS.get(("transformer", name), 851_084)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_recipe_builds_at_full_size(name):
    tree = merge(map(read_yaml, layers("tokenizer", name)))
    with torch.device("meta"):
        network = VQGAN(VQGANConfig(tree["data"]["in_channels"], **tree["model"]["network"]))
    count = sum(parameter.numel() for parameter in network.parameters())
    small = {1: 126_873, 3: 129_323}[tree["data"]["in_channels"]]
    assert count == PARAMETERS.get(("tokenizer", name), small)


@pytest.mark.trainings
@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_recipe_trains_a_step(name, tiny_shards, tmp_path):
    files = [*layers("tokenizer", name), RECIPES / "cluster" / "single.yaml", TINY / "tokenizer.yaml"]
    recipe = Recipe.from_files("tokenizer", files, SMALLER.get(name, []))
    assert fit_stage(Plan(recipe, tiny_shards, tmp_path)).step == 1
    assert load_tokenizer(tmp_path / "pretrained" / "tokenizer").image_size == 8
    assert (tmp_path / "tokenizer" / "reconstructions.png").is_file()


@pytest.mark.trainings
@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_recipe_trains_a_step(name, tiny_shards, tiny_pretrained, tmp_path):
    files = [*layers("transformer", name), RECIPES / "cluster" / "single.yaml", TINY / "transformer.yaml"]
    teacher = tiny_pretrained / "transformer" if name.startswith("distill-") else None
    recipe = Recipe.from_files("transformer", files)
    assert fit_stage(Plan(recipe, tiny_shards, tmp_path, tiny_pretrained / "tokenizer", teacher)).step == 1
    model = load_transformer(tmp_path / "pretrained" / "transformer")
    if name == "autoregressive":
        assert (model.mask_schedule, model.network.config.attention) == (None, "causal")
        assert (model.decoding.num_steps, model.decoding.token_selector) == (16, None)
    else:
        assert type(model.mask_schedule).__module__ == "maskgit_pl.schedules"
    if name in mask_schedules.names():
        assert yaml.safe_load((RECIPES / "transformer" / f"{name}.yaml").read_text())["model"]["mask_schedule"] == name
    assert (tmp_path / "transformer" / "samples.png").is_file()
    assert (tmp_path / "transformer" / "config.yaml").is_file()


# The recipes ``collapse`` and ``collapse-cured``: the codebook dies, the alarm says so, and the cure helps


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns shards of 28 px drawings, each one disc with a brightness gradient: 600 train, 100 val."""
    folder = tmp_path_factory.mktemp("drawings")
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(28), torch.arange(28), indexing="ij")
    for split, count in (("train", 600), ("val", 100)):
        (folder / "images" / split / "disc").mkdir(parents=True)
        for number in range(count):
            y, x, radius, slope_y, slope_x = torch.rand(5, generator=generator).tolist()
            disc = (rows - 28 * y) ** 2 + (columns - 28 * x) ** 2 < (4 + 10 * radius) ** 2
            bright = 128 + 4 * (slope_y - 0.5) * (rows - 14) + 4 * (slope_x - 0.5) * (columns - 14)
            image = (disc * bright).clamp(0, 255).to(torch.uint8)
            (folder / "images" / split / "disc" / f"{number}.png").write_bytes(encode_png(image[None]))
    make_shards(open_source(folder / "images"), folder / "shards")
    return folder / "shards"


def train(recipe: str, data: Path, folder: Path) -> float:
    """Trains a tokenizer; returns the fraction of codes that the validation images use."""
    where = ["--data", str(data), "--runs-folder", str(folder), "--run", "one", "--recipe", recipe]
    assert main(["train", "tokenizer", *where, "--data.validation_batch=100", "--data.validation_samples=100"]) == 0
    return read_logs(folder / "one" / "tokenizer").last("val")["codebook_usage"]


@pytest.mark.trainings
@pytest.mark.slow
def test_the_recipe_collapse_gives_the_alarm_and_its_cure_keeps_the_codes_in_use(drawings, tmp_path, capsys):
    usage = train("collapse", drawings, tmp_path / "sick")
    assert re.search(r"step 175: health: only .* codes are in use .*restart_below", capsys.readouterr().out)
    assert usage < 0.3
    assert train("collapse collapse-cured", drawings, tmp_path / "cured") > 3 * usage
    assert "health:" not in capsys.readouterr().out
