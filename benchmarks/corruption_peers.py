"""What other ways to save notice when they load a damaged checkpoint of the same state.

Each is used as its documentation says: torch DCP with its state dict helpers, one safetensors file
with the plain values in its metadata, ``torch.save`` with ``torch.load(weights_only=True)``, and
plain ColossalAI with the calls and the ``running_states.json`` of ColossalChat. Every load goes
into fresh objects, in a child process with a bound on memory and time, as a damaged file may
crash or hang native code.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import traceback
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

MEMORY_HEADROOM = 2 << 30
START_SECONDS = 120.0
LOAD_SECONDS = 20.0

_NAMES = rb"(?:epoch|step|sample_start_index)"
_JSON_VALUE = re.compile(rb'"' + _NAMES + rb'\\?": ?([0-9]+)')
# A key of a pickled dict, its memo, and the opcode of a small integer before the value's low byte.
_PICKLED_VALUE = re.compile(rb"\x00" + _NAMES + rb"(?:q.|r....)[KMJ](.)", re.DOTALL)
_PICKLED_INTEGER = re.compile(rb"\x80\x02[KMJ](.)", re.DOTALL)


class NoSuchFault(Exception):
    """A format has nothing that this kind of fault could change."""


def values_in(pattern: re.Pattern[bytes], path: Path) -> list[tuple[int, int]]:
    """Where the running states' values stand in a file."""
    return [match.span(1) for match in pattern.finditer(path.read_bytes())]


@dataclass(frozen=True)
class Layout:
    """Where a format keeps what faults aim at.

    Attributes:
        manifests: files that say what the others are.
        planted: names under which a stray file would lie where a loader reads.
        running: the file that holds the running states.
        values: where in that file their values stand, for a checkpoint's directory.
        text: whether the values are digits, otherwise binary.
        own_file: whether that file holds nothing else, so that its length may change.
    """

    manifests: tuple[str, ...]
    planted: tuple[str, ...]
    running: str
    values: Callable[[Path], list[tuple[int, int]]]
    text: bool = True
    own_file: bool = True


def json_values(name: str) -> Callable[[Path], list[tuple[int, int]]]:
    """For a file that holds the running states as JSON, quoted once more or not."""
    return lambda root: values_in(_JSON_VALUE, root / name)


def _pickled_values(root: Path) -> list[tuple[int, int]]:
    return values_in(_PICKLED_VALUE, root / "state.pt")


def _dcp_values(root: Path) -> list[tuple[int, int]]:
    """DCP pickles every plain value by itself; its metadata says where."""
    from torch.distributed.checkpoint import FileSystemReader

    data = (root / "__0_0.distcp").read_bytes()
    found = []
    for index, place in FileSystemReader(root).read_metadata().storage_data.items():
        end = place.offset + place.length
        match = _PICKLED_INTEGER.search(data, place.offset, end)
        if index.fqn.startswith("running.") and match:
            found.append(match.span(1))
    return found


# A fault: kind, its random numbers, the tree to damage, trees of other steps, layout.
Damage = Callable[[str, random.Random, Path, Sequence[Path], Layout], str]


# -- the state -----------------------------------------------------------------------------------


@dataclass
class Objects:
    """What a training loop has, and what it does to get gradients."""

    model: Any
    optimizer: Any
    scheduler: Any
    booster: Any = None

    def train(self, steps: int) -> None:
        """Some optimizer steps on made-up batches."""
        for step in range(steps):
            width = next(self.model.parameters()).shape[1]
            loss = self.model(torch.full((2, width), 1.0 + step)).square().mean()
            self.booster.backward(loss, self.optimizer) if self.booster else loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()


