"""A client of sf's REST interface, of Python's own library alone: modules run where nothing of sf is installed.

Shapes: docs/reference/rest.md. What is found where nothing is given: the variables SF_API_URL, SF_NAMESPACE and SF_KEY,
the context that `sf login` wrote (Python 3.11 reads it), this machine's own server with the key that root may read.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

ANSWER_S = 40.0
OWN = "http://127.0.0.1:13000"
LOOPBACK = re.compile(r"https?://(127\.\d+\.\d+\.\d+|localhost|\[::1\])(:\d+)?(/|$)")
OPTIONS: dict[str, Any] = {
    "api_url": {"type": "str"},
    "namespace": {"type": "str"},
    "key": {"type": "str", "no_log": True},
    "ca_cert": {"type": "path"},
}
SECRETS = ("vdi_password", "user_data")
"""Fields of an instance that stay out of results and inventories."""


class Failed(Exception):
    """What the server refused, or that it cannot be reached. `status`: of HTTP, 0 where there was no answer."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Api:
    """`api("GET", "instances", "web")`. Logs in at its first call, and once more when its token has ended."""

    def __init__(self, given: dict[str, Any]) -> None:
        """given: `OPTIONS`, any of which may be missing. Raises Failed."""
        self.url, self.namespace, self._key, ca = _access({n: given.get(n) or "" for n in OPTIONS})
        self._at, self._token = urlsplit(self.url), ""
        if self._at.scheme not in ("http", "https") or not self._at.hostname:
            raise Failed(f"not the URL of an API: {self.url!r} (https://HOST:PORT)")
        if not self._key:
            raise Failed(f"no key for namespace {self.namespace} at {self.url} (sf login, or the option key)")
        if self._at.scheme == "http" and not LOOPBACK.match(self.url):
            raise Failed(f"no key goes over plain HTTP to {self.url} (https://HOST:PORT)")
        self._tls = _trusting(ca) if self._at.scheme == "https" else None

    def __call__(self, method: str, *path: str, body: Any = None, once: str = "") -> Any:
        """The answer's JSON. body: JSON, or bytes as they are. once: an Idempotency-Key. Raises Failed."""
        for _ in range(2):
            if not self._token:
                self._login()
            status, data = self._send(method, path, body, once)
            if status != 401:
                break
            self._token = ""
        try:
            said = json.loads(data) if data else None
        except (ValueError, RecursionError):
            said = None
        if status < 400:
            return said
        said = said if isinstance(said, dict) else {}
        hint = f" ({said['hint']})" if said.get("hint") else ""
        raise Failed(f"{said.get('error') or f'the API answered {status}'}{hint}", status)

    def find(self, *path: str) -> dict[str, Any] | None:
        """An object, or None where there is none (the deleted stay readable for a while)."""
        try:
            found = self("GET", *path)
        except Failed as error:
            if error.status == 404:
                return None
            raise
        return None if found["state"] in ("delete-wait", "deleted") else found

    def follow(self, *path: str, timeout_s: float) -> Iterator[dict[str, Any]]:
        """An object again and again. Raises Failed when it fails, or when the time is over."""
        end, pause_s = time.monotonic() + timeout_s, 0.1
        while True:
            found = self("GET", *path)
            if found["state"].endswith("error"):
                raise Failed(f"{found['name']}: {found.get('error_message') or found['state']}")
            yield found
            if time.monotonic() > end:
                raise Failed(f"{found['name']} is {found['state']} after {timeout_s:.0f} s, not yet as asked")
            time.sleep(pause_s)
            pause_s = min(2.0, pause_s * 1.5)

    def _login(self) -> None:
        body = {"namespace": self.namespace, "key": self._key}
        status, data = self._send("POST", ("auth",), body, "")
        if status != 200:
            raise Failed(f"{self.url} does not take the key of namespace {self.namespace}", status)
        self._token = str(json.loads(data)["access_token"])

    def _send(self, method: str, path: tuple[str, ...], body: Any, once: str) -> tuple[int, bytes]:
        where = "/".join((self._at.path.rstrip("/"), *(quote(part, safe="") for part in path)))
        raw = isinstance(body, bytes)
        headers = {"Content-Type": "application/octet-stream" if raw else "application/json"}
        headers.update({"Authorization": f"Bearer {self._token}"} if self._token else {})
        headers.update({"Idempotency-Key": once} if once else {})
        to: Any = (self._at.hostname, self._at.port)
        if self._tls:
            connection = http.client.HTTPSConnection(*to, timeout=ANSWER_S, context=self._tls)
        else:
            connection = http.client.HTTPConnection(*to, timeout=ANSWER_S)
        try:
            connection.request(method, where, body if raw or body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise Failed(f"cannot reach {self.url}: {error or type(error).__name__}") from error
        finally:
            connection.close()


def finish(module: Any, run: Callable[[Any], dict[str, Any]]) -> None:
    """End a module with what `run` returns of it, or with what failed."""
    try:
        module.exit_json(**run(module))
    except Failed as error:
        module.fail_json(msg=str(error))


def settle_metadata(have: dict[str, Any], wanted: dict[str, Any] | None) -> list[str]:
    """The keys whose values are to be set; others stay as they are."""
    return [key for key, value in (wanted or {}).items() if key not in have or have[key] != value]


def without_secrets(instance: dict[str, Any] | None) -> dict[str, Any] | None:
    """An instance's view for results."""
    return instance and {name: value for name, value in instance.items() if name not in SECRETS}


def _trusting(ca: str) -> ssl.SSLContext:
    if not ca:
        return ssl.create_default_context()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # the authority signs for this cloud alone, and its nodes have many names
    try:
        context.load_verify_locations(cadata=ca)
    except ssl.SSLError as error:
        raise Failed(f"the authority's certificate cannot be read: {error}") from error
    return context


def _access(given: dict[str, str]) -> tuple[str, str, str, str]:
    """URL, namespace, key and the authority's certificate (PEM). A context's key goes to its URL only."""
    told = {name: given[name] or os.environ.get(f"SF_{name.upper()}", "") for name in OPTIONS}
    state = Path(os.environ.get("SF_STATE_DIR") or "/var/lib/sf")
    current, contexts = _contexts()
    url = (told["api_url"] or contexts.get(current, {}).get("url") or OWN).rstrip("/")
    fits = [one for name, one in sorted(contexts.items(), key=lambda c: c[0] != current) if one["url"] == url]
    named = [one for one in fits if told["namespace"] in ("", one.get("namespace"))]
    context = (named or [{}])[0]
    namespace = told["namespace"] or context.get("namespace") or "system"
    key = told["key"] or context.get("key") or ""
    ca = _text(Path(told["ca_cert"])) if told["ca_cert"] else next((o["ca"] for o in fits if o.get("ca")), "")
    if LOOPBACK.match(url):
        key = key or (_text(state / "auth/local-key") if namespace == "system" else "")
        ca = ca or _text(state / "auth/ca.crt")
    return url, namespace, key, ca


def _text(path: Path) -> str:
    """ "" where it cannot be read."""
    return path.read_text().strip() if os.access(path, os.R_OK) else ""


def _contexts() -> tuple[str, dict[str, dict[str, str]]]:
    """The current one's name, and all that `sf login` wrote."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    path = Path(os.environ.get("SF_CONFIG") or home / "sf/config.toml")
    try:
        import tomllib

        found = tomllib.loads(path.read_text())
    except (ImportError, OSError, ValueError):
        return "", {}
    known = found.get("contexts")
    known = known if isinstance(known, dict) else {}
    return str(found.get("context", "")), {
        n: c for n, c in known.items() if isinstance(c, dict) and c.get("url")
    }
