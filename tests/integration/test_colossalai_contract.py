"""What elastic-ckpt relies on in ColossalAI and ColossalAI does not promise.

A failure names what ColossalAI has changed, and the file that relies on it: begin there. What is
made when an optimizer is built is looked at in built ones, the rest in classes and sources.
"""

import ast
import importlib
import inspect
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("colossalai", reason="ColossalAI is not installed")

import colossalai

from elastic_ckpt.cli.doctor.versions import untested
from tests import plugins
from tests.integration.ranks import run_ranks
from tests.marks import slow_unless
from tests.plugins import Built, Setup, named

pytestmark = pytest.mark.one_torch

ROOT = Path(__file__).parents[2]
THEIRS = Path(colossalai.__file__).parent
ENGINES = "elastic_ckpt/training/engines/colossalai"
ENGINE = f"{ENGINES}/engine.py"
SIZE = f"{ENGINES}/whole_size.py"
SHIM = f"{ENGINES}/cpu_shim.py"
COVERAGE = f"{ENGINES}/coverage.py"
MASTERS = f"{ENGINES}/masters.py"
SCALE = f"{ENGINES}/loss_scale.py"
GUARD = f"{ENGINES}/weights_only.py"
FUNCTIONS = "elastic_ckpt/training/functions.py"
INDEX = "elastic_ckpt/checkpoint/colossalai_layout.py"
FILES = f"{ENGINES}/torch_archive.py"

STEPS = re.compile(r"(\w+)((?:\(\)|\[\w*\])*)")
"""A name on a path, and what is done with what it leads to."""


class Changed(Exception):
    """ColossalAI is not as it was."""

    def __init__(self, what: str) -> None:
        super().__init__(f"ColossalAI {metadata.version('colossalai')}: {what}")


# -- how to look ------------------------------------------------------------------------------


def follow(thing: Any, path: str, reader: str) -> Any:
    """Walk ``a.b()[].c[key]``, where ``[]`` takes the first of a collection.

    Raises:
        Changed: the path does not exist.
    """
    for name, marks in STEPS.findall(path):
        owner = owner_name(thing)
        if not has(thing, name):
            raise Changed(f"{owner} has no {name}, which {reader} reads")
        try:
            thing = getattr(thing, name)
            for mark in re.findall(r"\(\)|\[\w*\]", marks):
                thing = step(thing, mark)
        except Exception as error:
            message = f"{type(error).__name__} {error}".strip()
            raise Changed(
                f"{owner}.{name}{marks} ends with {message}, and {reader} reads it"
            ) from None
    return thing


def has(thing: Any, name: str) -> bool:
    """Without calling what a property does."""
    try:
        inspect.getattr_static(thing, name)
    except AttributeError:
        return hasattr(thing, name)  # a module's parts
    return True


def step(thing: Any, mark: str) -> Any:
    if mark == "()":
        return thing()
    if mark != "[]":
        return thing[mark[1:-1]]
    return next(iter(thing.values() if isinstance(thing, Mapping) else thing))


def owner_name(thing: Any) -> str:
    return getattr(thing, "__name__", None) or type(thing).__name__


def check_call(function: Any, shown: str, given: str, options: Mapping[str, Any], reader: str):
    """See that it takes what it is given.

    Raises:
        Changed: it does not.
    """
    try:
        inspect.signature(function).bind(*given.split(), **options)
    except TypeError as error:
        message = [*given.split(), *(f"{key}={value}" for key, value in options.items())]
        call = f"{shown}({', '.join(message)})"
        raise Changed(f"{call} is not a valid call ({error}), and {reader} makes it") from None


