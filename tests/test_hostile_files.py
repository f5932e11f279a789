"""Every JSON file that the package writes beside weights, mutated key by key: it loads, or is refused in one line."""

import copy
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maskgit_pl.data.samples import Labels
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.files import write_tensors
from maskgit_pl.networks.classifiers import (
    ClassifierSizes,
    create_classifier,
    describe_classifier,
    load_classifier,
)
from maskgit_pl.pretrained.networks import load_tokenizer, load_transformer, read_decoding, save_decoding
from maskgit_pl.training.speed import read_training_time
from tests.pretrained.test_networks import bounded_memory, equal, save_both

SECONDS, MEMORY = 10, 500_000_000  # of a load, at most; a load of what is here takes 10 ms and 1 MB
DEPTHS = (300, 600, 900, 100_000)  # Python's own limit is about 1000 calls, and code that walks a tree needs several


def nested(depth: int, opening: str) -> str:
    """Returns JSON of lists (``[``) or mappings (``{"a":``) inside one another."""
    return opening * depth + "0" + {"[": "]", "{": "}"}[opening[0]] * depth


LARGE = {  # what stands in a file in place of a word, for json is slow to write it
    **{f"@{name} {depth}@": nested(depth, opening) for depth in DEPTHS
       for name, opening in (("lists", "["), ("mappings", '{"a":'))},
    "@string@": '"' + "x" * 100_000 + '"',
    "@list@": "[" + "0," * 99_999 + "0]",
}  # fmt: skip
VALUES = (
    *LARGE, "text", 2**40, 10**9, 10**400, -1, 0.5, 1e300, float("nan"), float("inf"), True, None, [], {},
    {"name": "x"}, {"name": ["x"]},
)  # fmt: skip


def paths(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the path of every key of every mapping, and of the first items of every list."""
    keys = node if isinstance(node, dict) else range(min(len(node), 8)) if isinstance(node, list) else ()
    for key in keys:
        yield (*path, key)
        yield from paths(node[key], (*path, key))


def mutants(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields a description of each change, and the text of the changed file."""
    for path in paths(content):
        for value in ("@delete@", "@twice@", *VALUES):
            changed = copy.deepcopy(content)
            *above, key = path
            parent: Any = changed
            for name in above:
                parent = parent[name]
            if value == "@delete@":
                del parent[key]
            elif value == "@twice@":
                if not isinstance(parent, dict):
                    continue
                parent["@twice@"] = 0
            else:
                parent[key] = value
            text = json.dumps(changed).replace('"@twice@"', json.dumps(str(key)))
            if isinstance(value, str) and value in LARGE:
                text = text.replace(f'"{value}"', LARGE[value])
            yield f"{path}: {str(value)[:20]}", text
    yield "root: list", "[]"
    yield "root: empty", ""
    yield "root: binary", "\x00\x01"
    yield "root: large", " " * 20_000_000 + "{}"


@contextmanager
def bounded() -> Iterator[None]:
    """Ends what takes too long, and refuses memory beyond the bound."""

    def stop(*_: object) -> None:
        raise AssertionError(f"it took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with bounded_memory(MEMORY):
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(load: Callable[[], Any], file: Path, changed: str) -> Any:
    """Returns the result of a load; None if it is refused correctly."""
    try:
        with bounded():
            return load()
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        assert str(file.parent) in text, f"{changed}: the file is not named: {text[:300]}"
        assert "\n" not in text, f"{changed}: several lines: {text[:300]}"
        return None
    except Exception as error:
        raise AssertionError(f"{changed}: {type(error).__name__}: {str(error)[:300]}") from error


DECODING = DecodingConfig(
    2,
    {"name": "confidence", "choice_temperature": 2.0},
    {"name": "linear", "scale": 1.0},
    (1.0, 0.5),
    4,
    (4, 12),
    {"name": "pow", "exponent": 3.0},
)


def tokenizer(folder: Path) -> tuple[Path, Callable[[], Any]]:
    stage = save_both(folder) / "tokenizer"
    return stage / "config.json", lambda: load_tokenizer(stage).network.state_dict()


def transformer(folder: Path) -> tuple[Path, Callable[[], Any]]:
    stage = save_both(folder, DECODING) / "transformer"
    return stage / "config.json", lambda: load_transformer(stage).network.state_dict()


def decoding(folder: Path) -> tuple[Path, Callable[[], Any]]:
    save_both(folder)
    selector = {"name": "remdm", "eta": 0.2}
    save_decoding(folder, DecodingConfig(2, selector, {"name": "cosine", "scale": 1.0}), tuned={"metric": "fid"})

    def load() -> dict[str, Tensor]:
        recipe = read_decoding(folder)
        assert recipe is not None
        return {"scales": torch.zeros(len(recipe.scales()))}

    return folder / "decoding.json", load


def classifier(folder: Path) -> tuple[Path, Callable[[], Any]]:
    sizes = ClassifierSizes(1, 8, 2, width=4)
    folder.mkdir(parents=True)
    write_tensors(folder / "model.safetensors", create_classifier(sizes).state_dict())
    (folder / "config.json").write_text(json.dumps(describe_classifier(sizes, ("cat", "dog"))))
    return folder / "config.json", lambda: load_classifier(folder).state_dict()


FILES = (tokenizer, transformer, decoding, classifier)


@pytest.mark.slow
@pytest.mark.parametrize("make", FILES)
def test_a_file_with_one_changed_key_loads_the_same_or_is_refused(tmp_path, make):
    file, load = make(tmp_path / "folder")
    expected, good = load(), file.read_text()
    refused = tried = 0
    for changed, text in mutants(json.loads(good)):
        file.write_text(text)
        weights = outcome(load, file, changed)
        tried += 1
        refused += weights is None
        if weights is not None:
            assert equal(weights, expected) or make is decoding, f"{changed}: other weights"
    assert tried > 100
    assert refused > tried / 4
    file.write_text(good)
    assert equal(load(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("make", [tokenizer, transformer, classifier])
def test_weights_with_one_changed_byte_load_or_are_refused(tmp_path, make):
    written, load = make(tmp_path / "folder")
    file = written.with_name("model.safetensors")
    good = file.read_bytes()
    length = 8 + int.from_bytes(good[:8], "little")
    for place in {*range(16), *range(16, length, max(1, length // 80))}:
        for byte in (0x31, 0xFF):
            file.write_bytes(good[:place] + bytes([byte]) + good[place + 1 :])
            outcome(load, file, f"byte {place}: {byte}")


@pytest.mark.parametrize("depth", DEPTHS)
def test_times_and_labels_of_any_depth_are_refused(depth, tmp_path):
    (tmp_path / "training_time.json").write_text(nested(depth, '{"a":'))
    assert read_training_time(tmp_path) is None
    with pytest.raises(ValueError, match="label x must be a JSON object"):
        Labels("json:label").read(b'{"label": ' + nested(depth, "[").encode() + b"}", name="x")
