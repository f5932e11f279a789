"""A checkpoint that was saved can be loaded; a tensor in pieces is refused if its rows overlap or are missing."""

import json

import pytest
import torch

from maskgit_pl.files import sha256_of, write_tensors
from maskgit_pl.training.checkpoint_files import FolderCheckpointIO


def save(folder, state):
    FolderCheckpointIO().save_checkpoint(state, folder)
    return folder


@pytest.mark.parametrize(
    ("pieces", "is_whole"),
    [
        (((0, 4), (0, 4), (8, 4)), False),  # as many rows as a whole one has
        (((0, 4), (2, 4), (6, 6)), False),
        (((0, 4), (8, 4)), False),
        (((8, 4), (4, 4), (4, 0), (0, 4)), True),
    ],
)
def test_pieces_that_overlap_or_leave_a_gap_are_refused(tmp_path, pieces, is_whole):
    folder = save(tmp_path / "step-00000003", {"weight": torch.ones(4, 3)})
    (folder / "tensors-00000-of-00001.safetensors").unlink()
    for number, (start, count) in enumerate(pieces):
        name = f"tensors-{number:05d}-of-{len(pieces):05d}.safetensors"
        rows = {"/weight": torch.arange(start, start + count).float().unsqueeze(1).expand(-1, 3).contiguous()}
        write_tensors(folder / name, rows, metadata={"first_rows": json.dumps({"/weight": start})})
    marker = json.loads((folder / "COMPLETE.json").read_text())
    marker["files"] = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in folder.iterdir()
        if file.name != "COMPLETE.json"
    }
    (folder / "COMPLETE.json").write_text(json.dumps(marker))
    if is_whole:
        assert FolderCheckpointIO().load_checkpoint(folder)["weight"][:, 2].tolist() == list(range(12))
        return
    with pytest.raises(ValueError, match="'/weight' is incomplete; resume from an older one"):
        FolderCheckpointIO().load_checkpoint(folder)


def nested(depth):
    return {"a": nested(depth - 1)} if depth else 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("state", "rule"),
    [
        ({"callbacks": {"Other": {}, "History": nested(20)}}, "because of callbacks/History: .* at most 64 levels"),
        ({"extra": nested(25), "loops": {}}, "because of extra: .* at most 64 levels deep; save it in another form"),
        ({"extra": nested(500)}, r"checkpoint '/extra/a/a.*: values must be nested at most 32 deep"),
        (
            {"callbacks": {"Other": [1], "History": [0.123456789012345] * 900_000}},
            r"at most 16 MB, got 17\.1 MB, of which callbacks/History has 17\.1 MB; save long lists as tensors",
        ),
        ({"callbacks": {float("nan"): 1}}, "/callbacks: keys of a mapping must be finite, got nan; use text"),
        ({"extra": {1: torch.ones(1), "1": torch.ones(2)}}, "/extra/1: keys must be unique as text, got two tensors"),
        ({"global_step": 10**16}, r"could not be loaded again: .* global_step must be"),
    ],
    ids=["deep callback", "deep", "deeper", "large", "nan", "two tensors", "step"],
)
def test_what_could_not_be_loaded_is_not_saved_and_the_older_checkpoint_stays(tmp_path, state, rule):
    folder = save(tmp_path / "step-00000003", {"loops": {"done": 3}})
    for target in (folder, tmp_path / "step-00000004"):
        with pytest.raises(ValueError, match=rule):
            save(target, {"state_dict": {"weight": torch.ones(2)}, **state})
    assert list(tmp_path.iterdir()) == [folder]
    assert FolderCheckpointIO().load_checkpoint(folder)["loops"] == {"done": 3}


def test_whatever_is_saved_can_be_loaded(tmp_path):
    saved = []
    for depth in range(16, 24):
        for key in (1, 1.5, None, True, "a/b", ""):
            state = {"extra": {key: [nested(depth), (float("inf"),)]}, "callbacks": {}}
            folder = tmp_path / "step-00000003"
            try:
                save(folder, state)
            except ValueError:
                continue
            assert FolderCheckpointIO().load_checkpoint(folder) == state
            saved.append(depth)
    assert saved
    assert max(saved) < 23
