"""A pipeline whose transformer computes in 8 bits."""

from pathlib import Path

import pytest
import torch

from maskgit_pl.pipeline import MaskGIT


def test_a_pipeline_in_int8_generates_nearly_the_same_and_leaves_the_other_as_it_was(tiny_pretrained: Path) -> None:
    pipe = MaskGIT.from_pretrained(tiny_pretrained)
    before = pipe.generate([0, 1, 2] * 8, output_type="pt")
    made = pipe.quantize()
    images = made.generate([0, 1, 2] * 8, output_type="pt")
    assert torch.equal(pipe.generate([0, 1, 2] * 8, output_type="pt"), before)
    assert made.decoding == pipe.decoding
    assert (images == before).float().mean() > 0.5


def test_a_pipeline_in_int8_can_be_neither_saved_nor_moved(tiny_pretrained: Path, tmp_path: Path) -> None:
    made = MaskGIT.from_pretrained(tiny_pretrained).quantize()
    with pytest.raises(ValueError, match="pipeline in int8 cannot be saved; use the pipeline that quantize"):
        made.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    for target in (("meta", None), ("cpu", torch.bfloat16)):
        with pytest.raises(ValueError, match="pipeline in int8 cannot be moved or cast"):
            made.to(target[0], dtype=target[1])
    assert made.to("cpu") is made
