"""What an agent and its workers run, handed down from the supervisor as one line of JSON."""

from __future__ import annotations

import sys

import msgspec

from elastic_ckpt import __version__
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.protocol.rendezvous import Rendezvous
from elastic_ckpt.util.versions import work_together


class SharedBucket(msgspec.Struct, frozen=True):
    """The bucket that nodes without a common directory save to.

    Attributes:
        claim, nonce: the head's; 0 and empty on the others, whose ranks do not lead.
    """

    url: str
    claim: int = 0
    nonce: str = ""


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The specification of this node's workers.

    Attributes:
        board: path of the node's board.
        nproc: workers on this node.
        preload: modules that the template imports before workers are forked from it.
        save_interval_steps: overrides the script's interval; 0 leaves it, -1 means none.
        global_batch: samples of one optimizer step; 0 leaves the script's accumulation.
        retention: overrides the script's, if it is not the default.
        memory: directory of the node's memory tier; empty to save to the disk.
        memory_server: on several nodes host and port where this one serves it, and the secret;
            port 0 if it has none, an empty host if no node has.
        replicas: how many other nodes keep a copy of what this one has in memory.
        domain: what fails together with this node.
        run_id, identity: identify the run and the job directory.
        run_number, nonce, rewound, mount: the run's claim, as in ``checkpoint/ownership/fence.py``.
        rendezvous: where the job's nodes meet; None for a job of one node.
        is_checked: whether this node checks itself first, and reports it by ``Checked``.
        terms: options that must be the same on all nodes, by name.
        incarnation: the one that a worker belongs to.
        output: directory of the FIFOs that workers print to.
        on_notice: how to make a script save that takes no part in the agreement.
        bucket: what the ranks of several nodes save to; None if they share a directory.
        digests: steps between two digests of each rank's state in the journal; 0 for none.
        saves_itself: whether the run watches the script's own checkpoints.
        version: the supervisor's; empty from one that did not send it.
        module: the name under which ``script`` runs, as with ``python -m``; empty for a script.
    """

    script: str
    args: list[str]
    directory: str
    job: str
    node: str
    board: str
    nproc: int
    preload: list[str]
    save_interval_steps: int = 0
    global_batch: int = 0
    retention: Retention = Retention()
    memory: str = ""
    memory_server: tuple[str, int, str] = ("", 0, "")
    replicas: int = 0
    domain: str = ""
    run_id: str = ""
    identity: str = ""
    run_number: int = 0
    nonce: str = ""
    rewound: int = 0
    mount: int = 0
    rendezvous: Rendezvous | None = None
    is_checked: bool = False
    terms: dict[str, str] = {}
    incarnation: int = 0
    output: str = ""
    module: str = ""
    on_notice: str = "signal:SIGTERM"
    digests: int = 0
    saves_itself: bool = False
    bucket: SharedBucket | None = None
    version: str = ""


def decode_spec(line: bytes) -> WorkerSpec:
    """Return the specification in the supervisor's first line.

    Raises:
        SystemExit: it is of a version whose later messages this one does not understand.
    """
    spec = msgspec.json.decode(line, type=WorkerSpec)
    if spec.version and not work_together(spec.version, __version__):
        raise SystemExit(
            f"elastic-ckpt agent: version {__version__} in {sys.executable} does not work with the "
            f"supervisor's {spec.version}: rerun the same command"
        )
    return spec
