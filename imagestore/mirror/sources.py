"""Source lists: which upstream images a mirror carries (`sources.d/*.toml`), and what upstreams publish.

    [[source]]
    name = "debian"
    tags = ["12", "bookworm"]
    url = "https://example.org/images/{build}/debian-12-{arch}.qcow2"
    build = { page = "https://example.org/images/", pattern = '(\\d{8}-\\d+)/' }
    checksums = "https://example.org/images/{build}/SHA512SUMS"
    architectures = { x86_64 = "amd64", aarch64 = "arm64" }

`{arch}` is the upstream's word for the architecture, `{build}` the newest match of the pattern on the page, `{file}` in
the checksums' URL the last part of the image's.
"""

import fnmatch
import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from imagestore.errors import Corrupt, Invalid, NotFound
from imagestore.formats.digest import Digest
from imagestore.store.names import check_architecture, check_name

T = TypeVar("T")
ALGORITHMS = {32: "md5", 40: "sha1", 64: "sha256", 96: "sha384", 128: "sha512"}
_DIGITS = {name: digits for digits, name in ALGORITHMS.items()} | {"blake2b": 128}
SHIPPED = Path(__file__).with_name("sources.d")  # the lists that come with sf, in a wheel as well
_HEX = re.compile(r"[0-9a-fA-F]{32,128}")
_TAGGED = re.compile(r"([A-Z0-9a-z-]{2,16}) \((.+)\) = ([0-9a-fA-F]{32,128})")
_HASH = re.compile(r"(?:md|sha|blake|b2|rmd|ripemd|whirlpool|sm3)[0-9a-z]{0,8}")
_ALIASES = {"b2": "blake2b", "blake2b512": "blake2b"}
_WEB = re.compile(r"https?://[^/?#\s][!-~]{0,2000}", re.IGNORECASE)
_BUILD_LENGTH = 100
_MOST_BYTES = 1 << 40


@dataclass(frozen=True, slots=True)
class Source:
    """One upstream image for one or more architectures."""

    name: str
    tags: tuple[str, ...]
    url: str
    architectures: Mapping[str, str]  # ours (as `uname -m` says it) to the upstream's
    checksums: str = ""
    checksum: str = ""  # `sha256:…`, of a single URL; no source list has it
    signature: str = ""
    """URL of a detached signature on the checksum file, or "inline" where the file is clear-signed."""
    keyring: str = ""  # file of public keys for gpgv
    build: Mapping[str, str] = field(default_factory=dict)  # page and pattern, or nothing
    keep: int = 3
    """How many versions keep a name: the newest by its tags, older ones by `TAG-BUILD`; 0: the newest alone."""
    format: str = "qcow2"  # "" is whatever it turns out to be
    os: str = ""
    limit_bytes: int = 20 << 30
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """For reports."""
        return f"{self.name}:{self.tags[0]}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one image, whoever it came from. `result`: new, unchanged or failed."""

    name: str
    result: str
    message: str = ""
    digest: Digest | None = None
    new_bytes: int = 0
    seconds: float = 0.0


_BLANK = Source("", ("latest",), "", {"x86_64": "x86_64"})
_TABLE = {one.name: getattr(_BLANK, one.name) for one in fields(Source) if one.name != "checksum"}
_TABLE |= {"tags": [*_BLANK.tags]}  # a [[source]] that says nothing
_TYPES = {str: "text", int: "a number", list: "a list", dict: "a table"}


def load(directory: Path) -> list[Source]:
    """Every source of every file, in order; a name without `latest` has it for its newest version.

    Raises Invalid, naming the file; NotFound if there is none.
    """
    files = sorted(directory.glob("*.toml")) if directory.is_dir() else [directory]
    sources: list[Source] = []
    for path in files:
        try:
            body = tomllib.loads(path.read_text())
            if set(body) != {"source"} or not isinstance(body["source"], list):
                raise Invalid("it has [[source]] tables and nothing else")
            sources += [parse(entry) for entry in body["source"]]
        except FileNotFoundError:
            continue
        except (OSError, ValueError, Invalid) as error:
            raise Invalid(f"{path}: {error}") from error
    if not sources:
        raise NotFound(f"no source lists in {directory}", hint=f"see those that come with sf: {SHIPPED}")
    seen = set[tuple[str, str, str]]()
    for source in sources:
        for key in ((source.name, tag, arch) for tag in source.tags for arch in source.architectures):
            if key in seen:
                raise Invalid(f"{source.name}:{key[1]} for {key[2]} has two sources")
            seen.add(key)
    latest = {key[0] for key in seen if key[1] == "latest"}
    ordered = sorted(sources, key=lambda s: numbers(s.tags[0]))
    newest = {s.name: s.tags[0] for s in ordered if s.name not in latest}  # of every architecture
    return [replace(s, tags=(*s.tags, "latest")) if newest.get(s.name) == s.tags[0] else s for s in sources]


def numbers(text: str) -> list[int]:
    """By which versions are told older from newer."""
    return [int(number) for number in re.findall("[0-9]+", text)]


def lists(given: str = "") -> list[Source]:
    """Those of a file or directory, by default the administrator's own or, without any, those that come with sf."""
    own = Path("/etc/sf/sources.d")
    return load(Path(given) if given else own if own.is_dir() else SHIPPED)


def choose(items: Iterable[T], patterns: Collection[str], names: Callable[[T], Iterable[str]]) -> list[T]:
    """Those with a name (`NAME:TAG`) that matches any of the patterns; none: all. `debian` is `debian:*`.

    Raises NotFound for a pattern that nothing matches.
    """
    known = [(item, list(names(item))) for item in items]
    chosen = [] if patterns else [item for item, _ in known]
    for pattern in patterns:
        glob = pattern if ":" in pattern else f"{pattern}:*"
        matching = [item for item, every in known if fnmatch.filter(every, glob)]
        if not matching:
            there = ", ".join(sorted({name for _, every in known for name in every})[:20])
            raise NotFound(f"nothing matches {pattern!r}", hint=f"there is {there or 'nothing'}")
        chosen += [item for item in matching if item not in chosen]
    return chosen


def parse(body: Mapping[str, Any]) -> Source:
    """Check one [[source]] table. Raises Invalid."""
    if unknown := body.keys() - _TABLE.keys():
        raise Invalid(f"unknown keys: {', '.join(sorted(unknown))}")
    for key, value in body.items():
        if type(value) is not (kind := type(_TABLE[key])):
            raise Invalid(f"{key} is {_TYPES[kind]}, not {value!r:.80}")
    table = {**_TABLE, **body}
    name, tags, build, architectures = (table[key] for key in ("name", "tags", "build", "architectures"))
    if not tags or not architectures:
        raise Invalid(f"{name}: tags and architectures are some at least")
    if set(build) not in (set(), {"page", "pattern"}):
        raise Invalid(f"{name}: build has page and pattern")
    if not all(isinstance(word, str) for word in (*tags, *build.values())):
        raise Invalid(f"{name}: tags, page and pattern are text")
    if not 1 <= table["keep"] <= 1000 or not 1 <= table["limit_bytes"] <= _MOST_BYTES:
        raise Invalid(f"{name}: keep is from 1 to 1000, limit_bytes from 1 to {_MOST_BYTES}")
    table["name"], table["tags"] = check_name(name), tuple(check_name(tag, "tag") for tag in tags)
    table["architectures"] = {check_architecture(ours): str(theirs) for ours, theirs in architectures.items()}
    table["labels"] = {key: str(value) for key, value in table["labels"].items()}
    source, pattern = Source(**table), build.get("pattern", "")
    for url in (source.url, *filter(None, (source.checksums, build.get("page"), source.signature))):
        if url != "inline" and urlsplit(url).scheme not in ("https", "http"):
            raise Invalid(f"{name}: not a web address: {url[:200]!r}")
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise Invalid(f"{name}: the pattern is no regular expression: {error}") from error
    if build and groups != 1:
        raise Invalid(f"{name}: the pattern has one group, the build's name")
    if ("{build}" in source.url + source.checksums) != bool(build):
        raise Invalid(f"{name}: {{build}} in the URL and a build table go together")
    signed = (source.signature, source.keyring)
    if any(signed) and not all((*signed, source.checksums)):
        raise Invalid(f"{name}: signature, keyring and checksums go together")
    return source


def of_url(url: str, name: str, tag: str, architecture: str, *, checksum: str = "", **more: Any) -> Source:
    """A source of one file of any kind. checksum: as in `parse_checksum`, or "". Raises Invalid."""
    if not _WEB.fullmatch(url):
        raise Invalid(f"not a web address: {url[:200]!r}", hint="https://HOST/PATH")
    said = ":".join(parse_checksum(checksum)) if checksum else ""
    return Source(name, (tag,), url, {architecture: architecture}, checksum=said, keep=0, format="", **more)


