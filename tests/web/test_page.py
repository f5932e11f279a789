"""The page of ``maskgit web`` in a real Chromium: what a person does on it, and what a careless or hostile one does.

``make test-web`` runs them. ``make test-web WEB_PICTURES=docs/web`` also writes the pictures of docs/web.md.
"""

from __future__ import annotations

import io
import os
import re
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect
from playwright.sync_api import TimeoutError as Late

from maskgit_pl import MaskGIT, mask_schedules
from maskgit_pl.decoding import read_settings_file
from maskgit_pl.web.regions import MAX_UPLOAD_BYTES
from tests.web.conftest import ROOT, SECONDS, Server, open_page, running, starting, wait_for

TABS = ("Generate", "Compare", "Edit", "Panorama", "Schedules")
WIDTHS = (1280, 390)
ENDED = "\nmaskgit web: ended; its temporary files are removed\n"
expect.set_options(timeout=SECONDS * 1000)


def tab(page: Page, name: str) -> Locator:
    """Opens a tab and returns its panel."""
    page.get_by_role("tab", name=name, exact=True).click()
    return page.get_by_role("tabpanel").filter(visible=True)


def press(panel: Locator, name: str) -> None:
    panel.get_by_role("button", name=name, exact=True).click()


def number_field(panel: Locator, name: str) -> Locator:
    return panel.get_by_label(f"number input for {name}", exact=True)


def set_number(panel: Locator, name: str, value: int) -> None:
    """Types a number, until the slider beside the field shows that the page has taken it."""
    field, slider = number_field(panel, name), panel.get_by_label(f"range slider for {name}", exact=True)
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


def generate(page: Page, *, step: int = 8) -> Locator:
    """Generates with the default settings, and waits for the downloads."""
    panel = tab(page, "Generate")
    press(panel, "Generate")
    expect(page.locator("#generated")).to_contain_text(f"Step {step} of {step}: 49 of 49 tokens decided")
    expect(panel.get_by_role("link", name="Download").or_(panel.locator("a[download]")).first).to_be_visible()
    return panel


def download(page: Page, panel: Locator, name: str) -> bytes:
    """Returns the content of one of the downloads."""
    with page.expect_download() as waiting:
        panel.locator(f"a[download={name!r}]".replace("'", '"')).first.click()
    return Path(waiting.value.path()).read_bytes()


def pixels_of(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)))


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def upload(page: Page, panel: Locator, name: str, content: bytes) -> None:
    files = [{"name": name, "mimeType": "image/png", "buffer": content}]
    panel.locator("input[type=file]").first.set_input_files(files)  # type: ignore[arg-type]  # dicts


