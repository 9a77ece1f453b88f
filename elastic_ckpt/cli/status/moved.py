"""A job directory that was moved or copied: its record tells of a run in another directory."""

from __future__ import annotations

from typing import NamedTuple

from msgspec.structs import replace

from elastic_ckpt.cli.status.advice import RERUN, Advice
from elastic_ckpt.jobdir.node_record import NodeRecord
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.place import moved_from, record_at
from elastic_ckpt.jobdir.run_command import command_line
from elastic_ckpt.protocol.run_state import TERMINAL, RunState
from elastic_ckpt.util.text import printable


class Moved(NamedTuple):
    """Where the run of a record was.

    Attributes:
        place: the directory; empty if it is the one that has the record.
        run_is_elsewhere: the run did not end before that, and is not in this directory.
        run: what ``place`` has of it; None for nothing.
    """

    place: str = ""
    run_is_elsewhere: bool = False
    run: NodeRecord | None = None

    @property
    def _continues(self) -> bool:
        run = self.run
        return run is not None and run.state not in TERMINAL and bool(run.owner.is_alive())

    @property
    def message(self) -> str:
        """One line on a run that is elsewhere."""
        moved = f"this directory was {printable(self.place)}, moved or copied while a run was in it"
        run = self.run
        if self._continues:
            return f"{moved}: the run continues there"
        if run is not None and run.state in TERMINAL:
            return f"{moved}: the run ended there: {run.message}"
        return f"{moved}: how the run ended is not known here"

    def advice(self, found: Advice, state: str) -> Advice:
        """Return the advice for a directory that was moved or copied."""
        if not self.place or RERUN not in found.text or state == RunState.FINISHED.value:
            return found
        text = found.text.replace(f"{RERUN}, unless systemd or SLURM does", RERUN)
        text = text.replace(RERUN, "run it with this directory")
        was = f"this directory was {printable(self.place)}, and was moved or copied; "
        if self.run_is_elsewhere:  # the first line says it
            there = command_line("status", self.place)
            was = "see what is there now; to continue from this directory instead, "
            return Advice(was + text, (there, *found.commands))
        return Advice(was + text, found.commands)


def of_this_directory(
    job: JobDirectory, record: NodeRecord | None
) -> tuple[NodeRecord | None, Moved]:
    """Return the record with a command for this directory, and where its run was."""
    place = moved_from(job, record)
    if record is None or record.command is None or not place:
        return record, Moved()
    trained = record.trained.at(str(job.home)) if record.trained is not None else None
    here = replace(record, command=record.command.at(str(job.home)), trained=trained)
    is_local = record.owner.is_alive() is not None  # of another host the mounts may differ
    if record.state in TERMINAL or not is_local:
        return here, Moved(place)
    return here, Moved(place, True, record_at(place, record))
