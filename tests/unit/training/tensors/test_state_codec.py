"""Nested state as JSON and safetensors: what goes in comes out, or is refused by name."""

import json
import math
import struct
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.optim import lr_scheduler as schedulers

from elastic_ckpt.checkpoint.disk.part import DiskPart
from elastic_ckpt.errors import CheckpointRejected, UsageError
from elastic_ckpt.training.tensors.state_codec import read_state, write_state


def round_trip(directory, state):
    write_state(DiskPart(directory, "tested", 0), "s", state)
    return read_state(directory, "s")


def same(left, right) -> bool:
    """Equal in value and, for what the codec tells apart, in type."""
    if isinstance(left, torch.Tensor):
        return (
            isinstance(right, torch.Tensor)
            and left.dtype == right.dtype
            and left.shape == right.shape
            and torch.equal(left, right)
        )
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and (left == right).all()
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return (
            isinstance(right, (list, tuple))
            and isinstance(left, list) == isinstance(right, list)
            and len(left) == len(right)
            and all(map(same, left, right))
        )
    if isinstance(left, float) and math.isnan(left):
        return isinstance(right, float) and math.isnan(right)
    return type(left) is type(right) and left == right


# -- plain values -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        False,
        0,
        -1,
        2**63,
        -(2**200) + 1,
        0.1,
        -0.0,
        5e-324,
        1.7976931348623157e308,
        math.inf,
        -math.inf,
        math.nan,
        "",
        'snow \u2603, a quote ", a \\ and a \x00',
        "half of a pair \udc80",
        b"",
        bytes(range(256)),
        [],
        (),
        {},
        set(),
        frozenset({1, "a", (2, None)}),
        {1, 2.5, "x"},
        [1, [2, [3, (4, [5])]]],
        (1, (2, [3])),
        {"a": {"b": {"c": 1}}, "d": [{"e": (None, True)}]},
        {0: "int", -3: "negative", 2**70: "big"},
        {(1, "a"): 1, (2, (3, 4)): 2, (): 3},
        {None: 1, True: 2, 2.5: 3, "a": 4, b"b": 5, frozenset({1}): 6},
        {"$": "the tag itself"},
        {"$": "tensor", "name": "no.such.tensor"},
        {"a": {"$": "dict", "items": [[1, 2]]}},
        Counter({30: 2, 80: 1}),
        Counter(),
        Counter("abracadabra"),
        {"1": "text", 1: "number"},
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, set | frozenset) else repr(value),
)
def test_plain_values_are_restored(tmp_path, value):
    back = round_trip(tmp_path, {"value": value})["value"]
    assert same(value, back)
    assert type(back) is type(value)


@pytest.mark.parametrize("top", [None, 3, "text", [1, 2], (1,), {2: 3}, torch.arange(3)], ids=repr)
def test_anything_may_be_at_the_top(tmp_path, top):
    assert same(top, round_trip(tmp_path, top))


def test_the_sign_of_zero_is_kept(tmp_path):
    assert math.copysign(1, round_trip(tmp_path, [-0.0])[0]) == -1


def test_the_order_of_keys_is_kept(tmp_path):
    state = OrderedDict([("b", 1), ("a", torch.ones(1)), ("c", OrderedDict([(2, 0), (1, 0)]))])
    back = round_trip(tmp_path, state)
    assert list(back) == ["b", "a", "c"]
    assert list(back["c"]) == [2, 1]


# -- arrays -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [np.float64(0.1), np.float32(0.1), np.int64(-7), np.uint8(255), np.bool_(True)]
)
def test_numpy_scalars_are_restored_as_numbers(tmp_path, value):
    back = round_trip(tmp_path, {"value": value})["value"]
    assert back == value
    assert type(back) in (bool, int, float)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3),
        np.arange(5, dtype=np.uint32),
        np.zeros((0, 3), dtype=np.int16),
        np.array([[True, False]]),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(10)[::3],
        np.arange(4)[::-1],
        np.array(2.5),
        np.array([1 + 2j], dtype=np.complex64),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}{array.strides}",
)
def test_numpy_arrays_are_restored_as_arrays(tmp_path, array):
    back = round_trip(tmp_path, {"array": array})["array"]
    assert isinstance(back, np.ndarray)
    assert same(array, back)


@pytest.mark.filterwarnings("error")
def test_a_read_only_array_is_restored(tmp_path):
    array = np.arange(3)
    array.flags.writeable = False
    assert same(array, round_trip(tmp_path, [array])[0])


