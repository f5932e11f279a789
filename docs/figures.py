"""Draws the figures of ``how-it-works.md`` with the model of the package: python docs/figures.py.

The files are written into ``docs/how-it-works/``. They are the same on each run.
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from maskgit_pl import MaskGIT, MaskSampler, mask_schedules
from maskgit_pl.evaluation.figures import count_known_tokens, draw_schedules
from maskgit_pl.grids import image_grid, save_png

FOLDER = Path(__file__).parent / "how-it-works"
COLOURS = {"sqrt": "#c58b3a", "linear": "#6d9a5c", "cosine": "#d1460f", "cubic": "#14427a"}  # few tokens first, or many
NUM_TOKENS, NUM_STEPS = 256, 8
GREY = 176  # masked tokens


def draw_steps() -> Figure:
    """Draws the number of tokens that each of 8 steps decides, of 256, with four schedules."""
    page = Figure(figsize=(7.2, 3.4), layout="constrained", dpi=120)
    axes = page.add_subplot()
    for number, (name, colour) in enumerate(COLOURS.items()):
        known = count_known_tokens(mask_schedules.build(name), num_tokens=NUM_TOKENS, num_steps=NUM_STEPS)
        decided = [after - before for before, after in zip([0, *known], known, strict=False)]
        places = [step + 1 + (number - 1.5) * 0.2 for step in range(NUM_STEPS)]
        axes.bar(places, decided, 0.2, label=name, color=colour)
    axes.set(xlabel="step", ylabel=f"tokens decided, of {NUM_TOKENS}", xticks=range(1, NUM_STEPS + 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return page


def grey_out(image: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Returns an image (C, H, W) uint8 with masked tokens, (N,) bool, in grey."""
    rows, columns = (side // cells for side, cells in zip(image.shape[-2:], grid, strict=True))
    pixels = mask.view(grid).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return torch.where(pixels, GREY, image).to(torch.uint8)


def draw_masks(pipe: MaskGIT) -> Image.Image:
    """Draws two images with eight masks of training, from few masked tokens to many."""
    images = pipe.generate(["Sneaker", "Pullover"], output_type="pt", seed=4)
    sampler, count = MaskSampler(mask_schedules.build("cosine"), seed=0), 8
    index = torch.arange(count)
    masks = sampler.mask(49, index=index, epoch=torch.zeros_like(index), position=index, global_batch=count)
    masks = masks[masks.sum(1).argsort()]
    rows = [torch.stack([image, *(grey_out(image, mask, pipe.tokenizer.grid) for mask in masks)]) for image in images]
    captions = ["image", *(f"{int(masked)} of 49" for masked in masks.sum(1))]
    return image_grid(torch.cat(rows), columns=len(captions), column_captions=captions)


def main() -> None:
    """Draws all figures."""
    pipe = MaskGIT.from_pretrained("fashion-mnist-demo")
    FOLDER.mkdir(exist_ok=True)
    schedules = {name: mask_schedules.build(name) for name in ("sqrt", "linear", "arccos", "cosine", "square", "cubic")}
    (FOLDER / "schedules.png").write_bytes(draw_schedules(schedules, num_tokens=NUM_TOKENS))
    draw_steps().savefig(FOLDER / "steps.png", metadata={"Software": None})
    save_png(draw_masks(pipe), FOLDER / "masks.png")
    pipe.record(["Ankle boot"], seed=3, num_steps=8).save(FOLDER / "decoding.png")


if __name__ == "__main__":
    main()
