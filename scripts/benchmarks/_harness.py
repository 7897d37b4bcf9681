"""What every benchmark is written with.

A benchmark is a module of this package:

    '''One line that `scripts/bench` prints in its list.'''
    from benchmarks._harness import Bench, Contestant

    def run(bench: Bench) -> None:
        raw = bench.dir("data") / "disk.raw"
        push, restic = bench.contest(
            [Contestant("push", [bench.sf, …], before=wipe), Contestant("restic", ["restic", …], before=wipe)]
        )
        bench.ratio("push_vs_restic", push, restic, at_most=0.45)
        bench.number("new_bytes", 1234, "B")

Each run is a process of its own (a callable runs in a forked child), so that wall clock, CPU time and
peak memory come from the kernel (os.wait4) and cover every process it waited for. Contestants take
turns, in an order that is turned round in every second round: what else happens on the machine then hits
all of them. The figure is the median; the table shows the smallest and largest as well, and no run is
left out. A run that fails ends the benchmark with its last words, after a table of what was measured
until then.
"""

import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]

Work = Sequence[str | Path] | Callable[[], Any]


class Failed(Exception):
    """A contestant, or what prepares its run, did not end with success."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """One thing to measure: an argument vector, or a callable that runs in a forked child."""

    name: str
    work: Work
    before: Callable[[], object] | None = None
    """Runs, unmeasured, ahead of every round: removes the last round's output, drops a cache."""
    after: Callable[[], object] | None = None
    """Runs, unmeasured, after every round: a check of the result."""
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    ok: tuple[int, ...] = (0,)
    """Exit codes that count as success."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One run. `result` is what the callable returned, or the standard output of the command."""

    wall_s: float
    cpu_s: float
    rss_mib: float
    result: Any


@dataclass(frozen=True, slots=True)
class Measurement:
    """All runs of one contestant; the properties are medians."""

    name: str
    samples: tuple[Sample, ...]

    @property
    def wall_s(self) -> float:
        return statistics.median(s.wall_s for s in self.samples)

    @property
    def cpu_s(self) -> float:
        return statistics.median(s.cpu_s for s in self.samples)

    @property
    def rss_mib(self) -> float:
        return statistics.median(s.rss_mib for s in self.samples)

    @property
    def result(self) -> Any:
        """What the last run returned or printed."""
        return self.samples[-1].result


@dataclass(frozen=True, slots=True)
class Figure:
    """A named number, with its target where there is one."""

    name: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def met(self) -> bool | None:
        """None where nothing was asked."""
        if self.at_most is None and self.at_least is None:
            return None
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)


