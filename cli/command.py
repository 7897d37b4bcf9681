"""What every command is made of: lazily imported groups, and parameters that follow from a function's signature.

A command's function names what it needs; the parameters in `_SHARED` are added for it:

    @network.add(examples="sf network ls")
    def ls(everything: bool, form: str) -> None: …        # gets --all and --format

A group says which options all its commands have: `Group(needs=API)`.
"""

import importlib
import inspect
import platform
from collections.abc import Callable, Sequence
from typing import Any

import click
from click import Argument, Option

import imagestore

_Function = Callable[..., Any]
API = ("namespace", "api_url")
STORE = ("store",)


def _keep(ctx: click.Context, param: click.Parameter, value: str | bool | None) -> None:
    if value:
        ctx.ensure_object(dict)[str(param.name)] = str(value)


_KEPT: dict[str, Any] = {"expose_value": False, "callback": _keep}
_FORMATS = click.Choice(["table", "json", "name"])
_SHARED: dict[str, tuple[str, dict[str, Any]]] = {
    "name": ("", {}),
    "names": ("", {"nargs": -1, "required": True, "metavar": "NAME..."}),
    "form": ("--format", {"type": _FORMATS, "default": "table", "show_default": True}),
    "everything": ("--all", {"is_flag": True, "help": "Deleted ones too."}),
    "force": ("--force", {"is_flag": True, "help": "Do not ask."}),
    "limit": ("--limit", {"default": 100, "show_default": True}),
    "interface": ("--interface", {"metavar": "ADDRESS|MAC|UUID", "help": "Where a guest has more than one."}),
    "architecture": ("--arch", {"default": platform.machine(), "show_default": True}),
    "single_writer": (
        "--single-writer",
        {"is_flag": True, "help": "Nobody else changes the store meanwhile."},
    ),
    "store": (
        "--store",
        {"metavar": "URL", "help": "/path, s3:// or https://; default: this machine's.", **_KEPT},
    ),
    "namespace": ("--namespace", {"metavar": "NAME", "help": "Whom to act as; default: system.", **_KEPT}),
    "api_url": ("--api-url", {"metavar": "URL", "help": "Default: http://127.0.0.1:13000.", **_KEPT}),
    "quiet": ("-q --quiet", {"is_flag": True, "help": "No progress, only results and errors.", **_KEPT}),
    "debug": ("--debug", {"is_flag": True, "help": "Show the traceback of an error.", **_KEPT}),
}  # what many commands have: an argument of that name, or the option whose flags stand here


def shared(name: str) -> click.Parameter:
    """The parameter that a name stands for."""
    flags, attributes = _SHARED[name]
    return Option([*flags.split(), name], **attributes) if flags else Argument([name], **attributes)


class _Unit(click.ParamType[Any]):
    """A size or a duration, in the one form that settings have, too. `bare`: what a bare number counts."""

    def __init__(self, name: str, bare: str) -> None:
        self.name, self._bare = name, bare

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            if self.name == "size":
                return imagestore.size_bytes(str(value), self._bare)
            return imagestore.duration_s(str(value))
        except imagestore.Invalid as error:
            self.fail(f"{error}: {error.hint}", param, ctx)


SIZE, MEBIBYTES, GIBIBYTES = (_Unit("size", bare) for bare in ("", "M", "G"))  # bytes
DURATION = _Unit("duration", "s")  # seconds


def pairs(texts: Sequence[str]) -> dict[str, str]:
    """Of options KEY=VALUE. Raises UsageError."""
    if wrong := [text for text in texts if "=" not in text]:
        raise click.UsageError(f"{wrong[0]} is not KEY=VALUE")
    return dict(text.partition("=")[::2] for text in texts)


def kept(*flags: str, **attributes: Any) -> Callable[[_Function], _Function]:
    """An option that is a setting: it comes before the variable and the files of its name."""
    return click.option(*flags, **_KEPT, **attributes)


class Command(click.Command):
    """A command with the parameters its function asks for, and its examples at the end of its help."""

    def __init__(self, *args: Any, examples: str = "", needs: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples
        declared = {str(p.name): p for p in self.params}
        asked = inspect.signature(self.callback).parameters if self.callback else {}
        names = [name for name in asked if name in declared or name in _SHARED]
        wanted = [declared.pop(name) if name in declared else shared(name) for name in names]
        self.params = [*wanted, *declared.values(), *map(shared, (*needs, "quiet", "debug"))]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for line in self.examples.splitlines():
                formatter.write(f"{'':>{formatter.current_indent}}{line.strip()}\n")


class Group(click.Group):
    """Commands in the order in which they are written; those in `lazy` are imported when they are used."""

    def __init__(self, *args: Any, needs: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.needs = needs
        self.lazy: dict[str, tuple[str, str]] = {}  # name -> ("module:attribute", short help)

    def add(self, name: str | None = None, **attributes: Any) -> Callable[[_Function], click.Command]:
        """Decorates the function of a new command."""
        return super().command(name, cls=Command, needs=self.needs, **attributes)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.commands, *self.lazy]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.lazy:
            return super().get_command(ctx, cmd_name)
        module, attribute = self.lazy[cmd_name][0].split(":")
        found: click.Command = getattr(importlib.import_module(module), attribute)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        room = formatter.width - 6 - max(map(len, self.list_commands(ctx)))
        own = ((n, c.get_short_help_str(room)) for n, c in self.commands.items() if not c.hidden)
        with formatter.section("Commands"):
            formatter.write_dl([*own, *((name, text) for name, (_, text) in self.lazy.items())])


def flag(name: str) -> str:
    """A flag that many commands have, as it stood on the command line."""
    return str(click.get_current_context().ensure_object(dict).get(name, ""))


def settings() -> "imagestore.Settings":
    """The settings of this invocation, in which flags come first."""
    context = click.get_current_context()
    told = imagestore.Settings(context.ensure_object(dict))
    found: imagestore.Settings = context.meta.setdefault("sf.settings", told)
    return found
