"""Every regular expression of the tree takes time in proportion to the text, whatever that is.

Shown by its structure, not by a clock. A pattern becomes an automaton of its characters' positions (Glushkov); what
backtracks without end are words that lead through it in several ways (Weideman et al., "Analyzing catastrophic
backtracking behavior in practical regular expression matching", 2016):

- exponentially, where a position leads back to itself in two ways over the same word;
- by a power, where a word leads from p to p, from p to q and from q to q. A search begins with a loop over anything.

Bounded repetitions count as loops: {1,8} of {0,61} took 47 seconds for 43 characters.
"""

import ast
import importlib
import itertools
import re
import re._constants as c  # type: ignore[import-not-found]
import re._parser as parser  # type: ignore[import-not-found]
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compute.cluster.records.networks import check_dns_name
from compute.errors import Invalid
from imagestore.formats.keys import KINDS

ROOT = Path(__file__).resolve().parents[2]
CALLS = {f"re.{verb}" for verb in "compile match fullmatch search sub subn split findall finditer".split()}
OTHER = 256
"""Stands for all characters beyond Latin-1."""
EVERYTHING = frozenset(range(257))
WORD = frozenset(i for i in range(256) if chr(i).isalnum() or i == 95) | {OTHER}
CATEGORIES = {
    c.CATEGORY_DIGIT: frozenset(range(48, 58)) | {OTHER},
    c.CATEGORY_SPACE: frozenset(i for i in range(256) if chr(i).isspace()) | {OTHER},
    c.CATEGORY_WORD: WORD,
    c.CATEGORY_NOT_DIGIT: EVERYTHING - set(range(48, 58)),
    c.CATEGORY_NOT_SPACE: frozenset(i for i in range(257) if i == OTHER or not chr(i).isspace()),
    c.CATEGORY_NOT_WORD: EVERYTHING - WORD | {OTHER},
}


class Automaton:
    """Positions and which may follow which; an edge that was made twice is a word that is read in two ways."""

    def __init__(self, pattern: str | bytes, flags: int, *, search: bool) -> None:
        self.chars: list[frozenset[int]] = []
        self.edges: dict[tuple[int, int], int] = defaultdict(int)
        self.groups: dict[int, Any] = {}
        self.empty_loop = False
        self.bound: set[int] = set()
        parsed = parser.parse(pattern, flags)
        self.flags = flags | parsed.state.flags
        first, last, _ = self.sequence(parsed)
        self.free = set(last) - self.bound if search else set()
        """Where a match may end whatever follows: nobody comes back to try it in another way."""
        if search:
            anything = self.position(EVERYTHING)
            self.edges[anything, anything] += 1
            for position in first:
                self.edges[anything, position] += 1

    def position(self, chars: frozenset[int]) -> int:
        if self.flags & re.IGNORECASE:
            both = {chr(i).swapcase() for i in chars if i < OTHER}
            chars |= {min(ord(char), OTHER) for char in both if len(char) == 1}
        self.chars.append(chars)
        return len(self.chars) - 1

    def join(self, before: list[int], after: list[int]) -> None:
        for edge in itertools.product(before, after):
            self.edges[edge] += 1

    def sequence(self, nodes: Any) -> tuple[list[int], list[int], bool]:
        """(positions that can be first, that can be last, whether nothing at all matches too)."""
        first: list[int] = []
        last: list[int] = []
        nullable = True
        for node in nodes:
            if node[0] in (c.AT, c.ASSERT, c.ASSERT_NOT):
                self.bound.update(last)
            one_first, one_last, one_nullable = self.node(*node)
            self.join(last, one_first)
            first = first + one_first if nullable else first
            last = last + one_last if one_nullable else one_last
            nullable = nullable and one_nullable
        return first, last, nullable

    def node(self, kind: Any, value: Any) -> tuple[list[int], list[int], bool]:
        if kind in (c.LITERAL, c.NOT_LITERAL, c.ANY, c.IN):
            at = self.position(self.charset(kind, value))
            return [at], [at], False
        if kind == c.AT:
            if value == c.AT_BEGINNING and self.flags & re.MULTILINE:
                at = self.position(frozenset({10}))
                return [at], [at], False
            return [], [], True
        if kind in (c.ASSERT, c.ASSERT_NOT):
            self.sequence(value[1])
            return [], [], True
        if kind == c.SUBPATTERN:
            self.groups[value[0]] = value[3]
            return self.sequence(value[3])
        if kind == c.GROUPREF:
            return self.sequence(self.groups[value])
        if kind == c.BRANCH:
            parts = [self.sequence(part) for part in value[1]]
            return (
                [p for part in parts for p in part[0]],
                [p for part in parts for p in part[1]],
                any(part[2] for part in parts),
            )
        if kind in (c.MAX_REPEAT, c.MIN_REPEAT, c.POSSESSIVE_REPEAT):
            low, high, body = value
            if low == high:  # a fixed number of times is no loop
                return self.sequence(list(body) * min(low, 2))
            first, last, nullable = self.sequence(body)
            if high > 1:
                self.empty_loop |= nullable
                self.join(last, first)
            return first, last, nullable or low == 0
        raise AssertionError(f"what is {kind}?")

    def charset(self, kind: Any, value: Any) -> frozenset[int]:
        if kind == c.ANY:
            return EVERYTHING if self.flags & re.DOTALL else EVERYTHING - {10}
        if kind == c.LITERAL:
            return frozenset({min(value, OTHER)})
        if kind == c.NOT_LITERAL:
            return EVERYTHING - {value} | {OTHER}
        found: set[int] = set()
        negated = False
        for inner, what in value:
            if inner == c.NEGATE:
                negated = True
            elif inner == c.LITERAL:
                found.add(min(what, OTHER))
            elif inner == c.RANGE:
                found |= {min(i, OTHER) for i in range(what[0], min(what[1], 300) + 1)} | (
                    {OTHER} if what[1] > 255 else set()
                )
            elif inner == c.CATEGORY:
                found |= CATEGORIES[what]
        return frozenset(EVERYTHING - found | {OTHER} if negated else found)

    def steps(self, *at: int) -> Iterator[tuple[int, ...]]:
        """Where each of several walkers can be after one more character, the same for all."""
        for after in itertools.product(*(self.after[one] for one in at)):
            if frozenset.intersection(*(self.chars[one] for one in after)):
                yield after

    def reaches(self, start: tuple[int, ...], end: tuple[int, ...]) -> bool:
        seen, todo = set(), [start]
        while todo:
            for after in self.steps(*todo.pop()):
                if after == end:
                    return True
                if after not in seen:
                    seen.add(after)
                    todo.append(after)
        return False

    def trouble(self) -> str:
        """ "" if every text takes time in proportion to its length."""
        self.after: dict[int, list[int]] = defaultdict(list)
        for before, after in self.edges:
            self.after[before].append(after)
        if self.empty_loop:
            return "repeats what may be empty"
        loops = [at for at in range(len(self.chars)) if self.reaches((at,), (at,))]
        for (before, after), ways in self.edges.items():
            if ways > 1 and self.reaches((after,), (before,)):
                return "exponential: one loop inside another"
        for at in loops:
            for one, two in {tuple(sorted(pair)) for pair in self.steps(at, at)}:
                if one != two and self.reaches((one, two), (at, at)):
                    return "exponential: two ways around a loop"
        for p, q in itertools.permutations(loops, 2):
            if q not in self.free and self.reaches((p,), (q,)) and self.reaches((p, p, q), (p, q, q)):
                return "by a power: two loops over the same characters"
        return ""


