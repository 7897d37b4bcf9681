"""One reader of settings and of units, for commands, servers and services."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from compute import config
from imagestore import Invalid, Settings, settings
from imagestore.cache.imaged import options_of
from imagestore.units import duration_s, size_bytes


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(the machine's file, the user's file in XDG_CONFIG_HOME), both of them empty."""
    for name in [name for name in os.environ if name.startswith(("SF_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(settings, "_SYSTEM", tmp_path / "etc.toml")
    (tmp_path / "etc.toml").touch()
    user = tmp_path / "xdg/sf/config.toml"
    user.parent.mkdir(parents=True)
    user.touch()
    return tmp_path / "etc.toml", user


def test_every_reader_honours_xdg_config_home(files: tuple[Path, Path]) -> None:
    files[1].write_text('store = "/srv/images"\nread_ahead = 5\nfill_rate = "20M"\ncache_dir = "~/hints"\n')
    found = Settings()
    assert found.store_url == "/srv/images"
    assert config.load(found).stores == (("local", "/srv/images"),)
    assert config.load(found).images == options_of(found)
    assert (options_of(found).read_ahead, options_of(found).fill_bytes_s) == (5, 20 << 20)
    assert found.cache_dir == Path("~/hints").expanduser()


def test_what_a_file_says_counts_where_it_is_nought_or_no(files: tuple[Path, Path]) -> None:
    files[0].write_text("peer_port = 0\nmemory_reserve_mib = 0\nguests = false\ntls = true\nread_ahead = 7\n")
    files[1].write_text("read_ahead = 0\n")
    found = config.load(Settings())
    assert (found.peer_port, found.memory_reserve_mib, found.images.read_ahead) == (0, 0, 0)
    assert (found.guests, found.tls) == (False, True)
    assert not config.load(Settings({"listen": "0.0.0.0:1", "tls": "no"})).tls
    with pytest.raises(Invalid, match=r"tls is 'of': neither yes nor no"):
        config.load(Settings({"tls": "of"}))


def test_remotes_of_both_files_are_asked_by_commands_servers_and_services(files: tuple[Path, Path]) -> None:
    files[0].write_text('[remotes.office]\nurl = "https://a/"\n[remotes.lab]\nurl = "https://b/"\n')
    files[1].write_text(
        'store = "/s"\n[remotes.mine]\nurl = "https://c/"\n[remotes.office]\nurl = "https://d/"\n'
    )
    wanted = [("local", "/s"), ("office", "https://d/"), ("lab", "https://b/"), ("mine", "https://c/")]
    assert list(Settings().stores.items()) == list(config.load(Settings()).stores) == wanted


@pytest.mark.parametrize(
    "text", ["remotes = 3", "[remotes]\nlab = 3", "[remotes.lab]\nurl = 3", "[remotes.local]\nurl = '/x'"]
)
def test_a_remote_without_a_url_is_an_error_that_names_the_file(files: tuple[Path, Path], text: str) -> None:
    files[1].write_text(text)
    with pytest.raises(Invalid, match=r"config\.toml"):
        assert Settings().remotes


def test_the_file_in_a_home_that_is_closed_to_us_is_not_ours(files: tuple[Path, Path]) -> None:
    """A service that gave up root still has root's HOME; what SF_CONFIG names must be readable."""
    program = (
        "import os; os.setuid(65534); from imagestore import Settings; print(Settings().get('fill', 'now'))"
    )
    files[1].write_text('fill = "never"\n')
    files[1].parent.chmod(0o700)
    if os.geteuid() != 0:
        pytest.skip("root only")
    for environment, said in ((dict(os.environ), 0), ({**os.environ, "SF_CONFIG": str(files[1])}, 1)):
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (said, "" if said else "now\n"), done.stderr


@pytest.mark.parametrize(
    ("text", "unit", "size"),
    [
        ("512M", "", 512 << 20),
        ("8G", "", 8 << 30),
        ("8GiB", "", 8 << 30),
        ("1.5T", "", 3 << 39),
        ("100", "M", 100 << 20),
    ]
    + [("20m", "", 20 << 20), ("7", "", 7), ("0", "G", 0), ("4096B", "", 4096)],
)
def test_sizes(text: str, unit: str, size: int) -> None:
    assert size_bytes(text, unit) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("2h", 7200), ("1d", 86400), ("4w", 2419200), ("30.5", 30.5)],
)
def test_durations(text: str, seconds: float) -> None:
    assert duration_s(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "1e9", "٣", "9" * 50, "nan", "G", "1 month", "6M ", "1mo", "1h30m"]
)
def test_what_is_neither_is_invalid(text: str) -> None:
    with pytest.raises(Invalid):
        duration_s(text)
    if text.strip() != "6M":
        with pytest.raises(Invalid):
            size_bytes(text)