def parse_checksum(text: str) -> tuple[str, str]:
    """(algorithm, hex digits) of `sha256:…`, or of the digits alone. Raises Invalid."""
    algorithm, _, digits = text.lower().rpartition(":")
    algorithm = algorithm or ALGORITHMS.get(len(digits), "")
    if _DIGITS.get(algorithm) != len(digits) or not _HEX.fullmatch(digits):
        raise Invalid(f"not a checksum: {text[:80]!r}", hint="sha256:… or sha512:…, and hex digits")
    return algorithm, digits


def newest(page: str, pattern: str, arch: str) -> str:
    """The greatest build that a page names, numbers compared as numbers. Raises NotFound."""
    named = re.findall(pattern.replace("{arch}", re.escape(arch)), page)
    found = {build for build in named if len(build) <= _BUILD_LENGTH}
    if not found:
        raise NotFound(f"the page names no build that matches {pattern!r}")
    return str(max(found, key=numbers))


def locate(source: Source, architecture: str, build: str) -> Source:
    """With the URLs of one build for one architecture."""

    def fill(text: str, file: str = "") -> str:
        theirs = source.architectures[architecture]
        return text.replace("{arch}", theirs).replace("{build}", build).replace("{file}", file)

    url = fill(source.url)
    checksums, signature = (fill(one, url.rpartition("/")[2]) for one in (source.checksums, source.signature))
    return replace(source, url=url, checksums=checksums, signature=signature)


def find_checksum(text: str, file: str, listed_in: str = "") -> tuple[str, str]:
    """(algorithm, hex digest) of a file out of a list as sha256sum, `sha256sum --tag` or a single digest write it.

    The strongest wins where a list has several. What is meant by a digest says its tag, the heading above it or the
    list's name (`listed_in`), else its length. x.sha256 is of x, by whichever one name it calls it (x has a build's).
    Raises NotFound; Corrupt where two different digests may be meant.
    """
    named: dict[str, dict[str, set[str]]] = {}
    heading = next(filter(None, map(_hash_word, re.split("[._-]", listed_in.replace(file, "")))), "")
    lines = [text.strip() + f"  {file}"] if len(text.split()) == 1 else text.splitlines()
    for line in map(str.strip, lines):
        words = [_hash_word(word) for word in line.strip("# :").split()]
        if len(words) in (1, 2) and words[0] and words[1:] in ([], [""]) and not _HEX.search(line):
            heading = words[0]  # "# BLAKE2B HASH"
            continue
        tagged = _TAGGED.fullmatch(line)
        digest, name = (
            (tagged[3], tagged[2]) if tagged else (*line.removeprefix("\\").split(None, 1), "", "")[:2]
        )
        algorithm = _hash_word(tagged[1]) if tagged else heading
        if not algorithm or (not tagged and _DIGITS.get(algorithm, len(digest)) != len(digest)):
            algorithm = ALGORITHMS.get(len(digest), "")
        known = _DIGITS.get(algorithm) == len(digest) and _HEX.fullmatch(digest)
        if known and (plain := name.removeprefix("*").removeprefix("./")):
            named.setdefault(plain, {}).setdefault(algorithm, set()).add(digest.lower())
    alone = len(named) == 1 and listed_in.startswith(f"{file}.")
    if not (found := next(iter(named.values())) if alone else named.get(file)):
        raise NotFound(f"the checksum file does not name {file}")
    algorithm, digests = max(found.items(), key=lambda entry: (_DIGITS[entry[0]], entry[0]))
    if len(digests) > 1:
        raise Corrupt(f"the checksum file has several {algorithm} digests of {file}")
    return algorithm, digests.pop()


def _hash_word(word: str) -> str:
    """sha512 of SHA-512 and SHA512SUMS; "" for what is no hash's name."""
    plain = re.sub("[^a-z0-9]", "", word.lower()).removesuffix("s").removesuffix("sum")
    return _ALIASES.get(plain, plain) if _HASH.fullmatch(plain) else ""


def old_tag(tag: str, build: str) -> str:
    """The tag under which a version stays when a newer one takes its place."""
    return check_name(f"{tag}-{re.sub(r'[^a-z0-9]+', '-', build.lower()).strip('-')}", "tag")


def tags_to_drop(names: Sequence[str], tag: str, keep: int) -> list[str]:
    """Which of the `TAG-BUILD` names are too old to keep, given all tags of a name; oldest first."""
    prefix = f"{tag}-"
    old = [name for name in names if name.startswith(prefix) and name[len(prefix) :][:1].isdigit()]
    old.sort(key=lambda text: numbers(text[len(prefix) :]))
    return old[: max(0, len(old) - keep)]
