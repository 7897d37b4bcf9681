"""Bringing one file from a web server that is not trusted: resumable, bounded, led by the rules of `backends.web`."""

import hashlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from imagestore.backends.web import PATIENCE_S, Response, Web, body, paced, whole_of
from imagestore.errors import Invalid, Unavailable
from imagestore.outside import decimal
from imagestore.progress import Progress, Report, silent

_SLOWEST_BYTES_S = 4 << 10
_TEXT_BYTES = 4 << 20


class Downloader(Web):
    """Keeps connections; the caller closes it. `trusted`: the URLs come from this machine's administrator."""

    def small(self, url: str) -> bytes:
        """A checksum list, a signature, a directory's page. Raises StoreError."""
        with closing(self._get(url, {}, 200)) as response:
            return b"".join(_pieces(response, url, _TEXT_BYTES))

    def size_bytes(self, url: str) -> int:
        """Of a file, as its server says; 0 if it does not. Raises StoreError."""
        response = self.open("HEAD", url, {}, url[:200], (200,))
        return decimal(response.headers.get("content-length", "")) or 0

    def fetch(
        self,
        url: str,
        destination: Path,
        *,
        limit_bytes: int,
        unless: tuple[str, str] = ("", ""),
        progress: Report = silent,
    ) -> tuple[str, str] | None:
        """Download to `destination`, going on where an interrupted run stopped if the file is still the same.

        destination: of this URL alone, since what lies beside it is believed to be of it.
        unless: ETag and Last-Modified of what is there already; an unchanged file is not sent again. Returns those of
        what came, None where the server said that nothing has changed.
        Raises Invalid or Corrupt past `limit_bytes`, Denied for a forbidden address, NotFound, Unavailable.
        """
        part, note = destination.with_suffix(".part"), destination.with_suffix(".part.validator")
        etag, changed = unless
        known = {"If-None-Match": etag} if etag else {"If-Modified-Since": changed} if changed else {}
        validator = note.read_text("latin-1") if part.exists() and note.exists() else ""
        start = part.stat().st_size if validator and validator.isprintable() else 0
        if start:
            rest = {"Range": f"bytes={start}-", "If-Range": validator}
            response = self._get(url, rest, 200, 206, 416)
            goes_on = whole_of(response.headers.get("content-range", ""), start) is not None
            if response.status == 416 or (response.status == 206 and not goes_on):
                # It was whole already, or another one stands there now, or this server cannot count: all of it anew.
                response.close()
                part.unlink()
                response = self._get(url, {}, 200)
            start *= response.status == 206
        else:
            response = self._get(url, known, 200, *([304] if known else []))
        with closing(response):
            if response.status == 304:
                return None
            length = decimal(response.headers.get("content-length", ""))
            total = 0 if length is None else start + length  # 0: the server does not say
            if max(total, start) > limit_bytes:
                raise Invalid(f"{url}: {total} bytes are more than the limit of {limit_bytes}")
            with part.open("ab" if start else "wb") as file:
                said = response.headers
                strong = "" if said.get("etag", "").startswith("W/") else said.get("etag")
                # Only now: it would vouch for what lay there before.
                note.write_text(strong or said.get("last-modified", ""), "latin-1")
                done = start
                for piece in _pieces(response, url, limit_bytes - start):
                    file.write(piece)
                    done += len(piece)
                    progress(Progress("download", done, total))
            if total and done != total:
                raise Unavailable(f"{url}: the answer ended after {done} of {total} bytes")
            part.replace(destination)
            note.unlink(missing_ok=True)
            return said.get("etag", ""), said.get("last-modified", "")

    def _get(self, url: str, headers: dict[str, str], *accepted: int) -> Response:
        return self.open("GET", url, headers, url[:200], accepted)


def _pieces(response: Response, url: str, most_bytes: int) -> Iterator[bytes]:
    return paced(body(response, url), most_bytes, url, PATIENCE_S, _SLOWEST_BYTES_S)


def hash_file(path: Path, algorithm: str) -> str:
    """Hex digest of a file by one of hashlib's algorithms."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