def trouble(pattern: str | bytes, flags: int = 0, *, search: bool = False) -> str:
    return Automaton(pattern, flags, search=search).trouble()


@pytest.mark.parametrize(
    "pattern",
    [
        r"([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.?){1,8}",
        r"(a+)+b",
        r"(a*)*b",
        r"(a|ab|b)+c",
        r"(.+?)\s*$",
        r"\s*\s*x",
        r"a*[a-z]*!",
        r"(\d+,?)+;",
    ],
)
def test_the_check_knows_patterns_that_never_end(pattern: str) -> None:
    assert trouble(pattern)


def test_the_check_knows_a_search_that_begins_with_a_loop() -> None:
    assert trouble(r"\s+x", search=True)
    assert not trouble(r"\s+x")
    assert not trouble(r"\s+", search=True)


def lists() -> list[str]:
    """The patterns of the source lists: pages of strangers are searched with them."""
    files = sorted((ROOT / "imagestore/mirror/sources.d").glob("*.toml"))
    sources = [source for file in files for source in tomllib.loads(file.read_text())["source"]]
    return [source["build"]["pattern"].replace("{arch}", "x86_64") for source in sources if "build" in source]


ELSEWHERE = {
    "kind.rest": lambda: [kind.rest for kind in KINDS],
    "pattern": lists,
    "pattern.replace('{arch}', re.escape(arch))": lists,
}
"""Patterns that are values: where they come from."""


def patterns() -> Iterator[tuple[str, str | bytes, int, bool]]:
    """(file:line, pattern, flags, whether it searches) of every use of `re` in the tree."""
    for path in sorted(
        p for room in ("cli", "compute", "imagestore", "net") for p in (ROOT / room).rglob("*.py")
    ):
        text = path.read_text()
        if "import re\n" not in text:
            continue
        where = path.relative_to(ROOT)
        known = vars(importlib.import_module(".".join(where.with_suffix("").parts))) | {"name": "x"}
        tree = ast.parse(text)
        targets = {
            node.value: ast.unparse(node.targets[0])
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
        }
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call) or ast.unparse(call.func) not in CALLS:
                continue
            verb = ast.unparse(call.func).removeprefix("re.")
            if verb == "compile":
                by = rf"\b{targets[call]}" if call in targets else r"\]\)?(?:\[1\])?"
                uses = re.findall(by + r"\.(search|findall|finditer|subn?|split)\(", text)
                search = bool(uses)
            else:
                search = verb not in ("match", "fullmatch")
            words = {ast.unparse(word) for word in [*call.args, *(k.value for k in call.keywords)]}
            flags = sum(flag for flag in (re.MULTILINE, re.IGNORECASE) if f"re.{flag.name}" in words)
            said = ast.unparse(call.args[0])
            for pattern in ELSEWHERE[said]() if said in ELSEWHERE else [eval(said, known)]:
                yield f"{where}:{call.lineno}", pattern, flags, search


@pytest.mark.parametrize(
    ("pattern", "flags", "search"),
    [pytest.param(*rest, id=place) for place, *rest in patterns()],
)
def test_every_regular_expression_is_linear(pattern: str | bytes, flags: int, search: bool) -> None:
    """E2."""
    assert trouble(pattern, flags, search=search) == ""


def test_a_name_for_dns_that_took_the_server_away_for_a_minute_is_refused() -> None:
    """E2: 43 characters; longer ones than any clock would wait for."""
    for text in ("a" * 43 + "!", "a" * 10_000, "a." * 200, "-".join("a" * 300), "a" * 64, "a..b", ".a", ""):
        with pytest.raises(Invalid):
            check_dns_name(text)
    for text in ("a", "db.internal", "a.b.c.d.e.f.g.h", "A-1.x", "x" * 63 + ".", "xn--bcher-kva.example"):
        check_dns_name(text)
