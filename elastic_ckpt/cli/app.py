"""The command ``elastic-ckpt``: its sub-commands, and how errors reach the user."""

from __future__ import annotations

import sys
from typing import Any

import click

from elastic_ckpt import __version__
from elastic_ckpt.core.text import printable
from elastic_ckpt.errors import ElasticCkptError, ExitCode

_COMMANDS = {
    "run": "elastic_ckpt.cli.run",
    "status": "elastic_ckpt.cli.status",
    "list": "elastic_ckpt.cli.listing",
    "verify": "elastic_ckpt.cli.verify",
    "prune": "elastic_ckpt.cli.prune",
    "save": "elastic_ckpt.cli.save",
    "doctor": "elastic_ckpt.cli.doctor",
    "drill": "elastic_ckpt.cli.drill",
    "logs": "elastic_ckpt.cli.logs",
    "adopt": "elastic_ckpt.cli.adopt",
    "slurm": "elastic_ckpt.cli.slurm",
}


class _LazyGroup(click.Group):
    """Imports a command when it is used: ``status`` must not pay for the others."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        import importlib

        command: click.Command = importlib.import_module(_COMMANDS[cmd_name]).command
        return command


@click.group(
    cls=_LazyGroup, no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="elastic-ckpt")
def group() -> None:
    """Training that survives its machines: run, preempt, seal, resume.

    \b
      elastic-ckpt run --dir CHECKPOINTS --nproc 2 -- train.py --epochs 3
      elastic-ckpt status CHECKPOINTS

    DIR defaults to $ELASTIC_CKPT_DIR.
    """


def main() -> None:
    """Run the command line and exit with the code that the outcome owns."""
    sys.exit(_run())


def _run() -> int:
    try:
        result: Any = group.main(prog_name="elastic-ckpt", standalone_mode=False)
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except click.Abort:
        return 130
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context else ""
        _complain(f"{error.format_message()}{hint}")
        return int(ExitCode.USAGE)
    except ElasticCkptError as error:
        _complain(str(error))
        return int(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _complain(f"{place}{error.strerror or error}")
        return int(ExitCode.UNAVAILABLE)
    return int(result) if isinstance(result, int) else 0


def _complain(message: str) -> None:
    click.echo(f"elastic-ckpt: error: {printable(message, 4000)}", err=True)
