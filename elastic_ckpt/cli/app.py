"""The command ``elastic-ckpt``: its subcommands, and how errors are reported."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Final

import click
from click.exceptions import NoArgsIsHelpError

from elastic_ckpt import __version__
from elastic_ckpt.errors import ElasticCkptError, ExitCode, next_steps
from elastic_ckpt.util.journald import Priority, marked
from elastic_ckpt.util.outlet import EXIT_SECONDS, print_error
from elastic_ckpt.util.text import printable

SECTIONS: Final[Mapping[str, Mapping[str, str]]] = {
    "Run a job": {
        "run": "elastic_ckpt.cli.run.command",
        "save": "elastic_ckpt.cli.save",
        "nodes": "elastic_ckpt.cli.nodes",
        "drill": "elastic_ckpt.cli.drill",
    },
    "Inspect it": {
        "status": "elastic_ckpt.cli.status.command",
        "report": "elastic_ckpt.cli.report.command",
        "logs": "elastic_ckpt.cli.logs",
    },
    "Manage its checkpoints": {
        "list": "elastic_ckpt.cli.listing",
        "verify": "elastic_ckpt.cli.verify",
        "replay": "elastic_ckpt.cli.replay.command",
        "prune": "elastic_ckpt.cli.prune",
        "restore": "elastic_ckpt.cli.restore",
        "adopt": "elastic_ckpt.cli.adopt",
    },
    "Copy them": {
        "push": "elastic_ckpt.cli.bucket.push",
        "pull": "elastic_ckpt.cli.bucket.pull",
        "copy": "elastic_ckpt.cli.bucket.copy",
    },
    "Set up a machine": {
        "doctor": "elastic_ckpt.cli.doctor.command",
        "slurm": "elastic_ckpt.cli.slurm.command",
        "systemd": "elastic_ckpt.cli.systemd.command",
        "completion": "elastic_ckpt.cli.completion",
    },
}
"""The module of each command, as ``--help`` groups them."""

_COMMANDS: Final = {name: home for section in SECTIONS.values() for name, home in section.items()}
_WHOLE: Final = 500  # characters; the first sentence is wrapped, never cut


class _LazyGroup(click.Group):
    """A group that imports a command when it is used, so that ``status`` stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        import importlib

        command: click.Command = importlib.import_module(_COMMANDS[cmd_name]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Suggest a close match for an unknown command; click only knows imported ones."""
        if args[0] not in _COMMANDS and args[0][:1] != "-" and not ctx.resilient_parsing:
            from difflib import get_close_matches

            close = get_close_matches(args[0], _COMMANDS, n=1)
            hint = (
                f"did you mean {close[0]}?" if close else f"the commands are {', '.join(_COMMANDS)}"
            )
            ctx.fail(f"unknown command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Group the commands by purpose, with the same columns in all sections."""
        width = max(map(len, _COMMANDS))
        for title, section in SECTIONS.items():
            rows = []
            for name in section:
                command = self.get_command(ctx, name)
                if command is not None:
                    rows.append((name.ljust(width), command.get_short_help_str(_WHOLE)))
            with formatter.section(title):
                formatter.write_dl(rows)


@click.group(
    cls=_LazyGroup, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="elastic-ckpt")
def group() -> None:
    """Training that survives its machines: run, preempt, seal, resume.

    \b
      elastic-ckpt run --dir CHECKPOINTS --nproc 2 -- train.py --epochs 3
      elastic-ckpt status CHECKPOINTS

    DIR, the job's directory, defaults to $ELASTIC_CKPT_DIR. Each command has --help with examples.
    """


def main() -> None:
    """Run the command line and exit with the outcome's exit code."""
    sys.exit(_run())


def _run() -> int:
    try:
        result: Any = group.main(prog_name="elastic-ckpt", standalone_mode=False)
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except click.Abort:
        return 130
    except NoArgsIsHelpError as error:
        if sys.stderr.isatty():
            click.echo(error.format_message(), err=True)
        else:  # a page of help would hide the error in a batch job's log
            path = error.ctx.command_path if error.ctx else "elastic-ckpt"
            _print_error(f"missing command (see {path} --help)")
        return int(ExitCode.USAGE)
    except click.ClickException as error:
        context, lines = getattr(error, "ctx", None), next_steps(error)
        hint = f" (see {context.command_path} --help)" if context and not lines else ""
        _print_error(f"{error.format_message()}{hint}", lines)
        return int(ExitCode.USAGE)
    except ElasticCkptError as error:
        _print_error(str(error), next_steps(error))
        return int(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        path = f"{error.filename}: " if error.filename else ""
        _print_error(f"{path}{error.strerror or error}", next_steps(error))
        return int(ExitCode.UNAVAILABLE)
    return int(result) if isinstance(result, int) else 0


def _print_error(message: str, lines: tuple[str, ...] = ()) -> None:
    """Print an error, and the lines about what to do next."""
    error = marked(f"elastic-ckpt: error: {printable(message, 4000)}", Priority.ERROR)
    print_error("\n".join([error, *lines]), EXIT_SECONDS)
