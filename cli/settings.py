"""Where a setting comes from: the flag, then SF_*, then ~/.config/sf/config.toml, then /etc/sf/config.toml.

    store = "s3://images/sf?endpoint_url=https://s3.example"
    api_url = "https://sf.example:13000"
    namespace = "shop"
    key = "…"

    [remotes.official]          # asked in the order in which they stand here
    url = "https://images.example/"

After ours, the configuration of Shaken Fist's clients counts: SHAKENFIST_*, ~/.shakenfist, /etc/sf/shakenfist.json.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cli.errors import CONFLICT, ERROR, MISSING, USAGE, Problem

_LOOPBACK = re.compile(r"https?://(127\.\d+\.\d+\.\d+|localhost|\[::1\])(:\d+)?(/|$)")


def user_config() -> Path:
    """The file that `sf remote add` writes."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(os.environ.get("SF_CONFIG") or Path(base) / "sf" / "config.toml")


@dataclass
class Settings:
    """What one invocation runs with. `flags` holds what stood on the command line."""

    flags: dict[str, str] = field(default_factory=dict)

    def get(self, name: str, default: str = "") -> str:
        """The setting `name`, by the order above."""
        found = self.flags.get(name) or os.environ.get(f"SF_{name.upper()}") or self._file.get(name)
        return str(found) if found else default

    @cached_property
    def _file(self) -> dict[str, Any]:
        return read_toml(Path("/etc/sf/config.toml")) | read_toml(user_config())

    @property
    def quiet(self) -> bool:
        return bool(self.flags.get("quiet"))

    @property
    def state_dir(self) -> Path:
        return Path(self.get("state_dir", "/var/lib/sf")).expanduser().absolute()

    @property
    def store_url(self) -> str:
        """The store of image commands: by default the one under the state directory."""
        return self.get("store").split(" ")[0] or (self.state_dir / "store").as_uri()

    @property
    def store_is_default(self) -> bool:
        return not self.get("store")

    @property
    def remotes(self) -> dict[str, Mapping[str, str]]:
        """Configured remotes in their search order: name -> {url, …}."""
        found: dict[str, Mapping[str, str]] = self._file.get("remotes", {})
        if bad := [
            name for name, values in found.items() if not isinstance(values, dict) or "url" not in values
        ]:
            raise Problem(f"the remote {bad[0]!r} has no url in {user_config()}", code=USAGE)
        return found

    def access(self) -> tuple[str, str, str]:
        """URL of the API, namespace, key ("" if none). A key that stands beside a URL goes to that URL only."""
        names = ("api_url", "namespace", "key")
        sources = [
            {name: self.get(name) for name in names},
            {name: os.environ.get(f"SHAKENFIST_{name.upper()}", "") for name in names},
            *map(_client_file, (Path.home() / ".shakenfist", Path("/etc/sf/shakenfist.json"))),
        ]
        listen = self.get("listen", "127.0.0.1:13000")
        url = next((s["api_url"] for s in sources if s.get("api_url")), f"http://{listen}").rstrip("/")
        for source in sources:
            if source.get("key") and (source.get("api_url") or url).rstrip("/") == url:
                return url, source.get("namespace") or "system", source["key"]
        namespace = next((s["namespace"] for s in sources if s.get("namespace")), "system")
        local = self.state_dir / "auth" / "local-key"
        if namespace == "system" and _LOOPBACK.match(url) and os.access(local, os.R_OK):
            return url, namespace, local.read_text().strip()
        return url, namespace, ""


def _client_file(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text())
        return {"api_url": found["apiurl"], "namespace": found["namespace"], "key": found["key"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def read_toml(path: Path) -> dict[str, Any]:
    """The file's tables; none if it is not there. Raises Problem when it is broken."""
    import tomllib

    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise Problem(f"cannot read {path}: {error}", code=USAGE) from error


def add_remote(name: str, values: Mapping[str, str]) -> Path:
    """Append a remote to the user's file, whose other text stays as it is."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", name) or name == "local":
        raise Problem(f"not a remote's name: {name!r}", hint="small letters, digits, hyphens", code=USAGE)
    path = user_config()
    if name in read_toml(path).get("remotes", {}):
        raise Problem(f"there is a remote {name!r} already", hint=f"sf remote rm {name}", code=CONFLICT)
    old = path.read_text().rstrip() + "\n\n" if path.exists() else ""
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if value]
    return _write(path, f"{old.lstrip()}[remotes.{name}]\n" + "\n".join(lines) + "\n")


def remove_remote(name: str) -> Path:
    """Take a remote's section out of the user's file."""
    path = user_config()
    if name not in read_toml(path).get("remotes", {}):
        raise Problem(f"no remote is called {name!r} in {path}", hint="sf remote ls", code=MISSING)
    kept: list[str] = []
    inside = found = False
    for line in path.read_text().splitlines(keepends=True):
        inside = line.startswith(f"[remotes.{name}]") if line.startswith("[") else inside
        found |= inside
        kept += [] if inside else [line]
    if not found:
        raise Problem(f"{path} has {name!r} in an unusual form", hint="edit it by hand", code=ERROR)
    return _write(path, "".join(kept))


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.touch(0o600)  # the file may hold a key
    fresh.write_text(text)
    return fresh.replace(path)
