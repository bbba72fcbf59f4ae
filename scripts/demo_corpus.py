"""The corpus of the demo model: plain English prose out of permissively licensed Python packages.

A language model of a few million parameters can learn one thing well. Here that thing is running
English sentences, so the corpus is not "everything in the packages" but only paragraphs that a
person would read as prose. The road of a page:

    package (pip download, pinned) -> page (a module, a documentation file, a service description)
      -> texts (docstrings, the file itself, description fields) -> paragraphs without markup
      -> those that are prose -> those not seen before -> one document per text

`is_prose` is the filter that matters: at least 8 words, a capital letter first, a full stop last,
most words plain and lower case, some of them function words, no code. A paragraph is "seen before"
when its letters were met already, or when half of a sample of its runs of 6 words were (a quarter
of all runs, chosen by their hash, so that the sample is the same wherever the run appears).

Whole pages are held out, chosen by the hash of their name, and are read first: a training paragraph
that resembles a held-out one is dropped, not the other way round.

The same archives and the same Python give the same bytes, whatever the order of folders and the seed
of hashes. A pin may still stand for another archive elsewhere (a wheel has one per platform), so
sources.json names the archive that was read and its SHA-256, and a digest of every text written.

    python scripts/demo_corpus.py OUT

writes train.txt, held_out.txt, calibration.txt (a sample of train.txt), NOTICE and sources.json.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import html
import inspect
import json
import platform
import pydoc_data.topics
import re
import subprocess
import sys
import sysconfig
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from zlib import crc32

SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class Settings:
    """Sizes in bytes of clean text."""

    cap: int = 4_000_000  # per package, so that no one voice dominates
    held_out: int = 200_000
    held_out_page: int = 8_000  # at most this much of any held-out page
    calibration: int = 300_000
    smallest_document: int = 120


@dataclass(frozen=True)
class Source:
    name: str
    version: str
    licence: str
    kind: str  # "wheel", "sdist" or "python"


@dataclass(frozen=True)
class Page:
    source: Source
    path: str
    texts: list[str] = field(repr=False)  # each becomes a document


# Wheels give docstrings; source archives give their documentation folders too.
WHEELS = """
numpy 2.4.6 BSD-3-Clause
scipy 1.17.1 BSD-3-Clause
scikit-learn 1.9.1 BSD-3-Clause
pandas 3.1.1 BSD-3-Clause
statsmodels 0.15.0 BSD-3-Clause
matplotlib 3.11.2 Matplotlib (PSF-like)
nltk 3.10.4 Apache-2.0
networkx 3.6.1 BSD-3-Clause
botocore 1.44.5 Apache-2.0
keras 3.15.1 Apache-2.0
tensorflow-probability 0.25.0 Apache-2.0
jax 0.10.2 Apache-2.0
flax 0.12.8 Apache-2.0
optax 0.2.8 Apache-2.0
transformers 5.23.0 Apache-2.0
diffusers 0.42.1 Apache-2.0
accelerate 1.15.0 Apache-2.0
datasets 5.2.0 Apache-2.0
scikit-image 0.26.0 BSD-3-Clause
pymc 5.28.5 Apache-2.0
ray 2.60.0 Apache-2.0
apache-beam 2.77.0 Apache-2.0
mlflow 3.18.0 Apache-2.0
lightning 2.6.6 Apache-2.0
langchain-core 1.8.1 MIT
pulumi-aws 7.51.1 Apache-2.0
azure-mgmt-compute 39.0.0 MIT
google-api-python-client 2.202.0 Apache-2.0
oci 2.189.0 UPL-1.0 or Apache-2.0
pulumi-gcp 10.2.0 Apache-2.0
kubernetes 37.0.2 Apache-2.0
bokeh 3.9.2 BSD-3-Clause
dask 2026.8.0 BSD-3-Clause
distributed 2026.8.0 BSD-3-Clause
"""
SDISTS = """
Django 5.2.19 BSD-3-Clause
SQLAlchemy 2.1.9 MIT
sympy 1.14.0 BSD-3-Clause
Twisted 26.10.0 MIT
aiohttp 3.14.5 Apache-2.0 and MIT
celery 5.7.0 BSD-3-Clause
cinder 29.0.0 Apache-2.0
click 8.5.1 BSD-3-Clause
Cython 3.3.1 Apache-2.0
designate 23.0.0 Apache-2.0
djangorestframework 3.18.3 BSD-3-Clause
Flask 3.1.3 BSD-3-Clause
glance 33.0.0 Apache-2.0
ipython 9.18.1 BSD-3-Clause
ironic 39.0.0 Apache-2.0
Jinja2 3.1.6 BSD-3-Clause
jupyter-server 2.21.1 BSD-3-Clause
keystone 30.0.0 Apache-2.0
luigi 3.8.1 Apache-2.0
manila 23.0.1 Apache-2.0
neutron 29.0.0 Apache-2.0
nova 34.0.0 Apache-2.0
octavia 19.0.0 Apache-2.0
pytest 9.2.0 MIT
salt 3008.5 Apache-2.0
Scrapy 2.19.0 BSD-3-Clause
setuptools 84.2.1 MIT
Sphinx 9.0.4 BSD-2-Clause
swift 2.38.3 Apache-2.0
tornado 6.6.1 Apache-2.0
trio 0.35.0 MIT or Apache-2.0
Werkzeug 3.1.9 BSD-3-Clause
xarray 2026.9.0 Apache-2.0
"""
# Whose licence file stands in NOTICE for all of its kind.
LICENCE_TEXTS = {
    "Apache-2.0": "keras",
    "BSD-3-Clause": "Django",
    "BSD-2-Clause": "Sphinx",
    "MIT": "SQLAlchemy",
}


def table() -> list[Source]:
    """The sources, Python itself first."""
    rows = [Source("Python", platform.python_version(), "PSF-2.0", "python")]
    for kind, text in (("wheel", WHEELS), ("sdist", SDISTS)):
        for line in text.strip().splitlines():
            name, version, licence = line.split(" ", 2)
            rows.append(Source(name, version, licence, kind))
    return rows


# ---- getting the packages ----------------------------------------------------------------------


def download(source: Source, folder: Path) -> Path:
    """The archive of a pinned package, fetched once."""
    normal = re.sub(r"[-_.]+", "[-_.]", source.name.lower())
    suffix = r".*\.whl" if source.kind == "wheel" else r"\.(tar\.gz|zip)"
    pattern = re.compile(rf"{normal}-{re.escape(source.version)}{suffix}$")
    for _ in range(2):
        for path in sorted(folder.glob("*")):
            if pattern.match(path.name.lower()):
                return path
        only = ["--only-binary", ":all:"] if source.kind == "wheel" else ["--no-binary", ":all:"]
        pin = f"{source.name}=={source.version}"
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *only, "-d", str(folder)]
        subprocess.run([*pip, pin], check=True)
    raise FileNotFoundError(f"pip fetched {pin} into {folder}, but no file there has its name")


def members(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """(path inside, contents) of the wanted files of a wheel or source archive."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as z:
            for name in filter(wanted, z.namelist()):
                yield name, z.read(name)
    else:
        with tarfile.open(archive) as t:
            for member in t:
                name = member.name.partition("/")[2]
                if member.isfile() and wanted(name) and (stream := t.extractfile(member)):
                    yield name, stream.read()


