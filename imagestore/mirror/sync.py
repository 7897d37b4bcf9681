"""`sf mirror sync`: upstream images into the store, one source after the other; a bad one stops no other.

For each image: where is the newest build, what does its checksum file say, is that what we have already? If not:
download, compare, push, set its tags. The former version keeps a tag with its build until it is too old. Killed at any
moment, the names in the store are those before or after, and the rerun goes on with what was downloaded.
"""

import fcntl
import json
import os
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from imagestore.durable import opened
from imagestore.errors import Conflict, Corrupt, Denied, Invalid, NotFound, StoreError, Unavailable
from imagestore.formats.digest import Digest
from imagestore.formats.keys import PROVENANCE
from imagestore.mirror import sources
from imagestore.mirror.download import Downloader, hash_file
from imagestore.mirror.sources import Outcome, Source
from imagestore.outside import YEAR_9999_S, read_json, real
from imagestore.progress import Progress, Report, silent
from imagestore.push import push
from imagestore.store.roots import can_be_read
from imagestore.store.store import Store
from imagestore.updates.making import make_update

ATTEMPTS = 3
LONGEST_S = 6 * 3600.0  # what one image may take; then the next has its turn
_LEFT_S = 7 * 86400.0
_ODD = {"BADSIG", "EXPSIG", "EXPKEYSIG", "REVKEYSIG", "NODATA", "UNEXPECTED", "FAILURE", "ERROR", "BADARMOR"}
"""What gpgv says where it is not only a key that is missing (gnupg's doc/DETAILS)."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an image came from: beside the manifest, because the manifest knows no times and no places."""

    url: str = ""
    build: str = ""
    algorithm: str = ""
    checksum: str = ""
    signed_by: str = ""
    etag: str = ""
    last_modified: str = ""
    fetched_at_s: float = 0.0


def read_provenance(store: Store, digest: Digest) -> Provenance:
    """Empty where nothing is known, or it is odd: this is for people and for skipping work, never for trust."""
    try:
        body = read_json(store.backend.get(PROVENANCE.key(digest)).data)
        texts = {name: str(body.get(name, "")) for name in Provenance.__slots__ if name != "fetched_at_s"}
        return Provenance(**texts, fetched_at_s=real(body.get("fetched_at_s", 0), high=YEAR_9999_S))
    except (NotFound, ValueError, TypeError, AttributeError):
        return Provenance()


def sync(
    store: Store,
    wanted: Iterable[Source],
    work: Path,
    *,
    dry_run: bool = False,
    progress: Callable[[str], AbstractContextManager[Report]] = lambda title: nullcontext(silent),
) -> list[Outcome]:
    """Bring the newest build of every source into the store. `work`: where downloads lie, also between runs.

    dry_run: only look what is new, and how large the files are (`new_bytes`).
    progress: given "name:tag arch", the report for that image. Errors are in the outcomes.
    Raises Conflict while another one downloads to `work`.
    """
    store.check_writable()
    outcomes = []
    with nullcontext() if dry_run else _alone(work), closing(Downloader(trusted=True)) as web:
        for source in wanted:
            for architecture in source.architectures:
                started = time.monotonic()
                try:
                    image = _Image(store, web, source, architecture, work)
                    with progress(f"{source.title} {architecture}") as report:
                        outcome = image.preview() if dry_run else image.sync(_bounded(report, started))
                except (StoreError, OSError) as error:  # a full disk, too
                    words = f"{error} ({getattr(error, 'hint', '')})".removesuffix(" ()")
                    outcome = Outcome(f"{source.title} {architecture}", "failed", words)
                outcomes.append(replace(outcome, seconds=round(time.monotonic() - started, 1)))
    return outcomes


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Two would write to one file. What an interrupted run left of a build that nobody asks for any more is removed."""
    work.mkdir(parents=True, exist_ok=True)
    with opened(work, os.O_RDONLY) as directory:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(f"another sync downloads to {work}", hint="wait for its end") from error
        for path in work.iterdir():
            if time.time() - path.lstat().st_mtime > _LEFT_S:
                path.unlink()
        yield


def bring(
    store: Store, source: Source, architecture: str, work: Path, *, trusted: bool, progress: Report = silent
) -> Outcome:
    """One image of a source, as `sync` brings it. `trusted`: the URL is the administrator's. Raises StoreError."""
    with closing(Downloader(trusted=trusted)) as web:
        return _Image(store, web, source, architecture, work).sync(_bounded(progress, time.monotonic()))


