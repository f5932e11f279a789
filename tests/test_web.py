"""The functions of the page, without a browser and without gradio; ``tests/web`` tries the page itself."""

import inspect
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit_pl import MaskGIT, mask_schedules
from maskgit_pl.cli import _parse, main
from maskgit_pl.cli.arguments import read_call
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.pipeline.display import Recording
from maskgit_pl.pipeline.options import Outline, replace_settings
from maskgit_pl.web import form as plots
from maskgit_pl.web import markup, server
from maskgit_pl.web.form import add_settings, explain, pace
from maskgit_pl.web.markup import draw_frame
from maskgit_pl.web.regions import MAX_UPLOAD_BYTES, EditRegion, canvas_picture, read_brush, read_upload
from maskgit_pl.web.settings import (
    OWN,
    Call,
    FormSettings,
    PageRequest,
    call_edit,
    call_sample,
    guidance_choices,
    schedule_choices,
    selector_choices,
)
from maskgit_pl.web.studio import Made, Studio

MODEL = "fashion-mnist-demo"
SNEAKER, BAG = 7, 8


@pytest.fixture(scope="module")
def pipe() -> MaskGIT:
    return MaskGIT.from_pretrained(MODEL)


@pytest.fixture
def studio(pipe: MaskGIT, tmp_path: Path) -> Studio:
    (tmp_path / "files").mkdir()
    return Studio(pipe, MODEL, tmp_path / "files")


@pytest.fixture
def form(pipe: MaskGIT) -> FormSettings:
    return FormSettings.of(pipe.decoding)


@pytest.fixture
def image(pipe: MaskGIT) -> torch.Tensor:
    return pipe.generate([SNEAKER], seed=5, output_type="pt")[0]


def finished(run: Iterator[Recording | Made]) -> Made:
    """Runs a task of the studio to its end."""
    *_, made = run
    assert isinstance(made, Made)
    return made


# Settings


def test_the_model_s_own_form_changes_nothing(pipe, form):
    assert form.changes(pipe.decoding) == {}


@pytest.mark.parametrize("selector", list(token_selectors.build_all()))
@pytest.mark.parametrize("guidance", ["constant", "cosine"])
def test_a_form_gives_settings_that_the_model_takes(pipe, form, selector, guidance):
    changes = replace(form, token_selector=selector, guidance=guidance, guidance_scale=1.5).changes(pipe.decoding)
    decoding = pipe.decoding_with(**changes)
    pipe.check_decoding(decoding)
    has_noise = hasattr(token_selectors.build(selector), "choice_temperature")
    assert decoding.token_selector == ({"name": selector, "choice_temperature": 12.0} if has_noise else selector)
    assert decoding.guidance == {"name": guidance, "scale": 1.5}


def test_only_what_differs_from_the_model_is_a_change(pipe, form):
    wanted = replace(form, num_steps=4, mask_schedule="cosine", choice_temperature=3.0, first_temperature=0.5)
    assert wanted.changes(pipe.decoding) == {
        "num_steps": 4,
        "mask_schedule": "cosine",
        "choice_temperature": 3.0,
        "sampling_temperature": (0.5, 1.0),
    }
    assert replace(form, first_temperature=1.0).changes(pipe.decoding) == {"sampling_temperature": 1.0}


def test_arguments_of_the_model_s_own_selector_stay():
    own = DecodingConfig(token_selector={"name": "remdm", "eta": 0.1}, guidance={"name": "linear", "scale": 2.0})
    assert FormSettings.of(own).changes(own) == {}
    assert replace(FormSettings.of(own), choice_temperature=1.0).changes(own) == {"choice_temperature": 1.0}


def test_a_schedule_takes_the_place_of_a_list_of_tokens():
    own = DecodingConfig(num_steps=2, tokens_per_step=(1, 48))
    changes = replace(FormSettings.of(own), mask_schedule="cosine").changes(own)
    assert changes == {"mask_schedule": "cosine"}
    assert replace_settings(own, changes).tokens_per_step is None
    assert replace_settings(own, FormSettings.of(own).changes(own)) == own


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"sampling_temperature": (4.5, 0.5)},
        {"sampling_temperature": (0.5, 5.2)},
        {"choice_temperature": 40.0},
        {"guidance_scale": 12.5},
    ],
    ids=str,
)
def test_the_sliders_reach_the_model_s_own_values(studio, monkeypatch, changes):
    gradio = MagicMock()
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    for own, at_most in ((changes, 1), ({}, 0)):
        gradio.Slider.reset_mock()
        model = MaskGIT.from_pretrained(MODEL, decoding=studio.pipe.decoding_with(**own))
        add_settings(Studio(model, MODEL, studio.folder))
        sliders = [inspect.signature(_slider).bind(*call.args, **call.kwargs) for call in gradio.Slider.mock_calls]
        ranges = [(each.arguments["minimum"], each.arguments["value"], each.arguments["maximum"]) for each in sliders]
        assert len(ranges) == 5
        assert all(least <= value <= most for least, value, most in ranges)
        assert sum(usual != most for usual, (_, _, most) in zip((49, 4, 4, 30, 10), ranges, strict=True)) == at_most


