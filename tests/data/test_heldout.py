"""Held-out documents: what is measured on them, and what is refused before anything is learned."""

import pytest
from tiny import base_with, recipe_tree, tiny_tokenizer, words, write_documents
from yarn_tune.data.heldout import check_heldout, heldout_excerpts, heldout_tokens
from yarn_tune.errors import UserError
from yarn_tune.recipe.loading import parse_recipe


def check(recipe, base, native):
    check_heldout(recipe.data, recipe.eval, base, native, recipe.rope.window)


def test_heldout_excerpts_take_documents_in_turn(tmp_path):
    base = base_with(tiny_tokenizer(), tmp_path / "base")
    recipe = parse_recipe(recipe_tree(tmp_path, tmp_path), [])
    excerpts = heldout_excerpts(recipe.data, base, 256, 3)
    assert [label for label, _ in excerpts] == ["document 1, part 1", "document 2, part 1", "document 1, part 2"]
    assert all(ids.shape == (256,) for _, ids in excerpts)
    with pytest.raises(UserError, match="longest of 2 documents has 601 tokens"):
        heldout_excerpts(recipe.data, base, 1000, 3)


def test_heldout_documents_are_refused_where_compare_would_refuse_them(tmp_path):
    base = base_with(tiny_tokenizer(), tmp_path / "base")
    tree = recipe_tree(tmp_path, tmp_path)
    for settings, longest in (
        ([], 256),
        (["rope.window=601"], 601),
        (["rope.window=4096", "eval.lengths=[64,601]"], 601),
    ):
        recipe = parse_recipe(tree, settings)
        check(recipe, base, 64)
        assert heldout_excerpts(recipe.data, base, longest, 1)
    message = r"data.heldout: the longest of 2 documents has 601 tokens, fewer than the 602 .* or lower eval.lengths"
    for settings in (["rope.window=602"], ["rope.window=4096", "eval.lengths=[64,602]"]):
        with pytest.raises(UserError, match=message):
            check(parse_recipe(tree, settings), base, 64)
    with pytest.raises(UserError, match="data.heldout: no file matches 'nowhere.txt'"):
        check(parse_recipe(tree, ["data.heldout=[nowhere.txt]"]), base, 64)
    check(parse_recipe(tree, ["data.heldout=['hub:org/not-here', nowhere.txt]"]), base, 64)


def test_documents_unlike_the_training_text_are_read_and_checked_too(tmp_path):
    base = base_with(tiny_tokenizer(), tmp_path / "base")
    write_documents(tmp_path / "unlike.jsonl", [300], seed=70)
    recipe = parse_recipe(recipe_tree(tmp_path, tmp_path), [f"data.heldout_unlike=[{tmp_path}/unlike.jsonl]"])
    check(recipe, base, 64)
    (label, ids), *more = heldout_excerpts(recipe.data, base, 256, 4, "data.heldout_unlike")
    assert (label, more) == ("document 1, part 1", [])
    assert ids.tolist() == tiny_tokenizer()(words(300, 70))["input_ids"][:256]
    with pytest.raises(UserError, match=r"data.heldout_unlike: the longest of 1 documents has 301 tokens"):
        check(parse_recipe(recipe.to_dict(), ["eval.lengths=[302]", "rope.window=512"]), base, 64)
    with pytest.raises(UserError, match="data.heldout_unlike: no file matches 'nowhere.txt'"):
        check(parse_recipe(recipe.to_dict(), ["data.heldout_unlike=[nowhere.txt]"]), base, 64)


def test_prompts_that_cannot_be_made_are_refused_too(tmp_path):
    """`recipe_tree` holds out 900 tokens of prose in two documents."""
    base = base_with(tiny_tokenizer(), tmp_path / "base")
    tree = recipe_tree(tmp_path, tmp_path)
    for lengths, problem in (
        ("[40,4000]", r"^eval.retrieval: retrieval filler: 900 tokens of prose, 39\d\d needed; name longer documents"),
        ("[8,200]", r"^eval.retrieval: retrieval length: 8 tokens hold no prompt with 1 needle"),
        ("[60,200]", None),
    ):
        settings = ["rope.window=4096", "eval.lengths=[64]", f"eval.retrieval={{lengths: {lengths}}}"]
        recipe = parse_recipe(tree, settings)
        if problem is None:
            check(recipe, base, 64)
        else:
            with pytest.raises(UserError, match=problem):
                check(recipe, base, 64)
    for native in (64, 16):  # the native window's own prompt must hold a question
        recipe = parse_recipe(tree, ["rope.window=256", "eval.retrieval={}"])
        if native == 64:
            check(recipe, base, native)
        else:
            with pytest.raises(UserError, match=r"eval.retrieval: retrieval length: 0 tokens"):
                check(recipe, base, native)


def test_prose_to_hide_needles_in_has_no_special_tokens(tmp_path):
    base = base_with(tiny_tokenizer(), tmp_path / "base")
    recipe = parse_recipe(recipe_tree(tmp_path, tmp_path), [])
    texts = [words(n, 50 + i) for i, n in enumerate((600, 300))]
    expected = [token for text in texts for token in tiny_tokenizer()(text)["input_ids"]]
    assert heldout_tokens(recipe.data, base).tolist() == expected