def imports(source: str) -> Iterator[tuple[str, str]]:
    """What a source imports from ColossalAI: module and name; no name for a module itself."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


def check_import(module: str, name: str, reader: str) -> None:
    """See that it is there.

    Raises:
        Changed: it is not.
    """
    try:
        found = importlib.import_module(module)
    except ImportError:
        raise Changed(f"there is no {module}, which {reader} imports") from None
    if name and not hasattr(found, name):
        try:
            importlib.import_module(f"{module}.{name}")
        except ImportError:
            raise Changed(f"{module} has no {name}, which {reader} imports") from None


# -- imports and calls ------------------------------------------------------------------------

IMPORTS = [
    (module, name, reader)
    for reader in (ENGINE, SHIM)
    for module, name in imports((ROOT / reader).read_text())
    if module.partition(".")[0] == "colossalai"
]


def test_imports_are_found():
    assert ("colossalai.checkpoint_io", "GeneralCheckpointIO", ENGINE) in IMPORTS
    assert ("colossalai.zero.gemini.chunk", "Chunk", SHIM) in IMPORTS


@pytest.mark.parametrize(("module", "name", "reader"), IMPORTS)
def test_imports_exist(module, name, reader):
    check_import(module, name, reader)


@pytest.mark.parametrize(
    ("module", "name", "what"),
    [
        ("colossalai.no_such", "Chunk", "there is no colossalai.no_such"),
        ("colossalai.checkpoint_io", "NoSuchIO", "colossalai.checkpoint_io has no NoSuchIO"),
    ],
)
def test_missing_import_is_named(module, name, what):
    with pytest.raises(Changed, match=f"^ColossalAI [0-9.]+: {what}, which {ENGINE} imports$"):
        check_import(module, name, ENGINE)


CALLS = [
    ("booster:Booster.save_model", "self model path", {"shard": True}, ENGINE),
    ("booster:Booster.save_optimizer", "self optimizer path", {"shard": True}, ENGINE),
    ("booster:Booster.save_model", "self model path", {"shard": True, "use_async": True}, ENGINE),
    ("booster:Booster.save_optimizer", "self opt path", {"shard": True, "use_async": True}, ENGINE),
    ("booster:Booster.save_lr_scheduler", "self scheduler path", {}, ENGINE),
    ("booster:Booster.load_model", "self model path", {}, ENGINE),
    ("booster:Booster.load_optimizer", "self optimizer path", {}, ENGINE),
    ("booster:Booster.load_lr_scheduler", "self scheduler path", {}, ENGINE),
    ("checkpoint_io:GeneralCheckpointIO", "", {}, ENGINE),
    ("checkpoint_io:GeneralCheckpointIO.save_model", "self model path", {"shard": True}, ENGINE),
    ("checkpoint_io:GeneralCheckpointIO.save_optimizer", "self opt path", {"shard": True}, ENGINE),
    ("checkpoint_io:GeneralCheckpointIO._sync_io", "self", {}, ENGINE),
    ("interface:ModelWrapper.unwrap", "self", {}, ENGINE),
    ("interface:OptimizerWrapper.unwrap", "self", {}, ENGINE),
    ("zero.low_level:LowLevelZeroOptimizer._sanity_checks", "self", {}, SHIM),
    ("kernel.kernel_loader:CPUAdamLoader.load", "self", {"ext_name": None}, SHIM),
    ("zero.gemini.chunk:Chunk.close_chunk", "self", {}, SHIM),
    ("zero.gemini.chunk:Chunk.shard_move", "self device", {}, SHIM),
    ("zero.gemini.chunk.manager:ChunkManager.get_chunk", "self parameter", {}, MASTERS),
]
"""Module and what is in it, arguments, options, and who calls or replaces it."""


@pytest.mark.parametrize(
    ("place", "given", "options", "reader"), CALLS, ids=[" ".join(map(str, c[:3])) for c in CALLS]
)
def test_calls_accept_their_arguments(place, given, options, reader):
    module, _, name = place.partition(":")
    found = importlib.import_module(f"colossalai.{module}")
    check_call(follow(found, name, reader), name, given, options, reader)
    assert name.rpartition(".")[2] in (ROOT / reader).read_text()


def test_removed_argument_is_named():
    def save_model(self, model, checkpoint, sharded=False):
        """As it might be one day."""

    with pytest.raises(Changed) as caught:
        check_call(save_model, "Booster.save_model", "self model path", {"shard": True}, ENGINE)
    assert str(caught.value).endswith(
        "Booster.save_model(self, model, path, shard=True) is not a valid call (got an unexpected "
        f"keyword argument 'shard'), and {ENGINE} makes it"
    )


def test_shim_replaces_existing_methods():
    """What it puts in place of nothing would be for nothing."""
    from colossalai.accelerator.cpu_accelerator import CpuAccelerator

    names = set(re.findall(r"_cpu\.(\w+) = ", (ROOT / SHIM).read_text()))
    assert {"synchronize", "current_stream", "manual_seed"} <= names
    for name in names:
        follow(CpuAccelerator, name, SHIM)
    follow(colossalai.accelerator.get_accelerator(), "_name", SHIM)


def test_ddp_saves_like_the_general_writer():
    """Shares of them are written past TorchDDP's own methods, all of which let rank 0 write."""
    from colossalai.booster.plugin.torch_ddp_plugin import TorchDDPCheckpointIO

    check_replicas(TorchDDPCheckpointIO)


