from maskgit_pl.training.recipe import changes, fixed_settings

CONFIG = {
    "model": {
        "network": {"width": 8, "quantizer": {"name": "ema", "decay": 0.9}},
        "learning_rate": {"peak": 0.1, "warmup_steps": 5},
        "perceptual": {"network": {"name": "timm", "model": "m", "weights": "here.pth"}, "weight": 0.1},
        "adversarial": None,
        "betas": (0.9, 0.99),
        "decoding": {"num_steps": 8},
        "tokenizer": "folder",
        "seed": 0,
    },
    "data": {
        "path": "x",
        "global_batch": 4,
        "num_workers": 3,
        "seed": 0,
        "image_size": 8,
        "in_channels": 1,
        "crop": "c",
    },
    "trainer": {"max_steps": 10, "gradient_clip_val": 1.0},
}


def settings(**model):
    return fixed_settings({**CONFIG, "model": {**CONFIG["model"], **model}}, data="a" * 64, tokenizer="b" * 64)


def test_what_decides_what_is_learned_is_kept_and_nothing_else():
    assert settings() == {
        "data": "a" * 64,
        "tokenizer": "b" * 64,
        "model.network.width": 8,
        "model.network.quantizer": {"name": "ema", "decay": 0.9},
        "model.learning_rate.peak": 0.1,
        "model.perceptual.network": {"name": "timm", "model": "m"},
        "model.perceptual.weight": 0.1,
        "model.adversarial": None,
        "model.betas": [0.9, 0.99],
        "data.image_size": 8,
        "data.in_channels": 1,
        "data.crop": "c",
        "data.global_batch": 4,
        "data.seed": 0,
        "data.shuffle_window": None,
        "trainer.gradient_clip_val": 1.0,
        "trainer.gradient_clip_algorithm": None,
    }


def test_how_a_run_is_executed_may_change():
    free = {"activation_checkpointing": "blocks", "compiled": "blocks", "adamw": "foreach", "accumulation": 3}
    assert settings(**free) == settings()


def test_changes_are_listed_by_key_and_hashes_are_short():
    other = {**settings(adversarial={"weight": 0.5}, betas=(0.9, 0.9)), "tokenizer": "c" * 64}
    assert changes(settings(), other, {}) == [
        "model.adversarial.weight None -> 0.5",
        "model.betas [0.9, 0.99] -> [0.9, 0.9]",
        "tokenizer bbbbbbbbbbbb -> cccccccccccc",
    ]
    assert changes(settings(), settings(), {}) == []


def test_a_key_that_is_younger_than_the_checkpoint_had_its_default():
    assert changes({}, {"model.new": 3}, {"model.new": 3}) == []
    assert changes({}, {"model.new": 4}, {"model.new": 3}) == ["model.new 3 -> 4"]
    assert changes({"model.old": 1}, {}, {}) == ["model.old 1 -> None"]
