"""How a job was run: its command, hosts, versions, and the revisions of its script."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from elastic_ckpt.jobdir.node_record import NodeRecord
from elastic_ckpt.jobdir.run_command import quoted
from elastic_ckpt.journal.history import History
from elastic_ckpt.journal.history_types import Run
from elastic_ckpt.util.text import printable

MAX_HOSTS: Final = 64
MAX_REVISIONS: Final = 20

_MAX_COMMAND: Final = 4000  # characters
_SECRET: Final = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)
_HIDDEN: Final = "***"


@dataclass(frozen=True)
class Revision:
    """What ran from a moment on, until the next one.

    Attributes:
        since: seconds since the epoch.
        revision: ``git describe`` of the script's tree; empty if unknown.
        versions: by name.
    """

    since: float
    revision: str
    versions: dict[str, str]

    @property
    def is_dirty(self) -> bool:
        """Whether the tree had changes that were not committed."""
        return self.revision.endswith("-dirty")


@dataclass(frozen=True)
class Origin:
    """How a job was run.

    Attributes:
        command: for a shell, with secrets hidden; empty if unknown.
        directory: that it was typed in.
        hosts: each node with its host's name if that is another one.
        more_hosts: number of nodes that are not listed.
        revisions: in order of time, one for each change.
    """

    command: str
    directory: str
    script: str
    hosts: list[str]
    more_hosts: int
    revisions: list[Revision]


def origin_of(records: Sequence[NodeRecord], history: History) -> Origin:
    """Return how the newest run was started, and what ran since the first one."""
    command = next((one.command for one in records if one.command), None)
    hosts = sorted({_host(one) for one in records})
    runs = [run for run in history.runs if run.supervised]
    return Origin(
        " ".join(map(quoted, without_secrets(command.argv)))[:_MAX_COMMAND] if command else "",
        printable(command.directory) if command else "",
        next((run.script for run in reversed(runs) if run.script), ""),
        hosts[:MAX_HOSTS],
        max(0, len(hosts) - MAX_HOSTS),
        list(_changes(runs))[-MAX_REVISIONS:],
    )


def without_secrets(words: Sequence[str]) -> Iterator[str]:
    """Yield the words of a command; the value of an option that is named like a secret is hidden.

    A report is mailed and archived: ``--api-key=s3cr3t`` and ``--api-key s3cr3t`` lose the value.
    """
    for before, word in pairwise(("", *words)):
        name, equals, _ = word.partition("=")
        if equals and _SECRET.search(name):
            yield f"{name}={_HIDDEN}"
        elif before.startswith("-") and "=" not in before and _SECRET.search(before):
            yield word if word.startswith("-") else _HIDDEN
        else:
            yield word


def _host(record: NodeRecord) -> str:
    host = record.owner.host
    return record.node if host == record.node else f"{record.node} on {host}"


def _changes(runs: Sequence[Run]) -> Iterator[Revision]:
    last: tuple[str, dict[str, str]] | None = None
    for run in runs:
        versions = dict(run.versions)
        if not versions and run.version:
            versions = {"elastic-ckpt": run.version}
        if (run.revision or versions) and (run.revision, versions) != last:
            last = run.revision, versions
            yield Revision(run.began, run.revision, versions)
