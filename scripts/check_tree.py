"""What scripts/check asks of the tree beside style and types: rooms small enough to know, and faces that are used.

Usage: check_tree.py [ROOT]. Prints one line for each thing that is wrong, then the sizes; exits 1 if anything was.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("imagestore", "compute", "net", "cli")
FACES = ("imagestore", "imagestore.mirror", "compute", "net")
MODULES, FILE_LINES, PRODUCT_LINES = 14, 350, 37_000


def modules(root: Path) -> list[Path]:
    """Every module of the product."""
    return sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))


def sizes(root: Path) -> Iterator[str]:
    """Rooms with too many modules, files with too many lines, and a product that is too large."""
    rooms = Counter(path.parent for path in modules(root) if path.name != "__init__.py")
    for room, count in sorted(rooms.items()):
        if count > MODULES:
            yield f"{room.relative_to(root)}: {count} modules, more than {MODULES}: it is two rooms"
    lines = {path: len(path.read_bytes().splitlines()) for path in modules(root)}
    for path, count in lines.items():
        if count > FILE_LINES:
            yield f"{path.relative_to(root)}: {count} lines, more than {FILE_LINES}: it has two reasons to change"
    if sum(lines.values()) > PRODUCT_LINES:
        yield f"the product has {sum(lines.values())} lines, more than {PRODUCT_LINES}"


def faces(root: Path) -> Iterator[str]:
    """Imports that go past another package's face."""
    offered = {face: set(_offered(root / face.replace(".", "/") / "__init__.pyi")) for face in FACES}
    for path in modules(root):
        package = path.relative_to(root).parts[0]
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
        whole = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
        for node in nodes:
            if isinstance(node, ast.Import):
                asked = [(name.name, "") for name in node.names if name.name not in FACES]
            elif isinstance(node, ast.Attribute) and (face := ast.unparse(node.value)) in whole & {*FACES}:
                asked = [(face, node.attr)] if f"{face}.{node.attr}" not in FACES else []
            elif isinstance(node, ast.ImportFrom) and node.module:
                asked = [(node.module, name.name) for name in node.names]
            else:
                continue
            for module, name in asked:
                other = module.partition(".")[0]
                if other in PACKAGES and other != package and name not in offered.get(module, ()):
                    where = f"{path.relative_to(root)}:{node.lineno}"
                    yield f"{where}: {name or module} of {module} is not in the face of {other} (its __init__.pyi)"


def _offered(stub: Path) -> Iterator[str]:
    for node in ast.parse(stub.read_bytes()).body:
        if isinstance(node, ast.ImportFrom):
            yield from (name.name for name in node.names)


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    wrong = [*sizes(root), *faces(root)]
    for line in wrong:
        print(line, file=sys.stderr)
    counts = Counter[str]()
    for path in modules(root):
        counts[path.relative_to(root).parts[0]] += len(path.read_bytes().splitlines())
    rooms = ", ".join(f"{package} {counts[package]}" for package in PACKAGES)
    print(f"the product has {sum(counts.values())} lines of Python: {rooms} (at most {PRODUCT_LINES})")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
