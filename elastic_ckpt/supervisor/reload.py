"""What a running job takes over of settings that have changed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from elastic_ckpt.errors import UsageError
from elastic_ckpt.supervisor.settings import RunSettings


@dataclass(frozen=True)
class Reload:
    """
    Attributes:
        settings: from now on; another interval in steps takes a new incarnation.
        said: what changed, for people.
    """

    settings: RunSettings
    said: str


def reload(old: RunSettings, new: RunSettings) -> Reload:
    """The save interval and what a warning leads to; the rest counts from the next start.

    Raises:
        UsageError: it cannot be taken over now.
    """
    taken = replace(old, interval=new.interval, mtbf=new.mtbf, on_warning=new.on_warning)
    if old.endpoint and new.interval.told_steps != old.interval.told_steps:
        raise UsageError("a new interval in steps takes a new start of all nodes")
    later = "" if new == taken else "; what else differs counts from the next start"
    said = f"save interval {taken.interval}, on a warning {taken.on_warning}{later}"
    return Reload(taken, said)