class Bench:
    """Handed to `run`. Keeps figures, temporary directories, and what was promised about the peers."""

    def __init__(self, name: str, *, rounds: int | None = None, keep: bool = False) -> None:
        self.name = name
        self.sf = str(ROOT / ".venv/bin/sf")
        """The command under test."""
        self.python = sys.executable
        self.measurements: list[Measurement] = []
        self.figures: list[Figure] = []
        self.versions: dict[str, str] = {}
        self.notes: list[str] = []
        self._rounds = rounds
        self._stack = ExitStack()
        """Closed at the end: `bench.cleanup(fn)` adds to it."""
        self._root = Path(tempfile.mkdtemp(prefix=f"sf-bench-{name}-", dir=os.environ.get("SF_BENCH_DIR")))
        if keep:
            self._stack.callback(lambda: self.say(f"kept {self._root}"))
        else:
            self._stack.callback(shutil.rmtree, self._root, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stack.close()

    def cleanup(self, function: Callable[..., object], *args: Any) -> None:
        """Run `function(*args)` at the end, also after a failure; the last one added runs first."""
        self._stack.callback(function, *args)

    def say(self, text: str) -> None:
        """A line for the person who waits."""
        print(f"bench {self.name}: {text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A line under the table: what a reader must know to judge the figures."""
        self.notes.append(text)

    def dir(self, name: str) -> Path:
        """A directory of that name, made empty when first asked for, removed at the end."""
        path = self._root / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def fresh(self, name: str) -> Path:
        """The same directory, emptied."""
        shutil.rmtree(self._root / name, ignore_errors=True)
        return self.dir(name)

    def version(self, peer: str, argv: Sequence[str]) -> None:
        """Note a peer's version: the first line that `argv` prints."""
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        self.versions[peer] = ((done.stdout or done.stderr).strip().splitlines() or ["?"])[0]

    def run(
        self, argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> str:
        """Run a command that is not measured; its standard output. Raises Failed."""
        done = subprocess.run(
            [str(a) for a in argv], env={**os.environ, **(env or {})}, cwd=cwd, capture_output=True, text=True
        )
        if done.returncode:
            raise Failed(
                f"{' '.join(map(str, argv))} ended with {done.returncode}: {done.stderr.strip()[-2000:]}"
            )
        return done.stdout

    def apart(self, work: Callable[[], Any]) -> Any:
        """Run a callable in a forked child, unmeasured: what it allocates is in nobody's peak."""
        return _measure(Contestant("a preparation", work)).result

    def contest(self, contestants: Sequence[Contestant], rounds: int = 3) -> list[Measurement]:
        """Measure all of them `rounds` times each (--rounds wins), taking turns; in their order."""
        rounds = self._rounds or rounds
        samples: dict[str, list[Sample]] = {c.name: [] for c in contestants}
        for number in range(rounds):
            for contestant in contestants if number % 2 == 0 else list(reversed(contestants)):
                if contestant.before:
                    contestant.before()
                sample = _measure(contestant)
                if contestant.after:
                    contestant.after()
                samples[contestant.name].append(sample)
                took = f"{sample.wall_s:.3f} s, {sample.rss_mib:.0f} MiB"
                self.say(f"{contestant.name} {number + 1}/{rounds}: {took}")
        found = [Measurement(c.name, tuple(samples[c.name])) for c in contestants]
        self.measurements += found
        return found

    def measure(
        self,
        name: str,
        work: Work,
        *,
        rounds: int = 3,
        before: Callable[[], object] | None = None,
        after: Callable[[], object] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Measurement:
        """A contest of one."""
        return self.contest([Contestant(name, work, before, after, env or {}, cwd)], rounds)[0]

    def rounds(self, otherwise: int) -> int:
        """As many as `--rounds` says."""
        return self._rounds or otherwise

    def number(
        self,
        name: str,
        value: float,
        unit: str = "",
        *,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> float:
        """Keep one figure, with the target it must meet if there is one."""
        self.figures.append(Figure(name, value, unit, at_most, at_least))
        return value

    def ratio(
        self,
        name: str,
        ours: Measurement | float,
        theirs: Measurement | float,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> float:
        """Keep `ours / theirs` (wall clock where they are measurements)."""
        above = ours.wall_s if isinstance(ours, Measurement) else ours
        below = theirs.wall_s if isinstance(theirs, Measurement) else theirs
        return self.number(name, above / below, "×", at_most=at_most, at_least=at_least)

    def flat(self) -> dict[str, float]:
        """Figure name -> number: NAME_s, NAME_cpu_s, NAME_rss_mib of every measurement, then the numbers."""
        flat: dict[str, float] = {}
        for m in self.measurements:
            flat |= {
                f"{m.name}_s": round(m.wall_s, 6),
                f"{m.name}_cpu_s": round(m.cpu_s, 6),
                f"{m.name}_rss_mib": round(m.rss_mib, 1),
            }
        return flat | {f.name: round(f.value, 6) for f in self.figures}

    def report(self) -> None:
        """Print the tables to standard output."""
        from rich.console import Console
        from rich.table import Table

        console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
        if self.measurements:
            table = Table(title=f"{self.name}: medians", title_justify="left")
            table.add_column("what", no_wrap=True)
            for column in ("wall s", "min … max", "CPU s", "peak MiB", "runs"):
                table.add_column(column, justify="right", no_wrap=True)
            for m in self.measurements:
                walls = [s.wall_s for s in m.samples]
                spread = f"{min(walls):.3f} … {max(walls):.3f}"
                runs = str(len(m.samples))
                table.add_row(m.name, f"{m.wall_s:.3f}", spread, f"{m.cpu_s:.3f}", f"{m.rss_mib:.0f}", runs)
            console.print(table)
        if self.figures:
            table = Table(title="figures", title_justify="left")
            table.add_column("figure", no_wrap=True)
            table.add_column("value", justify="right", no_wrap=True)
            table.add_column("wanted", justify="right", no_wrap=True)
            table.add_column("", no_wrap=True)
            for f in self.figures:
                bounds = (("≤", f.at_most), ("≥", f.at_least))
                wanted = " ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
                verdict = {None: "", True: "[green]met[/]", False: "[red]missed[/]"}[f.met]
                table.add_row(f.name, f"{_plain(f.value)} {f.unit}".strip(), wanted, verdict)
            console.print(table)
        for peer, version in self.versions.items():
            console.print(f"{peer}: {version}", markup=False)
        for note in self.notes:
            console.print(note, markup=False)
        console.print(
            f"machine: {os.cpu_count()} CPUs, {_memory_gib():.0f} GiB, {os.uname().release}", markup=False
        )

    def write_json(self, path: Path) -> None:
        path.write_text(json.dumps(self.flat(), indent=1) + "\n")


def _plain(value: float) -> str:
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3f}"


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _measure(contestant: Contestant) -> Sample:
    """Run it once in a process of its own. Raises Failed."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.sync()  # what the one before left to be written is not for this one's fsync to wait for
        started = time.perf_counter()
        if callable(contestant.work):
            pid = _fork(contestant, out.fileno(), err.fileno())
        else:
            process = subprocess.Popen(
                [str(a) for a in contestant.work],
                env={**os.environ, **contestant.env},
                cwd=contestant.cwd,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
            pid = process.pid
        _, status, usage = os.wait4(pid, 0)
        wall_s = time.perf_counter() - started
        code = os.waitstatus_to_exitcode(status)
        if not callable(contestant.work):
            process.returncode = code
        out.seek(0)
        err.seek(0)
        if code not in contestant.ok:
            raise Failed(
                f"{contestant.name} ended with {code}: {err.read().decode(errors='replace')[-3000:]}"
            )
        printed = out.read()
        result = pickle.loads(printed) if callable(contestant.work) else printed.decode(errors="replace")
        # ru_maxrss is in KiB, and starts at what this process held when it forked: the harness stays small.
        return Sample(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, result)


def _fork(contestant: Contestant, out: int, err: int) -> int:
    """Start the callable in a child whose result comes back pickled through `out`."""
    assert callable(contestant.work)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(err, 1)
        os.dup2(err, 2)
        os.environ.update(contestant.env)
        if contestant.cwd:
            os.chdir(contestant.cwd)
        data = pickle.dumps(contestant.work())
        os.write(out, data) if len(data) < 1 << 20 else os.fdopen(out, "wb", closefd=False).write(data)
        code = 0
    except BaseException:  # noqa: BLE001 - a forked child must not return into the parent's stack
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
