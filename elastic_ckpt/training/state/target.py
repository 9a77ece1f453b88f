"""Where a save goes: to the fastest tier with room."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Final

import msgspec

from elastic_ckpt.checkpoint.memory.seal import Share
from elastic_ckpt.checkpoint.nodes.pairs import may_hand_over
from elastic_ckpt.checkpoint.nodes.reading import RESHARDING
from elastic_ckpt.checkpoint.nodes.tier import NodesMemory, new_identity
from elastic_ckpt.checkpoint.tier import Attempt, Ref, Tier, TierBusy, TierFull
from elastic_ckpt.errors import ElasticCkptError, UsageError
from elastic_ckpt.training.engines import Engine
from elastic_ckpt.training.ranks.rank_errors import as_failure
from elastic_ckpt.training.runtime import Runtime
from elastic_ckpt.training.state.rewind import leave_branch

log = logging.getLogger(__name__)

_encode = msgspec.json.encode

_MARGIN: Final = 1.05
"""How much larger than the last checkpoint the next one may be."""


def begin_attempt(
    runtime: Runtime,
    engine: Engine,
    step: int,
    *,
    allow_memory: bool = True,
    hands_over: bool = False,
    replaces: bool = False,
) -> Attempt:
    """Begin a save: in memory if there is a tier with room, else on disk. Collective.

    Args:
        hands_over: nodes may leave after it: in memory only if others keep what these have.
        replaces: as the memory tier's.

    Raises:
        StorageFailed: on every rank: the disk has no room, or does not answer.
        UsageError: on every rank: the engine needs a directory that all nodes share.
    """
    _check_suits(runtime, engine)
    disk = runtime.durable
    memory = runtime.memory if allow_memory or hands_over else None
    if isinstance(memory, NodesMemory):
        suits = runtime.rewound_to is None and not engine.reads_peers_files
        if suits and (not hands_over or _may_hand_over(engine, memory)):
            return _begin_on_nodes(
                runtime, engine, step, memory, hands_over=hands_over, replaces=replaces
            )
        memory = None
    memory = memory if allow_memory else None
    tiers: dict[str, Tier] = {tier.name: tier for tier in (memory, disk) if tier is not None}

    def begin() -> Attempt:
        with contextlib.suppress(OSError):  # without its disk only memory is left
            _prepare(runtime)
        if runtime.rewound_to is not None:
            leave_branch(runtime, runtime.rewound_to)
        size = _predicted_bytes(runtime, engine, disk)
        if memory is not None:
            try:
                return memory.begin(step, size, replaces=replaces)
            except TierBusy:
                log.info("saving step %d to the disk: memory waits for its drain", step)
            except TierFull as full:
                runtime.say(f"saving to the disk: {full.reason}")
            except OSError as error:  # something deleted it, say
                _report_memory(runtime, f"{memory.root}: {error.strerror or error}")
        return disk.begin(step, size)

    begun = runtime.peers.leader_does("begin", begin)
    told = runtime.peers.tell("attempt", begun.ref.encode() if begun else b"")
    runtime.rewound_to = None
    if begun is not None:
        return begun
    ref = Ref.decode(told)
    return tiers[ref.tier].join(ref)


def _check_suits(runtime: Runtime, engine: Engine) -> None:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    apart = runtime.bucket is not None and runtime.peers.world_size != local
    if apart and engine.reads_peers_files:
        raise UsageError(
            f"{engine.info.plugin or engine.info.name} may read what ranks of other nodes "
            "write, and nodes with a bucket share no directory: use a --dir that they share"
        )


def _prepare(runtime: Runtime) -> None:
    if not runtime.job.attempts.is_dir():
        runtime.fence.check_place()
        runtime.job.prepare()  # it was moved away, and there is work to save


class _Offer(msgspec.Struct, frozen=True):
    """What a node says when a save begins: the generation that it has room in, or why not."""

    share: Share
    slot: str = ""
    problem: str = ""
    is_full: bool = False  # which people are told; that a drain takes long is no news


class _Begun(msgspec.Struct, frozen=True):
    """What the leader answers: the attempt in memory by the nodes' generations, or that on disk."""

    ref: Ref
    slots: dict[int, str] = {}
    shares: list[Share] = []
    seconds: float = 0.0  # that a hand-over is expected to take at most


