import pytest

from maskgit_pl.evaluation.options import TuningOptions
from maskgit_pl.evaluation.tuning import tune


def test_invalid_options_are_refused_before_the_run_is_opened() -> None:
    with pytest.raises(
        ValueError, match=r"metric must be one of fid, sfid, kid, .*, agreement, got 'fdi'; did you mean 'fid'"
    ):
        tune("nowhere", metric="fdi")
    with pytest.raises(ValueError, match="search must be one of random, grid, got 'gird'; did you mean 'grid'"):
        TuningOptions(search="gird")
    for name, value in (("seconds", 0), ("seconds", float("nan")), ("seed", -1), ("plot_images", 1)):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            TuningOptions(**{name: value})
