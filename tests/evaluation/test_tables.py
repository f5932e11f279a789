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


def test_table_1_has_a_row_per_model_with_the_range_of_its_seeds() -> None:
    samples, costs = [], []
    for number, (model, backbone, fid) in enumerate([("MaskGIT", "adaln", 1.0), ("MaskGIT", "adaln", 2.0),
                                                     ("autoregressive", "bert", 3.0)]):  # fmt: skip
        mark = {
            "run": f"run-{number}",
            "backbone": backbone,
            "settings": backbone,
            "num_steps": 8 if number < 2 else 16,
        }
        samples.append({**row(model, "classifier", fid=fid), **mark})
        costs.append({**samples[-1], "batch_1": 0.01, "batch_64": 0.002 * fid, "torch": "2.9",
                      "training_seconds": 100 * fid, "training_device": "a CPU"})  # fmt: skip
    samples.append(row(REAL, "classifier", fid=0.1))
    cas = [{**each, "classifier": "small", "training_images": 5, "training_steps": 4, "top1": each["fid"] / 10,
            "top5": 1.0} for each in samples]  # fmt: skip
    other_steps = [{**each, "num_steps": 2, "fid": each["fid"] + 1} for each in samples[:2]]
    text = make_generation_page(samples, cas, costs, other_steps).markdown
    model = "| MaskGIT (adaln) | `run-0`, `run-1` |"
    for line in (
        f"{model} 1.50 (1.00 to 2.00) | 0.85M | 8 |",
        f"{model} 2.50 (2.00 to 3.00) | 1.50 (1.00 to 2.00) |  |",  # T = 2, 8 and 16
        "| autoregressive (bert) | `run-2` |  |  | 3.00 |",
        f"{model} 10.0 (10.0 to 10.0) | 3.00 (2.00 to 4.00) | 150 (100 to 200) |",
        "| autoregressive (bert) | `run-2` | 10.0 | 6.00 | 300 |",
        f"{model} 15.00 (10.00 to 20.00) | 100.00 (100.00 to 100.00) |",
    ):
        assert f"\n{line}\n" in text
