"""What only commands need of the settings: whose key goes to which API, and changes to the user's file.

    api_url = "https://sf.example:13000"
    namespace = "shop"
    key = "…"

    context = "cloud"
    [contexts.cloud]
    url, namespace, key, ca = …

A context, which `sf login` writes, goes before the lines above it, and behind flags and variables. After ours, the
configuration of Shaken Fist's clients counts: SHAKENFIST_*, ~/.shakenfist, /etc/sf/shakenfist.json.
"""

import json
import os
import re
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

import tomlkit
import tomlkit.items

from cli.errors import AUTH, CONFLICT, MISSING, USAGE, Problem
from imagestore import Settings, durable

_LOOPBACK = re.compile(r"https?://(127\.\d+\.\d+\.\d+|localhost|\[::1\])(:\d+)?(/|$)")
RESERVED = ("all", "local", "my")  # what no remote and no namespace may be called


def access(settings: Settings) -> tuple[str, str, str]:
    """URL of the API, namespace, key ("" if none). A key that stands beside a URL goes to that URL only."""
    names = ("api_url", "namespace", "key")
    told = {n: settings.flags.get(n) or settings.environment.get(f"SF_{n.upper()}") for n in names}
    places = ("SF_CONFIG", "XDG_CONFIG_HOME")
    filed = Settings(environment={n: t for n, t in settings.environment.items() if n in places})
    sources: list[dict[str, Any]] = [
        told | {"namespace": settings.get("namespace")},
        {name: filed.get(name) for name in names} | {"namespace": settings.get("namespace")},
        {name: os.environ.get(f"SHAKENFIST_{name.upper()}", "") for name in names},
        *map(_client_file, (Path.home() / ".shakenfist", Path("/etc/sf/shakenfist.json"))),
    ]
    if not told["api_url"] and (found := contexts(settings).get(settings.get("context"))):
        sources.insert(0, found | {"api_url": found["url"]} | {n: t for n, t in told.items() if t})
    url = next((s["api_url"] for s in sources if s.get("api_url")), _own(settings)).rstrip("/")
    for source in sources:
        beside = (source.get("api_url") or url).rstrip("/")
        if source.get("key") and url in (beside, *beside.split(",")):
            return url, source.get("namespace") or "system", source["key"]
    namespace = next((s["namespace"] for s in sources if s.get("namespace")), "system")
    local = settings.state_dir / "auth" / "local-key"
    if namespace == "system" and is_local(settings, url) and os.access(local, os.R_OK):
        return url, namespace, local.read_text().strip()
    return url, namespace, ""


def _own(settings: Settings) -> str:
    """Where this machine's server is reached from here."""
    host, _, port = settings.get("listen", "127.0.0.1:13000").rpartition(":")
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)  # noqa: S104 - never bound
    return f"http{'s' if settings.tls else ''}://{host}:{port}"


def is_local(settings: Settings, url: str) -> bool:
    """Whether the server there is this machine's."""
    return is_loopback(url) or url == _own(settings)


def authority(settings: Settings, url: str) -> str:
    """The certificate (PEM) of the authority that alone vouches for an API; "" for the system's authorities."""
    for one in contexts(settings).values():
        if url in one["url"].split(",") and one.get("ca"):
            return one["ca"]
    own = settings.state_dir / "auth" / "ca.crt"
    signed = is_local(settings, url) and not settings.get("tls_cert") and os.access(own, os.R_OK)
    return own.read_text() if signed else ""


def contexts(settings: Settings) -> dict[str, dict[str, str]]:
    """What `sf login` wrote down, by name."""
    found = settings.table("contexts")
    return {n: v for n, v in found.items() if isinstance(v, dict) and isinstance(v.get("url"), str)}


def keep_context(name: str, values: dict[str, str]) -> Path:
    """Write a context down and use it."""
    path, document = _user_file()
    known: Any = document.setdefault("contexts", tomlkit.table(is_super_table=True))
    known[name] = tomlkit.item(values)
    document["context"] = name
    return _write(path, document)


def check_key(url: str, namespace: str, key: str) -> None:
    """Raises Problem where there is no key, or it would go over the wire as it is."""
    if not key or not (url.startswith("https:") or is_loopback(url)):
        hint = "sf login https://HOST:PORT --fingerprint b3:…, as sf serve prints it there"
        hint = hint if key else "be root on the server, or set SF_NAMESPACE and SF_KEY"
        why = "no key goes over plain HTTP to" if key else f"no key for namespace {namespace} at"
        raise Problem(f"{why} {url}", hint=hint, code=AUTH)


def own_store(settings: Settings, namespace: str) -> tuple[str, str]:
    """The URL of a namespace's own image store over the API (`my`: the current one's), and who vouches for it."""
    url, me, key = access(settings)
    if not key and namespace != "my":
        hint = "sf remote ls; a namespace's images are seen with a key: sf login URL"
        raise Problem(f"no store or remote is called {namespace!r}", hint=hint, code=MISSING)
    url = living(url.split(","))
    check_key(url, me, key)
    scheme, _, rest = url.partition("://")
    me, key, of = (quote(part, safe="") for part in (me, key, me if namespace == "my" else namespace))
    return f"sf+{scheme}://{me}:{key}@{rest}/stores/{of}", authority(settings, url)


def parted(url: str) -> SplitResult:
    """The parts of an API's URL. Raises Problem."""
    with suppress(ValueError):  # of a port, too
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    raise Problem(f"not the URL of an API: {url!r}", hint="http://HOST:PORT", code=USAGE)


def living(urls: list[str]) -> str:
    """The first of several servers that answers; the first of all where none does."""
    for url in urls if urls[1:] else ():
        parts = parted(url)
        with suppress(OSError), socket.create_connection((parts.hostname, parts.port or 443), 3):
            return url
    return urls[0]


def is_loopback(url: str) -> bool:
    return bool(_LOOPBACK.match(url))


def _client_file(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text())
        return {"api_url": found["apiurl"], "namespace": found["namespace"], "key": found["key"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def add_remote(name: str, url: str) -> Path:
    """Append a remote to the user's file, whose other text stays as it is."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", name) or name in RESERVED:
        raise Problem(f"not a remote's name: {name!r}", hint="small letters, digits, hyphens", code=USAGE)
    path, document = _user_file()
    known: Any = document.get("remotes", {})
    if name in known:
        raise Problem(f"there is a remote {name!r} already", hint=f"sf remote rm {name}", code=CONFLICT)
    if isinstance(known, tomlkit.items.InlineTable):
        known[name] = {"url": url}
    else:  # behind everything, since the order of the file is the order of asking
        section = tomlkit.table(is_super_table=True)
        section.append(name, tomlkit.item({"url": url}))
        document.append("remotes", section)
    return _write(path, document)


def forget(kind: str, name: str) -> Path:
    """Take a context's or a remote's section out of the user's file. Raises Problem."""
    path, document = _user_file()
    known: Any = document.get(f"{kind}s", {})
    if name not in known:
        raise Problem(f"no {kind} is called {name!r} in {path}", hint=f"sf {kind} ls", code=MISSING)
    del known[name]
    return _write(path, document)


def _user_file() -> tuple[Path, tomlkit.TOMLDocument]:
    settings = Settings()
    assert settings.remotes is not None  # it can be read, or this says why not
    path = settings.user_file
    return path, tomlkit.parse(path.read_text() if path.exists() else "")


def _write(path: Path, document: tomlkit.TOMLDocument) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write(path.resolve(), tomlkit.dumps(document).encode())  # mode 0600: the file may hold a key
    return path
