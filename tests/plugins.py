"""A small job of each kind that ColossalAI's plugins make: trained, saved, loaded, compared.

For the tests and for the table in docs/colossalai.md. Everything here runs on the ranks, but the
setups. ColossalAI runs on a CPU through a shim, on a GPU without.
"""

import contextlib
import hashlib
import io
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

BATCH = 4
LENGTH = 16
VOCABULARY = 128
STEPS = 2  # before the save, and the same number after it


@dataclass(frozen=True)
class Setup:
    """A plugin with its arguments, the model that it trains, and the number of ranks.

    Attributes:
        exact: whether ColossalAI's own files suffice for a resume that is exact.
        others: layouts that may load what this one saved: ranks, and other arguments.
    """

    name: str
    plugin: str
    options: dict[str, Any] = field(default_factory=dict)
    model: str = "mlp"
    ranks: int = 2
    optimizer: str = "AdamW"
    exact: bool = True
    others: tuple[tuple[int, dict[str, Any]], ...] = ((1, {}), (4, {}))

    def at(self, ranks: int, options: dict[str, Any]) -> "Setup":
        """Return the same setup on another layout."""
        return replace(self, ranks=ranks, options=self.options | options)


def zero(name: str, stage: int, precision: str, **options: Any) -> Setup:
    """Return a setup of LowLevelZero."""
    options = {"stage": stage, "precision": precision, **options}
    return Setup(f"LowLevelZero {name}", "LowLevelZeroPlugin", options, exact=precision == "fp32")


def hybrid(
    name: str, precision: str, model: str = "llama", ranks: int = 2, **options: Any
) -> Setup:
    """Return a setup of HybridParallel; ``name`` gives the sizes: ``tp2 pp2``."""
    sizes = {"tp_size": 1, "pp_size": 1}
    for word in name.split():
        if word[:2] in ("tp", "pp") and word[2:].isdecimal():
            sizes[f"{word[:2]}_size"] = int(word[2:])
    micro = {"num_microbatches": 2} if sizes["pp_size"] > 1 else {}
    parallel = sizes["tp_size"] * sizes["pp_size"]
    more = (parallel if ranks > parallel else parallel * 2, {})
    other = (1, {"tp_size": 1, "pp_size": 1}) if parallel > 1 else (4, {})
    others = ((4, {}),) if "enable_sequence_parallelism" in options else (more, other)
    return Setup(
        f"Hybrid {name} {precision} ({model})",
        "HybridParallelPlugin",
        {**sizes, **micro, "precision": precision, **options},
        model,
        ranks,
        exact=precision == "fp32",
        others=others,
    )


FP16 = {"initial_scale": 256, "growth_interval": 3}
SMALL_CHUNKS = {"min_chunk_size_m": 0.0001, "search_range_m": 0.001, "hidden_dim": 32}
SEQUENCE = {"enable_sequence_parallelism": True, "zero_stage": 1}

