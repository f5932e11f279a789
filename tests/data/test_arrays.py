"""Arrays in memory-mapped files: what is not one of plain values is refused by its name."""

from pathlib import Path

import numpy as np
import pytest

from maskgit_pl.data.arrays import map_array


@pytest.mark.parametrize("shape", ["(True, 1)", "(-1,)", "(1.0,)", f"({10**30},)", "(4294967296, 4294967296)"])
def test_a_header_that_states_an_odd_shape_is_refused_in_one_line(tmp_path: Path, shape: str) -> None:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(4))
    with pytest.raises(ValueError, match=r"^\S+a\.npy: cannot be read \(.+\)$"):
        map_array(tmp_path / "a.npy", (1,), np.dtype(np.float32), hint="make it again")