def check_replicas(saver: Any) -> None:
    from colossalai.checkpoint_io import GeneralCheckpointIO

    for name in ("save_model", "save_optimizer"):
        if getattr(saver, name) is not getattr(GeneralCheckpointIO, name):
            raise Changed(f"{saver.__name__} has a {name} of its own, which {ENGINE} goes past")


def test_other_ddp_writer_is_named():
    from colossalai.booster.plugin.torch_ddp_plugin import TorchDDPCheckpointIO

    class Other(TorchDDPCheckpointIO):
        def save_model(self, *args, **options):
            """Something else."""

    with pytest.raises(Changed, match="Other has a save_model of its own"):
        check_replicas(Other)


# -- what reads files -------------------------------------------------------------------------

READERS = [
    *THEIRS.glob("checkpoint_io/*.py"),
    *THEIRS.glob("booster/plugin/*.py"),
    THEIRS / "booster/booster.py",
    THEIRS / "utils/safetensors.py",
]
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
MENDED = {("utils/safetensors.py", "_unpickler")}
"""What unpickles, and is replaced."""


def check_reads(name: str, source: str) -> None:
    """Check that a module of ColossalAI's unpickles only by ``torch.load`` or a patched function.

    Raises:
        Changed: it knows another way.
    """
    for module, what in imports(source):
        package = module.partition(".")[0]
        hidden = (module.startswith("torch.serialization") or module == "torch") and what in (
            "load",
            "save",
            "_load",
        )
        unpickles = package in UNPICKLERS or (what == "_unpickler" and (name, what) not in MENDED)
        if hidden or unpickles:
            shown = f"{module}.{what}" if what else module
            raise Changed(f"{name} uses {shown}, which {GUARD} does not see")


def test_files_are_read_only_by_torch_load():
    assert len(READERS) > 10
    for path in READERS:
        check_reads(str(path.relative_to(THEIRS)), path.read_text())


def test_patched_function_is_the_one_that_unpickles():
    from colossalai.utils import safetensors

    follow(safetensors, "_unpickler", ENGINE)
    if "_unpickler" not in safetensors._tensor_to_object.__code__.co_names:
        raise Changed(f"_tensor_to_object does not call the _unpickler that {ENGINE} replaces")


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("import pickle", "pickle"),
        ("def f():\n    from dill import loads", "dill.loads"),
        ("from torch import load", "torch.load"),
        ("from torch.distributed.distributed_c10d import _unpickler", "_unpickler"),
    ],
)
def test_other_unpickler_is_named(source, shown):
    with pytest.raises(Changed, match=f"checkpoint_io/new.py uses .*{shown}, which {GUARD} does"):
        check_reads("checkpoint_io/new.py", source)


# -- what is built ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Reads:
    """What a file reads of what a booster made; paths begin with a name in ``roots``."""

    setup: str
    reader: str
    paths: tuple[str, ...]


DDP = "TorchDDP fp32"
ZERO = "LowLevelZero 1 fp16"
GEMINI = "Gemini bf16, in chunks"
GEMINI_FP16 = "Gemini fp16"
HYBRID_FP32 = "Hybrid tp2 fp32 (llama)"
HYBRID = "Hybrid dp2 fp16 (llama)"
HYBRID_ZERO = "Hybrid dp2 zero1 bf16 (llama)"
MOE = "MoE ep2 zero1 bf16 (mixtral)"

