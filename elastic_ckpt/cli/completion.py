"""``elastic-ckpt completion``."""

from __future__ import annotations

from typing import Final

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

_SHELLS: Final[dict[str, type[ShellComplete]]] = {
    "bash": BashComplete,
    "zsh": ZshComplete,
    "fish": FishComplete,
}


@click.command("completion")
@click.argument("shell", type=click.Choice(list(_SHELLS)))
def command(shell: str) -> int:
    """Print a shell's completion script.

    \b
      eval "$(elastic-ckpt completion bash)"       # in ~/.bashrc
      eval "$(elastic-ckpt completion zsh)"        # in ~/.zshrc, after compinit
      elastic-ckpt completion fish > ~/.config/fish/completions/elastic-ckpt.fish

    A new shell then completes commands, options, their choices, and paths.
    """
    from elastic_ckpt.cli.app import group

    completion = _SHELLS[shell](group, {}, "elastic-ckpt", "_ELASTIC_CKPT_COMPLETE")
    click.echo(completion.source(), nl=False)
    return 0