_Offers = msgspec.json.Decoder(_Offer)


def _may_hand_over(engine: Engine, memory: NodesMemory) -> bool:
    """Return whether nodes keep anything for others, and fewer ranks could load it."""
    return memory.replicas > 0 and engine.info.name in RESHARDING


def _begin_on_nodes(
    runtime: Runtime,
    engine: Engine,
    step: int,
    memory: NodesMemory,
    *,
    hands_over: bool,
    replaces: bool,
) -> Attempt:
    """Begin in the memory of all nodes if each has room, else on disk; if nodes leave, in memory
    only if others can keep what these have, and that is faster. Collective."""
    disk, peers = runtime.durable, runtime.peers
    begun: list[Attempt] = []

    def judge(offers: list[bytes]) -> bytes:
        found = [_Offers.decode(one) for one in offers if one]
        shares = [one.share for one in found]
        refused = next((one for one in found if one.problem), None)
        seconds = runtime.board.hand_over_seconds if hands_over else 0.0
        stays = not hands_over or (seconds > 0 and may_hand_over(shares))
        if refused is None and stays:
            ref = Ref(memory.name, "", new_identity())
            slots = {one.share.first: one.slot for one in found}
            return msgspec.json.encode(_Begun(ref, slots, shares, seconds))
        told = "no other node keeps what one has that leaves, or the disk is faster"
        if refused is not None:
            told = f"{refused.share.host}: {refused.problem}"
            if refused.is_full:
                _report_memory(runtime, told)
        log.info("saving step %d to the disk: %s", step, told)
        try:
            with contextlib.suppress(OSError):
                _prepare(runtime)
            begun.append(disk.begin(step, _predicted_bytes(runtime, engine, disk)))
        except OSError as error:
            raise as_failure(peers.rank, error, "save") from error
        return msgspec.json.encode(_Begun(begun[0].ref))

    leaves = hands_over and runtime.board.deadline is not None
    share = msgspec.structs.replace(memory.share, leaves=leaves)
    offer = _offer(runtime, engine, step, memory, share, replaces=replaces)
    answer = msgspec.json.decode(peers.agree(f"room for step {step}", offer, judge), type=_Begun)
    if answer.ref.tier == memory.name:
        slot = answer.slots[memory.share.first]
        return memory.attempt(slot, answer.ref.attempt, answer.shares, answer.seconds)
    return begun[0] if begun else disk.join(answer.ref)


def _offer(
    runtime: Runtime,
    engine: Engine,
    step: int,
    memory: NodesMemory,
    share: Share,
    *,
    replaces: bool,
) -> bytes:
    """Take a generation for this node's share, on the rank that acts for it."""
    if not memory.acts:
        return b""
    # What is written by path may all be of one node's ranks, as with most of ColossalAI's plugins.
    part = 1.0 if engine.by_path else share.count / runtime.peers.world_size
    size = int(_MARGIN * engine.state_bytes() * part)
    held = max((one.seal.total_bytes for one in memory.own()), default=0)
    try:
        slot = memory.make_room(step, max(size, held), replaces=replaces)
    except TierBusy as busy:
        return _encode(_Offer(share, problem=busy.reason))
    except TierFull as full:
        return _encode(_Offer(share, problem=full.reason, is_full=True))
    except (OSError, ElasticCkptError) as error:
        return _encode(_Offer(share, problem=str(error), is_full=True))
    return _encode(_Offer(share, slot))


def _report_memory(runtime: Runtime, problem: str) -> None:
    """Say once that the memory tier cannot be used; saves go to the disk meanwhile."""
    log.warning("the memory tier cannot be used: %s", problem)
    if runtime.memory_problem != problem:
        runtime.memory_problem = problem
        runtime.say(f"saving to the disk, as the memory tier cannot be used: {problem}")


def _predicted_bytes(runtime: Runtime, engine: Engine, disk: Tier) -> int:
    """Return the size of the last checkpoint, and at least that of the leader's own tensors."""
    last = runtime.last_bytes
    if last is None:
        with contextlib.suppress(OSError):  # the save itself finds out what the disk refuses
            newest = disk.newest()
            last = runtime.last_bytes = newest.seal.total_bytes if newest and newest.seal else 0
    return int(_MARGIN * max(last or 0, engine.state_bytes()))