def _slider(minimum: float, maximum: float, value: float, **others: object) -> None:
    """The arguments of a slider of gradio."""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_steps", None),
        ("num_steps", 0),
        ("first_temperature", -1),
        ("choice_temperature", "x"),
        ("guidance_scale", -1),
    ],
)
def test_an_empty_or_wrong_field_is_named(form, field, value):
    with pytest.raises(ValueError, match=field):
        replace(form, **{field: value})


@pytest.mark.parametrize(("field", "value"), [("seed", None), ("seed", 2**32), ("variants", 9), ("dilation", -1)])
def test_a_wrong_number_of_a_request_is_named(form, field, value):
    with pytest.raises(ValueError, match=field):
        replace(PageRequest(0, 0, form), **{field: value})


def test_choices_begin_with_the_model_s_own(pipe):
    own = pipe.decoding
    assert selector_choices(own)[0] == ("confidence (as the model)", OWN)
    assert guidance_choices(own)[0] == ("linear (as the model)", OWN)
    choices = schedule_choices(own, pipe.transformer.schedule_for("web"))
    assert choices[0] == ("arccos (as the model)", OWN)
    assert [name for _, name in choices[1:]] == list(mask_schedules.build_all())


# Commands


def test_names_that_the_command_line_would_misread_become_indices(form):
    names = ["Bag", "a, b", "-x", "all", "Bag", "T-shirt/top"]
    words = [call_sample(PageRequest(label, 0, form), names, {}).words[1] for label in range(6)]
    assert words == ["0", "1", "2", "3", "4", "T-shirt/top"]
    assert call_edit("inpaint", PageRequest(None, 0, form, 2), names, {}).options["classes"] == [None, None]


@pytest.mark.parametrize(
    "names", [["0", "2", "a,b", "x"], ["01", "1", "a,b", ""], ["a,", "b,", "c,", "2", "02", "002"], ["all", "ALL", "0"]]
)
def test_the_command_line_reads_each_class_word_as_its_class(form, names):
    outline = Outline(tuple(names), None, 1, False, DecodingConfig(), 1, 1, 1)
    for label in range(len(names)):
        request = PageRequest(label, 0, form)
        assert outline.parse_classes(call_sample(request, names, {}).words[1]) == [label]
        words = call_edit("edit", request, names, {}).words
        assert outline.parse_class(words[words.index("--class") + 1]) == label


def test_python_and_shell_quote_what_they_must():
    call = Call("generate", [['a"b']], {"seed": 1}, "sample", ["--classes", "two words"], {"top_p": 0.5})
    assert '.generate(["a\\"b"], seed=1, top_p=0.5)' in call.python("runs/x")
    assert shlex.split(call.shell("my runs/x"))[:5] == ["maskgit", "sample", "my runs/x", "--classes", "two words"]