SETUPS = [
    Setup("TorchDDP fp32", "TorchDDPPlugin"),
    Setup("TorchFSDP fp32", "TorchFSDPPlugin", model="llama", optimizer="Adam"),
    zero("1 fp32", 1, "fp32"),
    zero("2 fp32", 2, "fp32"),
    zero("1 bf16", 1, "bf16"),
    zero("2 bf16", 2, "bf16"),
    zero("1 fp16", 1, "fp16", **FP16),
    zero("2 bf16, offload", 2, "bf16", cpu_offload=True),
    replace(
        zero("1 bf16, extra_dp2", 1, "bf16", extra_dp_size=2),
        ranks=4,
        others=((2, {"extra_dp_size": 1}),),
    ),
    Setup(
        "Gemini bf16, in chunks",
        "GeminiPlugin",
        {"precision": "bf16", "enable_async_reduce": False, **SMALL_CHUNKS},
        "llama",
        optimizer="HybridAdam",
        exact=False,
    ),
    Setup(
        "Gemini bf16, one chunk",
        "GeminiPlugin",
        {"precision": "bf16", "enable_async_reduce": False},
        optimizer="HybridAdam",
    ),
    hybrid("dp2", "fp32"),
    hybrid("dp2", "bf16"),
    hybrid("dp2", "fp16", **FP16),
    hybrid("dp2 zero1", "bf16", zero_stage=1),
    hybrid("dp2 zero2", "bf16", zero_stage=2),
    hybrid("tp2", "fp32"),
    hybrid("tp2", "bf16"),
    hybrid("pp2", "fp32"),
    hybrid("pp2", "bf16"),
    hybrid("tp2 pp2", "bf16", ranks=4),
    hybrid("dp2 tp2 zero1", "bf16", ranks=4, zero_stage=1),
    hybrid("dp2 pp2 zero1", "bf16", ranks=4, zero_stage=1),
    hybrid(
        "sp2 all_to_all zero1",
        "bf16",
        sp_size=2,
        sequence_parallelism_mode="all_to_all",
        **SEQUENCE,
    ),
    hybrid("tp2 sp split_gather", "bf16", sequence_parallelism_mode="split_gather", **SEQUENCE),
    hybrid("dp2", "fp32", "gpt2"),
    hybrid("tp2", "fp32", "gpt2"),
    hybrid("pp2", "fp32", "gpt2"),
    replace(
        hybrid("ep2 zero1", "bf16", "mixtral", ep_size=2, zero_stage=1),
        name="MoE ep2 zero1 bf16 (mixtral)",
        plugin="MoeHybridParallelPlugin",
        others=((4, {}), (1, {"ep_size": 1})),
    ),
    replace(
        hybrid("pp2 ep2 zero1", "bf16", "mixtral", ranks=4, ep_size=2, zero_stage=1),
        name="MoE pp2 ep2 zero1 bf16 (mixtral)",
        plugin="MoeHybridParallelPlugin",
        others=((2, {"pp_size": 1}),),
    ),
]
"""What each plugin is tried with; a name tells the setup in the tests and in the docs."""


def named(name: str) -> Setup:
    """Return a setup by its name."""
    return next(setup for setup in SETUPS if setup.name == name)


def why_not_here(setup: Setup) -> str:
    """Return what gloo lacks for a setup; empty if it can run."""
    import torch

    old = tuple(int(number) for number in torch.__version__.split(".")[:2]) < (2, 6)
    if old and not torch.cuda.is_available() and setup.options.get("enable_sequence_parallelism"):
        return "gloo of this torch has no all-to-all and no reduce-scatter"
    return ""


# -- on the ranks -----------------------------------------------------------------------------


@dataclass
class Built:
    """What a booster made."""

    setup: Setup
    booster: Any
    model: Any
    optimizer: Any
    scheduler: Any
    criterion: Any

    @property
    def state(self) -> tuple[Any, Any, Any, Any]:
        """Return the arguments for ``save_checkpoint``."""
        return self.booster, self.model, self.optimizer, self.scheduler


def make_model(kind: str, seed: int = 1) -> Any:
    """Make a small model from scratch."""
    import torch

    torch.manual_seed(seed)
    if kind == "mlp":
        nn = torch.nn
        return nn.Sequential(nn.Linear(LENGTH, 33), nn.Tanh(), nn.Linear(33, 3))
    import transformers

    if kind == "gpt2":  # without dropout: on a CPU its random numbers differ between tensor ranks
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64,
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, attn_implementation="eager",
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)
    config_type, model_type, more = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
        "mixtral": (
            transformers.MixtralConfig,
            transformers.MixtralForCausalLM,
            {"num_local_experts": 4},
        ),
    }[kind]
    config = config_type(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
        use_cache=False, attn_implementation="eager", **more,
    )  # fmt: skip
    return model_type(config)


def make_plugin(setup: Setup) -> Any:
    """Make the plugin."""
    from colossalai.booster import plugin
    from colossalai.booster.plugin.moe_hybrid_parallel_plugin import MoeHybridParallelPlugin

    kind = getattr(plugin, setup.plugin, MoeHybridParallelPlugin)
    return kind(**setup.options)


