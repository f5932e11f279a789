import pytest

from maskgit_pl.evaluation.metric_names import (
    METRICS,
    NETWORK_METRICS,
    direction,
    find_metric,
    format_value,
    is_better,
    metric_name,
    title,
)


def test_names_become_titles_and_values_have_their_factor() -> None:
    assert metric_name("kid", "lite0") == "kid/lite0"
    assert title("kid/lite0") == "KID x 1000 (lite0)"
    assert format_value("kid/lite0", 0.012345) == "12.35"
    assert format_value("kid/lite0", 0.012345, more_digits=1) == "12.345"
    assert title("fid/timm:resnet18") == "FID (timm:resnet18)"
    assert title("class_agreement") == "class agreement %"
    assert format_value("class_agreement", 0.75) == "75.0"


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_has_one_title_and_a_direction(name: str) -> None:
    assert [metric.title for metric in METRICS.values()].count(title(name)) == 1
    assert find_metric(f"{name}/x") == METRICS[name]
    assert is_better(name, 2.0, 1.0) == (direction(name) == "higher is better")
    assert not is_better(name, 1.0, 1.0)


def test_metrics_of_networks_are_metrics() -> None:
    assert set(NETWORK_METRICS) < set(METRICS)