SCALER = ("scale", "_scale", "_growth_step", "_hysteresis_step")
STORE = ("pg_to_param_list[]", "pg_to_bucket_store[].local_rank", "pg_to_bucket_store[].world_size")
CHUNK = ("keep_gathered", "chunk_size", "get_tensors()[]", "payload", "paired_chunk.payload")

READS = [
    Reads(DDP, ENGINE, ("booster.plugin", "booster.checkpoint_io._sync_io")),
    Reads(DDP, SIZE, ("optimizer.optim.state",)),
    Reads(ZERO, SIZE, ("optimizer.pg_to_bucket_store",)),
    Reads(GEMINI, SIZE, ("optimizer.chunk16_set", "optimizer.module.zero_group")),
    Reads(HYBRID, SIZE, ("plugin.tp_size", "plugin.pp_size")),
    Reads(HYBRID, ENGINE, ("booster.checkpoint_io.pp_size",)),
    Reads(DDP, COVERAGE, ("optimizer.optim.param_groups", "optimizer.optim.state")),
    Reads(
        ZERO,
        MASTERS,
        (
            "model.unwrap().named_parameters",
            "optimizer.get_working_to_master_map()[]",
            *(f"optimizer.{path}" for path in STORE),
        ),
    ),
    Reads(
        ZERO, SCALE, tuple(f"optimizer.mixed_precision_mixin.grad_scaler.{name}" for name in SCALER)
    ),
    Reads(
        GEMINI,
        MASTERS,
        (
            "optimizer.tp_rank",
            "optimizer.module.param2name[]",
            "optimizer.module.zero_group",
            "optimizer.module.extra_dp_group",
            "optimizer.module.chunk_manager.get_chunk",
            *(f"optimizer.chunk16_set[].{path}" for path in CHUNK),
        ),
    ),
    Reads(GEMINI, ENGINE, ("optimizer.chunk16_set",)),
    Reads(GEMINI, SHIM, ("chunk.cuda_shard", "chunk.cpu_shard")),
    Reads(
        GEMINI_FP16,
        SCALE,
        tuple(f"optimizer.mix_precision_mixin.grad_scaler.{name}" for name in SCALER),
    ),
    Reads(HYBRID_FP32, MASTERS, ("optimizer.get_working_to_master_map()",)),
    Reads(
        HYBRID_FP32,
        COVERAGE,
        ("optimizer.get_master_to_working_map()", "optimizer.param_info[param2id]"),
    ),
    Reads(
        HYBRID,
        MASTERS,
        (
            "plugin.mixed_dp_group",
            "plugin.pp_group",
            "plugin.tp_group",
            "optimizer.get_working_to_master_map()[]",
        ),
    ),
    Reads(HYBRID, SCALE, tuple(f"optimizer.mixed_precision.grad_scaler.{name}" for name in SCALER)),
    Reads(
        HYBRID,
        COVERAGE,
        ("optimizer.get_master_to_working_map()[]", "optimizer.param_info[param2id][]"),
    ),
    Reads(HYBRID, FUNCTIONS, ("plugin.dp_group.size()", "plugin.dp_size")),
    Reads(HYBRID_ZERO, MASTERS, tuple(f"optimizer.{path}" for path in STORE)),
    Reads(HYBRID_ZERO, COVERAGE, ("optimizer.param_info[param2id][]",)),
    Reads(
        MOE,
        MASTERS,
        (
            "plugin.moe_dp_group",
            "plugin.ep_group",
            "plugin.pp_group",
            "plugin.tp_group",
            *(f"optimizer.{path}" for path in STORE),
        ),
    ),
    Reads(MOE, COVERAGE, ("optimizer.param_info[param2id][]",)),
]

BUILT = list(dict.fromkeys(reads.setup for reads in READS))