def test_numpys_generators_are_restored(tmp_path):
    generator = np.random.default_rng(3)
    generator.random(5)
    legacy = np.random.RandomState(4)
    legacy.randn(3)
    back = round_trip(tmp_path, [generator.bit_generator.state, legacy.get_state()])
    expected = generator.random(4), legacy.randn(4)
    generator, legacy = np.random.default_rng(0), np.random.RandomState(0)
    generator.bit_generator.state = back[0]
    legacy.set_state(back[1])
    assert (generator.random(4) == expected[0]).all()
    assert (legacy.randn(4) == expected[1]).all()


# -- tensors ------------------------------------------------------------------------------------

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (3, 4)], ids=str)
def test_tensors_of_any_shape_and_dtype_are_restored(tmp_path, dtype, shape):
    generator = torch.Generator().manual_seed(1)
    tensor = torch.randn(shape, generator=generator).mul(5).to(dtype)
    back = round_trip(tmp_path, {"tensor": tensor})["tensor"]
    assert (back.dtype, back.shape) == (dtype, tensor.shape)
    if tensor.numel():
        assert torch.equal(back.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_special_numbers_in_tensors_are_restored_bit_for_bit(tmp_path):
    bits = torch.tensor([0x7FC00001, -1, 0x7F800000, -0x80000000, 1], dtype=torch.int32)
    back = round_trip(tmp_path, [bits.view(torch.float32)])[0]
    assert torch.equal(back.view(torch.int32), bits)


def test_views_and_odd_strides_are_restored_without_their_neighbours(tmp_path):
    whole = torch.arange(1000.0)
    state = {
        "slice": whole[3:6],
        "rows": whole.view(10, 100)[::4],
        "transposed": whole[:6].view(2, 3).t(),
        "expanded": torch.ones(1).expand(4),
        "reversed twice": whole.view(10, 100).flip(0)[1],
    }
    back = round_trip(tmp_path, state)
    assert same(state, back)
    assert (tmp_path / "s.safetensors").stat().st_size < 4 * 600


def test_views_of_one_storage_in_other_shapes_and_dtypes_are_restored(tmp_path):
    tensor = torch.arange(6.0)
    state = {"flat": tensor, "table": tensor.view(2, 3), "bits": tensor.view(torch.int32)}
    back = round_trip(tmp_path, state)
    assert same(state, back)
    back["flat"].zero_()
    assert back["table"].sum() == 15


def test_conjugated_and_negated_views_are_restored(tmp_path):
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    state = {"plain": tensor, "conjugate": tensor.conj(), "negative": tensor.conj().imag}
    assert same(state, round_trip(tmp_path, state))


def test_parameters_that_are_tied_are_written_once_and_stay_tied(tmp_path):
    model = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50))
    model[1].weight = model[0].weight
    back = round_trip(tmp_path, model.state_dict())
    assert same(dict(model.state_dict()), back)
    assert (tmp_path / "s.safetensors").stat().st_size < 1.5 * 4 * 50 * 50
    assert back["0.weight"].data_ptr() == back["1.weight"].data_ptr()
    assert back["0.bias"].data_ptr() != back["1.bias"].data_ptr()


def test_equal_tensors_that_are_not_tied_stay_apart(tmp_path):
    back = round_trip(tmp_path, [torch.zeros(3), torch.zeros(3), torch.zeros(0), torch.zeros(0)])
    back[0].fill_(1)
    assert torch.equal(back[1], torch.zeros(3))


def test_colliding_names_are_kept_apart(tmp_path):
    state = {
        "a": {"b": torch.ones(1), "b_": torch.ones(1) * 2},
        "a.b": torch.ones(1) * 3,
        "a.b_": torch.ones(1) * 4,
        1: {"x": torch.ones(1) * 5},
        "1": {"x": torch.ones(1) * 6},
        "": torch.ones(1) * 7,
        "list": [torch.ones(1) * 8],
        "list.0": torch.ones(1) * 9,
    }
    assert same(state, round_trip(tmp_path, state))


def test_names_that_the_file_format_rejects_are_restored(tmp_path):
    state = {"__metadata__": torch.ones(2), "half \udc80": torch.zeros(3)}
    assert same(state, round_trip(tmp_path, state))


def test_writing_leaves_the_state_as_it_was(tmp_path):
    weight = nn.Parameter(torch.randn(3, 4).t())
    state = {"weight": weight, "numbers": [1, 2]}
    write_state(DiskPart(tmp_path, "tested", 0), "s", state)
    assert state["weight"] is weight
    assert weight.requires_grad
    assert not weight.is_contiguous()


def test_loaded_tensors_do_not_need_the_file(tmp_path):
    """A checkpoint may be pruned while the job continues from it: nothing may stay mapped."""
    state = {"big": torch.arange(100_000.0), "small": torch.ones(2), "array": np.arange(9)}
    back = round_trip(tmp_path, state)
    with open("/proc/self/maps") as maps:
        assert str(tmp_path) not in maps.read()
    back["small"].add_(1)
    assert same(state, read_state(tmp_path, "s"))


