"""Machines for tests of `sf` as people type it: each a directory with state, cache and settings of its own."""

import contextlib
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.servers import free_ports

BIN = Path(sys.executable).parent
SF = BIN / "sf"


@dataclass
class Machine:
    """A state directory and settings of its own."""

    path: Path
    faketime: str = ""
    """How far its clock is off: "+8d"."""
    program: tuple[str | Path, ...] = (SF,)

    def sf(self, *words: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a command, which must end with this exit code."""
        done = subprocess.run(
            [*self.program, *words], env=self.environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == code, f"sf {words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    @property
    def environment(self) -> dict[str, str]:
        own = {
            "SF_STATE_DIR": str(self.path / "state"),
            "SF_CACHE_DIR": str(self.path / "cache"),
            "SF_CONFIG": str(self.path / "config.toml"),
            "HOME": str(self.path),
        }
        if self.faketime:
            library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
            own |= {
                "LD_PRELOAD": str(library),
                "FAKETIME": self.faketime,
            }
        return {k: v for k, v in os.environ.items() if not k.startswith("SF_") or "TEST" in k} | own

    @contextlib.contextmanager
    def serving(self, *words: str) -> Iterator[str]:
        """`sf mirror serve` with these options; its URL."""
        port = free_ports(1, 24000)
        process = subprocess.Popen(
            [*self.program, "-q", "mirror", "serve", "--port", str(port), *words], env=self.environment
        )
        url = f"http://127.0.0.1:{port}/"
        try:
            for _ in range(300):
                with contextlib.suppress(OSError), urllib.request.urlopen(url + "livez", timeout=2):
                    break
                time.sleep(0.1)
            else:
                raise AssertionError("the mirror does not come up")
            yield url
        finally:
            process.terminate()
            process.wait(20)


def machine(path: Path) -> Machine:
    path.mkdir()
    return Machine(path)


def run(*words: str | Path, cwd: Path | None = None) -> str:
    """Run a program that is none of ours and must succeed; what it printed."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=cwd)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout
