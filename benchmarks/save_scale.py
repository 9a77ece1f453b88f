"""What a save of 4,096 ranks costs its leader: CPU seconds of each stage, in this one process.

Real are the product's functions, the bytes that they exchange, the manifest, the index, and the
checkpoint's directories and files. Simulated are the other ranks: there are no processes, what
they would have posted in the job's store is made here, and the files are sparse. So what network,
store and disk take is not in these figures, nor is what the ranks do themselves.

The model is like one of 70 billion parameters (80 layers, 723 tensors, AdamW), each tensor sharded
over all ranks, as ``fully_shard`` does. Beside the engine's files each rank has 15 of the user's,
so that a checkpoint has 81,922 files.

*floor*: the JSON of the same entries and index encoded, and hashed, by the same libraries.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
import xxhash
from harness import Options, Report, goal, places, progress, read_options, summary
from torch import distributed
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from elastic_ckpt.checkpoint.catalog import list_checkpoints, newest_and_rejected
from elastic_ckpt.checkpoint.disk.attempt import DiskAttempt
from elastic_ckpt.checkpoint.manifest import (
    CHUNK_BYTES,
    EngineInfo,
    FileEntry,
    SealHeader,
    encode,
    make_manifest,
)
from elastic_ckpt.checkpoint.verify import MANIFEST_NAME, read_manifest, share_out, verify_quick
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.training.engines.torch import save_plan
from elastic_ckpt.training.engines.torch.division import HeldTensors
from elastic_ckpt.training.engines.torch.save_plan import PlanCache, RankPlan
from elastic_ckpt.training.engines.torch.state import PartState
from elastic_ckpt.training.state.save import owners_of
from elastic_ckpt.training.tensors.local_box import TensorBox
from elastic_ckpt.training.tensors.shard_reader import ShardReader

dist: Any = distributed

RANKS, QUICK_RANKS = 4_096, 64
LAYERS, QUICK_LAYERS = 80, 2
OTHER_FILES = 15
"""Files of each rank beside the engine's, its own state and its part manifest."""

CHECKPOINTS = 10
GOAL_SECONDS = 2.0
WIDTH, INNER, HEADS, WORDS = 8_192, 28_672, 1_024, 128_256


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The parameters of a model like Llama's of 70 billion, by name."""
    inside = {
        "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (HEADS, WIDTH),
        "self_attn.v_proj": (HEADS, WIDTH), "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER), "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
    }  # fmt: skip
    yield "model.embed_tokens.weight", (WORDS, WIDTH)
    for layer in range(layers):
        for name, shape in inside.items():
            yield f"model.layers.{layer}.{name}.weight", shape
    yield "model.norm.weight", (WIDTH,)
    yield "lm_head.weight", (WORDS, WIDTH)


def rows(shape: tuple[int, ...], rank: int, ranks: int) -> TensorBox:
    """A rank's rows, as ``Shard(0)`` cuts them."""
    each = -(-shape[0] // ranks)
    first = min(shape[0], rank * each)
    count = min(each, shape[0] - first)
    return TensorBox((first, *[0] * (len(shape) - 1)), (count, *shape[1:]))


def states_of(layers: int, ranks: int) -> dict[str, PartState]:
    """Rank 0's shards of the model and of the optimizer, without memory."""
    mesh = init_device_mesh("cpu", (ranks,))

    def sharded(shape: tuple[int, ...], dtype: torch.dtype) -> DTensor:
        local = torch.empty(rows(shape, 0, ranks).sizes, dtype=dtype, device="meta")
        return DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape),
            stride=(shape[1], 1) if len(shape) > 1 else (1,),
        )  # fmt: skip

    model: dict[str, torch.Tensor] = {}
    optimizer: dict[str, torch.Tensor] = {}
    for name, shape in shapes(layers):
        model[name] = sharded(shape, torch.bfloat16)
        optimizer[f"state.{name}.exp_avg"] = sharded(shape, torch.float32)
        optimizer[f"state.{name}.exp_avg_sq"] = sharded(shape, torch.float32)
        optimizer[f"state.{name}.step"] = torch.tensor(1.0)
    none: frozenset[str] = frozenset()
    return {"modeling": PartState({}, model, none), "optimizer": PartState({}, optimizer, none)}


