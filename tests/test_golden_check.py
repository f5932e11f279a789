"""check.py accepts every folder of its layout that is right, and names what is wrong in one that is not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import recipe
import torch
from check import main
from comparators import discriminator, tokenizer, transformer
from comparators.folder import Folder
from comparators.full import check_model

from maskgit_pl.losses import discriminator_loss, entropy_loss, generator_loss, r1_penalty, reconstruction_loss
from maskgit_pl.networks.codebooks import GradientQuantizerSpec

GOLDEN = Path(__file__).parent / "golden"
LOSSES, EDIT = "losses.npz", "decode_n16_T12_edit_start2.npz"
N16 = ("transformer_n16.npz", "transformer_n16_checkpoint.msgpack", "transformer_n16_grads.msgpack")


def copied(folder: Path, *files: str) -> Path:
    """A folder with some of the recorded files, and their manifest."""
    folder.mkdir(exist_ok=True)
    manifest = json.loads((GOLDEN / "manifest.json").read_text())
    manifest["files"] = {file: manifest["files"][file] for file in files}
    for file in files:
        shutil.copy(GOLDEN / file, folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def change(folder: Path, file: str, **arrays: np.ndarray) -> None:
    """Rewrites arrays of an .npz; its size in the manifest is put right."""
    with np.load(folder / file) as archive:
        np.savez_compressed(folder / file.removesuffix(".npz"), **{**archive, **arrays})
    edit(folder, lambda manifest: manifest["files"][file].update(bytes=(folder / file).stat().st_size))


def edit(folder: Path, how) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    how(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def write_tree(file: Path, arrays: dict[str, np.ndarray]) -> None:
    recipe.write_tree(file, ((path, array.shape) for path, array in arrays.items()), lambda path, _: arrays[path])


def checked(folder: Path, capsys) -> tuple[int, list[str], str]:
    """Returns the exit code, the lines of arrays that differ, and the last line."""
    code = main([str(folder)])
    lines = capsys.readouterr().out.splitlines()
    return code, [line for line in lines[:-1] if "OFF" in line], lines[-1]


def moved(array: np.ndarray) -> np.ndarray:
    """The array with one element off: by 1e-3, or by 1."""
    changed = array.copy()
    where = np.unravel_index(array.size // 2, array.shape)
    if array.dtype == bool:
        changed[where] = ~changed[where]
    else:
        changed[where] += 1e-3 if array.dtype.kind == "f" else 1
    return changed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "array"),
    [
        (LOSSES, "ce_grad_smoothing0.1"),
        (LOSSES, "entropy_argmax_T0.5"),
        (LOSSES, "perplexity_global"),
        (LOSSES, "generator_loss_non-saturating"),
        ("schedules.npz", "random_out_N1024"),
        ("schedules.npz", "mask_len_T12_N256"),
        ("schedules.npz", "masked_before_step_T16_N16"),
        ("transformer_n16.npz", "layer1_self_attention"),
        ("transformer_n16.npz", "loss_value"),
        *((EDIT, name) for name in ("final_seqs", "final_tokens", "next_ids", "cur_ids", "cat_samples", "mask_len")),
        *((EDIT, name) for name in ("masking", "unknown_at_start", "ratio", "mask_ratio", "temperature", "logits")),
        *((EDIT, name) for name in ("min_categorical_gap", "min_confidence_gap")),
    ],
)
def test_an_element_that_is_off_is_named(file, array, tmp_path, capsys):
    beside = N16 if file == "transformer_n16.npz" else ("transformer_n16_checkpoint.msgpack", file)
    folder = copied(tmp_path / "set", *(beside if file in (*N16, EDIT) else (file,)))
    with np.load(GOLDEN / file) as archive:
        change(folder, file, **{array: moved(archive[array])})
    code, off, _ = checked(folder, capsys)
    assert code == 1
    assert any(line.startswith(file) and line.split()[1] == array for line in off)


def test_a_gradient_that_is_off_is_named(tmp_path, capsys):
    folder = copied(tmp_path / "set", *N16)
    path = "TransformerLayer_1/Attention_0/self_attention/key/kernel"
    tree = {name.removeprefix("params/"): array for name, array in Folder(GOLDEN).tree(N16[2]).items()}
    tree[path] = moved(tree[path])
    write_tree(folder / N16[2], tree)
    code, off, last = checked(folder, capsys)
    assert code == 1
    assert [line.split()[1] for line in off] == [f"params/{path}"]
    assert last.startswith("95 of 96 arrays agree")


def test_what_nobody_compares_or_the_manifest_does_not_say_is_named(tmp_path, capsys):
    folder = copied(tmp_path / "set", "schedules.npz", LOSSES)
    change(folder, "schedules.npz", extra=np.zeros(3, np.float32))
    code, off, last = checked(folder, capsys)
    assert code == 1
    assert any("extra" in line and "not compared" in line for line in off)
    assert any("schedules.npz extra: the manifest says nothing" in line for line in off)
    assert last.startswith("75 of 76 arrays agree")


@pytest.mark.parametrize(
    ("how", "named"),
    [
        (lambda files: files[LOSSES].update(bytes=1), f"{LOSSES}: the manifest says 1 bytes, it has 83289"),
        (lambda files: files[LOSSES]["arrays"].update(l1=[[2], "float32"]), f"{LOSSES} l1: the manifest says [[2], "),
        (lambda files: files[LOSSES]["arrays"].update(l1=[[], "float64"]), f"{LOSSES} l1: the manifest says [[], "),
        (lambda files: files[LOSSES]["arrays"].update(more=[[], "int32"]), f"{LOSSES} more: the manifest says [[], "),
        (lambda files: files.update(more=files[LOSSES]), "more: the manifest names it, the folder lacks it"),
        (lambda files: files.pop(LOSSES), f"{LOSSES}: the folder has it, the manifest does not name it"),
        (lambda files: files[N16[1]].update(n_params=3), f"{N16[1]}: the manifest says 3 parameters, it has 77323"),
        (lambda files: files[N16[1]]["tree"].popitem(), f"{N16[1]} params/"),
    ],
)  # fmt: skip
def test_a_manifest_that_says_something_else_is_named(how, named, tmp_path, capsys):
    folder = copied(tmp_path / "set", LOSSES, N16[1])
    edit(folder, lambda manifest: how(manifest["files"]))
    code, off, _ = checked(folder, capsys)
    assert code == 1
    assert any(named in line for line in off)


def test_a_run_without_its_transformer_is_checked_by_its_logits_and_without_both_not_at_all(tmp_path, capsys):
    folder = copied(tmp_path / "set", EDIT, "decode_n256_T8.npz")
    code, off, _ = checked(folder, capsys)
    assert code == 1
    assert all("decode_n256_T8.npz" in line for line in off)
    assert any("final_tokens" in line and "not compared" in line for line in off)
    assert any("there must be a transformer's checkpoint or recorded logits" in line for line in off)


def test_a_file_of_an_unknown_kind_is_named(tmp_path, capsys):
    folder = copied(tmp_path / "set", LOSSES)
    (folder / LOSSES).rename(folder / "penalties.npz")
    code, off, _ = checked(folder, capsys)
    assert code == 1
    assert any("penalties.npz" in line and "l2" in line and "not compared" in line for line in off)


def broken(folder: Path, file: str) -> Path:
    (folder / file).write_bytes((GOLDEN / file).read_bytes()[:1000])
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "nowhere", "nowhere: there is no such folder"),
        (lambda path: path, "manifest.json is missing"),
        (lambda path: broken(copied(path, LOSSES), LOSSES), "losses.npz: it cannot be read: "),
        (lambda path: broken(copied(path, N16[1]), N16[1]), f"{N16[1]}: it cannot be read: "),
        (lambda path: (copied(path) / "manifest.json").write_text("[") and path, "manifest.json is no manifest: "),
    ],
)
def test_a_folder_that_cannot_be_read_is_one_line_and_exit_code_2(make, message, tmp_path, capsys):
    assert main([str(make(tmp_path))]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.slow
def test_a_full_size_model_of_another_seed_or_output_is_named(tmp_path):
    shutil.copytree(GOLDEN / "full", tmp_path, dirs_exist_ok=True)
    model = "discriminator256"
    with np.load(GOLDEN / "full" / f"{model}.npz") as archive:
        np.savez(tmp_path / f"{model}.npz", **{**archive, "logits": moved(archive["logits"])})
    report = check_model(Folder(tmp_path, "full_golden.json"), model)
    assert [made.array for made in report.comparisons if not made.agrees] == ["logits"]
    manifest = json.loads((tmp_path / "full_golden.json").read_text())
    (tmp_path / "full_golden.json").write_text(json.dumps({**manifest, "seed": 32}))
    report = check_model(Folder(tmp_path, "full_golden.json"), model)
    assert not any(made.agrees for made in report.comparisons)
    assert "the recipe's checkpoint has the sha256" in report.problems[0]


@pytest.mark.slow
def test_it_runs_as_a_script(tmp_path):
    folder = copied(tmp_path / "set", "schedules.npz")
    run = subprocess.run([sys.executable, GOLDEN / "check.py", folder], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "34 of 34 arrays agree (33 compared, 1 inputs)"


# Sets of other sizes, whose arrays our own networks make


def write_set(folder: Path, config: dict[str, object], **files: dict[str, np.ndarray]) -> Path:
    """A folder in the layout of the recorded ones; a file whose arrays have paths is a tree."""
    folder.mkdir()
    listed: dict[str, object] = {}
    for stem, arrays in files.items():
        arrays = {name: np.asarray(array) for name, array in arrays.items()}
        said = {name: [list(array.shape), array.dtype.name] for name, array in arrays.items()}
        if any("/" in name for name in arrays):
            file = folder / f"{stem}.msgpack"
            recipe.write_tree(
                file, ((path, array.shape) for path, array in arrays.items()), lambda path, _, a=arrays: a[path]
            )
            tree = {f"params/{path}": shape for path, shape in said.items()}
            listed[file.name] = {"n_params": sum(array.size for array in arrays.values()), "tree": tree}
        else:
            file = folder / f"{stem}.npz"
            np.savez_compressed(file, **arrays)
            listed[file.name] = {"arrays": {**said, **({"method": [[], "<U4"]} if "method" in said else {})}}
        listed[file.name]["bytes"] = file.stat().st_size
    (folder / "manifest.json").write_text(json.dumps({"config": config, "files": listed}))
    return folder


def weights(model: str, shapes) -> dict[str, np.ndarray]:
    return {path: recipe.array_of(5, model, path, shape) for path, shape in shapes}


def released(ours: dict[str, torch.Tensor], tree: dict[str, np.ndarray], to_ours) -> dict[str, np.ndarray]:
    """Returns our values in the layout of the released ``tree``: the inverse of ``to_ours``."""
    sizes = [array.size for array in tree.values()]
    numbers = np.split(np.arange(sum(sizes), dtype=np.float32), np.cumsum(sizes)[:-1])
    places = to_ours({path: n.reshape(tree[path].shape) for path, n in zip(tree, numbers, strict=True)})
    flat = np.zeros(sum(sizes), np.float32)
    for name, value in ours.items():
        flat[places[name].long().numpy()] = value
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    return {path: part.reshape(tree[path].shape) for path, part in zip(tree, parts, strict=True)}


def gradients_of(loss: torch.Tensor, network: torch.nn.Module) -> dict[str, torch.Tensor]:
    names, values = zip(*network.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, values, materialize_grads=True), strict=True))


def vqvae_set(folder: Path) -> Path:
    """Writes a set with images twice as wide as high, three levels, ReLU and argmax entropy."""
    entry = {
        "filters": 32, "num_res_blocks": 2, "channel_multipliers": [1, 1, 2], "codebook_size": 20, "embedding_dim": 6,
        "commitment_cost": 0.5, "entropy_loss_ratio": 0.2, "entropy_temperature": 0.5, "entropy_loss_type": "argmax",
    }  # fmt: skip
    tree = weights("tokenizer", recipe.tokenizer(filters=32, channel_multipliers=(1, 1, 2), codes=20, code_dim=6))
    spec = GradientQuantizerSpec(0.5, 0.2, 0.5, "argmax", codebook_weight=1.0)
    network = tokenizer.network_from(tree, activation="relu", quantizer=spec)
    random = np.random.RandomState(0)
    pixels, chosen = random.rand(1, 16, 32, 3).astype(np.float32), random.randint(20, size=(1, 4, 8), dtype=np.int32)
    images = tokenizer.to_images(pixels)
    features = network.encoder(images)
    distances = network.quantizer.distances(features.movedim(1, -1).reshape(-1, 6)).detach()
    indices = network.encode(images).view(1, 4, 8)
    codes, made = network.quantizer.codebook[indices], network(images)
    two = distances.sort(1).values
    loss = reconstruction_loss(made.reconstruction, images, kind="l2") + made.quantized.loss
    latent, drawn = (features.movedim(1, -1) - codes).square().mean(), torch.from_numpy(chosen).long()
    arrays = {
        "images": pixels,
        "encoder_output": tokenizer.nhwc(features),
        "distances": distances,
        "indices": indices.int(),
        "nearest_gap": two[:, 1] - two[:, 0],
        "quantized": codes,
        "decoded_from_indices": tokenizer.nhwc(network.decode(indices.flatten(1), (4, 8))),
        "random_indices": chosen,
        "decoded_from_random_indices": tokenizer.nhwc(network.decode(drawn.flatten(1), (4, 8))),
        "train_decoded": tokenizer.nhwc(made.reconstruction),
        "quantizer_loss": made.quantized.loss,
        "q_latent_loss": latent,
        "e_latent_loss": 0.5 * latent,
        "entropy_loss": 0.2 * entropy_loss(-distances, temperature=0.5, kind="argmax"),
        "entropy_softmax_T0.25": entropy_loss(-distances, temperature=0.25, kind="softmax"),
        "total_loss": loss,
    }
    arrays = {name: array.detach() if isinstance(array, torch.Tensor) else array for name, array in arrays.items()}
    slopes = released(gradients_of(loss, network), tree, lambda t: tokenizer.tokenizer_weights(t, network.config))
    return write_set(folder, {"vq": entry}, vqvae=arrays, vqvae_checkpoint=tree, vqvae_grads=slopes)


def released_run(predict, inputs: np.ndarray, *, steps: int, start: int, temperature: float) -> dict[str, np.ndarray]:
    """The released parallel decoder with 1 - r^3, written out row by row."""
    random, last = np.random.RandomState(3), inputs
    unknown_at_start = (inputs == -1).sum(1).astype(np.int32)
    made: dict[str, list[np.ndarray]] = {}
    for step in range(start, steps):
        ratio = np.float32((step + 1) / steps)
        mask_ratio = np.clip(np.float32(1) - ratio**3, 1e-6, 1).astype(np.float32)
        logits = predict(last)
        cat_gumbel = random.gumbel(size=logits.shape).astype(np.float32)
        conf_gumbel = random.gumbel(size=last.shape).astype(np.float32)
        samples = (logits + cat_gumbel).argmax(-1).astype(np.int32)
        probs = np.exp(logits - logits.max(-1, keepdims=True))
        probs = np.take_along_axis(probs / probs.sum(-1, keepdims=True), samples[..., None], -1)[..., 0]
        unknown = last == -1
        probs = np.where(unknown, probs, np.inf).astype(np.float32)
        noise_scale = np.float32(temperature) * (np.float32(1) - ratio)
        confidence = np.log(probs) + noise_scale * conf_gumbel
        lengths = np.maximum(1, np.minimum(unknown.sum(1) - 1, np.floor(unknown_at_start * mask_ratio)))
        lengths = lengths.astype(np.int32)[:, None]
        masking = confidence < np.take_along_axis(np.sort(confidence, 1), lengths, 1)
        sampled = np.where(unknown, samples, last)
        values = {
            "cur_ids": last, "logits": logits, "cat_gumbel": cat_gumbel, "cat_samples": samples, "ratio": ratio,
            "mask_ratio": np.full(len(last), mask_ratio), "mask_len": lengths[:, 0], "selected_probs": probs,
            "conf_gumbel": conf_gumbel, "temperature": noise_scale, "masking": masking, "sampled": sampled,
            "next_ids": np.where(masking, -1, sampled).astype(np.int32),
        }  # fmt: skip
        for name, value in values.items():
            made.setdefault(name, []).append(value)
        last = values["next_ids"]
    arrays = {name: np.stack(values) for name, values in made.items()}
    before, sampled = np.repeat(inputs[:, None], start, 1), arrays.pop("sampled").swapaxes(0, 1)
    return {
        **arrays,
        "inputs": inputs,
        "prng_seed": np.int64(3),
        "num_iter": np.int64(steps),
        "start_iter": np.int64(start),
        "choice_temperature": np.float32(temperature),
        "method": np.array("pow3"),
        "unknown_at_start": unknown_at_start,
        "final_seqs": np.concatenate([before, sampled], 1).astype(np.int32),
        "final_tokens": sampled[:, -1, 1:].astype(np.int32),
    }


def transformer_set(folder: Path) -> Path:
    """Writes a set with one layer, three heads, 7 codes, 2 classes, 3 x 3 tokens, and five steps from the second on."""
    tree = weights("transformer", recipe.transformer(layers=1, width=12, heads=3, mlp=20, words=10, positions=10))
    entry = {"layers": 1, "hidden": 12, "heads": 3, "inter": 20, "codebook": 7, "classes": 2, "latent": 3}
    network = transformer.network_from(tree, codebook_size=7)
    inputs = np.array([[7, -1, -1, -1, -1, -1, -1, -1, -1, -1], [8, -1, 6, -1, 0, 1, 2, -1, -1, 3]], np.int32)
    logits = transformer.everywhere(network, inputs)["logits"].detach()
    run = released_run(
        lambda ids: transformer.everywhere(network, ids)["logits"][..., :7].detach().numpy(),
        inputs, steps=5, start=1, temperature=2.0,
    )  # fmt: skip
    return write_set(
        folder, {"tf9": entry}, transformer_n9={"tokens": inputs, "logits": logits}, transformer_n9_checkpoint=tree,
        decode_n9_T5_pow3=run,
    )  # fmt: skip


def discriminator_set(folder: Path) -> Path:
    """Writes a set of 16 px with other widths and another R1 weight."""
    tree = weights("disc", recipe.discriminator(widths=(6, 5, 4)))
    network = discriminator.network_from(tree, image_size=16, pooling="blur")
    pixels, others = np.random.RandomState(0).rand(2, 2, 16, 16, 3).astype(np.float32)
    images = tokenizer.to_images(pixels).requires_grad_()
    real, fake = network(images), network(tokenizer.to_images(others))
    penalty = 3.0 * r1_penalty(real, images)
    (slope,) = torch.autograd.grad(real.sum(), images, retain_graph=True)
    arrays = {
        "blur_logits": real,
        "blur_fake_logits": fake,
        "blur_input_gradient": tokenizer.nhwc(slope),
        "blur_r1_penalty_cost3": penalty,
        "blur_discriminator_loss_hinge": discriminator_loss(real, fake, kind="hinge"),
        "blur_generator_loss_non-saturating": generator_loss(fake, kind="non-saturating"),
    }
    arrays = {name: array.detach().numpy() for name, array in arrays.items()}
    slopes = released(gradients_of(penalty, network), tree, discriminator.weights)
    return write_set(
        folder, {}, discriminator={"images": pixels, "fake_images": others, **arrays},
        discriminator_checkpoint=tree, discriminator_r1_grads=slopes,
    )  # fmt: skip


@pytest.mark.parametrize("make", [vqvae_set, transformer_set, discriminator_set])
def test_a_set_of_other_sizes_is_accepted(make, tmp_path, capsys):
    folder = make(tmp_path / "set")
    code, off, last = checked(folder, capsys)
    assert off == []
    assert code == 0, last
