"""The page of ``maskgit web`` in a real Chromium: what a person does on it, and what a careless one does.

``make test-web`` runs them. ``make test-web WEB_PICTURES=docs/web`` also writes the pictures of docs/web.md.
"""

from __future__ import annotations

import io
import os
import re
import signal
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect
from playwright.sync_api import TimeoutError as Late

from maskgit_pl import MaskGIT
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.web import page as page_module
from maskgit_pl.web.page import build_page, painted_pixels, settings_of, start_values, stream_steps
from tests.web.conftest import ROOT, SECONDS, Server, opened, running

MODEL = "fashion-mnist-demo"
BAG, BOOT = 8, 9
ENDED = "\nmaskgit web: ended; its temporary files are removed\n"


@pytest.fixture(scope="module")
def pipe() -> MaskGIT:
    return MaskGIT.from_pretrained(MODEL)


def tab(page: Page, name: str) -> Locator:
    """Opens a tab and returns its panel."""
    page.get_by_role("tab", name=name, exact=True).click()
    return page.get_by_role("tabpanel").filter(visible=True)


def press(panel: Locator, name: str) -> None:
    panel.get_by_role("button", name=name, exact=True).click()


def set_number(panel: Locator, name: str, value: int) -> None:
    """Types a number, until the slider beside the field shows that the page has taken it."""
    field = panel.get_by_label(f"number input for {name}", exact=True)
    slider = panel.get_by_label(f"range slider for {name}", exact=True)
    for _ in range(SECONDS // 5):
        field.fill(str(value))
        field.press("Tab")
        with suppress(AssertionError):
            expect(slider).to_have_value(str(value), timeout=5000)
            return
    raise AssertionError(f"{name} is not {value}")


def choose(page: Page, panel: Locator, field: str, option: str) -> None:
    panel.get_by_label(field, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()


def finish(page: Page, panel: Locator, *, steps: int = 8) -> None:
    """Waits until a run ends and the page shows its settings."""
    expect(panel.get_by_text(f"{steps} steps, token selector").first).to_be_visible()


def generate(page: Page, panel: Locator) -> None:
    """Generates in 8 steps, and waits for the images: the page shows the settings of its first ones from the start."""
    page.evaluate(
        """() => {
            const seen = window.seen = new Set(), panel = document.querySelector('#generated').closest('.tabitem');
            new MutationObserver(() => seen.add(panel.innerText.match(/Step \\d+ of 8: \\d+ of 49 tokens/)?.[0]))
                .observe(panel, {childList: true, subtree: true, characterData: true}) }"""
    )
    press(panel, "Generate")
    page.wait_for_function("window.seen.has('Step 8 of 8: 49 of 49 tokens')")
    finish(page, panel)


def check_equal(results: list[np.ndarray], expected: list[Image.Image] | list[np.ndarray]) -> None:
    assert all((pixels == np.array(image)).all() for pixels, image in zip(results, expected, strict=True))


def shown(page: Page, name: str) -> list[np.ndarray]:
    """Returns the pixels of the images of a gallery."""
    expect(page.locator(f"#{name} img").first).to_have_js_property("complete", value=True)
    sources = [image.get_attribute("src") for image in page.locator(f"#{name} .grid-container img").all()]
    return [np.array(Image.open(io.BytesIO(page.request.get(source or "").body()))) for source in sources]


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def upload(panel: Locator, name: str, content: bytes) -> None:
    files = [{"name": name, "mimeType": "image/png", "buffer": content}]
    panel.locator("input[type=file]").first.set_input_files(files)  # type: ignore[arg-type]  # dicts


def brush(page: Page, *, down: float = 0.35) -> None:
    """Paints a stroke on the picture of the editor, until the page can take it back: before, it takes no stroke."""
    canvas, undo = page.locator("#editor canvas").first, page.get_by_role("button", name="Undo")
    for _ in range(SECONDS // 5):
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        assert box is not None
        side = min(box["width"], box["height"])
        left, top = box["x"] + (box["width"] - side) / 2, box["y"] + (box["height"] - side) / 2
        page.mouse.move(left + 0.3 * side, top + down * side)
        page.mouse.down()
        page.mouse.move(left + 0.7 * side, top + down * side, steps=6)
        page.mouse.up()
        with suppress(AssertionError, Late):
            expect(undo).to_be_enabled(timeout=5000)
            return
    raise AssertionError("the editor took no stroke")


def start_long_run(page: Page) -> Locator:
    """Starts an edit of several windows of 49 steps each, and waits for its first step."""
    expect(page.locator("#generated img")).to_have_count(4)  # a page that was loaded again hears no click before
    press(tab(page, "Generate"), "Edit this image")
    panel = page.get_by_role("tabpanel").filter(visible=True)
    panel.get_by_label("Extend (outpaint)").check()
    for side in ("left", "up", "down"):
        panel.get_by_label(side, exact=True).check()
    set_number(panel, "Pixels to add on each side", 28)
    set_number(panel, "Results", 8)
    panel.get_by_role("button", name="Decoding settings").click()
    set_number(panel, "Decoding steps", 49)
    press(panel, "Edit")
    expect(panel.get_by_text(re.compile(r"Step \d+ of 49"))).to_be_visible()
    return panel


def test_the_page_opens_with_images_that_its_button_makes_again(page: Page, pipe: MaskGIT) -> None:
    expected = pipe.generate([0, 2, 5, 7], seed=11)
    check_equal(shown(page, "generated"), expected)
    panel = tab(page, "Generate")
    generate(page, panel)
    assert len(page.evaluate("[...window.seen].filter(Boolean)")) > 4  # each step is shown
    check_equal(shown(page, "generated"), expected)


def test_images_of_other_settings_are_compared(page: Page, pipe: MaskGIT) -> None:
    panel, before = tab(page, "Generate"), shown(page, "generated")
    press(panel, "Keep to compare")
    choose(page, panel, "Class", "Bag")
    panel.get_by_label("Seed", exact=True).fill("4")
    set_number(panel, "Images", 2)
    panel.get_by_role("button", name="Decoding settings").click()
    expect(panel.get_by_label("Token selector", exact=True)).to_have_value("as the model (confidence)")
    set_number(panel, "Decoding steps", 5)
    press(panel, "Generate")
    finish(page, panel, steps=5)
    check_equal(shown(page, "generated"), pipe.generate([BAG, BAG], seed=4, num_steps=5))
    check_equal(shown(page, "kept"), before)
    expect(panel.get_by_text("8 steps, token selector")).to_be_visible()


@pytest.mark.parametrize("task", ["box", "share"])
def test_the_chosen_image_becomes_another_class(page: Page, pipe: MaskGIT, task: str) -> None:
    image = shown(page, "generated")[2]
    page.locator("#generated img").nth(2).click()
    press(tab(page, "Generate"), "Edit this image")
    panel = page.get_by_role("tabpanel").filter(visible=True)
    if task == "box":
        panel.get_by_label("Box in place of the brush").fill("0,14,28,28")
        expected = pipe.inpaint(image, (0, 14, 28, 28), classes=[BOOT] * 2, seed=11)
    else:
        panel.get_by_label("Vary the whole image").check()
        expected = pipe.edit(image, strength=0.6, classes=[BOOT] * 2, seed=11)
    choose(page, panel, "Class of the new part", "Ankle boot")
    set_number(panel, "Results", 2)
    panel.get_by_role("button", name="Edit", exact=True).press("Enter")
    finish(page, panel)
    check_equal(shown(page, "edited"), [image, *expected])


def test_an_upload_is_extended(page: Page, pipe: MaskGIT) -> None:
    pixels = np.zeros((40, 100, 3), np.uint8)
    pixels[:, 30:70] = 255
    panel = tab(page, "Edit")
    upload(panel, "photo.png", png(pixels))
    expect(page.locator("#editor canvas").first).to_be_visible()
    panel.get_by_label("Extend (outpaint)").check()
    set_number(panel, "Pixels to add on each side", 8)
    press(panel, "Edit")
    finish(page, panel)
    before, *results = shown(page, "edited")
    assert before.shape == (28, 28)  # its centre, in the size of the model
    assert (before == 255).all()
    assert [result.shape for result in results] == [(28, 36)] * 4


def test_an_error_is_shown_as_a_sentence(page: Page) -> None:
    panel, toast = tab(page, "Edit"), page.get_by_test_id("toast-body")
    expect(panel.get_by_text("Which image shall change?")).to_be_visible()
    expect(panel.get_by_text("The model sees 28 x 28 pixels, in grey.")).to_be_visible()
    press(panel, "Edit")
    expect(toast.last).to_contain_text("an image is missing; upload one, or take the generated image")
    upload(panel, "text.png", b"a letter, not a picture")
    expect(toast.last).to_contain_text("image text.png must be a JPEG, PNG or WebP file")
    upload(panel, "huge.png", png(np.zeros((28, 28), np.uint8)) + bytes(2**24))
    expect(toast.last).to_contain_text("16")
    press(panel, "Take the generated image")
    expect(page.locator("#editor canvas").first).to_be_visible()
    press(panel, "Edit")
    expect(toast.last).to_contain_text("no region is painted; paint over the part to generate, or give a box")
    panel.get_by_label("Box in place of the brush").fill("0,0,99,99")
    press(panel, "Edit")
    expect(toast.last).to_contain_text("box must be left,top,right,bottom in the image")
    assert "Traceback" not in page.content()
    panel = tab(page, "Generate")
    for seed in ("", "-5"):
        panel.get_by_label("Seed", exact=True).fill(seed)
        press(panel, "Generate")
        expect(toast).to_contain_text(f"seed must be an integer in [0, 2**32), got {seed or None}")
        expect(toast).not_to_contain_text("box must be")  # errors of earlier runs go
        expect(page.locator("#generated .error")).to_be_hidden()  # of gradio, above the images


def test_a_run_ends_when_it_is_stopped_or_its_page_left(page: Page, server: Server) -> None:
    panel = start_long_run(page)
    press(panel, "Stop")
    server.wait_until_idle()
    expect(panel.get_by_text(re.compile(r"Step \d+ of 49"))).to_be_visible()
    page.reload()
    server.wait_until_idle()
    began = server.cpu_seconds()
    start_long_run(page)
    page.goto("about:blank")
    server.wait_until_idle()
    assert server.cpu_seconds() - began < 20  # a whole run takes more than 60
    page.goto(server.url)
    panel = tab(page, "Generate")
    generate(page, panel)  # the model is free


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_a_region_is_painted_on_a_screen_and_on_a_phone(
    browser: Browser, server: Server, width: int, height: int, tmp_path: Path
) -> None:
    """Draws both tabs on the way; ``WEB_PICTURES`` names the folder that keeps them."""
    folder = ROOT / os.environ["WEB_PICTURES"] if os.environ.get("WEB_PICTURES") else tmp_path
    with opened(browser, server.url, width=width, height=height) as page:
        panel = tab(page, "Generate")
        picture, button = page.locator("#generated").bounding_box(), panel.get_by_role("button", name="Generate")
        below = button.bounding_box()
        assert picture is not None
        assert below is not None
        assert picture["y"] + picture["height"] < height  # seen at once
        assert width > 390 or below["y"] > picture["y"]
        choose(page, panel, "Class", "Ankle boot")
        generate(page, panel)
        expect(page.locator("#generated")).to_be_in_viewport(ratio=0.95)
        check_fit(page, panel, width)
        save(page, folder / f"generate-{width}.png")
        image = shown(page, "generated")[0]
        panel = tab(page, "Edit")
        check_fit(page, panel, width)
        press(panel, "Take the generated image")
        brush(page)
        choose(page, panel, "Class of the new part", "Ankle boot")
        press(panel, "Edit")
        finish(page, panel)
        expect(page.locator("#edited")).to_be_in_viewport(ratio=0.9)
        save(page, folder / f"edit-{width}.png")
        before, *results = shown(page, "edited")
        assert (before == image).all()
        assert len(results) == 4
        for result in results:
            assert (result[24:] == image[24:]).all()  # far below the stroke
            assert (result[6:13] != image[6:13]).any()


def check_fit(page: Page, panel: Locator, width: int) -> None:
    """Checks that nothing is wider than the page, and that screen readers can name each field."""
    page.wait_for_function(f"document.documentElement.scrollWidth <= {width}")
    for role in ("button", "combobox", "radio", "slider", "spinbutton", "tab", "textbox"):
        nameless = page.get_by_role(role, name=re.compile(r"^\s*$"))  # type: ignore[arg-type]  # a literal
        expect(nameless, f"each {role} has a name").to_have_count(0)


def save(page: Page, file: Path) -> None:
    """Draws the whole page from its top, when nothing moves any more."""
    page.mouse.move(0, 0)
    drawn = page.screenshot(full_page=True)
    while (again := page.screenshot(full_page=True)) != drawn:
        drawn = again
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(drawn)).convert("RGB").save(file, optimize=True)
    assert file.stat().st_size < 300_000


def test_ctrl_c_ends_a_run_and_leaves_no_file(browser: Browser, tmp_path: Path) -> None:
    with running(tmp_path / "own", is_background=True) as server:
        assert server.cpu_seconds() < 12
        with opened(browser, server.url) as page:
            start_long_run(page)
            written = server.written()
            assert written
            assert [name for name in written if not name.startswith("tmp/maskgit-web-")] == []
            server.process.send_signal(signal.SIGINT)
            said, _ = server.process.communicate(timeout=SECONDS)
        assert (server.process.returncode, said) == (0, ENDED)
        assert list((server.place / "tmp").iterdir()) == []


# Functions of the page, without a browser


@pytest.mark.parametrize("selector", list(token_selectors.build_all()))
def test_changed_fields_become_settings_that_the_model_takes(pipe: MaskGIT, selector: str) -> None:
    own = settings_of(pipe, list(start_values(pipe).values()))
    check_equal([np.array(image) for image in pipe.generate([BAG], seed=1, **own)], pipe.generate([BAG], seed=1))
    changed = {"token_selector": selector, "first": 0.5, "guidance_scale": 3.5, "num_steps": 4}
    settings = settings_of(pipe, list({**start_values(pipe), **changed}.values()))
    has_noise = hasattr(token_selectors.build(selector), "choice_temperature")
    assert settings.pop("choice_temperature", None) == (12.0 if has_noise else None)
    assert settings == {
        "token_selector": selector, "sampling_temperature": (0.5, 0.8), "guidance_scale": 3.5, "num_steps": 4,
    }  # fmt: skip


def test_sliders_reach_the_values_of_the_model() -> None:
    selector = {"name": "confidence", "choice_temperature": 40.0}
    own = DecodingConfig(2, selector, {"name": "linear", "scale": 12.5}, sampling_temperature=(4.5, 0.5))
    page = build_page(MaskGIT.from_pretrained(MODEL, decoding=own), MODEL)
    sliders = [block for block in page.blocks.values() if type(block).__name__ == "Slider"]
    assert len(sliders) == 14
    assert all(slider.minimum <= slider.value <= slider.maximum for slider in sliders)


def test_an_autoregressive_model_is_refused(tiny_autoregressive: Path) -> None:
    with pytest.raises(ValueError, match="web requires a model with bidirectional attention"):
        build_page(MaskGIT.from_pretrained(tiny_autoregressive), "tiny")


def test_a_closed_stream_ends_its_call_after_the_step(pipe: MaskGIT) -> None:
    done: list[int] = []
    hook = pipe.transformer.network.register_forward_hook(lambda *_: done.append(1))
    steps = stream_steps(lambda callback: pipe.generate([0], num_steps=49, callback=callback), num_steps=49)
    next(steps)
    steps.close()  # type: ignore[attr-defined]  # a generator
    # The one thread of the model is free again: the next call runs.
    (*_, images) = stream_steps(lambda callback: pipe.generate([BAG], num_steps=2, callback=callback), num_steps=2)
    hook.remove()
    assert (np.array(images[0]) == np.array(pipe.generate([BAG], num_steps=2)[0])).all()
    assert len(done) < 49


def test_a_painted_canvas_pixel_masks_its_image_pixel() -> None:
    layer = Image.new("RGBA", (56, 28))
    layer.paste((0, 0, 0, 128), (4, 2, 5, 3))
    layer.paste((0, 0, 0, 255), (40, 20, 44, 22))
    layer.putpixel((50, 25), (0, 0, 0, 127))  # the faint edge of a stroke
    mask = painted_pixels([layer], height=14, width=28)
    assert mask.nonzero().tolist() == [[1, 2], [10, 20], [10, 21]]
    assert not torch.any(painted_pixels([], height=14, width=28))


def test_pictures_that_no_canvas_sends_are_refused_before_decoding(tmp_path: Path) -> None:
    def sent(side: int, layers: int) -> SimpleNamespace:
        Image.new("L", (side, side)).save(tmp_path / "drawn.png")
        drawn = SimpleNamespace(path=str(tmp_path / "drawn.png"))
        return SimpleNamespace(background=drawn, composite=drawn, layers=[drawn] * layers)

    page_module._check_canvas(sent(600, 1))
    for payload in (sent(600, 2), sent(4000, 1)):
        with pytest.raises(gr.Error, match="one layer of its own size"):
            page_module._check_canvas(payload)