def offers_of(states: dict[str, PartState], ranks: int) -> tuple[list[bytes], HeldTensors]:
    """What the ranks post for the plan, and what rank 1 holds; the others hold the like."""
    mine = HeldTensors.of(save_plan.candidates(states, 0))
    others = HeldTensors.of(save_plan.candidates(states, 1))
    digest = msgspec.json.decode(others.offer())[0]
    groups = {group: shape for _, shape, group in others.table.values()}
    offers = [mine.offer()]
    for rank in range(1, ranks):
        boxes = [rows(groups[group], rank, ranks) for group in range(len(groups))]
        offers.append(msgspec.json.encode((digest, boxes)))
    return offers, others


class Ranks:
    """What the other ranks say to the plan, in the places of torch's collectives."""

    def __init__(self, states: dict[str, PartState], ranks: int) -> None:
        self.offers, self._others = offers_of(states, ranks)

    def gather(self, value: Any) -> list[Any]:
        """As ``all_gather_object``."""
        assert value == self.offers[0]
        return self.offers

    def told(self, rank: int, value: bytes) -> bytes:
        """As ``broadcast_object_list``."""
        return value if rank == 0 else self._others.encoded_table()


def parts_of(plan: RankPlan, ranks: int) -> list[list[FileEntry]]:
    """The files of each rank, as it describes them to the leader."""
    random.seed(1)
    sizes = {file.path: file.header.file_bytes for file in plan.files}
    parts = []
    for rank in range(ranks):
        name = f"{rank:05d}"
        own = {f"{part}/{name}.safetensors": size for part, size in zip(
            ("modeling", "optimizer"), sizes.values(), strict=True
        )}  # fmt: skip
        own |= {f"ranks/{name}.json": 3_000, f"ranks/{name}.safetensors": 5_056}
        own |= {f"modeling/more/{name}-{n:02d}.bin": 4_096 for n in range(OTHER_FILES)}
        own[f"parts/{name}.json"] = 3_000
        if rank == 0:
            own |= {path: len(data) for path, data in plan.indexes.items()}
        parts.append([entry(path, size, rank) for path, size in own.items()])
    return parts


