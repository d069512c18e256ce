"""Documents of every kind, and every way a file can be bad."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save
from tiny import as_lists, base_with, recipe_tree, rows_of, tiny_tokenizer, words, write_documents
from tokenizers.processors import TemplateProcessing
from yarn_tune.data import documents
from yarn_tune.data.heldout import heldout_excerpts
from yarn_tune.data.rows import RowRequest, build_rows_apart
from yarn_tune.data.tokenization import Encoder
from yarn_tune.errors import UserError
from yarn_tune.models import checkpoint_files
from yarn_tune.recipe import missing_files
from yarn_tune.recipe.loading import parse_recipe


@pytest.fixture
def base(tmp_path):
    return base_with(tiny_tokenizer(), tmp_path / "base")


def recipe_with(tmp_path, files, *overrides, **keys):
    tree = recipe_tree(tmp_path, tmp_path)
    tree["data"] |= {"train": [str(file) for file in files], **keys}
    return parse_recipe(tree, list(overrides))


def all_tokens(rows):
    return sorted(token for row in rows.rows for token in row.input_ids)


def test_every_kind_of_file_gives_the_same_rows(tmp_path, base):
    texts = [words(300, 1), words(400, 2)]
    records = [{"text": text} for text in texts]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    for number, text in enumerate(texts):
        (tmp_path / f"t{number}.txt").write_text(text)
    ids = [tiny_tokenizer()(text)["input_ids"] for text in texts]
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps({"input_ids": i}) + "\n" for i in ids))
    expected = None
    for files in (["a.jsonl"], ["a.jsonl.gz"], ["a.parquet"], ["t*.txt"], ["ids.jsonl"]):
        recipe = recipe_with(tmp_path, [tmp_path / file for file in files], "data.rows=2")
        found = as_lists(rows_of(recipe, base).rows)
        expected = expected or found
        assert found == expected
    assert len(expected) == 2


def test_the_second_reading_comes_from_the_cache(tmp_path, base, monkeypatch):
    recipe = recipe_with(tmp_path, [write_documents(tmp_path / "a.jsonl", [700])])
    before = as_lists(rows_of(recipe, base).rows)
    monkeypatch.setattr("yarn_tune.data.tokenization.Encoder.encode", None)
    assert as_lists(rows_of(recipe, base).rows) == before
    write_documents(tmp_path / "a.jsonl", [700], seed=9)
    with pytest.raises(TypeError):
        rows_of(recipe, base)


def test_a_damaged_cache_is_made_again(tmp_path, base, monkeypatch):
    monkeypatch.setenv("YARN_TUNE_CACHE", str(tmp_path / "cache"))
    recipe = recipe_with(tmp_path, [write_documents(tmp_path / "a.jsonl", [700])])
    before = as_lists(rows_of(recipe, base).rows)
    paths = list((tmp_path / "cache" / "tokens").glob("*.safetensors"))
    assert len(paths) == 2, "what the first pass found, and the tokens"
    for path in paths:
        whole = path.read_bytes()
        for damaged in (b"", whole[:50], whole[:-1], save({"other": torch.ones(1)})):
            path.write_bytes(damaged)
            assert as_lists(rows_of(recipe, base).rows) == before
            assert len(path.read_bytes()) == len(whole)


def test_a_cache_that_cannot_be_written_costs_the_cache_alone(tmp_path, base, monkeypatch, capsys):
    recipe = recipe_with(tmp_path, [write_documents(tmp_path / "a.jsonl", [700])])
    before = as_lists(rows_of(recipe, base).rows)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("YARN_TUNE_CACHE", str(tmp_path / "file"))
    assert as_lists(rows_of(recipe, base).rows) == before
    assert "tokens are not kept" in capsys.readouterr().err

    def full_disk(path, content):
        raise UserError("No space left on device")

    monkeypatch.setenv("YARN_TUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("yarn_tune.data.documents.write_atomically", full_disk)
    assert as_lists(rows_of(recipe, base).rows) == before
    assert "No space left" in capsys.readouterr().err
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_batches_cover_all_rows_before_any_comes_again(tmp_path, base):
    recipe = recipe_with(tmp_path, [write_documents(tmp_path / "a.jsonl", [256 * 7])])
    rows = rows_of(recipe, base)
    assert len(rows.rows) == 7
    seen = as_lists([row for step in range(7) for row in rows.batch(step, 2, seed=3)])
    first, second = seen[:7], seen[7:]
    assert sorted(first) == sorted(second) == sorted(as_lists(rows.rows))
    assert first != second
    assert as_lists(rows.batch(5, 2, seed=3)) == seen[10:12]
    assert as_lists(rows.batch(0, 2, seed=4)) != seen[:2] or as_lists(rows.batch(1, 2, seed=4)) != seen[2:4]


def test_single_document_rows_come_first_and_short_ones_are_joined(tmp_path, base):
    recipe = recipe_with(tmp_path, [write_documents(tmp_path / "a.jsonl", [50] * 20 + [600])], "data.rows=2")
    rows = rows_of(recipe, base)
    assert rows.packed.whole_rows == 2
    assert rows.available > 2
    assert all(0 not in row.input_ids for row in rows.rows), "no document ends inside a row of one document"


def beginning_tokenizer():
    """`tiny_tokenizer` that puts `<begin>` before every text."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", begin)]
    )
    return tokenizer, begin


