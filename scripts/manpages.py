"""Writes sf(1) and a page for each of its nouns out of the commands' own help: manpages.py DIRECTORY."""

import sys
from collections.abc import Iterator
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def escaped(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join(f"\\&{line}" if line[:1] in (".", "'") else line for line in text.splitlines())


def paragraphs(text: str) -> Iterator[str]:
    """click's help: a paragraph that begins with \\b keeps its lines."""
    for part in (text or "").strip().split("\n\n"):
        if part.startswith("\b"):
            yield f".PP\n.nf\n{escaped(part[1:].strip(chr(10)))}\n.fi"
        elif part.strip():
            yield f".PP\n{escaped(' '.join(part.split()))}"


def parameters(command: click.Command, context: click.Context) -> Iterator[str]:
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
        if record is not None:
            yield f".TP\n\\fB{escaped(record[0])}\\fR\n{escaped(record[1]) or chr(92) + '&'}"


def described(command: click.Command, context: click.Context) -> Iterator[str]:
    yield from paragraphs(command.help or "")
    yield from parameters(command, context)
    if examples := getattr(command, "examples", ""):
        lines = "\n".join(line.strip() for line in examples.splitlines())
        yield f".PP\nExamples:\n.PP\n.nf\n.RS\n{escaped(lines)}\n.RE\n.fi"


def usage(command: click.Command, context: click.Context) -> str:
    return escaped(" ".join([context.command_path, *command.collect_usage_pieces(context)]))


def page(command: click.Command, context: click.Context, others: list[str]) -> str:
    title = context.command_path.replace(" ", "-")
    short = command.get_short_help_str(200).rstrip(".")
    lines = [f'.TH {title.upper()} 1 "" "sf" "sf"', f".SH NAME\n{title} \\- {escaped(short)}"]
    lines += [f".SH SYNOPSIS\n{usage(command, context)}", ".SH DESCRIPTION", *described(command, context)]
    if isinstance(command, click.Group):
        lines.append(".SH COMMANDS")
        for name in command.list_commands(context):
            one = command.get_command(context, name)
            assert one is not None
            if one.hidden:
                continue
            with click.Context(one, info_name=name, parent=context) as inside:
                if context.parent is None:
                    lines.append(
                        f".TP\n\\fB{escaped(inside.command_path)}\\fR(1)\n{escaped(one.get_short_help_str(200))}"
                    )
                else:
                    lines += [f".SS {usage(one, inside)}", *described(one, inside)]
    lines += list(paragraphs(command.epilog or ""))
    lines.append(
        ".SH SEE ALSO\n" + ", ".join(f"\\fB{escaped(name)}\\fR(1)" for name in others if name != title)
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    from cli.main import sf

    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    with click.Context(sf, info_name="sf") as top:
        commands = {name: sf.get_command(top, name) for name in sf.list_commands(top)}
        (directory / "sf.1").write_text(page(sf, top, [f"sf-{name}" for name in commands]))
        for name, command in commands.items():
            assert command is not None
            with click.Context(command, info_name=name, parent=top) as context:
                (directory / f"sf-{name}.1").write_text(page(command, context, ["sf"]))


if __name__ == "__main__":
    main()
