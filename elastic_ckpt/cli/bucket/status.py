"""``elastic-ckpt status`` of a job in a bucket: who owns it, and what it would continue from."""

from __future__ import annotations

import time
from typing import Any, Final

import click

from elastic_ckpt.checkpoint.bucket import catalog
from elastic_ckpt.checkpoint.bucket.keys import RUNS, beat_key
from elastic_ckpt.checkpoint.bucket.object_store import open_store
from elastic_ckpt.checkpoint.bucket.ownership import Owner, read_beat, read_owner
from elastic_ckpt.checkpoint.bucket.store import Bucket
from elastic_ckpt.checkpoint.bucket.take import newest_owner
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.cli.bucket.places import shown
from elastic_ckpt.cli.common import echo_json
from elastic_ckpt.jobdir.run_command import command_line
from elastic_ckpt.policy.lease import BUCKET_LEASE_SECONDS
from elastic_ckpt.util.text import printable
from elastic_ckpt.util.units import human_bytes, human_duration

_NEXT: Final = "elastic-ckpt pull {url} DIR brings it to a machine"


def status_bucket(url: BucketUrl, *, as_json: bool) -> int:
    """Print it. 0 if there is a checkpoint and the owner lives or has ended, 1 if the owner is
    silent, 2 without a checkpoint."""
    view = _gather(open_store(url), url)
    if as_json:
        echo_json(view)
    else:
        _print(view)
    code: int = view["exit_code"]
    return code


def bucket_state(store: Bucket) -> tuple[str, str]:
    """Return ``none``, ``ended``, ``running`` or ``silent``, and who owns it, for people."""
    number = newest_owner(store)
    beat = read_beat(store, number) if number else None
    owner = read_owner(store, number) if number else None
    return _state(store, number, ended=beat is not None and beat.ended), _shown(owner)


def _gather(store: Bucket, url: BucketUrl) -> dict[str, Any]:
    from elastic_ckpt.supervisor.cluster.left_out import notes_in

    number = newest_owner(store)
    owner = read_owner(store, number) if number else None
    beat = read_beat(store, number) if number else None
    every = [one for session in catalog.sessions(store) for one in catalog.listed(store, session)]
    current = [one for one in every if not one.superseded]
    newest = catalog.newest(store)
    sealed = next((one.modified for one in current if one.seal == newest), None)
    state = _state(store, number, ended=beat is not None and beat.ended)
    return {
        "url": str(url),
        "owner": _shown(owner),
        "claim": number,
        "state": state,
        "newest": shown(newest) if newest else None,
        "step": newest.step if newest else None,
        "bytes": catalog.read_seal(store, newest).total_bytes if newest else None,
        "age_seconds": None if sealed is None else max(0.0, time.time() - sealed),
        "checkpoints": len(current),
        "superseded": len(every) - len(current),
        "left_out": [one.node for one in notes_in(store)],
        "exit_code": 2 if newest is None else int(state == "silent"),
    }


def _state(store: Bucket, number: int, *, ended: bool) -> str:
    """Return ``none``, ``ended``, ``running``, or ``silent``: no beat within its lease, as far as
    this machine's clock and the store's agree."""
    if not number or ended:
        return "ended" if number else "none"
    beats = {one.key: one.modified for page in store.listing(RUNS) for one in page}
    age = time.time() - beats.get(beat_key(number), 0.0)
    return "silent" if age > BUCKET_LEASE_SECONDS else "running"


def _shown(owner: Owner | None) -> str:
    return owner.shown if owner else ""


def _print(view: dict[str, Any]) -> None:
    url, newest = view["url"], view["newest"]
    if view["left_out"]:
        command = command_line("nodes", url)
        click.echo(f"! nodes that are left out: {', '.join(view['left_out'])}: {command}")
    if newest is None:
        click.echo(
            f"{url}: no checkpoint" + (f", owned by {view['owner']}" if view["claim"] else "")
        )
        return
    age = human_duration(view["age_seconds"])
    click.echo(f"{url}: {newest}, {human_bytes(view['bytes'])}, sealed {age} ago")
    said = {
        "ended": f"nobody is running it: the last owner, {view['owner']}, has ended",
        "running": f"{view['owner']} is running it",
        "silent": f"{view['owner']} has been silent for over {BUCKET_LEASE_SECONDS:.0f} s",
    }[view["state"]]
    click.echo(f"  {printable(said)}")
    more = f", {view['superseded']} superseded" if view["superseded"] else ""
    click.echo(f"  {view['checkpoints']} checkpoints{more}")
    if view["state"] != "running":
        click.echo(f"  {_NEXT.format(url=url)}")