@pytest.mark.parametrize("packing", ["long", "concat"])
def test_rows_and_excerpts_begin_as_the_tokenizer_lets_a_text_begin(tmp_path, base, packing):
    """One token gives way at every position zero, and is no target; without such a tokenizer nothing changes."""
    path = write_documents(tmp_path / "a.jsonl", [700, 300, 90, 40])
    recipe = recipe_with(tmp_path, [path], f"data.packing={packing}")
    tokenizer, begin = beginning_tokenizer()
    beginning = base_with(tokenizer, tmp_path / "beginning")
    plain, begun = rows_of(recipe, base), rows_of(recipe, beginning)
    assert (plain.prefix, begun.prefix) == ((), (begin,))
    for one, other in zip(plain.rows, begun.rows, strict=True):
        starts = [place == 0 for place in one.position_ids]
        assert other.input_ids.tolist() == [begin if s else t for s, t in zip(starts, one.input_ids, strict=True)]
        assert other.labels.tolist() == one.labels.tolist()
        assert begin not in other.labels
        for number, piece in enumerate(other.pieces(64, (begin,))):
            assert piece.input_ids.tolist() == [begin, *other.input_ids.tolist()[64 * number + 1 : 64 * (number + 1)]]
            assert begin not in piece.labels
    excerpts = [heldout_excerpts(recipe.data, each, 256, 3) for each in (base, beginning)]
    for (_, one), (_, other) in zip(*excerpts, strict=True):
        assert other.tolist() == [begin, *one.tolist()[1:]]