def brush(page: Page, *, across: tuple[float, float] = (0.4, 0.6), down: float = 0.5) -> None:
    """Paints a stroke on the picture of the editor, in fractions of its size, until the page shows its tokens.

    The editor takes no stroke before it has drawn its picture, and the same stroke twice is one.
    """
    canvas = page.locator("#editor canvas").first
    painted = page.locator("#token-mask").get_by_text("pixels became")
    for _ in range(SECONDS // 5):
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        assert box is not None
        side = min(box["width"], box["height"])
        left = box["x"] + (box["width"] - side) / 2
        top = box["y"] + (box["height"] - side) / 2
        page.mouse.move(left + across[0] * side, top + down * side)
        page.mouse.down()
        page.mouse.move(left + across[1] * side, top + down * side, steps=8)
        page.mouse.up()
        with suppress(Late):
            painted.wait_for(timeout=5000)
            return
    raise AssertionError("the stroke became no tokens")


def nameless(page: Page, role: str) -> Locator:
    """Returns the visible fields of a role that a screen reader could not name."""
    return page.get_by_role(role, name=re.compile(r"^\s*$"))  # type: ignore[arg-type]  # a literal


def still_picture(page: Page) -> bytes:
    """Waits until nothing moves, and returns the whole page as a PNG."""
    shown = page.screenshot(full_page=True)
    while (again := page.screenshot(full_page=True)) != shown:
        shown = again
    return shown


def observe_steps(page: Page, selector: str) -> Callable[[], set[str]]:
    """Notes each caption of a step that appears in an element; returns a function that reads them."""
    page.evaluate(
        """(selector) => {
            const place = document.querySelector(selector), seen = new Set(), pattern = /(Window \\d+, s|S)tep \\d+/;
            window.seen = seen;
            new MutationObserver(() => seen.add(place.innerText.match(pattern)?.[0]))
                .observe(place, {childList: true, subtree: true, characterData: true}) }""",
        selector,
    )
    return lambda: {step for step in page.evaluate("[...window.seen]") if step}


def start_long_panorama(page: Page) -> Locator:
    """Starts a panorama of more than 1,000 steps with a double click, and waits for its second window."""
    panel = tab(page, "Panorama")
    set_number(panel, "Width in pixels", 224)
    set_number(panel, "Height in pixels", 56)
    panel.get_by_role("button", name="Decoder settings").click()
    set_number(panel, "Decoding steps", 49)
    panel.get_by_role("button", name="Generate the panorama", exact=True).dblclick()
    expect(panel.get_by_text(re.compile(r"Window \d+, step"))).to_be_visible()
    return panel


def shirt() -> np.ndarray:
    """An image to upload: generated, of the model's size."""
    (image,) = MaskGIT.from_pretrained("fashion-mnist-demo").generate(["T-shirt/top"], seed=3)
    return np.array(image)


def edit_panel(page: Page) -> Locator:
    """Opens the tab, which generates an image to edit."""
    panel = tab(page, "Edit")
    expect(page.locator("#token-mask")).to_contain_text("Paint over the part to generate")
    return panel


def test_it_starts_quickly_and_writes_to_its_temporary_folder_only(browser: Browser, tmp_path: Path) -> None:
    with running(tmp_path / "own") as server:
        assert server.cpu_seconds() < 10
        page = open_page(browser, server.url)
        generate(page)
        page.close()
        assert any(name.startswith("tmp/maskgit-web-") for name in server.written())
        assert [name for name in server.written() if not name.startswith("tmp/maskgit-web-")] == []
        assert server.stop() == (0, ENDED)
        assert server.written() == []


@pytest.mark.parametrize("is_background", [False, True])
def test_ctrl_c_ends_it_at_once_in_the_middle_of_a_run(browser: Browser, tmp_path: Path, is_background: bool) -> None:
    with running(tmp_path / "own", is_background=is_background) as server:
        page = open_page(browser, server.url)
        start_long_panorama(page)
        assert any(name.startswith("tmp/maskgit-web-") for name in server.written())
        assert server.stop(signal.SIGINT) == (0, ENDED)
        page.close()
        assert server.written() == []
        assert list((server.place / "tmp").iterdir()) == []


def test_ctrl_c_while_it_starts_leaves_no_folder(tmp_path: Path) -> None:
    """The signal comes when the temporary folder exists: gradio is being imported."""
    with starting(tmp_path / "own") as (place, process):
        wait_for(lambda: any((place / "tmp").glob("maskgit-web-*")))
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=SECONDS)
        assert (process.returncode, said) == (130, "maskgit web: interrupted\n")
        assert list((place / "tmp").iterdir()) == []


def test_an_image_is_generated_step_by_step(page: Page) -> None:
    panel = tab(page, "Generate")
    seen = observe_steps(page, "#generated")
    choose(page, panel, "Class", "Sneaker")
    generate(page)
    assert len(seen()) > 4
    images = page.locator("#generated img")
    expect(images).to_have_count(3)
    for image, shown in zip(images.all(), ("Tokens", "Confidence of each token", "Image of all tokens"), strict=True):
        expect(image).to_have_attribute("alt", re.compile(rf"^{shown}\."))
    expect(page.get_by_label("Color bar of the confidence, from dark (0) to bright (1)")).to_be_visible()


def test_the_scrubber_shows_each_step_by_keyboard(page: Page) -> None:
    panel = generate(page)
    slider = panel.get_by_label("range slider for Show step", exact=True)
    slider.focus()
    slider.press("ArrowLeft")
    expect(page.locator("#generated")).to_contain_text("Step 7 of 8: 34 of 49 tokens decided")
    slider.press("Home")
    expect(page.locator("#generated")).to_contain_text("Step 1 of 8: 4 of 49 tokens decided, 4 in this step")


