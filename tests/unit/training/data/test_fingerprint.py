"""A data set's fingerprint depends on its contents, and is equal in every run."""

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from elastic_ckpt.training.data.fingerprint import DataIdentity
from elastic_ckpt.training.state.rng import capture_rng
from tests.unit.training.tensors.test_state_codec import same


class Listed(Dataset):
    """Samples as they are given."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


class Augmented(Listed):
    """Every sample with noise from the global generators."""

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + torch.rand(1).item()
        return self.samples[index], noise


class OwnGenerator(Listed):
    """Adds noise from a private generator to every sample."""

    def __init__(self, samples):
        super().__init__(samples)
        self.generator = random.Random(0)

    def __getitem__(self, index):
        return self.samples[index], self.generator.random()


def dataset_fingerprint(data) -> str:
    return DataIdentity(data).digest


def numbers(size: int = 20) -> list[float]:
    return [float(value) for value in range(size)]


# -- what it tells apart ------------------------------------------------------------------------


def test_the_same_data_have_the_same_fingerprint():
    assert dataset_fingerprint(Listed(numbers())) == dataset_fingerprint(Listed(numbers()))
    assert len(dataset_fingerprint(Listed(numbers()))) == 32


def test_it_changes_with_the_length():
    fingerprints = {dataset_fingerprint(Listed([0.0] * size)) for size in range(1, 30)}
    assert len(fingerprints) == 29


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 1000])
@pytest.mark.parametrize("place", ["first", "last"])
def test_it_changes_with_the_contents(size, place):
    changed = numbers(size)
    changed[0 if place == "first" else -1] = 0.5
    assert dataset_fingerprint(Listed(changed)) != dataset_fingerprint(Listed(numbers(size)))


def test_it_changes_with_an_order_of_samples():
    assert dataset_fingerprint(Listed(numbers()[::-1])) != dataset_fingerprint(Listed(numbers()))


ONE, TWO = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])

DIFFERENT = [
    (ONE, TWO),
    (ONE, ONE.view(1, 2)),
    (ONE, ONE.view(torch.int32)),
    (ONE.bfloat16(), TWO.bfloat16()),
    (torch.tensor(True), torch.tensor(False)),
    (torch.tensor([1 + 1j]), torch.tensor([1 + 1j]).conj()),
    (torch.eye(2).to_sparse(), torch.zeros(2, 2).to_sparse()),
    (ONE.numpy(), TWO.numpy()),
    (ONE.numpy(), ONE.numpy().reshape(2, 1)),
    (np.array([1, 0], dtype=np.int32), np.array([1], dtype=np.int64)),
    (b"ab", b"ac"),
    ("ab", "ac"),
    ("1", 1),
    (1, 1.0),
    (True, 1),
    (None, 0),
    ({"x": 1}, {"x": 2}),
    ({"x": 1}, {"y": 1}),
    ((1, 2), [1, 2]),
    ([[1], 2], [[1, 2]]),
    ([(1,), (2,)], [(1, 2), ()]),
    ({"a": ONE, "b": [TWO]}, {"a": ONE, "b": [ONE]}),
]


@pytest.mark.parametrize(("left", "right"), DIFFERENT, ids=lambda value: type(value).__name__)
def test_different_samples_have_different_fingerprints(left, right):
    assert dataset_fingerprint(Listed([left])) != dataset_fingerprint(Listed([right]))
    assert dataset_fingerprint(Listed([left])) == dataset_fingerprint(Listed([left]))


def test_the_order_of_a_dictionary_does_not_matter():
    left, right = {"a": 1, "b": 2}, {"b": 2, "a": 1}
    assert dataset_fingerprint(Listed([left])) == dataset_fingerprint(Listed([right]))


def test_strides_do_not_matter():
    table = torch.arange(6.0).view(2, 3)
    assert dataset_fingerprint(Listed([table.t()])) == dataset_fingerprint(
        Listed([table.t().contiguous()])
    )


def test_a_value_without_a_stable_form_counts_by_its_type():
    class Left:
        pass

    class Right:
        pass

    assert dataset_fingerprint(Listed([Left()])) == dataset_fingerprint(Listed([Left()]))
    assert dataset_fingerprint(Listed([Left()])) != dataset_fingerprint(Listed([Right()]))


def test_torchs_own_data_sets_work():
    whole = TensorDataset(torch.arange(10.0), torch.arange(10))
    parts = {dataset_fingerprint(Subset(whole, range(start, start + 5))) for start in range(5)}
    assert len(parts) == 5


# -- alike in every run -------------------------------------------------------------------------


def test_it_is_the_same_in_every_run():
    code = """
import numpy, torch
from elastic_ckpt.training.data.fingerprint import DataIdentity
class Samples(list):
    pass
class Thing:
    pass
