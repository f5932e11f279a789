from maskgit_pl.evaluation.ledger import REAL
from maskgit_pl.evaluation.tables import make_editing_page, make_generation_page


def row(model: str, network: str, **numbers: object) -> dict[str, object]:
    common = {"run": "" if model == REAL else "run-a", "num_images": 100, "real_images": 500, "num_steps": 8,
              "parameters": 850_000, "seconds_per_image": 0.015, "commit": "a" * 40, "dataset": "shoes", "data": "f00",
              "split": "val", "date": "2026-01-02", "device": "cpu"}  # fmt: skip
    return {**common, "model": model, "network": network, **numbers}


def test_pages_name_the_reference() -> None:
    file = {"split": "", "reference_file": "imagenet.npz", "real_images": None}
    for changes, compared in (({}, "500 real images of the val split"), (file, "the statistics of imagenet.npz")):
        tasks = [row("MaskGIT", "lite0", fid=1.0, task="outpaint-right", **changes)]
        for page in (make_generation_page(tasks, []), make_editing_page(tasks)):
            assert f"compared with {compared}" in " ".join(page.markdown.split())
