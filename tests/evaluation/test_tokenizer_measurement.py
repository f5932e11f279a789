import pytest
import torch

from maskgit_pl.evaluation.tokenizer_measurement import reconstruct_in_tiles, tile_starts
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig


def network(channels: int, codebook_size: int = 16) -> VQGAN:
    sizes = {"base_channels": 8, "channel_multipliers": (1, 1), "num_res_blocks": 1, "num_groups": 2, "code_dim": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VQGAN(VQGANConfig(channels, codebook_size=codebook_size, **sizes)).eval().requires_grad_(False)  # type: ignore[arg-type]


def images(channels: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("length", "tile", "overlap", "starts"),
    [
        (8, 8, 2, [0]),
        (5, 8, 2, [0]),
        (9, 8, 2, [0, 1]),
        (20, 8, 2, [0, 6, 12]),
        (16, 8, 0, [0, 8]),
        (21, 8, 2, [0, 6, 12, 13]),
    ],
)
def test_tiles_of_one_size_cover_the_axis_and_overlap(length: int, tile: int, overlap: int, starts: list[int]) -> None:
    assert tile_starts(length, tile, overlap) == starts


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (8, 6), (7, 5)])
def test_an_image_of_one_tile_is_the_plain_pass(channels: int, size: tuple[int, int]) -> None:
    model, pictures = network(channels), images(channels, *size)
    tokens, made = reconstruct_in_tiles(model, pictures, tile=(8, 8), overlap=2)
    assert torch.equal(tokens, model.encode(pictures))
    assert torch.equal(made, model.decode(tokens, model.grid(size))[..., : size[0], : size[1]])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"patch_size": 2},
        {"layout": "taming", "num_middle_blocks": 2, "latent_channels": 4},
        {"layout": "magvit2", "num_middle_blocks": 2},
    ],
)
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (5, 19), (19, 5), (19, 21)])
def test_every_layout_reconstructs_images_of_any_size(options: dict, size: tuple[int, int]) -> None:
    sizes = {"base_channels": 8, "channel_multipliers": (1, 1), "num_res_blocks": 1, "num_groups": 2, "code_dim": 4}
    model = VQGAN(VQGANConfig(3, codebook_size=16, **sizes, **options)).eval().requires_grad_(False)
    pictures = images(3, *size)
    _, made = reconstruct_in_tiles(model, pictures, tile=(8, 8), overlap=2)
    assert made.shape == pictures.shape
    assert made.isfinite().all()


class Recorder(torch.nn.Module):
    """Reconstructs each tile as its brightness in the corner, so that tiles differ and seams would show."""

    config = VQGANConfig(1, base_channels=8, channel_multipliers=(1,), num_groups=2)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        self.shown = pixels
        return torch.zeros(len(pixels), pixels[0, 0].numel(), dtype=torch.int64)

    def decode(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return self.shown[..., :1, :1].expand_as(self.shown)


def test_a_perfect_tokenizer_is_perfect_in_tiles() -> None:
    perfect = Recorder()
    perfect.decode = lambda tokens, grid: perfect.shown  # type: ignore[method-assign]
    pictures = images(3, 19, 30)
    tokens, made = reconstruct_in_tiles(perfect, pictures, tile=(8, 8), overlap=2)  # type: ignore[arg-type]
    assert torch.allclose(made, pictures, atol=1e-6)
    assert tokens.shape == (2, 3 * 5 * 64)  # tiles x pixels of a tile


def test_no_step_of_a_blended_seam_is_larger_than_its_share() -> None:
    ramp = torch.linspace(0, 1, 32).expand(1, 1, 8, 32)
    _, blended = reconstruct_in_tiles(Recorder(), ramp, tile=(8, 8), overlap=4)  # type: ignore[arg-type]
    _, cut = reconstruct_in_tiles(Recorder(), ramp, tile=(8, 8), overlap=0)  # type: ignore[arg-type]
    assert float(blended.diff(dim=-1).abs().max()) < 0.5 * float(cut.diff(dim=-1).abs().max())