def _bounded(progress: Report, started_s: float) -> Report:
    def tell(done: Progress) -> None:
        if time.monotonic() - started_s > LONGEST_S:
            raise Invalid(f"it was given up after {LONGEST_S / 3600:.0f} hours")
        progress(done)

    return tell


class _Image:
    """One source for one architecture."""

    def __init__(self, store: Store, web: Downloader, source: Source, architecture: str, work: Path) -> None:
        self._store, self._web, self._source, self._architecture = store, web, source, architecture
        self._work = work
        store.check_writable()
        work.mkdir(parents=True, exist_ok=True)
        record = store.names.read(source.name, source.tags[0])
        self._current = None if record.removed else record.images.get(architecture)

    def _look(self) -> Provenance:
        """What upstream has now."""
        source, build = self._source, ""
        if source.build:
            theirs = source.architectures[self._architecture]
            page = self._web.small(source.build["page"].replace("{arch}", theirs)).decode(errors="replace")
            build = sources.newest(page, source.build["pattern"], theirs)
        location = sources.locate(source, self._architecture, build)
        there = Provenance(location.url, build)
        if source.checksum:
            algorithm, _, checksum = source.checksum.partition(":")
            return replace(there, algorithm=algorithm, checksum=checksum)
        if not location.checksums:
            return self._beside(there)
        text, signed_by = self._web.small(location.checksums), ""
        if source.signature and not Path(source.keyring).exists():
            signed_by = f"signature not checked: no keyring at {source.keyring}"
        elif source.signature:
            signature = b"" if source.signature == "inline" else self._web.small(location.signature)
            text, signed_by = check_signature(text, signature, Path(source.keyring))
        names = (urlsplit(url).path.rpartition("/")[2] for url in (location.url, location.checksums))
        algorithm, checksum = sources.find_checksum(text.decode(errors="replace"), *names)
        return replace(there, algorithm=algorithm, checksum=checksum, signed_by=signed_by)

    def _beside(self, there: Provenance) -> Provenance:
        """With a checksum out of a file that lies beside the image, if there is one of a usual name."""
        where, _, file = urlsplit(there.url).path.rpartition("/")
        for beside in (f"{file}.sha512", f"{file}.sha256", f"{file}.SHA256", "SHA512SUMS", "SHA256SUMS"):
            with suppress(NotFound, Denied, Corrupt):
                text = self._web.small(urlsplit(there.url)._replace(path=f"{where}/{beside}").geturl())
                algorithm, checksum = sources.find_checksum(text.decode(errors="replace"), file, beside)
                return replace(there, algorithm=algorithm, checksum=checksum)
        return there

    def _have(self, there: Provenance) -> bool:
        """Whether what our name stands for was made from the file with this checksum."""
        if not self._current or not there.checksum or not can_be_read(self._store, self._current):
            return False
        with suppress(NotFound, Corrupt):
            return dict(self._store.manifest(self._current).source).get(there.algorithm) == there.checksum
        return False

    def _outcome(self, result: str, there: Provenance, digest: Digest | None, new_bytes: int = 0) -> Outcome:
        name = f"{self._source.title} {self._architecture}"
        return Outcome(name, result, there.signed_by, digest, new_bytes)

    def preview(self) -> Outcome:
        """What `sync` would do, as far as that is known without downloading."""
        there = self._look()
        if self._have(there):
            return self._outcome("unchanged", there, self._current)
        return self._outcome("new", there, None, self._web.size_bytes(there.url))

    def sync(self, progress: Report) -> Outcome:
        """Bring it here, unless it is."""
        source, there, path = self._source, self._look(), None
        known = read_provenance(self._store, self._current) if self._current else Provenance()
        if not self._have(there):
            there, path = self._download(there, known, progress)
        if path is not None and not there.checksum:
            there = replace(there, algorithm="sha256", checksum=hash_file(path, "sha256"))
            if self._have(there):
                path.unlink()
                path = None
        if path is None and self._current:
            self._tag(self._current)
            return self._outcome("unchanged", there, self._current)
        assert path is not None
        if self._current and source.keep:
            self._keep(self._current, known)
        try:
            result = push(
                self._store,
                path,
                source.name,
                source.tags[0],
                architecture=self._architecture,
                labels=source.labels,
                os_name=source.os,
                source={"format": source.format or "any", there.algorithm: there.checksum},
                format_=source.format or None,
                bounded=True,
                progress=progress,
            )
        finally:
            path.unlink()
        now_s = round(self._store.backend.now())
        there = replace(there, fetched_at_s=now_s)
        encoded = json.dumps(asdict(there), sort_keys=True, indent=1).encode()
        self._store.backend.put(PROVENANCE.key(result.digest), encoded)
        self._tag(result.digest)
        if self._current:  # last, as it takes a while: who is killed meanwhile knows whence the image is
            with suppress(StoreError, OSError):
                make_update(self._store, self._current, result.digest)
        return self._outcome("new", there, result.digest, result.new_bytes)

    def _download(
        self, there: Provenance, known: Provenance, progress: Report
    ) -> tuple[Provenance, Path | None]:
        """The file, with the right checksum; fetched again when it is wrong, given up after ATTEMPTS.

        And what its server says of it. None: it is what is known.
        """
        path = self._work / f"{Digest.of(there.url.encode()).hex()[:24]}.image"
        limit_bytes, same = self._source.limit_bytes, known.url == there.url and not there.checksum
        unless = (known.etag, known.last_modified) if same else ("", "")
        for attempt in range(ATTEMPTS):
            try:
                said = self._web.fetch(
                    there.url, path, limit_bytes=limit_bytes, unless=unless, progress=progress
                )
            except Unavailable:
                if attempt + 1 == ATTEMPTS:
                    raise
                time.sleep(2**attempt)
                continue
            wanted = there.checksum
            if said is None:
                return there, None
            if not wanted or hash_file(path, there.algorithm) == wanted:
                return replace(there, etag=said[0], last_modified=said[1]), path
            path.unlink()
        message = f"{there.url}: its {there.algorithm} is not the published one, {ATTEMPTS} times over"
        raise Corrupt(message, hint="upstream may be in the middle of a change; the next run tries again")

    def _tag(self, digest: Digest) -> None:
        for tag in self._source.tags:
            self._store.names.set(self._source.name, tag, self._architecture, digest)

    def _keep(self, digest: Digest, known: Provenance) -> None:
        """A tag for the version that is about to be replaced; versions past `keep` lose theirs."""
        name, tag, names = self._source.name, self._source.tags[0], self._store.names
        fetched = time.strftime("%Y%m%d", time.gmtime(known.fetched_at_s))  # of all architectures
        old = sources.old_tag(tag, (self._source.build and known.build) or fetched)
        names.set(name, old, self._architecture, digest)
        present = [record.tag for record in names.list(lenient=True) if record.name == name]
        for gone in sources.tags_to_drop(present, tag, self._source.keep - 1):
            names.remove(name, gone)