def test_the_plot_follows_the_settings(page: Page) -> None:
    panel = tab(page, "Generate")
    choose(page, panel, "Mask schedule", "cosine")
    expect(
        panel.get_by_alt_text("Plot of the mask schedule. Tokens kept at each step: 1, 3, 5, 6, 7, 9, 9, 9")
    ).to_be_visible()
    set_number(panel, "Decoding steps", 2)
    expect(panel.get_by_alt_text("Plot of the mask schedule. Tokens kept at each step: 15, 34")).to_be_visible()


def test_the_downloads_are_those_of_the_image(page: Page, tmp_path: Path) -> None:
    panel = tab(page, "Generate")
    choose(page, panel, "Class", "Bag")
    panel.get_by_label("Seed", exact=True).fill("11")
    set_number(panel, "Decoding steps", 5)
    generate(page, step=5)
    (expected,) = MaskGIT.from_pretrained("fashion-mnist-demo").generate(["Bag"], seed=11, num_steps=5)
    assert (pixels_of(download(page, panel, "image.png")) == np.array(expected)).all()
    assert Image.open(io.BytesIO(download(page, panel, "decoding.gif"))).n_frames == 5
    assert Image.open(io.BytesIO(download(page, panel, "filmstrip.png"))).width > 500
    (tmp_path / "decoding.json").write_bytes(download(page, panel, "decoding.json"))
    assert read_settings_file(tmp_path / "decoding.json")[0].num_steps == 5
    panel.get_by_text("Make the same image").click()
    expect(panel.get_by_label("Command line")).to_have_text(
        "maskgit sample fashion-mnist-demo --classes Bag --per-class 1 --seed 11 --num-steps 5 --images images"
    )


def test_two_settings_are_compared_on_the_same_noise(page: Page) -> None:
    panel = tab(page, "Compare")
    press(panel, "Compare")
    expect(page.locator("#compared-A")).to_contain_text("A. Step 8 of 8")
    expect(page.locator("#compared-B")).to_contain_text("B. Step 4 of 4")
    expect(panel.get_by_text("tokens are the same in A and B")).not_to_have_text(
        "49 of 49 tokens are the same in A and B."
    )
    slider = panel.get_by_label("range slider for Show step of both", exact=True)
    slider.focus()
    slider.press("Home")
    expect(page.locator("#compared-A")).to_contain_text("A. Step 1 of 8: 4 of 49")
    expect(page.locator("#compared-B")).to_contain_text("B. Step 1 of 4: 8 of 49")
    number_field(panel, "Decoding steps").last.fill("8")
    number_field(panel, "Decoding steps").last.press("Tab")
    press(panel, "Compare")
    expect(panel.get_by_text("tokens are the same in A and B")).to_have_text("49 of 49 tokens are the same in A and B.")


def test_a_brush_on_an_upload_becomes_a_token_mask_and_new_pixels(page: Page) -> None:
    panel, image = edit_panel(page), shirt()
    upload(page, panel, "shirt.png", png(image))
    brush(page, across=(0.35, 0.65), down=0.5)
    preview = page.locator("#token-mask")
    expect(preview).to_contain_text(re.compile(r"\d+ of 784 pixels became \d+ of 49 tokens"))
    press(panel, "Edit")
    expect(panel.get_by_alt_text("Result with seed 3", exact=True)).to_be_visible()
    mask = pixels_of(download(page, panel, "mask.png")) > 0
    rows, columns = np.nonzero(mask)
    assert (abs(rows.mean() - 13.5), abs(columns.mean() - 13.5)) < (3, 3)  # where the stroke was
    assert columns.max() - columns.min() > rows.max() - rows.min()
    made = pixels_of(download(page, panel, "seed-0.png"))
    assert (pixels_of(download(page, panel, "image.png")) == image).all()
    assert (made != image)[mask].any()
    far = np.ones_like(mask)
    far[: rows.max() + 12, :] = False  # the mask, its neighbours and the seam
    assert (made == image)[far].all()


