"""Reader of web archives, WARC and WET (ISO 28500): the text of conversion records, and of pages as they were fetched.

The format's framing is a few lines; a reader of our own goes on behind a damaged record, which libraries do not.
"""

import gzip
import http.client
import io
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from data_prep import files
from data_prep.documents import DAMAGED, MALFORMED, TOO_LONG, Batch, Part, ReadOptions, Rejections
from data_prep.errors import UserError
from data_prep.readers import Document, batched, damage, too_long

_BLOCK_BYTES = 1 << 20
_MOST_HEADER_BYTES = 1 << 16
_HTML = ("text/html", "application/xhtml+xml")
_OK = 200


class _RejectedError(Exception):
    """(category, reason) of a record that is no document."""


def read_warc(part: Part, options: ReadOptions, rejections: Rejections) -> Iterator[Batch]:
    """A record a document, if it holds text: conversion records (WET), and responses and resources that are plain text
    or HTML, of which the main text is taken. Other records are passed over. Lines are numbers of records, from 1.

    Raises UserError for HTML where resiliparse is not installed.
    """
    yield from batched(part, _documents(part, options, rejections), options, rejections)


def _documents(part: Part, options: ReadOptions, rejections: Rejections) -> Iterator[Document]:
    number = told = 0
    with files.Watched(part.path) as file:
        stream: io.BufferedReader[Any] | None = files.buffered(part.path, file)
        while stream is not None:
            try:
                skipped, found = _next_record(stream)
                if skipped:
                    number += 1
                    rejections.add(number, DAMAGED, f"no WARC record begins where one should ({skipped:,} bytes)")
                if not found:
                    break
                number += 1
                headers, text = _record(stream, options.max_document_bytes)
            except _RejectedError as rejected:
                rejections.add(number, *rejected.args)
                continue
            except files.DECOMPRESSION_ERRORS as error:
                file.raise_failure()
                number += 1
                rejections.add(number, DAMAGED, damage(error))
                # Each record is a gzip member of its own.
                stream = files.next_gzip_member(stream) if part.path.endswith(".gz") else None
                continue
            if text is None:
                continue
            fields = {
                options.id_field: headers.get("warc-record-id", "").strip("<>"),
                "url": headers.get("warc-target-uri"),
                "date": headers.get("warc-date"),
            }
            yield number, text, fields if options.fields else {}, file.bytes_read - told
            told = file.bytes_read
    rejections.lines = number


def _record(stream: "io.BufferedReader[Any]", limit: int) -> tuple[dict[str, str], str | None]:
    """(headers, text) of the record that begins here; no text where it holds none. Raises _RejectedError."""
    headers, length = _headers(stream)
    kind = headers.get("warc-type", "")
    if kind not in ("conversion", "response", "resource"):
        _skip(stream, length)
        return headers, None
    if length > limit:
        _skip(stream, length)
        raise _RejectedError(TOO_LONG, too_long(length, limit))
    content = stream.read(length)
    if len(content) < length or stream.peek(1)[:1] not in (b"", b"\r", b"\n"):
        raise _RejectedError(DAMAGED, "its Content-Length does not lead to the next record")
    return headers, _text(kind, headers, content, limit)


def _next_record(stream: BinaryIO) -> tuple[int, bool]:
    """Reads to the line that begins a record, and over it: (bytes skipped that are not blank, whether there is one)."""
    skipped = 0
    for line in iter(lambda: stream.readline(_MOST_HEADER_BYTES), b""):
        if line.startswith(b"WARC/"):
            return skipped, True
        if not line.isspace():
            skipped += len(line)
    return skipped, False


def _headers(stream: BinaryIO) -> tuple[dict[str, str], int]:
    """(headers, names in lower case; Content-Length) of a record; raises _RejectedError."""
    headers: dict[str, str] = {}
    size = 0
    for line in iter(lambda: stream.readline(_MOST_HEADER_BYTES), b""):
        size += len(line)
        if size > _MOST_HEADER_BYTES:
            raise _RejectedError(DAMAGED, "its header does not end")
        if line.isspace():
            break
        name, _, value = line.decode("utf-8", "replace").partition(":")
        headers.setdefault(name.strip().lower(), value.strip())
    length = headers.get("content-length", "")
    if not length.isascii() or not length.isdecimal():
        raise _RejectedError(DAMAGED, f"Content-Length is {length!r}, expected a number")
    return headers, int(length)