def repeat(made: Made, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Returns the image of the Python line and all images of the command line, made from the downloads."""
    for file in made.files:
        shutil.copy(file, folder)
    monkeypatch.chdir(folder)
    exec(made.python, {})  # the line that the page shows
    assert main([*shlex.split(made.command)[1:], "--device", "cpu"]) == 0
    return [np.array(Image.open(file)) for file in (Path("made.png"), *sorted(Path("images").iterdir()))]


def changed(form: FormSettings) -> FormSettings:
    return replace(
        form, num_steps=6, token_selector="halton", mask_schedule="cosine", guidance="cosine", guidance_scale=1.0,
        first_temperature=0.9, last_temperature=0.7,
    )  # fmt: skip


def make_sample(studio: Studio, form: FormSettings, image: torch.Tensor) -> Made:
    request = PageRequest(BAG, 11, form)
    *_, recording = studio.decode(request)
    return studio.keep(recording, request)


def make_inpaint(studio: Studio, form: FormSettings, image: torch.Tensor) -> Made:
    region = EditRegion(image, [], box="0,0,14,28", dilation=1, outline=studio.pipe.outline)
    return finished(studio.edit(image, region, "inpaint", PageRequest(None, 3, form, 2, 1)))


def make_edit(studio: Studio, form: FormSettings, image: torch.Tensor) -> Made:
    region = EditRegion(image, [], box="10%,20%,60%,80%", dilation=0, outline=studio.pipe.outline)
    return finished(studio.edit(image, region, "edit", PageRequest(BAG, 3, form, 2, 0)))


def make_outpaint(studio: Studio, form: FormSettings, image: torch.Tensor) -> Made:
    sides = {"left": 0, "right": 8, "up": 4, "down": 0}
    return finished(studio.outpaint(image, sides, PageRequest(SNEAKER, 3, form, 2, 0)))


def make_panorama(studio: Studio, form: FormSettings, image: torch.Tensor) -> Made:
    size = {"width": 56, "height": 32, "overlap": 0.4}
    return finished(studio.panorama(size, PageRequest(SNEAKER, 3, form)))


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_sample, make_inpaint, make_edit, make_outpaint, make_panorama])
@pytest.mark.parametrize("settings", [lambda form: form, changed], ids=["own", "changed"])
def test_the_shown_lines_make_the_same_images(
    studio: Studio, form, image, make: Callable[..., Made], settings, tmp_path, monkeypatch
):
    made = make(studio, settings(form), image)
    python, *shell = repeat(made, tmp_path, monkeypatch)
    expected = made.images[:, 0].numpy()
    assert (python == expected[0]).all()
    assert len(shell) == len(expected)
    assert all((one == other).all() for one, other in zip(shell, expected, strict=True))
    assert (
        json.loads((tmp_path / "decoding.json").read_text())["decoding"]["num_steps"]
        == made.recording.decoding.num_steps
    )


# Recordings


def test_the_recording_grows_step_by_step_and_ends_in_the_image(studio, pipe, form):
    recordings = list(studio.decode(PageRequest(SNEAKER, 5, form)))
    assert [len(each.steps) for each in recordings] == list(range(1, 9))
    assert (recordings[-1].images_at(7) == pipe.generate([SNEAKER], seed=5, output_type="pt")).all()


def test_an_edit_is_recorded_step_by_step_and_ends_when_it_is_closed(studio, form, image, monkeypatch):
    steps: list[int] = []
    network = studio.pipe.transformer.network
    hook = network.register_forward_hook(lambda *_: steps.append(1))
    region = EditRegion(image, [], box="0,0,14,28", dilation=1, outline=studio.pipe.outline)
    run = studio.edit(image, region, "inpaint", PageRequest(None, 3, form, 2, 1))
    found = [next(run) for _ in range(3)]
    assert [len(each.steps) for each in found] == [1, 2, 3]
    assert (found[0].requested == region.mask).all()
    assert found[0].steps[0].tokens.shape == (1, 49)  # the first of two results
    done = len(steps)
    run.close()
    assert list(run) == []
    assert len(steps) == done
    hook.remove()


@pytest.mark.slow
def test_a_panorama_counts_its_windows(studio, form):
    run = studio.panorama({"width": 56, "height": 28, "overlap": 0.5}, PageRequest(SNEAKER, 3, form))
    captions = [draw_frame(each, 99).caption.partition(":")[0] for each in run if isinstance(each, Recording)]
    assert captions[:8] == [f"Step {step} of 8" for step in range(1, 9)]
    assert captions[8] == "Window 2, step 2 of 8"  # the first step is for tokens without context


def test_a_frame_counts_its_tokens_and_the_nearest_one_is_shown(studio, form):
    *_, recording = studio.decode(PageRequest(SNEAKER, 5, form))
    first, last = draw_frame(recording, 1), draw_frame(recording, 8)
    assert first.caption == "Step 1 of 8: 4 of 49 tokens decided, 4 in this step"
    assert first.title == "Sneaker, seed 5: 8 steps, token selector confidence (choice_temperature 12)"
    assert last.caption == draw_frame(recording, 99).caption
    assert draw_frame(recording, 0).caption == first.caption
    # The first step leaves 45 cells grey: (176, 176, 176) covers most of the picture.
    grey = (np.array(first.tokens) == 176).all(-1).mean()
    assert 0.8 < grey < 45 / 49


def test_the_bright_end_of_the_confidence_is_one(studio, form):
    *_, recording = studio.decode(PageRequest(SNEAKER, 5, form))
    confidence = torch.cat([torch.full((1, 25), 0.9999), torch.zeros(1, 24)], 1)
    step = replace(recording.steps[0], confidence=confidence)
    picture = draw_frame(replace(recording, steps=[step]), 1).confidence
    assert picture.getpixel((0, 0)) == (253, 231, 37)  # the ends of viridis
    assert picture.getpixel((picture.width - 1, picture.height - 1)) == (68, 1, 84)


def test_files_of_old_results_are_removed(studio, form, monkeypatch):
    monkeypatch.setattr("maskgit_pl.web.studio._MAX_KEPT", 2)
    request = PageRequest(0, 0, replace(form, num_steps=1))
    *_, recording = studio.decode(request)
    made = [studio.keep(recording, request) for _ in range(3)]
    assert [each.files[0].exists() for each in made] == [False, True, True]


# Regions and uploads


def strokes(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    layer = Image.new("RGBA", (width, height))
    layer.paste((230, 90, 20, 255), box)
    return layer


def test_a_painted_canvas_pixel_masks_its_image_pixel():
    layers = [strokes(56, 28, (4, 2, 5, 3)), strokes(56, 28, (40, 20, 44, 22))]
    mask = read_brush(layers, height=14, width=28)
    assert mask.nonzero().tolist() == [[1, 2], [10, 20], [10, 21]]
    assert not read_brush([], height=14, width=28).any()


def test_a_faint_edge_of_a_stroke_does_not_count():
    layer = Image.new("RGBA", (28, 28))
    layer.putpixel((3, 4), (0, 0, 0, 127))
    layer.putpixel((5, 6), (0, 0, 0, 128))
    assert read_brush([layer], height=28, width=28).nonzero().tolist() == [[6, 5]]


def test_a_region_says_what_the_brush_became(pipe, image):
    region = EditRegion(image, [strokes(28, 28, (0, 0, 5, 4))], box="", dilation=0, outline=pipe.outline)
    assert region.describe() == "20 of 784 pixels became 2 of 49 tokens, which are generated again"
    picture = np.array(region.picture())
    assert picture.shape == (*canvas_picture(image).size[::-1], 3)
    assert (picture[8, -8] == 0).all()  # the image, black in its corner
    assert np.array(region.mask_picture()).sum() == 20 * 255


@pytest.mark.parametrize(
    ("layers", "box", "said"),
    [
        ([], "", "mask must not be empty"),
        ([], "1,2,3", "box must be left"),
        ([], "0,0,29,3", "box must lie in the image"),
    ],
)
def test_a_wrong_region_is_answered(pipe, image, layers, box, said):
    with pytest.raises(ValueError, match=said):
        EditRegion(image, layers, box=box, dilation=1, outline=pipe.outline)


def test_an_upload_is_cropped_and_resized(pipe, tmp_path):
    pixels = np.zeros((40, 100, 3), np.uint8)
    pixels[:, 30:70] = 255
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    read = read_upload(tmp_path / "photo.png", pipe.outline)
    assert read.shape == (1, 28, 28)
    assert (read == 255).all()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (bytes(MAX_UPLOAD_BYTES + 1), "image x.png must have at most 16"),
        (b"a letter", "image x.png must be a JPEG, PNG or WebP file"),
        (b"", "image x.png is empty"),
    ],
)
def test_a_bad_upload_is_refused_by_its_name(pipe, tmp_path, content, said):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        read_upload(tmp_path / "x.png", pipe.outline)
    assert str(tmp_path) not in str(error.value)


def test_many_pixels_are_refused_before_they_are_decoded(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr("maskgit_pl.web.regions.decode_image", lambda *_, **__: pytest.fail("decoded"))
    Image.new("1", (5000, 5000)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="must have at most 24000000 pixels, got 5000 x 5000"):
        read_upload(tmp_path / "x.png", pipe.outline)


# Limits of the studio


def test_a_change_of_class_needs_a_class(studio, form, image):
    region = EditRegion(image, [], box="0,0,9,9", dilation=0, outline=studio.pipe.outline)
    with pytest.raises(ValueError, match="class must be named"):
        next(studio.edit(image, region, "edit", PageRequest(None, 0, form)))


def test_a_canvas_has_at_most_16_images(studio, form, image):
    request = PageRequest(0, 0, form)
    with pytest.raises(ValueError, match="width x height must be at most 16 images"):
        next(studio.panorama({"width": 28 * 17, "height": 28, "overlap": 0.5}, request))
    with pytest.raises(ValueError, match="width x height must be at most 16 images"):
        next(studio.outpaint(image, {"left": 28 * 16, "right": 0, "up": 0, "down": 0}, request))
    with pytest.raises(ValueError, match=r"width must be a multiple of 4 pixels, .* got 57; use 56 or 60"):
        next(studio.panorama({"width": 57, "height": 28, "overlap": 0.5}, request))
    with pytest.raises(ValueError, match=r"right must be a multiple of 4 pixels, .* got 3; use 0 or 4"):
        next(studio.outpaint(image, {"left": 0, "right": 3, "up": 0, "down": 0}, request))
    with pytest.raises(ValueError, match="left must be an integer"):
        next(studio.outpaint(image, {"left": -4, "right": 0, "up": 0, "down": 0}, request))


def test_a_model_that_the_page_cannot_show_is_refused(tiny_autoregressive, tmp_path):
    with pytest.raises(ValueError, match="web requires a model with bidirectional attention"):
        Studio(MaskGIT.from_pretrained(tiny_autoregressive), "tiny", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("own", [None, [1, 1, 1, 1, 1, 1, 1, 42]], ids=["schedule", "list"])
def test_each_schedule_decodes_with_its_own_counts(pipe, tmp_path, own):
    model = MaskGIT.from_pretrained(MODEL, decoding=pipe.decoding_with(tokens_per_step=own))
    studio = Studio(model, MODEL, tmp_path)
    found = dict(studio.decode_schedules(PageRequest(0, 0, FormSettings.of(model.decoding))))
    kept = plots.kept_by_schedule(49, 8)
    assert found.keys() == kept.keys() == mask_schedules.build_all().keys()
    for name, recording in found.items():
        assert [int((step.was_masked & ~step.still_masked).sum()) for step in recording.steps] == kept[name]


# Plots and HTML


def test_counts_are_those_of_the_decoder(pipe, studio, form):
    counts = plots.count_kept(pipe, pipe.decoding)
    *_, recording = studio.decode(PageRequest(0, 0, form))
    assert counts == [int((step.was_masked & ~step.still_masked).sum()) for step in recording.steps]
    assert plots.describe_counts(counts, pipe.decoding) == "Tokens kept at each step: 4, 4, 4, 5, 5, 5, 7, 15"
    assert "at least" in plots.describe_counts(counts, replace(pipe.decoding, token_selector="entropy"))
    assert plots.draw_counts(counts).lstrip().startswith(b"<?xml")


def test_names_cannot_become_markup():
    name = "<script>alert('x')</script>\x1b[0m\""
    picture = Image.new("L", (2, 2))
    for html in (
        markup.figure(picture, alt=name, caption=name),
        markup.plot(b"", alt=name, caption=name),
        markup.counts_table({name: [1, 2]}),
        markup.strip([], label=name),
        markup.schedule_heading(name, name),
        markup.message(name),
        markup.code(name, name),
    ):
        assert "<script" not in html
        assert "&lt;script" in html
        assert '"alert' not in html
        assert "\x1b" not in html


def test_the_table_has_a_row_for_each_schedule():
    html = markup.counts_table({"cosine": [1, 3], "log": [5, 2]})
    assert html.count("<tr>") == 3
    assert "<td>5</td><td>2</td>" in html


def test_errors_are_sentences(pipe, caplog):
    with pytest.raises(ValueError, match="num_steps") as wrong:
        pipe.check_decoding(pipe.decoding_with(num_steps=50))
    assert explain(wrong.value) == str(wrong.value)
    assert explain(KeyError("x")) == (
        "KeyError: internal error of maskgit_pl or of a library; the terminal shows where"
    )


def test_a_fast_run_is_stretched_to_three_seconds_at_most(monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr("maskgit_pl.web.form.time.sleep", slept.append)
    assert list(pace(range(4), num_steps=4)) == [0, 1, 2, 3]
    assert sum(slept) == pytest.approx(0.6, abs=0.1)
    slept.clear()
    list(pace(range(100), num_steps=100))
    assert sum(slept) == pytest.approx(3.0, abs=0.3)


# The command


def test_a_used_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        with pytest.raises(ValueError, match=f"free port of this machine, got 127.0.0.1:{port}"):
            server.check_port("127.0.0.1", port)
    with pytest.raises(ValueError, match="port must be an integer in"):
        server.check_port("127.0.0.1", 0)


def test_the_command_shows_the_model_of_the_package_by_default():
    args = _parse(["web"])
    assert read_call(args.function, vars(args)) == {}
    args = _parse(["web", "runs/one", "--port=80"])
    assert read_call(args.function, vars(args)) == {"folder": Path("runs/one"), "port": 80}


def test_without_gradio_the_command_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    assert main(["web"]) == 2
    assert capsys.readouterr().err == "maskgit web: web requires the package gradio: pip install 'maskgit_pl[web]'\n"


@pytest.mark.slow
def test_the_functions_of_the_page_do_not_import_gradio():
    names = "settings regions markup studio form page server"
    code = f"""import sys
for name in {names.split()}:
    __import__("maskgit_pl.web." + name)
assert "gradio" not in sys.modules"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
