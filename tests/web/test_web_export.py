"""The page of ``maskgit export --format web`` in a real Chromium, from a plain web server for files.

``make test-web WEB_PICTURES=docs/web`` also writes the pictures of docs/export.md, with the
student ``runs/one-step``.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect

from maskgit_pl import MaskGIT
from maskgit_pl.cli import main
from maskgit_pl.contrib.web_export import RUNTIME, VERSION
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.pipeline.sharing import find_folder
from maskgit_pl.pretrained.networks import save_decoding
from maskgit_pl.randomness import gumbel_rows, random_bits
from maskgit_pl.schedules import mask_schedules
from tests.conftest import save_tiny_pretrained
from tests.web.conftest import ROOT

MODEL = "fashion-mnist-demo"
BAG = 8
PICTURES = os.environ.get("WEB_PICTURES")
NUM_IMAGES = 200
TOKENS = """async ([model, jobs]) => {
    const script = await import("./page.js"), page = await (await fetch("model.json")).json();
    const graphs = await script.loadGraphs(page), mask = page.mask_token_id;
    const predict = script.guidedBy(page, graphs[["transformer", "student"][model]]);
    const results = [], begin = performance.now();
    for (const { known, ...settings } of jobs) {
        const start = known?.map((token) => token < 0 ? mask : token) ?? Array(page.num_tokens).fill(mask);
        let last;
        for await (const step of script.decode(page, page.models[model], predict, start, settings)) last = step;
        results.push(last.tokens);
    }
    return [results, (performance.now() - begin) / jobs.length];
}"""


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of ONNX Runtime Web, of the package that npm installs."""
    url = f"https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-{VERSION}.tgz"
    folder = tmp_path_factory.mktemp("runtime")
    with urllib.request.urlopen(url, timeout=120) as answer:
        content = io.BytesIO(answer.read())
    with tarfile.open(fileobj=content) as archive:
        for name in RUNTIME:
            member = archive.extractfile(f"package/dist/{name}")
            assert member is not None
            (folder / name).write_bytes(member.read())
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the package with the decoding of a distilled one: its images are bad. Pictures show a real one."""
    if PICTURES:
        return ROOT / "runs/one-step"
    folder = tmp_path_factory.mktemp("student") / "pretrained"
    shutil.copytree(find_folder(MODEL), folder)
    save_decoding(folder, DecodingConfig(1, "random", random_start=0.4, top_k=100))
    return folder


@pytest.fixture(scope="module")
def exported(runtime: Path, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "page"
    command = ["export", MODEL, "--format", "web", "--out", str(folder), "--student", str(student)]
    assert main([*command, "--runtime", str(runtime)]) == 0
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of the documentation."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--quiet", "--conf-dir", "docs", ".", str(folder)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    return folder


@contextmanager
def served(folder: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def opened(browser: Browser, url: str, width: int = 1280) -> Iterator[Page]:
    """Opens the page, which asks no other machine, and waits for its first image; its console stays empty."""
    faults: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900})
    local = (url, "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(local) else faults.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text))
    page.goto(url)
    wait_for_result(page, 1)
    yield page
    page.close()
    assert faults == []


def wait_for_result(page: Page, number: int) -> None:
    expect(page.locator("body")).to_have_attribute("data-done", str(number))


@pytest.fixture(scope="module")
def url(exported: Path) -> Iterator[str]:
    with served(exported) as found:
        yield found


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    with opened(browser, url) as found:
        yield found


@pytest.fixture(scope="module")
def pipe() -> MaskGIT:
    return MaskGIT.from_pretrained(MODEL)


def job(decoding: DecodingConfig, label: int, seed: int, **changes: Any) -> dict[str, Any]:
    """Returns the settings of the script for an image of the model."""
    first, last = decoding.sampling_temperature, decoding.sampling_temperature
    if isinstance(decoding.sampling_temperature, tuple):
        first, last = decoding.sampling_temperature
    selector, guidance = decoding.token_selector, decoding.guidance
    return {
        "label": label, "seed": seed, "steps": decoding.num_steps, "schedule": "arccos", "first": first, "last": last,
        "choice": selector["choice_temperature"] if isinstance(selector, dict) else 0,
        "guidance": guidance["scale"] if isinstance(guidance, dict) else 0, **changes,
    }  # fmt: skip


def pixels(page: Page, canvas: str) -> str:
    return page.locator(canvas).evaluate("canvas => canvas.toDataURL()")


def test_random_numbers_are_the_bits_of_python(page, exported):
    key = json.loads((exported / "model.json").read_text())["streams"]["decode/codes"]
    known, words, noise = page.evaluate(
        """async (key) => {
            const { philox, randomBits, gumbelRow } = await import("./page.js");
            const ones = 0xffffffff;
            return [philox([ones, ones, ones, ones], [ones, ones]), randomBits(key, 7, 3, 49),
                    [...gumbelRow(4000000000, 123456789, 1000)]];
        }""",
        key,
    )
    assert known == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]  # of the Random123 library
    assert words == random_bits("decode/codes", seed=7, index=0, epoch=3, count=49)[0].tolist()
    expected = gumbel_rows(torch.tensor(4000000000), torch.tensor(123456789), 1000)
    assert torch.tensor(noise).sub(expected).abs().max() <= 3e-6


def test_tokens_are_those_of_python(page, pipe, capsys):
    labels, seeds = [number % 10 for number in range(NUM_IMAGES)], range(100, 100 + NUM_IMAGES)
    jobs = [job(pipe.decoding, label, seed) for label, seed in zip(labels, seeds, strict=True)]
    tokens, milliseconds = page.evaluate(TOKENS, [0, jobs])
    ours = pipe.generate_tokens(labels, seed=100).flatten(1).tolist()
    equal = sum(a == b for a, b in zip(tokens, ours, strict=True))
    begin = time.perf_counter()
    for label, seed in zip(labels[:20], seeds[:20], strict=True):
        pipe.generate_tokens(label, seed=seed)
    python = (time.perf_counter() - begin) / 20 * 1000
    with capsys.disabled():
        times = f"{milliseconds:.0f} ms an image, Python {python:.0f} ms"
        print(f"\n{equal} of {NUM_IMAGES} images equal; {times}", file=sys.stderr)
    assert equal >= 0.98 * NUM_IMAGES  # two scores may differ by less than the rounding of float32


@pytest.mark.parametrize("schedule", ["cosine", "square", "linear", "log", "sqrt", "exp"])
def test_other_settings_give_the_tokens_of_python_too(page, pipe, schedule):
    assert schedule in mask_schedules.names()
    decoding = replace(
        pipe.decoding, num_steps=5, mask_schedule=schedule, sampling_temperature=0.7,
        guidance={"name": "linear", "scale": 0.0}, token_selector={"name": "confidence", "choice_temperature": 3.0},
    )  # fmt: skip
    tokens, _ = page.evaluate(TOKENS, [0, [job(decoding, label, 5 + label, schedule=schedule) for label in range(10)]])
    ours = pipe.generate_tokens(list(range(10)), seed=5, decoding=decoding).flatten(1).tolist()
    assert sum(a == b for a, b in zip(tokens, ours, strict=True)) >= 9


def test_an_edit_and_a_student_give_the_tokens_of_python(page, pipe, student):
    known = pipe.generate_tokens([BAG] * 10, seed=0)
    known[:, 3:] = -1
    jobs = [job(pipe.decoding, 0, 50 + row, known=known[row].flatten().tolist()) for row in range(10)]
    tokens, _ = page.evaluate(TOKENS, [0, jobs])
    ours = pipe.generate_tokens([0] * 10, seed=50, known=known.numpy()).flatten(1).tolist()
    assert sum(a == b for a, b in zip(tokens, ours, strict=True)) >= 9
    small = MaskGIT.from_pretrained(student)
    jobs = [job(small.decoding, label, 70 + label) for label in range(10)]
    tokens, _ = page.evaluate(TOKENS, [1, jobs])
    ours = small.generate_tokens(list(range(10)), seed=70).flatten(1).tolist()
    assert sum(a == b for a, b in zip(tokens, ours, strict=True)) >= 9


def test_a_person_generates_steps_through_and_paints(page, exported):
    first, second = pixels(page, "#picture"), pixels(page, "#student")
    assert page.locator("#label option").count() == 11  # ten classes, and none
    page.get_by_label("Class").select_option("Bag")
    wait_for_result(page, 2)
    bag = pixels(page, "#picture")
    assert bag != first
    assert pixels(page, "#student") != second
    expect(page.locator("#caption")).to_contain_text("Step 8 of 8: 0 of 49 tokens masked")
    page.get_by_role("button", name="Step back").click()
    expect(page.locator("#caption")).to_contain_text("Step 7 of 8")
    assert pixels(page, "#picture") != bag
    page.get_by_label("Confidence").check()
    shown = pixels(page, "#picture")
    page.get_by_label("Confidence").uncheck()
    assert pixels(page, "#picture") != shown
    page.get_by_role("button", name="Play").click()
    expect(page.locator("#caption")).to_contain_text("Step 8 of 8")
    assert pixels(page, "#picture") == bag
    # The lower half becomes that of another class, by the pointer and by the keyboard.
    picture = page.locator("#picture")
    box = picture.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 5, box["y"] + 0.95 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 5, box["y"] + 0.95 * box["height"], steps=20)
    page.mouse.up()
    picture.press("ArrowUp")
    picture.press("Space")
    page.get_by_label("Class").select_option("Trouser")  # with painted tokens, nothing is generated yet
    page.get_by_role("button", name="Fill").click()
    wait_for_result(page, 3)
    expect(page.locator("#caption")).to_contain_text("tokens masked,")
    changed = page.evaluate(
        """async ([before, after]) => {
            const read = async (source) => {
                const image = new Image();
                image.src = source;
                await image.decode();
                const canvas = new OffscreenCanvas(image.width, image.height), context = canvas.getContext("2d");
                context.drawImage(image, 0, 0);
                return context.getImageData(0, 0, image.width, image.height).data;
            };
            const [a, b] = [await read(before), await read(after)], rows = Array(7).fill(0);
            for (let k = 0; k < a.length; k++) rows[Math.floor(7 * k / a.length)] += Math.abs(a[k] - b[k]);
            return rows.map((sum) => sum / a.length * 7);
        }""",
        [bag, pixels(page, "#picture")],
    )
    assert max(changed[:3]) < 3 < changed[6]


def test_a_setting_changes_the_image_and_can_be_taken_back(page):
    before = pixels(page, "#picture")
    page.get_by_text("Decoding", exact=True).click()
    page.get_by_label("Mask schedule").select_option("log")
    wait_for_result(page, 2)
    assert pixels(page, "#picture") != before
    page.get_by_label("Guidance").fill("-1")
    page.get_by_label("Guidance").press("Tab")  # refused: nothing is generated
    page.get_by_role("button", name="Settings of the model").click()
    wait_for_result(page, 3)
    assert pixels(page, "#picture") == before


def test_the_picture_is_that_of_python_in_color_too(browser, runtime, tmp_path):
    tiny, folder = save_tiny_pretrained(tmp_path / "tiny", in_channels=3), tmp_path / "page"
    assert main(["export", str(tiny), "--format", "web", "--out", str(folder), "--runtime", str(runtime)]) == 0
    expected = np.asarray(MaskGIT.from_pretrained(tiny).generate([0], seed=18)[0]).astype(int)
    with served(folder) as url, opened(browser, url) as page:
        content = base64.b64decode(pixels(page, "#picture").partition(",")[2])
        picture = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    scale = len(picture) // len(expected)
    shown = picture[scale // 2 :: scale, scale // 2 :: scale]
    assert expected.shape == shown.shape
    assert expected.std(-1).max() > 0  # there is color
    assert np.abs(shown - expected).max() <= 1


@pytest.mark.parametrize(("file", "change"), [("transformer.onnx", "broken"), ("tokenizer-decoder.onnx", "gone")])
def test_a_broken_file_is_one_sentence(browser, exported, tmp_path, file, change):
    folder = shutil.copytree(exported, tmp_path / "page")
    if change == "gone":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes((folder / file).read_bytes()[:-100])
    with served(folder) as url:
        page = browser.new_page()
        page.goto(url)
        expect(page.get_by_role("alert")).to_have_text(f"{file} is missing or has changed. Export the page again.")
        page.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_window(browser, url, exported, width, tmp_path, capsys):
    folder = ROOT / PICTURES if PICTURES else tmp_path
    with opened(browser, url, width) as page:
        page.get_by_label("Class").select_option("Ankle boot")
        wait_for_result(page, 2)
        for _ in range(3):
            page.get_by_role("button", name="Step back").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.screenshot(path=folder / f"export-{width}.png", full_page=True)
    if width == 1280:
        sizes = {file.name: file.stat().st_size for file in exported.iterdir()}
        with capsys.disabled():
            print(f"\n{sum(sizes.values()) / 2**20:.1f} MiB: {sizes}", file=sys.stderr)


@pytest.mark.parametrize("is_online", [True, False])
def test_the_site_shows_the_model_or_else_its_picture(browser, site, runtime, is_online):
    with served(site) as url:
        page = browser.new_page()
        asked = []

        def answer(route: Route) -> None:
            asked.append(route.request.url)
            headers = {"Access-Control-Allow-Origin": "*"}
            route.fulfill(path=runtime / asked[-1].rpartition("/")[2], headers=headers) if is_online else route.abort()

        page.route("https://cdn.jsdelivr.net/**", answer)
        page.goto(f"{url}docs/how-it-works.html")
        picture, frame = page.locator('img[src$="decoding.png"]'), page.frame_locator("iframe")
        if is_online:
            expect(frame.locator("#caption")).to_contain_text("Step 8 of 8")
            expect(picture).to_be_hidden()
        else:
            expect(frame.get_by_role("alert")).to_contain_text("is missing or has changed")
            expect(picture).to_be_visible()
        assert {url.rpartition("/")[2] for url in asked} == {*RUNTIME}
        assert all(f"onnxruntime-web@{VERSION}/dist/" in url for url in asked)
        page.close()


def test_another_runtime_and_another_tokenizer_are_refused(runtime, tmp_path, tiny_pretrained, capsys):
    other = shutil.copytree(runtime, tmp_path / "runtime")
    (other / "ort-wasm-simd-threaded.wasm").write_bytes(b"")
    command = ["export", MODEL, "--format", "web", "--out", str(tmp_path / "page")]
    assert main([*command, "--runtime", str(other)]) == 2
    assert f"--runtime must be the folder dist of onnxruntime-web {VERSION}" in capsys.readouterr().err
    assert main([*command, "--student", str(tiny_pretrained)]) == 2
    assert "--student must have the tokenizer of" in capsys.readouterr().err
    assert not (tmp_path / "page").exists()