def test_a_box_and_another_class_by_keyboard(page: Page) -> None:
    panel = edit_panel(page)
    panel.get_by_label("Box in place of the brush").fill("0,14,28,28")
    expect(page.locator("#token-mask")).to_contain_text("392 of 784 pixels became 35 of 49 tokens")
    number_field(panel, "Tokens around the mask (dilation)").fill("0")
    number_field(panel, "Tokens around the mask (dilation)").press("Tab")
    expect(page.locator("#token-mask")).to_contain_text("392 of 784 pixels became 28 of 49 tokens")
    panel.get_by_label("Change class").check()
    choose(page, panel, "Class of the new part", "Trouser")
    set_number(panel, "Results", 2)
    panel.get_by_role("button", name="Edit", exact=True).press("Enter")
    expect(panel.get_by_alt_text("Result with seed 1", exact=True)).to_be_visible()
    panel.get_by_text("Make the same image").click()
    expect(panel.get_by_label("Command line")).to_have_text(re.compile("maskgit edit .* --class Trouser --variants 2"))
    panel.get_by_text("The first result step by step").click()
    expect(panel.get_by_text("Step 8 of 8: 49 of 49 tokens decided")).to_be_visible()
    choose(page, panel, "Class of the new part", "no class")
    press(panel, "Edit")
    expect(page.get_by_text("class must be named to change the class of a region, got no class")).to_be_visible()


def test_an_edit_is_drawn_step_by_step_with_the_region_that_was_asked_for(page: Page) -> None:
    panel = edit_panel(page)
    panel.get_by_label("Box in place of the brush").fill("8,8,20,20")
    expect(page.locator("#token-mask")).to_contain_text("requested pixels")
    panel.get_by_role("button", name="Decoder settings").click()
    set_number(panel, "Decoding steps", 20)
    set_number(panel, "Results", 1)
    seen = observe_steps(page, ".edited")
    press(panel, "Edit")
    live = panel.locator(".edited")
    expect(live.get_by_alt_text(re.compile(r"Tokens\. Step \d+ of 20"))).to_be_visible()
    expect(live.get_by_text("requested pixels")).to_be_visible()
    expect(live.get_by_text("T-shirt/top, seed 0: 20 steps, token selector confidence")).to_be_visible()
    expect(panel.get_by_alt_text("Result with seed 0", exact=True)).to_be_visible()
    assert len(seen()) > 4


def test_an_image_is_extended(page: Page) -> None:
    panel = edit_panel(page)
    panel.get_by_label("Extend (outpaint)").check()
    set_number(panel, "Pixels to add: right", 8)
    set_number(panel, "Results", 1)
    press(panel, "Edit")
    expect(panel.get_by_alt_text("Result with seed 0", exact=True)).to_be_visible()
    assert pixels_of(download(page, panel, "seed-0.png")).shape == (28, 36)


def test_a_panorama_is_generated(page: Page) -> None:
    panel = tab(page, "Panorama")
    set_number(panel, "Width in pixels", 56)
    press(panel, "Generate the panorama")
    expect(panel.get_by_alt_text("Panorama, 56 x 28 pixels, seed 0")).to_be_visible()
    assert pixels_of(download(page, panel, "seed-0.png")).shape == (28, 56)


def test_every_mask_schedule_is_shown_and_decoded(page: Page) -> None:
    panel = tab(page, "Schedules")
    expect(panel.get_by_alt_text("Plot of the mask ratio of each schedule")).to_be_visible()
    set_number(panel, "Decoding steps", 3)
    expect(page.locator("#counts thead th")).to_have_count(1 + 3)
    press(panel, "Decode with each schedule")
    for name in mask_schedules.build_all():
        expect(panel.get_by_alt_text(f"{name}. The image", exact=True)).to_be_visible()
    expect(page.locator("#schedules img")).to_have_count(4 * len(mask_schedules.build_all()))


def huge() -> bytes:
    return png(np.zeros((28, 28), np.uint8)) + bytes(MAX_UPLOAD_BYTES)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("huge.png", huge, "16"),
        ("wide.png", lambda: png(np.zeros((5000, 5000), np.uint8)), "image wide.png must have at most 24000000 pixels"),
        ("text.png", lambda: b"a letter, not a picture", "image text.png must be a JPEG, PNG or WebP file"),
        ("cut.png", lambda: png(shirt())[:-30], "image cut.png"),
    ],
)
def test_a_bad_upload_is_answered_in_a_sentence(page: Page, name: str, content, said: str) -> None:
    panel = edit_panel(page)
    upload(page, panel, name, content())
    toast = page.get_by_test_id("toast-body")
    expect(toast).to_contain_text(said)
    assert "Traceback" not in toast.inner_text()
    panel.get_by_label("Box in place of the brush").fill("0,0,28,14")  # the page still works
    expect(page.locator("#token-mask")).to_contain_text("392 of 784 pixels")


