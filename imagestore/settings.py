"""Where a setting comes from: the flag, then SF_*, then the user's file, then /etc/sf/config.toml, then a default.

    store = "s3://images/sf?endpoint_url=https://s3.example"
    fill_rate = "20M"

    [remotes.official]
    url = "https://images.example/"

The user's file is $SF_CONFIG, or sf/config.toml in $XDG_CONFIG_HOME (~/.config). Remotes of both files count: those of
/etc first, each in the order in which it stands there; of two with one name the user's URL is right. Commands, servers
and services all read by this.
"""

import os
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from imagestore.errors import Invalid
from imagestore.units import switch

T = TypeVar("T")
_SYSTEM = Path("/etc/sf/config.toml")


@dataclass
class Settings:
    """What one process runs with. `flags` holds what stood on the command line."""

    flags: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def get(self, name: str, default: str = "") -> str:
        """The setting `name`, a list's items with blanks between. Raises Invalid for a file that cannot be read."""
        told = self.flags.get(name) or self.environment.get(f"SF_{name.upper()}")
        found = told or self._file.get(name, "")
        return (" ".join(map(str, found)) if isinstance(found, list) else str(found)) or default

    def parsed(self, name: str, parse: Callable[[str], T], default: str = "") -> T:
        """The setting as a value. Raises Invalid, naming it, where `parse` raises ValueError or Invalid."""
        text = self.get(name, default)
        try:
            return parse(text)
        except (ValueError, Invalid) as err:
            hint = f"a flag, SF_{name.upper()}, or a line of {self.user_file} or {_SYSTEM}"
            raise Invalid(f"configuration: {name} is {text[:80]!r}: {err}", hint=hint) from err

    @property
    def user_file(self) -> Path:
        """The file that `sf remote add` writes."""
        base = self.environment.get("XDG_CONFIG_HOME") or "~/.config"
        return Path(self.environment.get("SF_CONFIG") or Path(base, "sf", "config.toml")).expanduser()

    @property
    def state_dir(self) -> Path:
        return Path(self.get("state_dir", "/var/lib/sf")).expanduser().absolute()

    @property
    def instance_dir(self) -> Path:
        """Guests' disks."""
        return Path(self.get("instance_dir") or self.state_dir / "instances").expanduser().absolute()

    @property
    def cache_dir(self) -> Path:
        """Hints about stores, safe to delete."""
        return Path(self.get("cache_dir", "~/.cache/sf")).expanduser()

    @property
    def tls(self) -> bool:
        """Whether the API of this machine speaks TLS: by default everywhere but on loopback."""
        host = self.get("listen", "127.0.0.1:13000").rpartition(":")[0].strip("[]")
        here = host in ("", "localhost", "::1") or host.startswith("127.")
        return self.parsed("tls", switch, "off" if here else "on") or bool(self.get("tls_cert"))

    def table(self, name: str) -> dict[str, Any]:
        """A table of the files, `[name]`; {} if there is none. Raises Invalid."""
        found = self._file.get(name, {})
        if not isinstance(found, dict):
            raise Invalid(f"{name} in {self.user_file} or {_SYSTEM} is no table")
        return found

    @property
    def store_url(self) -> str:
        """The local store: by default the one under the state directory."""
        return self.stores["local"]

    @property
    def store_is_default(self) -> bool:
        return not self.get("store")

    @property
    def stores(self) -> dict[str, str]:
        """URLs by name in the order in which names are looked up: the local store, then the remotes."""
        first, *more = self.get("store").split() or [(self.state_dir / "store").as_uri()]
        return {"local": first} | {f"store{n}": url for n, url in enumerate(more, 2)} | self.remotes

    @property
    def remotes(self) -> dict[str, str]:
        """URLs of the configured remotes by name, in the order in which they are asked. Raises Invalid."""
        found = self._file["remotes"]
        for name, values in found.items():
            if not isinstance(values, dict) or not isinstance(values.get("url"), str) or name == "local":
                raise Invalid(f"the remote {name!r} in {self.user_file} or {_SYSTEM} has no url, or is taken")
        return {name: values["url"] for name, values in found.items()}

    @cached_property
    def _file(self) -> dict[str, Any]:
        lower, upper = _read(_SYSTEM), _read(self.user_file, named="SF_CONFIG" in self.environment)
        return lower | upper | {"remotes": lower["remotes"] | upper["remotes"]}


def _read(path: Path, *, named: bool = True) -> dict[str, Any]:
    """The file's tables; "remotes" is always there."""
    # As git does: a service that gave up root still has root's home in its environment.
    closed = () if named else (PermissionError,)
    found = dict[str, Any]()
    try:
        with suppress(FileNotFoundError, NotADirectoryError, *closed):
            found = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as err:
        raise Invalid(f"cannot read {path}: {err}") from err
    if not isinstance(found.setdefault("remotes", {}), dict):
        raise Invalid(f"cannot read {path}: remotes are tables, [remotes.NAME]")
    return found
