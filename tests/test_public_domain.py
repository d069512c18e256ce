"""The documents of data/: the table that splits them keeps authors and genres apart; the demo's excerpts are usable."""

import gzip
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from yarn_tune.models.loading import load_tokenizer

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "data/public-domain"
JUNK = re.compile(r"Project Gutenberg|\[Illustration|\ufffd|</?(?:p|div|span|td|tr)\b|&(?:amp|lt|gt|nbsp);|\n{4,}")


def records(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_public_domain", FOLDER / "prepare.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_no_author_and_no_genre_of_train_is_in_heldout_unlike(prepare):
    near = [shelf for shelf in prepare.SHELVES if shelf.train or shelf.validation or shelf.like]
    unlike = [shelf for shelf in prepare.SHELVES if shelf.unlike]
    assert not {shelf.author for shelf in near} & {shelf.author for shelf in unlike}
    assert not {shelf.genre for shelf in near} & {shelf.genre for shelf in unlike}
    for kind in ("prose", "technical"):
        assert sum(len(shelf.unlike) for shelf in unlike if shelf.kind == kind) >= 2
        assert len({shelf.author for shelf in near if shelf.train and shelf.kind == kind}) >= 5


def test_heldout_like_and_validation_are_of_authors_of_train(prepare):
    taught = {shelf.author for shelf in prepare.SHELVES if shelf.train}
    assert {shelf.author for shelf in prepare.SHELVES if shelf.like or shelf.validation} <= taught


def test_no_document_is_in_two_splits(prepare):
    titles = [title for shelf in prepare.SHELVES for split in prepare.SPLITS for title in getattr(shelf, split)]
    assert len(set(titles)) == len(titles)
    stems = [title[:-1] for title in titles if title.endswith("*")]
    assert not [title for title in titles for stem in stems if title.startswith(stem) and title != f"{stem}*"]


def test_what_the_demo_model_has_seen_is_not_held_out(prepare):
    kept = {title for shelf in prepare.SHELVES for title in (*shelf.train, *shelf.validation)}
    away = {title for shelf in prepare.SHELVES for title in (*shelf.like, *shelf.unlike)}
    assert set(prepare.SEEN) <= kept
    assert not set(prepare.SEEN) & away
    assert set(prepare.TUNE) <= kept
    assert set(prepare.HELDOUT) <= away


def test_the_readme_has_every_document(prepare):
    said = (FOLDER / "README.md").read_text()
    for shelf in prepare.SHELVES:
        assert f"| {shelf.author} | {shelf.genre} | {shelf.kind} | {shelf.licence} |" in said
        for split in prepare.SPLITS:
            assert not [title for title in getattr(shelf, split) if title not in said and not title.endswith("*")]


def test_the_sample_of_unlike_text(prepare):
    path = ROOT / "data/sample/unlike.jsonl.gz"
    assert path.stat().st_size < 150_000
    documents = records(path)
    sources = [document["source"].split(" (its first ")[0] for document in documents]
    assert tuple(sources) == prepare.SAMPLE_UNLIKE
    shelves = {title: shelf for shelf in prepare.SHELVES for title in shelf.unlike}
    assert {shelves[source].licence for source in sources} == {prepare.FREE}
    assert [shelves[source].kind for source in sources] == ["prose", "technical"] * 2
    tokenizer = load_tokenizer(str(ROOT / "data/tiny-base"))
    for document in documents:
        assert not JUNK.search(document["text"])
        assert len(tokenizer(document["text"])["input_ids"]) >= 3 * 2048


@pytest.mark.skipif(
    not (FOLDER / "heldout-unlike.jsonl.gz").exists(), reason="data/public-domain/prepare.py has not run"
)
def test_the_files_are_as_the_table_says(prepare):
    files = {split: records(FOLDER / name) for split, name in prepare.SPLITS.items()}
    for split, documents in files.items():
        named = [shelf for shelf in prepare.SHELVES if getattr(shelf, split)]
        assert {document["author"] for document in documents} == {shelf.author for shelf in named}
        assert all(len(document["text"]) <= prepare.LONGEST for document in documents)
    sources = [document["source"] for documents in files.values() for document in documents]
    assert len(set(sources)) == len(sources)
    assert [document["kind"] for split in ("like", "unlike") for document in files[split][:4]] == 2 * [
        "prose",
        "technical",
        "prose",
        "technical",
    ]
    authors = {split: {document["author"] for document in documents} for split, documents in files.items()}
    assert not authors["unlike"] & (authors["train"] | authors["validation"])
    assert all(len(document["text"]) > 150_000 for split in ("like", "unlike") for document in files[split])
    assert not [
        document["source"]
        for document in files["unlike"]
        if re.search(r"(?i)gutenberg (ebook|license)", document["text"])
    ]