def check_signature(text: bytes, signature: bytes, keyring: Path) -> tuple[bytes, str]:
    """(the signed text, who signed) by gpgv; an empty signature means that `text` is clear-signed. Raises Denied.

    Of several signatures one by a key of the keyring is enough, where those by strangers are all that it cannot check.
    """
    with tempfile.TemporaryDirectory(prefix="sf-gpgv-") as scratch:
        directory = Path(scratch)
        (directory / "text").write_bytes(text)
        if signature:
            (directory / "signature").write_bytes(signature)
        files = ["signature", "text"] if signature else ["text"]
        output = [] if signature else ["--output", "signed"]
        command = ["gpgv", "--status-fd", "1", "--keyring", str(keyring.absolute()), *output, *files]
        try:
            done = subprocess.run(command, cwd=directory, capture_output=True, timeout=30)
        except FileNotFoundError as error:
            raise Invalid("gpgv is not installed", hint="apt-get install gpgv") from error
        except subprocess.TimeoutExpired as error:
            raise Denied("gpgv did not come to an end") from error
        told = [line.split(" ", 3) for line in done.stdout.decode(errors="replace").splitlines()]
        words = Counter(line[1] for line in told if line[0] == "[GNUPG:]" and len(line) > 1)
        good = [line[3] for line in told if line[1:2] == ["GOODSIG"] and len(line) > 3]
        checked = words["NEWSIG"] - words["NO_PUBKEY"]
        if not good or len(good) != checked or (done.returncode and _ODD & words.keys()):
            raise Denied("the checksum file's signature is wrong, or by a key that is not in the keyring")
        return text if signature else (directory / "signed").read_bytes(), good[0]