# -- optimizers and schedulers ------------------------------------------------------------------


def trainer(kind, schedule):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    if kind == "adamw":
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.02}]
        optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.99), amsgrad=True)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    return model, optimizer, schedule(optimizer)


def train(objects, first, last):
    model, optimizer, scheduler = objects
    rates = []
    for step in range(first, last):
        inputs = torch.linspace(-1, 1 + step, 12, dtype=torch.float64).view(3, 4)
        loss = model(inputs).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(scheduler, schedulers.ReduceLROnPlateau):
            scheduler.step(loss.item())
        else:
            scheduler.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    return rates


SCHEDULES = {
    "multi step": lambda o: schedulers.MultiStepLR(o, [2, 4, 4, 9], gamma=0.5),
    "one cycle": lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=20),
    "sequential": lambda o: schedulers.SequentialLR(
        o,
        [schedulers.ConstantLR(o, 0.1, 4), schedulers.ExponentialLR(o, 0.9)],
        milestones=[5],
    ),
    "chained": lambda o: schedulers.ChainedScheduler(
        [schedulers.LinearLR(o, 0.5, total_iters=7), schedulers.ExponentialLR(o, 0.9)]
    ),
    "warm restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 7),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "plateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, threshold=0.5),
}


@pytest.mark.filterwarnings("ignore:To get the last learning rate")
@pytest.mark.filterwarnings("ignore:The epoch parameter in")
@pytest.mark.filterwarnings("ignore:Please also save or load")
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("stop", [0, 4, 5, 6])
def test_training_continues_exactly(tmp_path, kind, name, stop):
    calm = trainer(kind, SCHEDULES[name])
    rates = train(calm, 0, 12)
    first = trainer(kind, SCHEDULES[name])
    train(first, 0, stop)
    state = round_trip(tmp_path, [part.state_dict() for part in first])
    second = trainer(kind, SCHEDULES[name])
    train(second, 0, 2)  # anything of its own must not remain
    second = trainer(kind, SCHEDULES[name])
    for part, saved in zip(second, state, strict=True):
        part.load_state_dict(saved)
    assert train(second, stop, 12) == rates[stop:]
    for mine, theirs in zip(second[0].parameters(), calm[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    # Counters and tuples too are what they were, not what JSON makes of them.
    for part, other in zip(second, calm, strict=True):
        assert describe(part.state_dict()) == describe(other.state_dict())


def describe(value):
    """A state with tensors as lists, to compare it in full."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return type(value) is Counter, {key: describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return isinstance(value, tuple), [describe(item) for item in value]
    return value


def test_a_gradient_scaler_is_restored(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=3)
    back = round_trip(tmp_path, scaler.state_dict())
    other = torch.amp.GradScaler("cpu")
    other.load_state_dict(back)
    assert other.state_dict() == scaler.state_dict()


# -- what is refused ----------------------------------------------------------------------------


class Something:
    pass


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (Something(), "Something"),
        (1 + 2j, "complex"),
        (torch.float32, "dtype"),
        (torch.device("cpu"), "device"),
        (range(3), "range"),
        (len, "builtin_function_or_method"),
        (np.datetime64("2020-01-01"), "date"),
        (np.longdouble(1), "longdouble"),
        (np.array([Something()]), "ndarray of object"),
        (np.array(["text"]), "ndarray of <U4"),
        (torch.eye(2).to_sparse(), "Tensor"),
        (torch.ones(2, device="meta"), "Tensor"),
        (torch.ones(2, dtype=torch.complex128), "Tensor of torch.complex128"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unsupported_value_is_rejected_with_its_path(tmp_path, value, what):
    state = {"fine": [1], "optimizer": {"groups": [0, {"odd": value}]}}
    with pytest.raises(UsageError, match=rf"at 'optimizer.groups.1.odd' is a {what}"):
        write_state(DiskPart(tmp_path, "tested", 0), "s", state)
    assert list(tmp_path.iterdir()) == []


def test_an_unsupported_top_level_value_is_rejected(tmp_path):
    with pytest.raises(UsageError, match="at 'the top' is a Something"):
        write_state(DiskPart(tmp_path, "tested", 0), "s", Something())


def test_an_unsupported_key_is_rejected_with_its_path(tmp_path):
    with pytest.raises(UsageError, match="at 'table' is a Something"):
        write_state(DiskPart(tmp_path, "tested", 0), "s", {"table": {Something(): 1}})


@pytest.mark.parametrize("wrap", [list, tuple, "a", 0, (1, 2)], ids=repr)
@pytest.mark.parametrize("depth", [0, 1, 20, 40, 60, 63, 64, 65, 70, 200, 5000])
def test_a_deeply_nested_state_is_restored(tmp_path, wrap, depth):
    state = 1
    for _ in range(depth):
        state = wrap([state]) if isinstance(wrap, type) else {wrap: state}
    if depth > 64:
        with pytest.raises(UsageError, match="nested deeper than 64"):
            write_state(DiskPart(tmp_path, "tested", 0), "s", state)
    else:
        assert round_trip(tmp_path, state) == state


def test_a_state_that_contains_itself_is_rejected(tmp_path):
    state = {}
    state["self"] = state
    with pytest.raises(UsageError, match="nested deeper"):
        write_state(DiskPart(tmp_path, "tested", 0), "s", state)


# -- damage -------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path):
    write_state(
        DiskPart(tmp_path, "tested", 0),
        "s",
        {"a": torch.arange(5.0), "b": {1: b"x", (2,): np.arange(2)}},
    )
    return tmp_path


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 20, -1])
@pytest.mark.parametrize("name", ["s.json", "s.safetensors"])
def test_a_truncated_file_is_rejected(written, name, keep):
    content = (written / name).read_bytes()
    (written / name).write_bytes(content[:keep])
    with pytest.raises(CheckpointRejected, match=r"s in .* is not readable"):
        read_state(written, "s")


@pytest.mark.parametrize(
    "text",
    [
        "\udcff",
        "[1, 2",
        '{"$": "no such kind", "items": []}',
        '{"$": ["list"], "items": []}',
        '{"$": "tensor"}',
        '{"$": "tensor", "name": "missing"}',
        '{"$": "tensor", "name": ["a"]}',
        '{"$": "ndarray", "tensor": 3}',
        '{"$": "ndarray", "tensor": {"$": "tensor", "name": "missing"}}',
        '{"$": "bytes", "base64": 7}',
        '{"$": "bytes", "base64": "x"}',
        '{"$": "dict", "items": [[1]]}',
        '{"$": "dict", "items": [[[1], 2]]}',
        '{"$": "dict", "items": 5}',
        '{"$": "set", "items": [[1]]}',
        '{"$": "tuple"}',
        "[" * 100_000,
        "[" * 500 + "]" * 500,
    ],
    ids=lambda text: text[:40],
)
def test_an_invalid_tree_is_rejected(written, text):
    (written / "s.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointRejected, match=r"s in .* is not readable"):
        read_state(written, "s")


def test_a_damaged_header_is_rejected(written):
    path = written / "s.safetensors"
    content = path.read_bytes()
    for head in (b"\xff" * 8, struct.pack("<Q", 3), content[:8] + b"{}{}"):
        path.write_bytes(head + content[len(head) :])
        with pytest.raises(CheckpointRejected):
            read_state(written, "s")


def test_a_missing_file_is_an_os_error(written):
    """An error of the disk must never set a checkpoint aside."""
    (written / "s.json").unlink()
    with pytest.raises(FileNotFoundError):
        read_state(written, "s")


# -- the files ----------------------------------------------------------------------------------


def test_the_files_contain_only_json_and_raw_tensors(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    write_state(DiskPart(tmp_path, "tested", 0), "s", optimizer.state_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.json", "s.safetensors"]
    tree = json.loads((tmp_path / "s.json").read_text(encoding="ascii"))
    assert set(tree) == {"state", "param_groups"}
    content = (tmp_path / "s.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert set(header) == {
        f"state.{index}.{name}" for index in (0, 1) for name in ("step", "exp_avg", "exp_avg_sq")
    }
    spans = sorted(tuple(entry["data_offsets"]) for entry in header.values())
    assert [0, *(end for _, end in spans)] == [*(start for start, _ in spans), spans[-1][1]]
    assert len(content) == 8 + length + spans[-1][1]


def test_nothing_is_pickled_or_unpickled(tmp_path, monkeypatch):
    import pickle

    def refuse(*_, **__):
        raise AssertionError("pickle was used")

    for owner, names in (
        (pickle, ("dump", "dumps", "load", "loads", "Pickler", "Unpickler")),
        (torch, ("save", "load")),
        (np, ("save", "load")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, refuse)
    state = {"a": torch.ones(2), "b": np.arange(3), "c": {(1, 2): Counter("aab")}, "d": b"x"}
    assert same(state, round_trip(tmp_path, state))


def test_any_safetensors_reader_finds_the_parameters_by_name(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1, bias=False))
    write_state(DiskPart(tmp_path, "tested", 0), "s", model.state_dict())
    with safe_open(tmp_path / "s.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(model.state_dict())
        for name, value in model.state_dict().items():
            assert torch.equal(file.get_tensor(name), value)
    with safe_open(tmp_path / "s.safetensors", framework="numpy") as file:
        assert file.get_tensor("0.weight").shape == (4, 3)