def make_objects(seed: int, width: int = 32) -> Objects:
    """A small model with AdamW and a scheduler, not yet trained."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return Objects(model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000))


def running_states(step: int) -> dict[str, int]:
    """As ColossalChat writes them, for a batch size of 8."""
    return {"epoch": 0, "step": step, "sample_start_index": step * 8}


def digest(state: Any) -> str:
    """Equal for states that are equal bit by bit: types, shapes, NaNs and signs of zero too."""
    return hashlib.sha256(repr(_exact(state)).encode()).hexdigest()


def _exact(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return str(value.dtype), tuple(value.shape), data.numpy().tobytes()
    if isinstance(value, dict):
        return {key: _exact(item) for key, item in sorted(value.items(), key=repr_of_key)}
    if isinstance(value, list | tuple):
        return [_exact(item) for item in value]
    return value  # repr is exact for a float


def repr_of_key(item: tuple[Any, Any]) -> str:
    """Keys may be of several types."""
    return repr(item[0])


# -- the formats ---------------------------------------------------------------------------------


class Peer(ABC):
    """One way to save and load, with its name and layout."""

    name: str
    layout: Layout

    def prepare(self) -> None:  # noqa: B027  # most need nothing
        """Import what is needed, once, before children are forked; ImportError if it is not."""

    def objects(self, seed: int) -> Objects:
        """Fresh objects of the kind that this peer saves."""
        return make_objects(seed)

    def state(self, objects: Objects) -> dict[str, Any]:
        """What has to be brought back, apart from the running states."""
        return {
            "model": objects.model.state_dict(),
            "optimizer": objects.optimizer.state_dict(),
            "scheduler": objects.scheduler.state_dict(),
        }

    @abstractmethod
    def save(self, root: Path, objects: Objects, running: dict[str, int]) -> None:
        """Write a checkpoint below a directory that is there already."""

    @abstractmethod
    def load(self, root: Path, objects: Objects) -> dict[str, int]:
        """Load into the objects; the running states."""


class TorchSave(Peer):
    """One pickle in a zip file, loaded with ``weights_only``."""

    name = "torch.save"
    layout = Layout((), (), "state.pt", _pickled_values, text=False, own_file=False)

    def save(self, root: Path, objects: Objects, running: dict[str, int]) -> None:
        torch.save({**self.state(objects), "running": running}, root / "state.pt")

    def load(self, root: Path, objects: Objects) -> dict[str, int]:
        saved = torch.load(root / "state.pt", weights_only=True)
        return _restore(objects, saved)


class Safetensors(Peer):
    """One safetensors file; what is no tensor goes into its metadata as JSON."""

    name = "safetensors"
    layout = Layout((), (), "state.safetensors", json_values("state.safetensors"), own_file=False)

    def save(self, root: Path, objects: Objects, running: dict[str, int]) -> None:
        from safetensors.torch import save_file

        state = self.state(objects)
        tensors = {f"model.{name}": tensor for name, tensor in state["model"].items()}
        for index, moments in state["optimizer"]["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        plain = {
            "param_groups": state["optimizer"]["param_groups"],
            "scheduler": state["scheduler"],
            "running": running,
        }
        metadata = {name: json.dumps(value) for name, value in plain.items()}
        save_file(tensors, root / "state.safetensors", metadata=metadata)

    def load(self, root: Path, objects: Objects) -> dict[str, int]:
        from safetensors import safe_open

        saved: dict[str, Any] = {"model": {}, "optimizer": {"state": {}}}
        with safe_open(root / "state.safetensors", framework="pt") as file:
            plain = {name: json.loads(value) for name, value in file.metadata().items()}
            for name in file.keys():  # noqa: SIM118, it is no dict
                part, _, place = name.partition(".")
                if part == "model":
                    saved["model"][place] = file.get_tensor(name)
                else:
                    index, _, moment = place.partition(".")
                    moments = saved["optimizer"]["state"].setdefault(int(index), {})
                    moments[moment] = file.get_tensor(name)
        saved["optimizer"]["param_groups"] = plain["param_groups"]
        return _restore(objects, saved | plain)


class DCP(Peer):
    """torch.distributed.checkpoint in a single process."""

    name = "DCP"
    layout = Layout(
        (".metadata",),
        ("__1_0.distcp", "__0_1.distcp", ".metadata.tmp"),
        "__0_0.distcp",
        _dcp_values,
        text=False,
        own_file=False,
    )

    def prepare(self) -> None:
        import torch.distributed.checkpoint.state_dict  # noqa: F401

    def state(self, objects: Objects) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(objects.model, objects.optimizer)
        scheduler = objects.scheduler.state_dict()
        return {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    def save(self, root: Path, objects: Objects, running: dict[str, int]) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save({**self.state(objects), "running": running}, checkpoint_id=root)

    def load(self, root: Path, objects: Objects) -> dict[str, int]:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_state_dict

        saved = {**self.state(objects), "running": running_states(0)}
        dcp.load(saved, checkpoint_id=root)
        set_state_dict(
            objects.model,
            objects.optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
        )
        objects.scheduler.load_state_dict(saved["scheduler"])
        return _read_running(saved["running"])


class ColossalAI(Peer):
    """Booster with TorchDDPPlugin, as ColossalChat calls it, on one gloo rank."""

    name = "ColossalAI"
    layout = Layout(
        ("modeling/pytorch_model.bin.index.json", "optimizer/pytorch_optim.bin.index.json"),
        (
            "modeling/pytorch_model-00002.bin",
            "modeling/stray.index.json",
            "optimizer/pytorch_optim-00002.bin",
            "optimizer/stray.index.json",
        ),
        "running_states.json",
        json_values("running_states.json"),
    )

    def prepare(self) -> None:
        if importlib.util.find_spec("colossalai") is None:
            raise ImportError("colossalai")
        with quiet():
            from elastic_ckpt.training.engines.colossalai.cpu_shim import patch_loads

            patch_loads()
            import colossalai.booster.plugin.torch_ddp_plugin  # noqa: F401

    def objects(self, seed: int) -> Objects:
        import torch.distributed as dist
        from colossalai.booster import Booster
        from colossalai.booster.plugin import TorchDDPPlugin

        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        plain = make_objects(seed)
        booster = Booster(plugin=TorchDDPPlugin())
        model, optimizer, _, _, scheduler = booster.boost(
            plain.model, plain.optimizer, lr_scheduler=plain.scheduler
        )
        return Objects(model, optimizer, scheduler, booster)

    def state(self, objects: Objects) -> dict[str, Any]:
        plain = Objects(objects.model.unwrap(), objects.optimizer.unwrap(), objects.scheduler)
        return super().state(plain)

    def save(self, root: Path, objects: Objects, running: dict[str, int]) -> None:
        booster = objects.booster
        (root / "modeling").mkdir()
        booster.save_model(objects.model, str(root / "modeling"), shard=True)
        booster.save_optimizer(objects.optimizer, str(root / "optimizer"), shard=True)
        booster.save_lr_scheduler(objects.scheduler, str(root / "lr_scheduler"))
        (root / "running_states.json").write_text(json.dumps(running, indent=4))

    def load(self, root: Path, objects: Objects) -> dict[str, int]:
        booster = objects.booster
        booster.load_model(objects.model, str(root / "modeling"))
        booster.load_optimizer(objects.optimizer, str(root / "optimizer"))
        booster.load_lr_scheduler(objects.scheduler, str(root / "lr_scheduler"))
        return _read_running(json.loads((root / "running_states.json").read_text("utf-8")))


PEERS: tuple[Peer, ...] = (DCP(), Safetensors(), TorchSave(), ColossalAI())


def _restore(objects: Objects, saved: dict[str, Any]) -> dict[str, int]:
    objects.model.load_state_dict(saved["model"])
    objects.optimizer.load_state_dict(saved["optimizer"])
    objects.scheduler.load_state_dict(saved["scheduler"])
    return _read_running(saved["running"])


def _read_running(running: dict[str, Any]) -> dict[str, Any]:
    """A script asks for these by their names, and for no others."""
    return {name: running[name] for name in running_states(0)}


# -- damage, load, compare -----------------------------------------------------------------------


def build(peer: Peer, root: Path, seed: int, steps: int) -> dict[str, str]:
    """Save one checkpoint per step; digests of what was saved, by directory."""
    return dict(forked(partial(_build, peer, root, seed, steps)))


def _build(peer: Peer, root: Path, seed: int, steps: int) -> Iterator[tuple[str, str]]:
    objects = peer.objects(seed)
    for step in range(1, steps + 1):
        objects.train(1)
        place = root / f"step-{step}"
        place.mkdir(parents=True)
        peer.save(place, objects, running_states(step))
        yield str(place), digest((peer.state(objects), running_states(step)))


def observe(
    peer: Peer, saved: dict[str, str], faults: Sequence[tuple[str, str]], damage: Damage
) -> list[tuple[str, str, str]]:
    """What became of each fault, given as kind and seed.

    Returns:
        For each: the outcome, what was done, and what was said. The outcome is ``noticed``,
        ``crashed`` (the process died or hung), ``silent``, ``harmless``, or ``n/a``.
    """
    found: list[tuple[str, str, str]] = []
    while len(found) < len(faults):
        began = False
        try:
            rest = faults[len(found) :]
            for answer in forked(partial(_observe, peer, saved, rest, damage)):
                if began:
                    found.append(tuple(answer))
                began = True
        except Died as death:
            if not began:
                raise
            found.append(("crashed", "", str(death)))
    return found


def _observe(
    peer: Peer, saved: dict[str, str], faults: Sequence[tuple[str, str]], damage: Damage
) -> Iterator[tuple[str, str, str]]:
    roots = [Path(path) for path in saved]
    for root in roots:  # if these were no good, every outcome below would be worthless
        outcome, said = _load(peer, root, saved[str(root)])
        if outcome != "harmless":
            raise RuntimeError(f"{peer.name} does not load an undamaged checkpoint: {said}")
    yield "began", "", ""
    for kind, seed in faults:
        rng = random.Random(seed)
        root = rng.choice(roots)
        copy = root.parent / f"damaged-{os.getpid()}" / root.name
        shutil.copytree(root, copy)
        try:
            others = [other for other in roots if other != root]
            done = damage(kind, rng, copy, others, peer.layout)
        except NoSuchFault:
            yield "n/a", "", ""
        else:
            outcome, said = _load(peer, copy, saved[str(root)])
            yield outcome, done, said
        shutil.rmtree(copy.parent)


def _load(peer: Peer, root: Path, expected: str) -> tuple[str, str]:
    objects = peer.objects(seed=-1)  # other values than those that were saved
    try:
        running = peer.load(root, objects)
    except BaseException as error:  # DCP's own error is no Exception
        return "noticed", f"{type(error).__name__}: {str(error)[:100]}"
    same = digest((peer.state(objects), running)) == expected
    return ("harmless" if same else "silent"), ""


# -- children ------------------------------------------------------------------------------------


class Died(Exception):
    """A child ended by a signal or had to be ended."""


def forked(work: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """What a generator yields in a child process with bounds, as JSON brings it.

    Raises:
        Died: the child was killed, or was silent for too long and has been killed.
        RuntimeError: the generator raised.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _be_child(work, writer)
    os.close(writer)
    ended = False
    try:
        rest, patience = b"", START_SECONDS
        while True:
            if not select.select([reader], [], [], patience)[0]:
                raise Died(f"silent for {patience:.0f} s")
            data = os.read(reader, 1 << 16)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                patience = LOAD_SECONDS
                yield json.loads(line)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        ended = True
        if code < 0:
            raise Died(signal.Signals(-code).name)
        if code > 0:
            raise RuntimeError(rest.decode(errors="replace").replace("\r", "\n"))
    finally:
        os.close(reader)
        if not ended:
            os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
            os.waitpid(pid, 0)


def _be_child(work: Callable[[], Iterator[Any]], writer: int) -> None:
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_HEADROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        with quiet():
            for item in work():
                os.write(writer, json.dumps(item).encode() + b"\n")
        code = 0
    except BaseException:
        os.write(writer, traceback.format_exc().replace("\n", "\r").encode())
    finally:
        os._exit(code)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No output from native code, loggers or warnings; they would drown the table."""
    kept = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for fd in (*kept, nowhere):
            os.close(fd)
