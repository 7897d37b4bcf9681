"""`sf serve` and `sf completion`."""

import click

from cli.command import Command


@click.command(cls=Command, examples='eval "$(sf completion bash)"\nsf completion zsh > ~/.zfunc/_sf')
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the shell's completion script."""
    from click.shell_completion import get_completion_class

    from cli.main import sf

    found = get_completion_class(shell)
    assert found
    print(found(sf, {}, "sf", "_SF_COMPLETE").source())