# ---- pages and their texts ---------------------------------------------------------------------

SKIP = re.compile(
    r"(^|/)(tests?|testing|_?vendor(ed)?|_vendor|third_party|thirdparty|externals?|locale|node_modules"
    r"|authors|changelogs?|changes|history|whatsnew|release_?notes|releasenotes|news|licen[cs]es?)(/|\.|$)"
    r"|(^|/)(test_|changelog|changes|release|migration_)[^/]*$",
    re.IGNORECASE,
)
BLOCK_TAG = re.compile(r"</?(p|li|ul|ol|note|important|dl|dt|dd|br)\b[^>]*>")
SERVICE = re.compile(r"service-2\.json(\.gz)?$|discovery_cache/documents/.*\.json$")


def docstrings(code: str) -> list[str]:
    """Every docstring of a module, in order. The code is parsed, never run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in found if text]


def descriptions(node: object) -> Iterator[str]:
    """Every description in a service's JSON, as plain text."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("documentation", "description") and isinstance(value, str):
                blocks = BLOCK_TAG.sub("\n\n", value)
                yield html.unescape(re.sub(r"<[^>]*>", "", blocks))
            else:
                yield from descriptions(value)


def may_hold_prose(path: str) -> bool:
    pure = PurePosixPath(path)
    in_docs = any(part.lower() in ("doc", "docs") for part in pure.parts)
    kinds = (".py", ".rst", ".md", ".txt") if in_docs else (".py", ".rst", ".md")
    return not SKIP.search(path) and (pure.suffix in kinds or bool(SERVICE.search(path)))