def build(setup: Setup, seed: int = 1, leave_out: str = "") -> Built:
    """Return model, optimizer and scheduler, boosted."""
    import torch
    from colossalai.booster import Booster

    from elastic_ckpt.training.engines.colossalai.cpu_shim import patch_training

    patch_training(leave_out)
    with quiet():
        booster = Booster(plugin=make_plugin(setup))
        model = make_model(setup.model, seed)
        if setup.optimizer == "HybridAdam":
            from colossalai.nn.optimizer import HybridAdam as Optimizer
        else:
            Optimizer = getattr(torch.optim, setup.optimizer)
        optimizer = Optimizer(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        model, optimizer, criterion, _, scheduler = booster.boost(
            model, optimizer, criterion=lambda outputs, _: outputs.loss, lr_scheduler=scheduler
        )
    return Built(setup, booster, model, optimizer, scheduler, criterion)


@contextlib.contextmanager
def quiet():
    """Silence ColossalAI's logger, which writes to standard output."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def train(built: Built, first: int, last: int) -> None:
    """Train from ``first`` up to ``last``, with data by step and data-parallel rank."""
    import torch
    import torch.distributed as dist

    group = getattr(built.booster.plugin, "dp_group", None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for step in range(first, last):
        torch.manual_seed(100 * step + dist.get_rank(group))
        if built.setup.model == "mlp":
            loss = built.model(torch.randn(BATCH, LENGTH).to(device)).pow(2).mean()
            built.booster.backward(loss, built.optimizer)
        else:
            ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH)).to(device)
            batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
            if built.setup.options.get("pp_size", 1) > 1:
                built.booster.execute_pipeline(
                    iter([batch]), built.model, built.criterion, built.optimizer, return_loss=True
                )
            else:
                built.booster.backward(built.model(**batch).loss, built.optimizer)
        built.optimizer.step()
        built.optimizer.zero_grad()
        built.scheduler.step()


def digests(built: Built) -> dict[str, Any]:
    """Return digests of all state that must be equal, bit for bit, in two equivalent runs."""
    import torch

    from elastic_ckpt.training.engines.colossalai.loss_scale import find_loss_scale

    inner = built.optimizer.optim
    stepped = [p for group in inner.param_groups for p in group["params"]]
    if hasattr(built.optimizer, "chunk16_set"):
        module = built.optimizer.module
        chunks = dict.fromkeys(module.chunk_manager.get_chunk(p) for p in module.param2name)
        weights = [chunk.payload for chunk in chunks]
        masters = [chunk.paired_chunk.payload for chunk in chunks]
    else:
        weights, masters = list(built.model.unwrap().parameters()), stepped
    moments = [
        value
        for p in stepped
        for _, value in sorted(inner.state.get(p, {}).items())
        if isinstance(value, torch.Tensor)
    ]
    scale = find_loss_scale(built.optimizer)
    return {
        "weights": digest(weights),
        "masters": digest(masters),
        "moments": digest(moments),
        "learning rate": built.scheduler.get_last_lr(),
        "loss scale": str(scale.state()) if scale else "",
    }


def digest(tensors: Any) -> str:
    """Return a digest of the tensors' bytes."""
    import torch

    found = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(flat.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def train_undisturbed(rank: int, setup: Setup, first: int, last: int) -> dict[str, Any]:
    """Return the state after the steps from ``first`` up to ``last``."""
    built = build(setup)
    train(built, first, last)
    return digests(built)


def train_and_save(rank: int, setup: Setup, directory: str, leave_out: str = "") -> Any:
    """Train and save in the middle; return the state at the save and at the end."""
    from elastic_ckpt import save_checkpoint
    from elastic_ckpt.training.engines import EngineInputs, make_engine

    built = build(setup, leave_out=leave_out)
    train(built, 0, STEPS)
    at_save = digests(built)
    with quiet():
        save_checkpoint(directory, *built.state, 0, STEPS, BATCH, None)
    foretold = make_engine(EngineInputs(*built.state)).state_bytes()
    written = written_bytes(Path(directory) / f"epoch-0_step-{STEPS}")
    assert 0.8 * written < foretold < 1.5 * written, (foretold, written)
    train(built, STEPS, 2 * STEPS)
    return at_save, digests(built)


def load_and_train(rank: int, setup: Setup, directory: str) -> Any:
    """Resume; return the state after the load and at the end."""
    from elastic_ckpt import load_checkpoint

    built = build(setup, seed=2)
    with quiet():
        place = load_checkpoint(directory, *built.state)
    assert place[:2] == (0, STEPS), place
    at_load = digests(built)
    train(built, STEPS, 2 * STEPS)
    return at_load, digests(built)


def load_plainly_and_train(rank: int, setup: Setup, directory: str) -> Any:
    """Resume with ColossalAI's own calls, from the same files."""
    built = build(setup, seed=2)
    place = os.path.join(directory, f"epoch-0_step-{STEPS}")
    with quiet():
        built.booster.load_model(built.model, os.path.join(place, "modeling"))
        built.booster.load_optimizer(built.optimizer, os.path.join(place, "optimizer"))
        built.booster.load_lr_scheduler(built.scheduler, os.path.join(place, "lr_scheduler"))
    at_load = digests(built)
    train(built, STEPS, 2 * STEPS)
    return at_load, digests(built)


def load_and_save_again(rank: int, setup: Setup, directory: str) -> None:
    """Load into another layout and save again, as that step of the next epoch."""
    from elastic_ckpt import load_checkpoint, save_checkpoint

    built = build(setup, seed=2)
    with quiet():
        load_checkpoint(os.path.join(directory, f"epoch-0_step-{STEPS}"), *built.state)
        save_checkpoint(directory, *built.state, 1, STEPS, BATCH, None)


# -- looking at files -------------------------------------------------------------------------


def differences(left: Path, right: Path) -> list[str]:
    """Return which of weights, moments and masters differ between two checkpoints."""
    return [
        kind
        for kind, read in (("weights", _weights), ("moments", _moments), ("masters", _masters))
        if not _same(read(left), read(right))
    ]


def _same(left: dict[Any, str], right: dict[Any, str]) -> bool:
    """Whether all are equal by name; one of two tied weights may be missing."""
    common = left.keys() & right.keys()
    return set(left.values()) == set(right.values()) and all(left[k] == right[k] for k in common)


def _shards(place: Path) -> dict[Any, Any]:
    """Return all tensors in an index's shards."""
    import torch

    (index,) = place.glob("*.index.json")
    found: dict[Any, Any] = {}
    for name in set(json.loads(index.read_text())["weight_map"].values()):
        found |= torch.load(place / name, weights_only=True)
    return found


def written_bytes(checkpoint: Path) -> int:
    """Return the bytes of all tensors of weights, optimizer and masters."""
    import safetensors.torch

    from elastic_ckpt.training.engines import tensor_bytes

    masters = [
        safetensors.torch.load_file(path)
        for path in (checkpoint / "precision").glob("masters-*.safetensors")
    ]
    kinds = (_shards(checkpoint / kind) for kind in ("modeling", "optimizer"))
    return tensor_bytes([*masters, *kinds])


def _weights(checkpoint: Path) -> dict[str, str]:
    return {name: digest([tensor]) for name, tensor in _shards(checkpoint / "modeling").items()}


def _moments(checkpoint: Path) -> dict[Any, str]:
    states = _shards(checkpoint / "optimizer")
    return {
        number: digest([state[key] for key in sorted(state) if key.startswith("exp_avg")])
        for number, state in states.items()
    }


def _masters(checkpoint: Path) -> dict[str, str]:
    """Return the masters by parallel index and parameter, without padding."""
    import safetensors.torch
    import torch

    pieces: dict[str, list[Any]] = {}
    for path in sorted((checkpoint / "precision").glob("masters-*.safetensors")):
        place = path.name.rpartition("-of-")[0].rpartition("-")[0]
        for name, tensor in safetensors.torch.load_file(path).items():
            pieces.setdefault(f"{place} {name}", []).append(tensor.flatten())
    joined = {name: torch.cat(parts) for name, parts in pieces.items()}
    return {name: digest([tensor[: _end(tensor)]]) for name, tensor in joined.items()}


def _end(tensor: Any) -> int:
    """Return where the padding of the last shard starts."""
    used = tensor.nonzero()
    return int(used[-1]) + 1 if len(used) else 0