def test_a_dataset_is_streamed_until_enough(tmp_path, base, monkeypatch):
    """The hub's path through `datasets`, on a dataset folder, so that it needs no network."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_documents(folder / "train.jsonl", [300] * 50)
    read: list[str] = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda *a: read.append("x") or encode(*a))
    recipe = recipe_with(tmp_path, [], "data.rows=3", f"data.train=[hub:{folder}:train]")
    rows = rows_of(recipe, base)
    assert len(rows.rows) == 3
    assert len(read) < 50
    missing = recipe_with(tmp_path, [], "data.train=[hub:org/not-here]")
    with pytest.raises(UserError, match="could not be read from the hub"):
        rows_of(missing, base)


def test_every_name_behind_a_dataset_is_read(tmp_path, base):
    folders = [tmp_path / name for name in ("one", "two")]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        write_documents(folder / "train.jsonl", [300] * 50, seed=100 * seed)
    mine = write_documents(tmp_path / "mine.jsonl", [300], seed=900)
    names = ", ".join([*(f"hub:{folder}" for folder in folders), str(mine)])
    recipe = recipe_with(tmp_path, [], "data.rows=3", f"data.train=[{names}]")
    packed = rows_of(recipe, base).packed
    # Twice what the rows take of each dataset, in documents of 301 tokens, and the file.
    assert packed.documents == 2 * 6 + 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "every document is empty"),
        ("blank.txt", b"  \n ", "every document is empty"),
        ("short.txt", b"w1 w2 w3", "do not fill one row of 256"),
        ("latin.txt", b"caf\xe9 w1", "line 1: not valid UTF-8 at byte 3 (0xE9)"),
        ("latin.jsonl", b'{"text": "caf\xe9"}\n', "not valid UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("list.jsonl", b"[1, 2]\n", 'line 1: must be an object such as {"text": ...}; found a list'),
        (
            "field.jsonl",
            b'{"body": "a"}\n',
            "line 1: no text under 'text' (found body); name the field in data.text_key",
        ),
        ("torn.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:40], "is the file complete?"),
        ("torn.parquet", b"PAR1 and then nothing", "is the file complete?"),
        ("wrong.csv", b"a,b", "unknown kind of file; known: .txt, .md"),
        (
            "ids.jsonl",
            b'{"input_ids": [5, 9999]}\n',
            "line 1: input_ids reach 9999, outside the base's vocabulary of 128",
        ),
    ],
)
def test_bad_files_give_one_clear_message(tmp_path, base, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        rows_of(recipe_with(tmp_path, [path]), base)
    assert message in str(caught.value)
    assert "data.train" in str(caught.value)


def test_a_truncated_parquet_file(tmp_path, base):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": words(500, 1)}]), path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match="is the file complete"):
        rows_of(recipe_with(tmp_path, [path]), base)


def test_missing_files_name_the_remedy(tmp_path, base):
    recipe = recipe_with(tmp_path, ["nowhere/*.txt"])
    assert missing_files([*recipe.data.train, *recipe.data.heldout]) == ["nowhere/*.txt"]
    with pytest.raises(
        UserError,
        match="no file matches 'nowhere/\\*.txt' in the working folder .* or beside the recipe; check the path",
    ):
        rows_of(recipe, base)
    recipe = recipe_with(tmp_path, ["nowhere/*.txt"], prepare="make documents")
    with pytest.raises(UserError, match="run `make documents` first"):
        rows_of(recipe, base)


def test_files_are_trained_on_or_held_out_whatever_their_names(tmp_path, base):
    write_documents(tmp_path / "a.jsonl", [700])
    write_documents(tmp_path / "b.jsonl", [700], seed=9)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "b.jsonl")
    for train, heldout in (("*.jsonl", "b.jsonl"), ("link.jsonl", "b.jsonl"), ("b.jsonl", "../*/b.jsonl")):
        recipe = recipe_with(tmp_path, [tmp_path / train], heldout=[str(tmp_path / heldout)])
        with pytest.raises(UserError, match=r"data.heldout: \S*/b.jsonl is among the files of data.train too"):
            rows_of(recipe, base)
    apart = recipe_with(tmp_path, [tmp_path / "a.jsonl"], heldout=[str(tmp_path / "b.jsonl")])
    rows_of(apart, base)
    unlike = parse_recipe(apart.to_dict(), [f"data.heldout_unlike=[{tmp_path}/../*/a.jsonl]"])
    with pytest.raises(UserError, match=r"data.heldout_unlike: \S*/a.jsonl is among the files of data.train too"):
        rows_of(unlike, base)


def test_a_document_held_back_without_which_no_row_is_full_is_explained(tmp_path):
    tree = recipe_tree(tmp_path / "base", tmp_path)
    tree["data"]["train"] = [str(write_documents(tmp_path / "two.jsonl", [700, 30]))]
    data = parse_recipe(tree, []).data
    with pytest.raises(UserError, match="do not fill one row of 256.*train.decide holds back 1 of the 2 documents"):
        build_rows_apart(data, base_with(tiny_tokenizer(), tmp_path / "base"), RowRequest(256, 4, 0), 16)


def test_documents_are_hashed_once_and_again_when_they_change(tmp_path, base, monkeypatch):
    """Hashing a large corpus for every command would take minutes."""
    recipe = recipe_with(tmp_path, [write_documents(tmp_path / "a.jsonl", [700])])
    first = all_tokens(rows_of(recipe, base))
    hashed = []
    digest = checkpoint_files.file_digest
    monkeypatch.setattr(checkpoint_files, "file_digest", lambda path: hashed.append(path) or digest(path))
    documents._digest.cache_clear()  # as another process
    assert all_tokens(rows_of(recipe, base)) == first
    assert not [path for path in hashed if path.name == "a.jsonl"]
    write_documents(tmp_path / "a.jsonl", [700], seed=9)
    documents._digest.cache_clear()
    assert all_tokens(rows_of(recipe, base)) != first