def _skip(stream: BinaryIO, length: int) -> None:
    while length > 0 and (block := stream.read(min(length, _BLOCK_BYTES))):
        length -= len(block)


def _text(kind: str, headers: dict[str, str], content: bytes, limit: int) -> str | None:
    """The text of a record; None where it holds none, such as an image or a redirect. Raises _RejectedError."""
    if kind == "conversion":
        return _decoded(content, "utf-8")
    content_type = headers.get("content-type", "")
    if kind == "response":
        if not content_type.startswith("application/http"):
            return None
        found = _page(content, limit)
        if found is None:
            return None
        content_type, content = found
    media_type, _, parameters = content_type.lower().partition(";")
    media_type = media_type.strip()
    _, _, charset = parameters.partition("charset=")
    charset = charset.partition(";")[0].strip("\"' ")
    if media_type == "text/plain":
        return _decoded(content, charset or "utf-8")
    return _text_of_html(content, charset) if media_type in _HTML else None


def _decoded(content: bytes, charset: str) -> str:
    try:
        return content.decode(charset)
    except UnicodeDecodeError as error:
        raise _RejectedError(MALFORMED, f"not {charset} at byte {error.start}") from None
    except LookupError:
        raise _RejectedError(MALFORMED, f"unknown charset {charset!r}") from None


class _Received:
    """What http.client takes for a socket."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def makefile(self, *_: object) -> io.BytesIO:
        return io.BytesIO(self._content)


def _page(content: bytes, limit: int) -> tuple[str, bytes] | None:
    """(content type, body) of an HTTP response, its encodings undone; None unless it is a page that was found."""
    try:
        response = http.client.HTTPResponse(_Received(content))  # type: ignore[arg-type]
        response.begin()
        content_type = response.getheader("Content-Type", "")
        if response.status != _OK or not content_type.lower().startswith(("text/plain", *_HTML)):
            return None
        encoding = response.getheader("Content-Encoding", "identity").lower()
        try:
            body = response.read()
        except (http.client.HTTPException, ValueError):  # crawlers undo the chunks and leave the header
            body = content.partition(b"\r\n\r\n")[2]
    except (http.client.HTTPException, ValueError) as error:
        raise _RejectedError(MALFORMED, f"not an HTTP response ({' '.join(str(error).split())})") from None
    if encoding in ("identity", "") or (encoding in ("gzip", "deflate") and body.lstrip()[:1] == b"<"):
        return content_type, body
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise _RejectedError(MALFORMED, f"Content-Encoding {encoding!r} is not known here")
    try:
        if encoding == "deflate":
            body = zlib.decompressobj().decompress(body, limit + 1)
        else:
            body = gzip.GzipFile(fileobj=io.BytesIO(body)).read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise _RejectedError(DAMAGED, damage(error)) from None
    if len(body) > limit:
        raise _RejectedError(TOO_LONG, f"longer than the {limit:,} bytes of --max_document_megabytes")
    return content_type, body


def _text_of_html(page: bytes, charset: str) -> str:
    """The main text of a page: without navigation, headers and footers, as resiliparse finds it."""
    try:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.encoding import bytes_to_str, detect_encoding
    except ImportError:
        raise UserError(
            "the text of HTML pages in WARC files needs a package that is not installed: pip install resiliparse;"
            " WET files hold the text itself"
        ) from None
    try:
        return str(
            extract_plain_text(bytes_to_str(page, charset or detect_encoding(page) or "utf-8"), main_content=True)
        )
    except Exception as error:
        raise _RejectedError(MALFORMED, f"not a page of HTML ({' '.join(str(error).split())})") from None
