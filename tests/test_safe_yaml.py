import pytest

from maskgit_pl.safe_yaml import read_yaml


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a: &x [1, 1]\nb: [*x, *x]", "aliases are not allowed"),
        ("model: {mask_schedule: cosine}\nmodel: {}", "appears twice"),
        ("model:\n\tmask_schedule: cosine", "recipe.yaml"),
        ("- 1\n- 2", "must be a mapping, got"),
        ("model: {class_path: os.system}", "model.class_path cannot be set"),
        ("trainer: {callbacks: [{class_path: a.B}]}", "trainer.callbacks.class_path cannot be set"),
        ("1: 2", "the key 1 is not a string"),
        ("model: {a: .nan}", "model.a must be finite"),
        ("model: {a: 2020-01-01}", "model.a must be a number, a word, a list or a mapping"),
        ("a: " + "[" * 5000, "nested too deep"),
        ("a: " + "[" * 30 + "]" * 30, "nested too deep"),
        ("a: " + "9" * 5000, "recipe.yaml"),
        ("a: b: c", r"line 1, column 5: mapping values are not allowed here"),
        ("model: !!python/object/apply:os.system [echo]", "recipe.yaml"),
        ("a: " + "x" * 200_001, "at most 200000 bytes"),
    ],
)
def test_an_unsafe_recipe_is_refused_by_name(tmp_path, text, rule):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=rule) as caught:
        read_yaml(file)
    assert "\n" not in str(caught.value)
