"""scripts/check refuses what the tree must not become; each rule is broken once, in a copy."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("imagestore", "compute", "net", "cli")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def checked(tree: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, ROOT / "scripts/check_tree.py", tree]
    return subprocess.run(argv, capture_output=True, text=True)


def linted(tree: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command as lint; lint()"
    argv = [sys.executable, "-P", "-c", code, "--no-cache"]
    return subprocess.run(
        argv, cwd=tree, capture_output=True, text=True, env={"PATH": "", "PYTHONPATH": str(tree)}
    )


def test_the_tree_as_it_is_passes(tree: Path) -> None:
    assert checked(tree).returncode == 0, checked(tree).stderr
    assert linted(tree).returncode == 0, linted(tree).stdout


def test_a_room_of_fifteen_modules_is_refused(tree: Path) -> None:
    for number in range(15 - len([p for p in (tree / "net/kernel").glob("*.py") if p.name != "__init__.py"])):
        (tree / f"net/kernel/more{number}.py").write_text('"""One more."""\n')
    assert "net/kernel: 15 modules" in checked(tree).stderr


def test_a_file_of_351_lines_is_refused(tree: Path) -> None:
    (tree / "net/long.py").write_text("x = 1\n" * 351)
    done = checked(tree)
    assert done.returncode == 1
    assert "net/long.py: 351 lines" in done.stderr


def test_a_product_of_more_than_37000_lines_is_refused(tree: Path) -> None:
    for number in range(12):
        (tree / f"compute/wire/w{number}.py").write_text("x = 1\n" * 350)
    many = sum(
        len(p.read_bytes().splitlines()) for package in PACKAGES for p in (tree / package).rglob("*.py")
    )
    for number in range((37_001 - many) // 350 + 1):
        (tree / f"cli/{number}").mkdir()
        (tree / f"cli/{number}/w.py").write_text("x = 1\n" * 350)
    assert "more than 37000" in checked(tree).stderr


def test_an_import_past_a_face_is_refused(tree: Path) -> None:
    (tree / "cli/past.py").write_text("from imagestore.formats.digest import Digest\n")
    assert "cli/past.py:1: Digest of imagestore.formats.digest is not in the face" in checked(tree).stderr


def test_an_attribute_past_a_face_is_refused_and_one_of_it_is_not(tree: Path) -> None:
    lines = (
        "import imagestore",
        "import imagestore.mirror",
        "imagestore.mirror.signing",
        "imagestore.formats",
    )
    (tree / "cli/past.py").write_text("".join(f"{line}\n" for line in lines))
    said = "cli/past.py:4: formats of imagestore is not in the face of imagestore (its __init__.pyi)"
    # Of this file alone: a tree that has almost as many lines as it may would be over it by these four.
    assert [line for line in checked(tree).stderr.splitlines() if "past.py" in line] == [said]


def test_an_upward_import_is_refused(tree: Path) -> None:
    upward = tree / "imagestore/formats/digest.py"
    upward.write_text(upward.read_text() + "\nfrom imagestore.push import push  # noqa\n")
    done = linted(tree)
    assert done.returncode == 1
    assert "imagestore.formats is not allowed to import imagestore.push" in done.stdout


@pytest.mark.parametrize("package", ["imagestore", "imagestore.mirror", "compute", "net"])
def test_every_name_of_a_face_is_there(package: str) -> None:
    code = f"import {package} as face\nfor name in dir(face): getattr(face, name)\nassert face.__all__"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_is_imported_that_another_project_keeps_to_itself() -> None:
    """It may be another in the next release; which one somebody has is not ours to say."""
    private = re.compile(r"^\s*(?:from|import) [\w.]*\._\w.*", re.MULTILINE)
    read = (path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    assert [found for text in read for found in private.findall(text)] == []