def test_a_wrong_value_is_answered_in_a_sentence(page: Page) -> None:
    panel = edit_panel(page)
    press(panel, "Edit")
    expect(page.get_by_text("mask must not be empty; paint the region to generate, or give a box")).to_be_visible()
    panel.get_by_label("Box in place of the brush").fill("0,0,99,99")
    expect(page.locator("#token-mask")).to_contain_text("box must lie in the image")
    panel = tab(page, "Generate")
    panel.get_by_label("Seed", exact=True).fill("")
    press(panel, "Generate")
    expect(page.get_by_text("seed must be an integer in [0, 2**32)")).to_be_visible()


def test_fast_double_clicks_leave_a_working_page(page: Page) -> None:
    panel = tab(page, "Generate")
    set_number(panel, "Decoding steps", 49)
    button = panel.get_by_role("button", name="Generate", exact=True)
    for _ in range(6):
        button.dblclick()
    expect(page.locator("#generated")).to_contain_text(re.compile(r"Step \d+ of 49"))
    page.reload()
    page.get_by_role("button", name="Generate", exact=True).wait_for()
    generate(page)


def reload_page(page: Page, panel: Locator) -> None:
    page.reload()
    page.get_by_role("button", name="Generate", exact=True).wait_for()


@pytest.mark.parametrize(
    "leave",
    [
        pytest.param(lambda page, panel: press(panel, "Stop"), id="Stop"),
        pytest.param(reload_page, id="reload"),
        pytest.param(lambda page, panel: page.goto("about:blank"), id="leave"),
    ],
)
def test_a_run_that_is_left_in_the_middle_ends(
    browser: Browser, server: Server, leave: Callable[[Page, Locator], object]
) -> None:
    page = open_page(browser, server.url)
    server.wait_until_idle()
    began = server.cpu_seconds()
    panel = start_long_panorama(page)
    left = server.cpu_seconds()
    leave(page, panel)
    server.wait_until_idle()
    # About 1 of more than 30 windows was decoded before. A run that continues, or a second one that the double click
    # started, would use far more.
    assert server.cpu_seconds() - left < 10 * (left - began)
    page.goto(server.url)
    generate(page)
    page.close()


def test_stop_ends_an_edit_and_keeps_its_last_step(page: Page, server: Server) -> None:
    panel = edit_panel(page)
    panel.get_by_label("Extend (outpaint)").check()
    for side in ("left", "right", "up", "down"):
        set_number(panel, f"Pixels to add: {side}", 28)
    panel.get_by_role("button", name="Decoder settings").click()
    set_number(panel, "Decoding steps", 49)
    press(panel, "Edit")
    live = panel.locator(".edited")
    expect(live.get_by_text(re.compile(r"Window \d+, step"))).to_be_visible()
    press(panel, "Stop")
    server.wait_until_idle()
    expect(live.get_by_text(re.compile(r"Window \d+, step \d+ of 49"))).to_be_visible()
    expect(panel.get_by_alt_text("Result with seed 0", exact=True)).to_have_count(0)
    set_number(panel, "Decoding steps", 4)
    set_number(panel, "Pixels to add: left", 0)
    press(panel, "Edit")  # the button works again
    expect(panel.get_by_alt_text("Result with seed 0", exact=True)).to_be_visible()


def test_stop_ends_the_schedules(page: Page, server: Server) -> None:
    panel = tab(page, "Schedules")
    set_number(panel, "Decoding steps", 49)
    press(panel, "Decode with each schedule")
    expect(panel.get_by_alt_text("arccos. The image", exact=True)).to_be_visible()
    press(panel, "Stop")
    server.wait_until_idle()
    assert page.locator("#schedules h3").count() < len(mask_schedules.build_all())