def setup_named(name: str) -> Setup:
    if name != GEMINI_FP16:
        return named(name)
    plain = named("Gemini bf16, one chunk")
    options = plain.options | {"precision": "fp16"}
    return replace(plain, name=name, ranks=1, options=options)


def roots(built: Built) -> Any:
    booster, model, optimizer, _ = built.state
    chunk = next(iter(getattr(optimizer, "chunk16_set", [])), None)
    return SimpleNamespace(
        booster=booster, plugin=booster.plugin, model=model, optimizer=optimizer, chunk=chunk
    )


def complaints(built: Built, reads: list[Reads]) -> list[str]:
    """What has changed of what is read, and of what it means."""
    found = []
    for one in reads:
        for path in one.paths:
            try:
                follow(roots(built), path, one.reader)
            except Changed as changed:
                found.append(str(changed))
    for check in MEANINGS.get(built.setup.name, ()):
        if found:  # what it needs may not be there
            break
        try:
            check(built)
        except Changed as changed:
            found.append(str(changed))
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            found.append(
                str(Changed(f"{check.__name__} of {built.setup.name} ends with {message}"))
            )
    return list(dict.fromkeys(found))


def replicas(built: Built) -> None:
    from colossalai.booster.plugin.torch_ddp_plugin import TorchDDPCheckpointIO

    if type(built.booster.checkpoint_io) is not TorchDDPCheckpointIO:
        kind = type(built.booster.checkpoint_io).__name__
        raise Changed(f"TorchDDPPlugin saves by {kind}, not by the class that {ENGINE} knows")


