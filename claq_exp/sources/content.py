"""What a file holds, by its content: compressed or not, a table, JSON, plain text, or no text."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from claq_exp.errors import SourceError, telling_line

HEAD = 1 << 16  # bytes that are looked at
DAMAGED = 0.01  # share of damaged characters from which a file is no text in this encoding
PLAIN = ".txt"
JSON = (".jsonl", ".json", ".ndjson")
BINARY_TABLES = (".parquet", ".arrow")
WRITTEN_TABLES = (".csv", ".tsv")
SAME = {".feather": ".arrow", ".ipc": ".arrow"}
WEB_PAGES = (".html", ".htm", ".xhtml")

CONTROL = bytes({*range(32), 127} - set(b"\t\n\v\f\r\x1b"))
ESCAPED = re.compile("[\udc80-\udcff]")  # how `surrogateescape` keeps a byte that is no UTF-8
REPLACED = re.compile("\ufffd")
MARKS = {  # longer ones first: that of UTF-32 begins as that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}


def _by_arrow(name: str) -> Callable[[Path], BinaryIO]:
    def opened(path: Path) -> BinaryIO:
        import pyarrow

        stream: Any = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), name)
        return io.BufferedReader(stream)

    return opened


COMPRESSED: dict[str, tuple[re.Pattern[bytes], tuple[str, ...], Callable[[Path], Any]]] = {
    "gzip": (re.compile(rb"\x1f\x8b\x08"), (".gz", ".gzip"), gzip.open),
    "bzip2": (re.compile(rb"BZh[1-9]1AY&SY"), (".bz2",), bz2.open),
    "xz": (re.compile(rb"\xfd7zXZ\0|\x5d\0\0"), (".xz", ".lzma"), lzma.open),
    "zstandard": (re.compile(rb"\x28\xb5\x2f\xfd"), (".zst", ".zstd"), _by_arrow("zstd")),
    "lz4": (re.compile(rb"\x04\x22\x4d\x18"), (".lz4",), _by_arrow("lz4")),
}
PACKED = tuple(suffix for _, suffixes, _ in COMPRESSED.values() for suffix in suffixes)
TABLE_MARKS = {
    ".parquet": re.compile(rb"PAR1"),
    ".arrow": re.compile(rb"ARROW1|\xff\xff\xff\xff.{3}\0", re.DOTALL),
}
UNPACK = "unpack it and give the text inside"
NO_TEXT = (  # beginning of a content -> what it is, what to do
    (rb"PK(\x03\x04|\x05\x06)", "a zip archive (.docx, .npz and .pt are such)", UNPACK),
    (rb".{257}ustar", "a tar archive", UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (rb"Rar!\x1a\x07", "a rar archive", UNPACK),
    (rb"%PDF-", "a PDF document", "extract its text first, e.g. with pdftotext"),
    (rb"\{\\rtf", "an RTF document", "save it as plain text"),
    (rb"\xd0\xcf\x11\xe0", "an Office document", "save it as plain text"),
    (rb"\x80[\x02-\x05]", "a pickle, which is never loaded", "save it as .jsonl or .parquet"),
    (rb".{5}\0\0\0\{\"", "a safetensors file", "give a text; weights belong into model.source"),
    (rb"GGUF[\x01-\x09]\0\0\0", "a GGUF model", "give a text; a model belongs into model.source"),
    (rb"SQLite format 3\0", "an SQLite database", "export its texts as .jsonl or .csv"),
    (rb"\x93NUMPY", "a NumPy array", "give the text that it was made of"),
    (rb"\x89HDF\r\n", "an HDF5 file", "save its texts as .jsonl or .parquet"),
    (rb"Obj\x01", "an Avro file", "save its texts as .jsonl or .parquet"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF.{4}WEBP|II\*\0|MM\0\*", "an image", "give a text"),
    (rb"\x7fELF|MZ\x90\0", "a program", "give a text"),
    (rb"version https://git-lfs", "a pointer of Git LFS, not the file", "run 'git lfs pull' there"),
)
REFUSED = [(re.compile(mark, re.DOTALL), what, advice) for mark, what, advice in NO_TEXT]
JSON_BEGIN = re.compile(rb'(\xef\xbb\xbf)?\s*(\[\s*)?\{\s*"\w+"\s*:')
WEB_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype html|html[\s>])", re.IGNORECASE)


@dataclass
class Losses:
    """What of a text is not read as it stands.

    skipped: records whose field is null.  damaged: characters that cannot be decoded, which become
    U+FFFD, and control characters, which stay.
    """

    skipped: int = 0
    damaged: int = 0


def suffix_of(name: str) -> str:
    """Return the suffix that says how a file is read: in lower case, without one of packing."""
    path = Path(name.lower())
    while path.suffix in PACKED:
        path = path.with_suffix("")
    return SAME.get(path.suffix, path.suffix)


def kind_of(path: Path) -> str:
    """Return how a file is read: .parquet, .arrow, .csv, .tsv, .jsonl or .txt.

    The content decides, and the name where the content does not tell: between kinds of text.
    Raises SourceError that says what the file is where it holds no text, or nothing.
    """
    with opened(path) as file:
        head = file.read(HEAD)
    for kind, mark in TABLE_MARKS.items():
        if mark.match(head):
            return kind
    _refuse_other(path, head)
    suffix = suffix_of(path.name)
    if suffix in (*BINARY_TABLES, *WRITTEN_TABLES):
        return suffix
    if suffix in JSON or (suffix != PLAIN and JSON_BEGIN.match(head)):
        return JSON[0]
    return PLAIN


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file for its bytes, unpacked where its content is packed.

    Raises SourceError for one that cannot be read, or is cut short or damaged.
    """
    name = None
    try:
        with path.open("rb") as file:
            head = file.read(16)
        name, unpack = next(
            ((name, unpack) for name, (mark, _, unpack) in COMPRESSED.items() if mark.match(head)),
            (None, None),
        )
        with unpack(path) if unpack else path.open("rb") as file:
            yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if name is None or getattr(error, "errno", None):
            reason = getattr(error, "strerror", None) or telling_line(error)
            raise SourceError(f"{path} cannot be read: {reason}") from error
        raise SourceError(f"{path} is no whole {name} file: {telling_line(error)}") from error


