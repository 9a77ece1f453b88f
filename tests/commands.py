"""Every command of the command line, by its full name."""

from __future__ import annotations

from collections.abc import Iterator

import click

from elastic_ckpt.cli.app import group

PROGRAM = "elastic-ckpt"


def walk(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """Yield a command and all its subcommands with their full names."""
    yield name, command
    if isinstance(command, click.Group):
        with click.Context(command) as context:
            for sub in command.list_commands(context):
                found = command.get_command(context, sub)
                assert found is not None
                yield from walk(found, f"{name} {sub}")


COMMANDS = dict(walk(group, PROGRAM))
