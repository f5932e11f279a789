import pytest

from maskgit_pl.files import parse_yaml, read_yaml, set_key


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("entry", "others"),
    [
        ("license: apache-2.0\n", "a: 1\n"),
        ("license: >\n  apache\n\n  more\n", "a: 1\n"),
        ("license: |-\n  apache\n", "# a comment\na: 1\n"),
        ("license:\n- apache\n- other\n", "a: no\nb: 1e-3 # a comment\n"),
        ("license:\n  - apache\n", "a: {b: [1,\n  2]}\n"),
        ("license: [apache,\n  other] # both\n", "a: .nan\n"),
        ("license:\n", "a: 2020-01-01\n"),
        ('"license": apache\n', "a: 'x'\n"),
        ("'license'  : apache\n  more\n", "a: 1\n"),
        ("? license\n: apache\n", "a: 1\n"),
        ("license:\n  name: apache\n", "a:\n- license: b\n"),
        ("license: a\nlicense: b\n", "a: 1\n"),
        ("", "a: license\n"),
        ("license: !!str a\n", ""),
        ("", ""),
    ],
)
def test_a_key_is_set_and_other_lines_stay_as_they_are(entry, others):
    for text in (others + entry, entry + others):
        assert set_key(text, "license", "mit") == f"license: mit\n{others}"
    if entry and others:
        indented = "".join(f"  {line}\n" if line else "\n" for line in (entry + others).split("\n")[:-1])
        content = parse_yaml(set_key(indented, "license", "mit"))
        assert repr(content) == repr({"license": "mit", **parse_yaml(others)})


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["{license: b, a: 1}\n", "- license\n", "license\n", "a: &x 1\nlicense: *x\n", "a: b: c\n", "? [a]\n: b\n",
             "a: 1\u2028license: b\n", "a: 1\n---\nlicense: b\n", "a: " + "[" * 5000]
)  # fmt: skip
def test_a_key_is_not_set_in_a_text_that_would_change_otherwise(text):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        set_key(text, "license", "mit")


@pytest.mark.parametrize("word", ["no", "null", "1.0"])
def test_a_key_is_not_set_to_a_word_that_is_read_as_something_else(word):
    with pytest.raises(ValueError, match="so that license can be set"):
        set_key("", "license", word)


@pytest.mark.parametrize(
    ("text", "value"),
    [("010", 10), ("-07", -7), ("0x1F", 31), ("0b11", 3), ("1_000", 1000), ("12:30", "12:30"), ("1:30.5", "1:30.5"),
     ("1e-3", 0.001), ("1.5", 1.5), ("+5", 5)],
)  # fmt: skip
def test_numbers_are_those_of_yaml_1_2(text, value):
    assert repr(parse_yaml(text)) == repr(value)