def test_a_slow_user_does_not_block_the_page_of_another(page: Page, browser: Browser, server: Server) -> None:
    generate(page)
    other = open_page(browser, server.url)
    slow = tab(other, "Schedules")
    set_number(slow, "Decoding steps", 49)
    press(slow, "Decode with each schedule")
    expect(slow.get_by_alt_text("arccos. The image", exact=True)).to_be_visible()
    panel = tab(page, "Generate")
    panel.get_by_label("range slider for Show step", exact=True).press("Home")
    expect(page.locator("#generated")).to_contain_text("Step 1 of 8")
    set_number(panel, "Decoding steps", 4)
    expect(panel.get_by_alt_text("Tokens kept at each step: 8, 9, 10, 22")).to_be_visible()
    assert other.locator("#schedules h3").count() < len(mask_schedules.build_all())  # it is still at work
    press(panel, "Generate")
    expect(page.locator("#generated")).to_contain_text("Step 4 of 4")  # after its turn
    other.close()


def test_it_fits_a_phone_and_every_field_has_a_name(browser: Browser, server: Server) -> None:
    page = open_page(browser, server.url, width=390)
    page.evaluate("document.body.append(document.createElement('button'))")
    expect(nameless(page, "button")).to_have_count(1)  # one that has no name is found
    page.evaluate("document.body.lastChild.remove()")
    for name in TABS:
        panel = tab(page, name)
        expect(panel.locator("button").first).to_be_visible()
        still_picture(page)
        page.wait_for_function("document.documentElement.scrollWidth <= 390")
        for role in ("button", "combobox", "radio", "slider", "spinbutton", "tab", "textbox"):
            expect(nameless(page, role), f"each {role} of {name} has a name").to_have_count(0)
        expect(page.get_by_role("slider")).not_to_have_count(0)
        expect(page.locator("main figure img:not([alt]), main figure img[alt='']")).to_have_count(0)
    page.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_pictures_of_each_part(browser: Browser, server: Server, width: int, tmp_path: Path) -> None:
    """Draws the parts of the page; ``WEB_PICTURES`` names the folder that keeps them."""
    folder = ROOT / os.environ["WEB_PICTURES"] if os.environ.get("WEB_PICTURES") else tmp_path
    page = open_page(browser, server.url, width=width)
    panel = tab(page, "Generate")
    choose(page, panel, "Class", "Ankle boot")
    generate(page)
    save(page, folder / f"generate-{width}.png")
    panel = tab(page, "Compare")
    choose(page, panel, "Class", "Ankle boot")
    press(panel, "Compare")
    expect(panel.get_by_text("tokens are the same in A and B")).to_be_visible()
    expect(page.locator("#compared-A")).to_contain_text("Step 8 of 8")
    save(page, folder / f"compare-{width}.png")
    panel = edit_panel(page)
    brush(page, across=(0.3, 0.7), down=0.4)
    expect(page.locator("#token-mask")).to_contain_text("pixels became")
    choose(page, panel, "Class of the new part", "Ankle boot")
    press(panel, "Edit")
    expect(panel.get_by_alt_text("Result with seed 3", exact=True)).to_be_visible()
    save(page, folder / f"edit-{width}.png")
    panel = tab(page, "Panorama")
    choose(page, panel, "Class", "Bag")
    press(panel, "Generate the panorama")
    expect(panel.get_by_alt_text("Panorama, 112 x 28 pixels, seed 0")).to_be_visible()
    save(page, folder / f"panorama-{width}.png")
    panel = tab(page, "Schedules")
    press(panel, "Decode with each schedule")
    expect(panel.get_by_alt_text("square. The image", exact=True)).to_be_visible()
    save(page, folder / f"schedules-{width}.png")
    page.close()


def save(page: Page, file: Path) -> None:
    """Draws the page from its top, full width and at most 1,700 pixels high on a screen, 4,000 on a phone."""
    page.mouse.move(0, 0)
    picture = Image.open(io.BytesIO(still_picture(page))).convert("RGB")
    most = 1700 if picture.width > WIDTHS[-1] else 4000
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.crop((0, 0, picture.width, min(picture.height, most))).save(file, optimize=True)
    assert file.stat().st_size < 300_000
