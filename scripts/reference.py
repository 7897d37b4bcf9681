"""Writes docs/reference/: every command with its help, every REST call with its parameters, out of the code itself.

Usage: reference.py [--check]. With --check nothing is written; exits 1 when what is there is not what the code says.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
WIDTH = 100


def commands() -> Iterator[str]:
    """The whole `sf --help`, group by group."""
    from cli.main import sf

    yield "# Commands\n\nMade by scripts/reference.py out of the commands' own help.\n"
    yield _help(sf, "sf", None)
    with click.Context(sf, info_name="sf") as top:
        for name in sf.list_commands(top):
            command = sf.get_command(top, name)
            assert command is not None
            yield f"\n## sf {name}\n"
            yield _help(command, name, top)
            if isinstance(command, click.Group):
                with click.Context(command, info_name=name, parent=top) as inside:
                    for verb in command.list_commands(inside):
                        one = command.get_command(inside, verb)
                        assert one is not None
                        if not one.hidden:
                            yield f"\n### sf {name} {verb}\n"
                            yield _help(one, verb, inside)


def _help(command: click.Command, name: str, parent: click.Context | None) -> str:
    context = click.Context(
        command, info_name=name, parent=parent, max_content_width=WIDTH, terminal_width=WIDTH
    )
    with context:
        return f"```text\n{command.get_help(context).rstrip()}\n```\n"


def calls() -> Iterator[str]:
    """Every route of the REST API out of its OpenAPI."""
    from compute.api.app import build

    services: Any = SimpleNamespace(store=None)
    schema = build(services).openapi()
    parts = schema.get("components", {}).get("schemas", {})
    yield "# REST API\n\nMade by scripts/reference.py out of the server's own OpenAPI (`GET /openapi.json`).\n"
    last = ""
    for path, verbs in sorted(schema["paths"].items()):
        if (noun := path.split("/")[1]) != last:
            last = noun
            yield f"\n## /{noun}\n"
        for verb, call in verbs.items():
            yield f"\n### {verb.upper()} {path}\n\n{call.get('description', '').strip()}\n"
            fields = [
                f"| `{p['name']}` | {p['in']} | {_kind(p['schema'])} | {'yes' if p.get('required') else ''} |"
                for p in call.get("parameters", ())
            ]
            fields += list(_body(call.get("requestBody", {}), parts))
            if fields:
                yield "\n".join(("| field | in | type | needed |", "|---|---|---|---|", *fields)) + "\n"


def _body(body: dict[str, Any], parts: dict[str, Any]) -> Iterator[str]:
    for content in body.get("content", {}).values():
        schema = _resolved(content.get("schema", {}), parts)
        for name, one in schema.get("properties", {}).items():
            needed = "yes" if name in schema.get("required", ()) else ""
            yield f"| `{name}` | body | {_kind(one)} | {needed} |"


def _resolved(schema: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    for one in (schema, *schema.get("anyOf", ()), *schema.get("allOf", ())):
        if "$ref" in one:
            found: dict[str, Any] = parts[one["$ref"].rpartition("/")[2]]
            return found
    return schema


def _kind(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return str(schema.get("type", "any"))


def main() -> None:
    wrong = []
    for name, lines in (("commands.md", commands()), ("rest.md", calls())):
        path, text = ROOT / "docs" / "reference" / name, "\n".join(lines).replace("\n\n\n", "\n\n")
        if path.is_file() and path.read_text() == text:
            continue
        wrong.append(str(path.relative_to(ROOT)))
        if "--check" not in sys.argv:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    for one in wrong:
        print(
            f"{one}: {'is not what the code says; run scripts/reference.py' if '--check' in sys.argv else 'written'}"
        )
    sys.exit(bool(wrong) and "--check" in sys.argv)


if __name__ == "__main__":
    main()