def read_bytes(path: Path) -> bytes:
    """Return the whole content of a file, unpacked.  Raises as `opened`."""
    with opened(path) as file:
        return file.read()


def read_plain(path: Path, encoding: str | None, losses: Losses) -> str:
    """Return the whole text of a file, its Windows line ends as plain ones.

    encoding: of a file without a byte-order mark; UTF-8 by default.  losses: is added to.
    Raises SourceError where more than a few characters are damaged.
    """
    with _decoded(path, encoding, losses) as lines:
        return "".join(lines).replace("\r\n", "\n")


@contextmanager
def read_lines(path: Path, encoding: str | None, losses: Losses) -> Iterator[Iterator[str]]:
    """Give the lines of a file one by one, with their ends; else as `read_plain`.

    Raises at once where the beginning is damaged, for what is read next would blame its form.
    """
    with opened(path) as file:
        head = file.read(HEAD)
    chosen = _encoding(head, encoding)
    text = head.decode(chosen, errors="replace").removesuffix("\ufffd")  # a character cut in two
    share = (text.count("\ufffd") + _control(text)) / max(1, len(text))
    if share > DAMAGED:
        raise _not_in(path, head, chosen, share)
    with _decoded(path, encoding, losses) as lines:
        yield lines


@contextmanager
def _decoded(path: Path, encoding: str | None, losses: Losses) -> Iterator[Iterator[str]]:
    with opened(path) as file:
        head = file.read(HEAD)
    chosen = _encoding(head, encoding)
    characters = damaged = 0

    def mended(text: Iterator[str]) -> Iterator[str]:
        nonlocal characters, damaged
        for line in text:
            whole, replaced = (line, 0) if line.isascii() else damage.subn("\ufffd", line)
            damaged += replaced + _control(whole)
            characters += len(line)
            yield whole

    with opened(path) as file:
        # `replace` would hide which U+FFFD stood in a file of UTF-8 before
        utf8 = codecs.lookup(chosen).name.startswith("utf-8")
        damage = ESCAPED if utf8 else REPLACED
        errors = "surrogateescape" if utf8 else "replace"
        try:
            yield mended(io.TextIOWrapper(file, chosen, errors, newline="\n"))
        except UnicodeError as error:
            raise SourceError(f"{path} is no text in {chosen}: {telling_line(error)}") from error
    if damaged > DAMAGED * characters:
        raise _not_in(path, head, chosen, damaged / characters)
    losses.damaged += damaged


def _encoding(head: bytes, otherwise: str | None) -> str:
    """Return the encoding that a byte-order mark names, else the one that was asked for."""
    marked = (name for start, name in MARKS.items() if head.startswith(start))
    return next(marked, otherwise or "utf-8")


def _control(text: str) -> int:
    encoded = text.encode()
    return len(encoded) - len(encoded.translate(None, CONTROL))


def _refuse_other(path: Path, head: bytes) -> None:
    """Raise SourceError for what is no text by its first bytes."""
    if not head:
        raise SourceError(f"{path} is empty; give a file with text")
    found = [(what, advice) for mark, what, advice in REFUSED if mark.match(head)]
    for name, (mark, _, _) in COMPRESSED.items():
        if mark.match(head):
            found.append((f"{name} inside of another packing", "unpack it once"))
    if WEB_PAGE.match(head) and suffix_of(path.name) not in WEB_PAGES:
        found.append(("a web page", "fetch the file itself, or name it .html to read its source"))
    if found:
        what, advice = found[0]
        raise SourceError(f"{path} is {what}; {advice}")


def _not_in(path: Path, head: bytes, encoding: str, share: float) -> SourceError:
    """Return the error for a file of which too much is no text in an encoding."""
    even, odd = (head[start::2].count(0) / max(1, len(head) // 2) for start in (0, 1))
    found = f"{share:.1%} of its characters are no text in {encoding.upper()}"
    if max(even, odd) > 0.3 and min(even, odd) < 0.1:
        order = "le" if odd > even else "be"
        return SourceError(
            f"{path} is UTF-16 without a byte-order mark; set encoding=utf-16-{order}"
        )
    if len(head) - len(head.translate(None, CONTROL)) > DAMAGED * len(head):
        return SourceError(f"{path} is a binary file ({found}); give a text, or its encoding")
    return SourceError(f"{path}: {found}; set its encoding, e.g. encoding=cp1252")