def masters_of_zero(built: Built) -> None:
    """Each parameter has one, flat, and as long as its share of it."""
    optimizer = built.optimizer
    known = optimizer.get_working_to_master_map()
    names = {id(p): name for name, p in built.model.unwrap().named_parameters()}
    for group, parameters in optimizer.pg_to_param_list.items():
        shards = optimizer.pg_to_bucket_store[group].world_size
        for parameter in parameters:
            check_master(known, names, parameter, -(-parameter.numel() // shards))


def masters_of_replicas(built: Built) -> None:
    """Each parameter has one of its own size."""
    known = built.optimizer.get_working_to_master_map()
    names = {id(p): name for name, p in built.model.unwrap().named_parameters()}
    for parameter in built.model.unwrap().parameters():
        check_master(known, names, parameter, parameter.numel())


def check_master(known: Any, names: Any, parameter: Any, size: int) -> None:
    import torch

    if id(parameter) not in known:
        raise Changed(f"get_working_to_master_map does not go by id(parameter), as {MASTERS} does")
    if id(parameter) not in names:
        raise Changed(f"a parameter of ZeRO's is not the model's, and {MASTERS} looks for its name")
    master = known[id(parameter)]
    if master.numel() != size or master.dtype is not torch.float32:
        raise Changed(
            f"the master of {names[id(parameter)]} has {master.numel()} elements of "
            f"{master.dtype}, and {MASTERS} takes it for {size} of torch.float32"
        )


def masters_of_gemini(built: Built) -> None:
    """Chunks are cut over the ranks, and each has one of masters beside it."""
    import torch
    import torch.distributed as dist

    module = built.optimizer.module
    for parameter, name in module.param2name.items():
        chunk = module.chunk_manager.get_chunk(parameter)
        if chunk not in built.optimizer.chunk16_set:
            raise Changed(
                f"get_chunk of {name} is none of chunk16_set, as {MASTERS} takes it to be"
            )
        shards = 1 if chunk.keep_gathered else dist.get_world_size(module.zero_group)
        master = chunk.paired_chunk.payload
        if master.numel() * shards != chunk.chunk_size or master.dtype is not torch.float32:
            raise Changed(f"a paired chunk is not a shard of fp32, as {MASTERS} takes it to be")


def numbers(built: Built) -> None:
    """What the optimizer was given has numbers, by the id of the script's parameters."""
    inner = built.optimizer.optim
    working = built.optimizer.get_master_to_working_map() or {}
    known = built.optimizer.param_info["param2id"]
    for group in inner.param_groups:
        for parameter in group["params"]:
            if id(working.get(id(parameter), parameter)) not in known:
                raise Changed(f"param2id does not go by id(parameter), as {COVERAGE} does")


def saved(built: Built) -> None:
    """Its files are made by ``torch.save`` from paths and read by ``torch.load``; an index names
    all of them, and what is in them."""
    import torch
    import torch.distributed as dist

    plugins.train(built, 0, 1)
    place = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(place)
    written: set[str] = set()
    read: set[str] = set()
    with plugins.quiet(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", noting(torch.save, 1, written))
        patch.setattr(torch, "load", noting(torch.load, 0, read))
        try:
            for kind in ("modeling", "optimizer"):
                check_saved(built, Path(place[0], kind), written, read)
        finally:
            if dist.get_rank() == 0:
                shutil.rmtree(place[0], ignore_errors=True)


def noting(plain: Any, at: int, paths: set[str]) -> Any:
    """The same, and the paths that it is given."""

    def call(*args: Any, **options: Any) -> Any:
        path = args[at] if len(args) > at else options.get("f")
        if isinstance(path, str | os.PathLike):
            paths.add(os.path.abspath(path))
        return plain(*args, **options)

    return call


def check_saved(built: Built, place: Path, written: set[str], read: set[str]) -> None:
    import torch.distributed as dist

    from elastic_ckpt.checkpoint.colossalai_layout import read_index

    booster = built.booster
    name = "model" if place.name == "modeling" else "optimizer"
    thing = built.model if name == "model" else built.optimizer
    getattr(booster, f"save_{name}")(thing, str(place), shard=True)
    dist.barrier()
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, written)
    for path in place.iterdir():
        if path.suffix != ".json" and str(path) not in set().union(*everyones):
            raise Changed(f"{name}s are not saved by torch.save to a path, as {FILES} takes them")
    indexes = list(place.glob("*.index.json"))
    if len(indexes) != 1:
        raise Changed(f"a saved {name} has {len(indexes)} indexes, and {COVERAGE} reads the one")
    content = json.loads(indexes[0].read_text())
    if not content.get("weight_map") or (name == "optimizer" and not param_groups(content)):
        raise Changed(
            f"an index of a {name} has {', '.join(content)}, and {INDEX} reads weight_map, and "
            "metadata's param_groups of an optimizer's"
        )
    index = read_index(indexes[0])
    absent = [one for one in index.files if not (place / one).is_file()]
    if absent:
        raise Changed(f"an index names {absent[0]}, which {INDEX} takes for a file beside it")
    if name == "model":
        lacking = {one for one, _ in built.model.unwrap().named_parameters()} - index.entries
        if lacking:
            raise Changed(f"an index has no {min(lacking)}, a parameter that {COVERAGE} looks for")
    elif not all(entry.isdecimal() for entry in index.entries):
        raise Changed(f"an optimizer's index names {min(index.entries)}, not numbers as {COVERAGE}")
    read.clear()
    getattr(booster, f"load_{name}")(thing, str(place))
    if not any(Path(path).parent == place for path in read):
        raise Changed(f"{name}s are not loaded by torch.load, as {GUARD} takes them")
    dist.barrier()


def param_groups(content: Any) -> Any:
    return (content.get("metadata") or {}).get("param_groups")


MEANINGS = {
    DDP: (replicas, saved),
    ZERO: (masters_of_zero, saved),
    GEMINI: (masters_of_gemini, saved),
    HYBRID: (masters_of_replicas, numbers, saved),
    HYBRID_FP32: (numbers, saved),
    HYBRID_ZERO: (masters_of_zero, numbers),
    MOE: (masters_of_zero, numbers),
}


def look(rank: int, name: str) -> list[str]:
    """On the ranks: what is not as it was."""
    built = plugins.build(setup_named(name))
    return complaints(built, [reads for reads in READS if reads.setup == name])


@pytest.mark.parametrize("name", slow_unless({ZERO, HYBRID}, BUILT))
def test_attributes_of_a_built_optimizer_exist(name):
    setup = setup_named(name)
    for result in run_ranks(look, setup.ranks, name):
        assert isinstance(result, list), f"it cannot be built: {result}"
        assert not result, "\n".join(result)


@pytest.mark.parametrize("reads", READS, ids=[f"{one.setup}, {one.reader}" for one in READS])
def test_listed_attributes_are_read_by_our_sources(reads):
    """Else the contract would outlive what it is for."""
    source = (ROOT / reads.reader).read_text()
    for path in reads.paths:
        for name in re.findall(r"\w+", path.partition(".")[2]):
            assert re.search(rf"\b{name}\b", source), f"{reads.reader} does not read {name}"


def test_torch_scaler_attributes_exist():
    """TorchDDP's, in fp16."""
    import torch
    from colossalai.booster.mixed_precision.fp16_torch import TorchAMPOptimizer

    plain = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    optimizer = TorchAMPOptimizer(plain)
    for path in ("scaler.is_enabled()", "scaler.state_dict()", "scaler.load_state_dict"):
        follow(optimizer, path, SCALE)


# -- each of it can fail ----------------------------------------------------------------------


class Thing:
    """A stand-in for one of ColossalAI's objects."""


EVERY = [(one.reader, path) for one in READS for path in one.paths]


@pytest.mark.parametrize(("reader", "path"), EVERY, ids=[" ".join(one) for one in EVERY])
def test_renamed_attribute_is_named(reader, path):
    for gone, (name, _) in enumerate(STEPS.findall(path)):
        things = stand_ins(path)
        follow(things[0], path, reader)
        owner = things[gone]
        setattr(owner, f"{name}_renamed", vars(owner).pop(name))
        with pytest.raises(Changed) as caught:
            follow(things[0], path, reader)
        assert str(caught.value) == (
            f"ColossalAI {metadata.version('colossalai')}: Thing has no {name}, "
            f"which {reader} reads"
        )


def stand_ins(path: str) -> list[Thing]:
    """One that has nothing but ``path``; and what each of its names leads to."""
    things = [Thing()]
    for name, marks in STEPS.findall(path):
        held: Any = Thing()
        things.append(held)
        for mark in reversed(re.findall(r"\(\)|\[\w*\]", marks)):
            held = wrapped(held, mark)
        setattr(things[-2], name, held)
    return things


def wrapped(value: Any, mark: str) -> Any:
    return (lambda: value) if mark == "()" else {mark[1:-1] or "first": value}


def without_buckets(built: Built, patch: pytest.MonkeyPatch) -> None:
    patch.delattr(built.optimizer, "pg_to_bucket_store")


def masters_by_name(built: Built, patch: pytest.MonkeyPatch) -> None:
    known = built.optimizer.get_working_to_master_map()
    other = {f"parameter {number}": master for number, master in enumerate(known.values())}
    patch.setattr(built.optimizer, "get_working_to_master_map", lambda: other)


def masters_whole(built: Built, patch: pytest.MonkeyPatch) -> None:
    known = built.optimizer.get_working_to_master_map()
    other = {key: master.repeat(2) for key, master in known.items()}
    patch.setattr(built.optimizer, "get_working_to_master_map", lambda: other)


def masters_of_bf16(built: Built, patch: pytest.MonkeyPatch) -> None:
    known = built.optimizer.get_working_to_master_map()
    other = {key: master.bfloat16() for key, master in known.items()}
    patch.setattr(built.optimizer, "get_working_to_master_map", lambda: other)


def another_scaler(built: Built, patch: pytest.MonkeyPatch) -> None:
    scaler = built.optimizer.mixed_precision_mixin.grad_scaler
    patch.delattr(scaler, "_growth_step")


def no_chunks(built: Built, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(built.optimizer, "chunk16_set", set())


def longer_chunks(built: Built, patch: pytest.MonkeyPatch) -> None:
    for chunk in built.optimizer.chunk16_set:
        patch.setattr(chunk, "chunk_size", chunk.chunk_size * 2)


def numbers_by_name(built: Built, patch: pytest.MonkeyPatch) -> None:
    known = built.optimizer.param_info["param2id"]
    other = {f"parameter {number}": number for number in known.values()}
    patch.setitem(built.optimizer.param_info, "param2id", other)


def another_saver(built: Built, patch: pytest.MonkeyPatch) -> None:
    from colossalai.checkpoint_io import GeneralCheckpointIO

    patch.setattr(built.booster, "checkpoint_io", GeneralCheckpointIO())


def another_index(built: Built, patch: pytest.MonkeyPatch) -> None:
    from colossalai.checkpoint_io import CheckpointIndexFile

    def write(self, name):
        Path(self.root_path, name).write_text(json.dumps({"tensors": self.weight_map}))

    patch.setattr(CheckpointIndexFile, "write_index_file", write)


def another_format(built: Built, patch: pytest.MonkeyPatch) -> None:
    from colossalai.checkpoint_io import utils

    def save(state, path, use_safetensors):
        Path(path).write_bytes(b"")

    patch.setattr(utils, "save_state_dict", save)


def another_reader(built: Built, patch: pytest.MonkeyPatch) -> None:
    from colossalai.checkpoint_io import general_checkpoint_io
    from torch.serialization import load

    def shards(paths, *args, **options):
        return [load(path) for path in paths]

    patch.setattr(general_checkpoint_io, "load_state_dict_shards", shards)


SPOILT = {
    DDP: [
        (
            another_saver,
            f"TorchDDPPlugin saves by GeneralCheckpointIO, not by the class that {ENGINE}",
        ),
        (another_index, f"an index of a model has tensors, and {INDEX} reads weight_map"),
        (another_format, f"models are not saved by torch.save to a path, as {FILES} takes them"),
        (another_reader, f"models are not loaded by torch.load, as {GUARD} takes them"),
    ],
    ZERO: [
        (
            without_buckets,
            f"LowLevelZeroOptimizer has no pg_to_bucket_store, which {MASTERS} reads",
        ),
        (masters_by_name, f"does not go by id(parameter), as {MASTERS} does"),
        (masters_whole, f"elements of torch.float32, and {MASTERS} takes it for"),
        (masters_of_bf16, f"elements of torch.bfloat16, and {MASTERS} takes it for"),
        (another_scaler, f"DynamicGradScaler has no _growth_step, which {SCALE} reads"),
    ],
    GEMINI: [
        (no_chunks, f"GeminiOptimizer.chunk16_set[] ends with StopIteration, and {MASTERS} reads"),
        (longer_chunks, f"a paired chunk is not a shard of fp32, as {MASTERS} takes it to be"),
    ],
    HYBRID: [(numbers_by_name, f"param2id does not go by id(parameter), as {COVERAGE} does")],
}
"""Possible changes in ColossalAI, and the error for each."""


def look_at_spoilt(rank: int, name: str) -> list[list[str]]:
    built = plugins.build(setup_named(name))
    reads = [reads for reads in READS if reads.setup == name]
    message = []
    for spoil, _ in SPOILT[name]:
        with pytest.MonkeyPatch.context() as patch:
            spoil(built, patch)
            message.append(complaints(built, reads))
    return [*message, complaints(built, reads)]


@pytest.mark.parametrize("name", slow_unless({ZERO}, list(SPOILT)))
def test_changes_in_a_built_optimizer_are_named(name):
    (result,) = run_ranks(look_at_spoilt, 1, name)
    assert isinstance(result, list), result
    *message, untouched = result
    assert untouched == []
    for (spoil, text), lines in zip(SPOILT[name], message, strict=True):
        start = f"ColossalAI {metadata.version('colossalai')}: "
        assert all(line.startswith(start) for line in lines), lines
        assert any(text in line for line in lines), (spoil.__name__, lines)


# -- what was tried ---------------------------------------------------------------------------


def test_installed_versions_are_in_the_table():
    """Of ``elastic_ckpt/cli/doctor/versions.py``, which ``elastic-ckpt doctor`` compares with."""
    names = ("torch", "colossalai", "transformers", "peft")
    found = {"Python": "3.11", **{name: metadata.version(name) for name in names}}
    assert untested(found) == []