def texts_of(path: str, content: bytes) -> list[str]:
    """The texts of one file."""
    pure = PurePosixPath(path)
    if SERVICE.search(path):
        raw = gzip.decompress(content) if pure.suffix == ".gz" else content
        return list(descriptions(json.loads(raw)))
    text = content.decode("utf-8", errors="replace")
    if pure.suffix == ".py":
        return docstrings(text)
    return [inspect.cleandoc(re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))]


def package_pages(source: Source, archive: Path) -> Iterator[Page]:
    for path, content in members(archive, may_hold_prose):
        if texts := texts_of(path, content):
            yield Page(source, path, texts)


def python_pages(source: Source) -> Iterator[Page]:
    """The language reference that `help()` shows, and the docstrings of the standard library."""
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        yield Page(source, f"topics/{topic}", [text])
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root).as_posix()
        skipped = ("site-packages", "lib2to3", "idlelib", "pydoc_data", "config-")
        if inside.startswith(skipped) or not may_hold_prose(inside):
            continue
        if texts := texts_of(inside, path.read_bytes()):
            yield Page(source, inside, texts)


# ---- from text to paragraphs of prose ----------------------------------------------------------

MARKUP = (
    (re.compile(r"!\[[^\]]*\]\([^)]*\)"), ""),  # markdown image
    (re.compile(r"\[([^\]]+)\]\([^)]*\)"), r"\1"),  # markdown link
    (re.compile(r"\[([^\]]+)\]\[[^\]]*\]"), r"\1"),
    (
        re.compile(r"(:[\w+-]+)?:[\w+-]+:`+!?~?([^`<]+?)\s*<[^`>]*>`+"),
        r"\2",
    ),  # role, title <target>
    (re.compile(r"(:[\w+-]+)?:[\w+-]+:`+!?~([\w.]+\.)?([^`.]+)`+"), r"\3"),  # role, short name
    (re.compile(r"(:[\w+-]+)?:[\w+-]+:`+!?([^`]+)`+"), r"\2"),  # role
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`__?"), r"\1"),  # rst link
    (re.compile(r"`+([^`]+)`+_{0,2}"), r"\1"),  # literal
    (re.compile(r"\*{1,3}(\S(?:[^*]*\S)?)\*{1,3}"), r"\1"),  # emphasis
    (re.compile(r"(?<![\w])_(\w[^_]*\w)_(?![\w])"), r"\1"),
    (re.compile(r"\s*\[[#\w]{1,12}\]_"), ""),  # rst citation
    (re.compile(r"\b([A-Za-z]{3,})_(?=[\s.,;)])"), r"\1"),  # rst reference
    (re.compile(r"(?<=\w)\(\)"), ""),  # of a function's name
    (re.compile(r"<[a-zA-Z/][^>]*>"), ""),
    (re.compile(r"[‘’]"), "'"),
    (re.compile(r"[“”]"), '"'),
    (re.compile(r"\s+"), " "),
)
BULLET = re.compile(r"^(\s*)([-*+•]|\(?\d{1,2}[.)]|#\.)\s+")
RULE = re.compile(r"^\s*([=\-~^\"'`#*+.:_])\1{2,}\s*$")
WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")
FUNCTION_WORDS = (
    "the a an of to in is and for be this that it as with on are by or if not can from will which "
    "you we when has have was at but its they than should must may one all use used so only any no "
    "more"
)
COMMON = frozenset(FUNCTION_WORDS.split())
BOILERPLATE = re.compile(
    r"licen[cs]e|copyright|warrant|deprecated|auto-?generated|(?<!\w)(TODO|FIXME|XXX)(?!\w)|https?:|www\.",
    re.IGNORECASE,
)
SENTENCE = re.compile(r"[.?!][)\"]?$")
CODE = re.compile(r">>>|[{}|\\=@$^~<>#]|::|\w\(|\(\)|--|\.\.|__|`|\*|�|[^\x00-\x7f–—é…]")


def paragraphs(text: str) -> Iterator[str]:
    """Blocks of lines at one depth, joined; a blank line, bullet, rule or new depth ends one."""
    block: list[str] = []
    depth = 0
    for line in [*text.expandtabs().splitlines(), ""]:
        bullet = BULLET.match(line)
        indent = bullet.end() if bullet else len(line) - len(line.lstrip())
        if not line.strip() or bullet or RULE.match(line) or (block and indent != depth):
            short = len(block) < 2 and len("".join(block)) <= 40
            if not short and not RULE.match(line):  # a line that is underlined is a heading
                yield " ".join(block)
            block = []
        if line.strip() and not RULE.match(line):
            block.append(line[bullet.end() :] if bullet else line.strip())
            depth = indent


def clean(paragraph: str) -> str:
    for pattern, replacement in MARKUP:
        paragraph = pattern.sub(replacement, paragraph)
    return paragraph.strip()


def is_prose(paragraph: str) -> bool:
    """Whether a person would read this as running English."""
    tokens = paragraph.split()
    if not 8 <= len(tokens) <= 400 or not (paragraph[0].isupper() and SENTENCE.search(paragraph)):
        return False
    if CODE.search(paragraph) or BOILERPLATE.search(paragraph):
        return False
    words = [t.strip(".,;:?!()\"'") for t in tokens]
    plain = sum(bool(WORD.fullmatch(w)) for w in words)
    lower = sum(w.islower() and bool(WORD.fullmatch(w)) for w in words)
    common = sum(w.lower() in COMMON for w in words)
    n = len(tokens)
    if max(map(len, words)) > 24:
        return False
    return plain >= 0.9 * n and lower >= 0.75 * n and common >= 0.22 * n


class Seen:
    """Remembers paragraphs, exactly and nearly."""

    def __init__(self) -> None:
        self.exact: set[int] = set()
        self.runs: set[int] = set()

    def add(self, paragraph: str) -> bool:
        """True, and remembered, unless something like it was here before."""
        words = re.sub(r"[^a-z ]", "", paragraph.lower()).split()
        whole = digest(" ".join(words))
        runs = {crc32(" ".join(words[i : i + 6]).encode()) for i in range(len(words) - 5)}
        sample = {r for r in runs if r % 4 == 0}
        if whole in self.exact or len(sample & self.runs) * 2 > len(sample):
            return False
        self.exact.add(whole)
        self.runs |= sample
        return True


def digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def documents(page: Page, seen: Seen, settings: Settings) -> Iterator[str]:
    """One per text of the page: its fresh prose, neighbours together."""
    for text in page.texts:
        prose = (p for p in map(clean, paragraphs(text)) if is_prose(p))
        document = "\n\n".join(p for p in prose if seen.add(p))
        if len(document) >= settings.smallest_document:
            yield document


# ---- the corpus --------------------------------------------------------------------------------


Documents = dict[Source, list[str]]


def split(pages: list[Page], settings: Settings) -> tuple[Documents, Documents]:
    """(train, held out). The order is by hash, so that a cap samples all of a package."""
    seen = Seen()
    order = sorted(pages, key=lambda p: digest(f"{p.source.name}/{p.path}"))
    held: Documents = {}
    size = 0
    rest = iter(order)
    while size < settings.held_out:
        page = next(rest)
        found = list(documents(page, seen, settings))
        if sum(map(len, found)) > settings.held_out_page:
            found = found[: max(1, len(found) * settings.held_out_page // sum(map(len, found)))]
        if sum(map(len, found)) <= 2 * settings.held_out_page:
            held.setdefault(page.source, []).extend(found)
            size += sum(map(len, found))
    train: Documents = {}
    sizes: dict[Source, int] = {}
    for page in rest:
        if sizes.get(page.source, 0) >= settings.cap:
            continue
        found = list(documents(page, seen, settings))
        train.setdefault(page.source, []).extend(found)
        sizes[page.source] = sizes.get(page.source, 0) + sum(map(len, found))
    return train, held


def shuffled(groups: Iterable[list[str]]) -> list[str]:
    """All documents, in the order of their hashes."""
    return sorted((d for group in groups for d in group), key=digest)


def write(path: Path, found: Iterable[str]) -> None:
    write_text(path, f"\n{SEPARATOR}\n".join(found) + "\n")


def write_text(path: Path, text: str) -> None:
    """The same bytes on every system."""
    path.write_text(text, encoding="utf-8", newline="\n")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sample(found: list[str], size: int) -> list[str]:
    """Documents in a second order, until there are `size` characters of them."""
    chosen: list[str] = []
    for document in sorted(found, key=lambda d: digest("calibration" + d)):
        if size <= 0:
            break
        chosen.append(document)
        size -= len(document)
    return chosen


def licence_file(archive: Path) -> str:
    """What a package says about its licence: a file of that name at its root or in its metadata."""
    name = re.compile(
        r"^([^/]*\.dist-info/(licen[cs]es/)?)?(LICEN[CS]E|COPYING)[^/]*$", re.IGNORECASE
    )
    found = [
        (len(path), content) for path, content in members(archive, lambda p: bool(name.search(p)))
    ]
    return min(found)[1].decode("utf-8", errors="replace") if found else ""


def copyrights(text: str) -> list[str]:
    """The first three claims of a licence file."""
    lines = (line.strip(" #*\t") for line in text.splitlines())
    claim = re.compile(r"(Copyright|©)\s.*(\d{4}|\(c\)|©)", re.IGNORECASE)
    found = (line for line in lines if claim.match(line) and "yyyy" not in line)
    return list(dict.fromkeys(found))[:3]


NOTICE = """\
The model in this folder was trained on the documentation and docstrings of the packages below,
each under the licence named beside it; held_out.txt and calibration.txt are excerpts from them.
Markup was removed and only paragraphs of prose were kept."""
PSF = re.compile(r"PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2\n.*?(?=\n\n\n?BEOPEN)", re.DOTALL)


def notice(sources: list[Source], archives: dict[Source, Path]) -> str:
    """Who wrote the text, under which licence, and the licences themselves."""
    texts = {s.name: licence_file(archives[s]) for s in sources if s in archives}
    python = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    found = PSF.search(python.read_text(encoding="utf-8"))
    texts["Python"] = found.group(0) if found else ""
    blocks = [NOTICE]
    for source in sources:
        title = f"{source.name} {source.version}: {source.licence}"
        blocks.append("\n    ".join([title, *copyrights(texts[source.name])]))
    for licence, name in (LICENCE_TEXTS | {"PSF-2.0": "Python"}).items():
        blocks.append(f"{'-' * 20} {licence}, as in {name}\n\n{texts[name].strip()}")
    return "\n\n".join(blocks) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to write; packages are kept in OUT/packages")
    out = parser.parse_args().out
    packages = out / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    settings = Settings()
    sources = table()
    archives = {s: download(s, packages) for s in sources if s.kind != "python"}
    pages: list[Page] = []
    for source in sources:
        archive = archives.get(source)
        pages += package_pages(source, archive) if archive else python_pages(source)
    train, held = split(pages, settings)
    documents_ = shuffled(train.values())
    write(out / "train.txt", documents_)
    write(out / "held_out.txt", shuffled(held.values()))
    write(out / "calibration.txt", sample(documents_, settings.calibration))
    write_text(out / "NOTICE", notice(sources, archives))
    sizes: list[dict[str, Any]] = [
        {
            "name": s.name,
            "version": s.version,
            "licence": s.licence,
            "archive": archives[s].name if s in archives else "",
            "sha256": sha256(archives[s]) if s in archives else "",
            "train_bytes": sum(len(d.encode()) for d in train.get(s, [])),
            "held_out_bytes": sum(len(d.encode()) for d in held.get(s, [])),
        }
        for s in sources
    ]
    made = {n: sha256(out / n) for n in ("train.txt", "held_out.txt", "calibration.txt", "NOTICE")}
    write_text(out / "sources.json", json.dumps({"sources": sizes, "made": made}, indent=1) + "\n")
    for row in sizes:
        print(f"{row['name']:24} {row['train_bytes']:>10,} {row['held_out_bytes']:>8,}")
    print(f"{'all':24} {sum(r['train_bytes'] for r in sizes):>10,}")


if __name__ == "__main__":
    main()
