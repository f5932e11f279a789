from maskgit_pl.runs.layers import merge, remove_key, value_at


def test_later_files_win_key_by_key_and_a_named_thing_is_replaced():
    trees = [
        {"a": {"x": 1, "y": 2}, "spec": {"name": "pow", "exponent": 3}, "word": "cosine", "null": None},
        {"a": {"x": 5}, "spec": {"name": "log"}, "word": {"rate": 2}, "null": {"z": 1}},
        {"spec": {"base": 2}},
    ]
    assert merge(trees) == {
        "a": {"x": 5, "y": 2},
        "spec": {"name": "log", "base": 2},
        "word": {"name": "cosine", "rate": 2},
        "null": {"z": 1},
    }
    assert trees[0]["spec"] == {"name": "pow", "exponent": 3}


def test_a_dotted_key_is_found_and_taken_out_in_place():
    tree = {"a": {"b": {"c": 1, "d": None}}, "word": "x"}
    assert [value_at(tree, key) for key in ("a.b.c", "a.b.d", "a.x.c", "word.x")] == [1, None, None, None]
    assert [remove_key(tree, key) for key in ("a.b.c", "a.b.c", "a.b.d", "word.x", "word")] == [
        True, False, True, False, True,
    ]  # fmt: skip
    assert tree == {"a": {"b": {}}}