samples = Samples(
    {"text": f"sample {i}", "ids": [i, i + 1], "bytes": b"x", "tags": {"a", "b", "c", "d"},
     "numbers": numpy.arange(3) + i, "tensor": torch.ones(2) * i, "half": numpy.float64(i / 2),
     "none": None, "thing": Thing(), (i, "key"): True}
    for i in range(50)
)
print(DataIdentity(samples).digest)
"""
    prints = []
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )  # fmt: skip
        prints.append(done.stdout.strip())
    assert prints[0] == prints[1]
    assert len(prints[0]) == 32


def test_a_scalar_counts_the_same_in_every_version_of_numpy():
    """NumPy 2 writes its scalars as np.float64(1.5): an upgrade must not stop a job."""

    class Shown(float):
        def __repr__(self):
            return f"np.float64({float(self)})"

    class OlderShown(float):
        pass

    OlderShown.__name__ = Shown.__name__
    assert dataset_fingerprint(Listed([Shown(1.5)])) == dataset_fingerprint(
        Listed([OlderShown(1.5)])
    )


# -- randomness ---------------------------------------------------------------------------------


def test_a_random_augmentation_does_not_disturb_it():
    random.seed(1)
    torch.manual_seed(1)
    np.random.seed(1)
    first = dataset_fingerprint(Augmented(numbers()))
    random.seed(2)
    torch.manual_seed(2)
    np.random.seed(2)
    assert dataset_fingerprint(Augmented(numbers())) == first
    changed = numbers()
    changed[-1] = 99.0
    assert dataset_fingerprint(Augmented(changed)) != first  # the contents still count


@pytest.mark.parametrize("kind", [Listed, Augmented, OwnGenerator])
def test_the_callers_random_state_is_left_alone(kind):
    before = capture_rng()
    dataset_fingerprint(kind(numbers()))
    assert same(before, capture_rng())


def test_accelerators_that_are_not_in_use_yet_keep_their_seed(monkeypatch):
    """torch.manual_seed would seed them, too, once they are in use."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    torch.cuda.manual_seed(3)
    assert seeded == [3]
    dataset_fingerprint(Augmented(numbers()))
    assert seeded == [3]


def test_a_data_set_with_its_own_generator_counts_by_its_length():
    data = OwnGenerator(numbers())
    first = dataset_fingerprint(data)
    assert dataset_fingerprint(data) == first  # although its generator went on
    assert dataset_fingerprint(OwnGenerator([5.0] * 20)) == first
    assert dataset_fingerprint(OwnGenerator(numbers(21))) != first


# -- data sets that speak for themselves --------------------------------------------------------


@pytest.mark.parametrize("name", ["fingerprint", "_fingerprint"])
def test_a_data_sets_own_fingerprint_is_used(name):
    data = Listed(numbers())
    plain = dataset_fingerprint(data)
    setattr(data, name, "abc")
    first = dataset_fingerprint(data)
    assert first != plain
    data.samples = numbers()[::-1]
    assert dataset_fingerprint(data) == first
    setattr(data, name, "abd")
    assert dataset_fingerprint(data) != first


def test_a_data_set_with_a_fingerprint_is_not_read():
    class Unreadable(Listed):
        fingerprint = "abc"

        def __getitem__(self, index):
            raise AssertionError("a sample was read")

    identity = DataIdentity(Unreadable(numbers()))
    assert identity.digest
    assert identity.fields == {}


@pytest.mark.parametrize("value", [None, 7, lambda: "abc"])
def test_a_fingerprint_must_be_a_string(value):
    data = Listed(numbers())
    plain = dataset_fingerprint(data)
    data.fingerprint = value
    assert dataset_fingerprint(data) == plain


# -- whether two are the same --------------------------------------------------------------------


def same_data(saved, now) -> bool:
    saved = DataIdentity(saved)
    return DataIdentity(now).is_same(saved.digest, saved.fields)


def named(name: str | None, samples):
    data = Listed(samples)
    data._fingerprint = name
    return data


def test_a_librarys_fingerprint_is_not_trusted_over_equal_samples():
    """Hugging Face's depends on the files' paths."""
    assert same_data(named("at one path", numbers()), named("at another", numbers()))
    assert not same_data(named("one", numbers()), named("another", numbers()[::-1]))
    assert same_data(named("one", numbers()), named("one", numbers()[::-1]))
    assert same_data(named(None, numbers()), named("later", numbers()))


def staged(root: str, shift: float = 0.0):
    return Listed([{"x": index + shift, "path": f"{root}/{index:05}.png"} for index in range(20)])


def test_the_directory_that_samples_are_staged_to_does_not_matter():
    assert same_data(staged("/scratch/1"), staged("/scratch/2"))
    assert same_data(staged("s3://one"), staged("s3://other/bucket"))
    assert not same_data(staged("/scratch/1"), staged("/scratch/1", shift=1.0))
    assert not same_data(staged("relative"), staged("another"))


def test_the_difference_names_the_fields():
    saved = DataIdentity(staged("relative"))
    now = DataIdentity(staged("another"))
    assert now.difference(saved.fields) == "its samples differ in field 'path' (equal: 'x')"
    one = DataIdentity(Listed([(1, 2), (3, 4)]))
    other = DataIdentity(Listed([(1, 2), (3, 5)]))
    assert other.difference(one.fields) == "its samples differ in field '1' (equal: '0')"
    assert DataIdentity(Listed([1])).difference(DataIdentity(Listed([2])).fields) == (
        "its samples differ"
    )


def test_the_users_word_counts_alone():
    data = Listed(numbers())
    saved = DataIdentity(data)
    changed = Listed(numbers()[::-1])
    assert not DataIdentity(changed).is_same(saved.digest, saved.fields)
    changed.fingerprint = saved.digest  # as the error's text has it
    assert DataIdentity(changed).is_same(saved.digest, saved.fields)
    data.fingerprint = "mine"
    mine = DataIdentity(data)
    data.fingerprint = "other"
    assert not DataIdentity(data).is_same(mine.digest, mine.fields)


def test_only_the_fields_that_repeat_count():
    one, other = DataIdentity(OwnGenerator(numbers())), DataIdentity(OwnGenerator(numbers()))
    assert set(one.fields) == {"0"}
    assert other.is_same(one.digest, one.fields)


def test_a_wide_sample_has_few_fields():
    wide = DataIdentity(Listed([tuple(range(100)), tuple(range(100))]))
    changed = DataIdentity(Listed([tuple(range(100)), (*range(99), 7)]))
    assert len(wide.fields) == 33
    assert "'others'" in changed.difference(wide.fields)