def entry(path: str, size: int, rank: int) -> FileEntry:
    """A file with invented digests."""
    count = -(-size // CHUNK_BYTES)
    chunks = tuple(digest() for _ in range(count)) if count > 1 else ()
    return FileEntry(path, size, digest(), rank, chunks)


def digest() -> str:
    """32 hexadecimal digits."""
    return f"{random.getrandbits(128):032x}"


def header(attempt: DiskAttempt, ranks: int) -> SealHeader:
    """Of a checkpoint that holds nothing of interest."""
    return SealHeader(
        job="benchmark", attempt=attempt.identity, incarnation=1, created="", reason="interval",
        epoch=0, step=attempt.step, step_in_epoch=1, sample_start_index=1, samples_per_step=1,
        order_seed=0, dataset_fingerprint="", dataset_size=0, world_size=ranks,
        data_parallel_size=ranks, engine=EngineInfo("torch"), torch="",
    )  # fmt: skip


class Stages:
    """CPU seconds by stage, of each pass."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def time(self, name: str, act: Callable[[], Any]) -> Any:
        """Do something, and note what it took."""
        began = time.process_time()
        found = act()
        self.seconds.setdefault(name, []).append(time.process_time() - began)
        return found

    def sums(self, names: tuple[str, ...]) -> list[float]:
        """What some of them took together, by pass."""
        return [sum(each) for each in zip(*(self.seconds[name] for name in names), strict=True)]


PLAN, SAME, FILES, SEAL = "plan of the first save", "plan, unchanged", "ranks' files", "seal"
FLOOR = "floor"


def save(stages: Stages, job: JobDirectory, states: dict[str, PartState], ranks: int) -> Path:
    """What the leader does in two saves, the second of which has nothing new to plan."""
    cache = PlanCache()
    plan = stages.time(PLAN, lambda: cache.plan_for(states))
    assert stages.time(SAME, lambda: cache.plan_for(states)) is plan
    parts = parts_of(plan, ranks)
    attempt = DiskAttempt.begin(job, CHECKPOINTS)
    make_files(attempt.path, parts, plan)
    written = [msgspec.json.encode([one.path for one in part]) for part in parts]
    posted = [msgspec.json.encode(part) for part in parts]
    paths, entries = msgspec.json.Decoder(list[str]), msgspec.json.Decoder(list[FileEntry])

    def gather() -> list[FileEntry]:
        owners = owners_of(map(paths.decode, written), [[] for _ in parts])
        msgspec.json.encode(owners)
        return [one for data in posted for one in entries.decode(data)]

    files = stages.time(FILES, gather)
    about = header(attempt, ranks)
    place: Path = stages.time(SEAL, lambda: attempt.publish(about, files))

    def floor() -> None:
        for data in (msgspec.json.encode(files), *plan.indexes.values()):
            xxhash.xxh3_128_hexdigest(msgspec.json.encode(msgspec.json.decode(data)))

    stages.time(FLOOR, floor)
    return place


def make_files(place: Path, parts: list[list[FileEntry]], plan: RankPlan) -> None:
    """Sparse files, but what rank 0 reads of its own: headers and indexes."""
    (place / "modeling" / "more").mkdir(parents=True)
    (place / "optimizer").mkdir()
    starts = {file.path: file.header.data for file in plan.files} | plan.indexes
    for part in parts:
        for one in part:
            with open(place / one.path, "wb") as file:
                file.write(starts.get(one.path, b""))
                file.truncate(one.bytes)


def read(stages: Stages, job: JobDirectory, place: Path, states: Any, ranks: int) -> None:
    """What commands and one rank of a restart do with it."""
    stages.time("newest intact, status", lambda: newest_and_rejected(job))
    stages.time(f"list of {CHECKPOINTS}", lambda: list_checkpoints(job))

    def load() -> None:
        read_manifest(place)
        share_out(verify_quick(place).files, 0, ranks)
        for part, state in states.items():
            with ShardReader(place / part) as reader:
                reader.check(list(state.tensors.items()))

    stages.time("one rank's load, without its bytes", load)


def add_older(job: JobDirectory, place: Path, ranks: int) -> None:
    """Older checkpoints, of which only the manifests are looked at."""
    files = read_manifest(place).files
    for step in range(1, CHECKPOINTS):
        attempt = DiskAttempt(job, digest()[:16], step)
        older = job.root / f"epoch-0_step-{step}"
        older.mkdir()
        (older / MANIFEST_NAME).write_bytes(encode(make_manifest(header(attempt, ranks), files)))


def measure(options: Options, report: Report) -> None:
    """Fill the report."""
    ranks, layers = (QUICK_RANKS, QUICK_LAYERS) if options.quick else (RANKS, LAYERS)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    states = states_of(layers, ranks)
    others = Ranks(states, ranks)
    save_plan.gather, save_plan.told = others.gather, others.told
    stages = Stages()
    for turn in range(options.repeats):
        progress(f"pass {turn + 1} of {options.repeats}")
        with places(options.directory) as where:
            job = JobDirectory.at(where.disk / "job")
            job.prepare()
            place = save(stages, job, states, ranks)
            size = (place / MANIFEST_NAME).stat().st_size
            index = sum((place / part / "index.json").stat().st_size for part in states)
            count = len(read_manifest(place).files)
            add_older(job, place, ranks)
            read(stages, job, place, states, ranks)
    dist.destroy_process_group()
    floor = stages.seconds.pop(FLOOR)
    for name, seconds in stages.seconds.items():
        report.rows.append(summary(name, seconds, floor))
    report.rows.append(summary("floor: the same JSON, encoded and hashed", floor, floor))
    first, later = stages.sums((PLAN, FILES, SEAL)), stages.sums((SAME, FILES, SEAL))
    report.goals.append(goal("leader's CPU seconds of the first save", first, GOAL_SECONDS, " s"))
    report.goals.append(goal("of each later one", later, GOAL_SECONDS, " s"))
    report.notes.append(
        f"{ranks:,} ranks, {count:,} files; manifest {size / 1e6:.1f} MB, "
        f"indexes {index / 1e6:.2f} MB"
    )


def main() -> None:
    """Print the table."""
    options = read_options(__doc__, repeats=3)
    os.environ.setdefault("TORCH_DISTRIBUTED_DEBUG", "OFF")
    report = Report("save_scale", "A save of many ranks: CPU of the leader", {"ranks": RANKS})
    measure(options, report)
    report.show(options)


if __name__ == "__main__":
    main()
