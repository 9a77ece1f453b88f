"""A script's own loop, with what Accelerate or Fabric has set up: to the bit as undisturbed."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from elastic_ckpt.errors import UsageError
from tests.integrations.example import EXAMPLES, Example
from tests.job import environment
from tests.marks import slow

pytest.importorskip("accelerate")
pytest.importorskip("lightning")

EPOCHS, SAMPLES, ACCUMULATED = 3, 190, 3
BATCHES = {1: 48, 2: 24}
"""Of an epoch; the last group of it has fewer than the others at 1 process."""


class Accelerate(Example):
    script = EXAMPLES / "accelerate_loop.py"


class Fabric(Example):
    script = EXAMPLES / "fabric_loop.py"


@pytest.fixture(
    scope="module",
    params=["Accelerate-2", "Fabric-1", slow("Accelerate-1"), slow("Fabric-2")],
)
def undisturbed(request, tmp_path_factory) -> Example:
    name, _, number = request.param.partition("-")
    kind, ranks = {"Accelerate": Accelerate, "Fabric": Fabric}[name], int(number)
    with kind(tmp_path_factory.mktemp("undisturbed"), ranks) as job:
        assert job.start().wait() == 0, job.output()
    seen = [job.samples(rank) for rank in range(ranks)]
    assert [len(one) for one in seen] == [BATCHES[ranks] * EPOCHS] * ranks
    for epoch in range(EPOCHS):
        numbers = {n for one in seen for _, there, batch in one if there == epoch for n in batch}
        assert numbers == set(range(SAMPLES))
    assert len(job.weights()) == 1
    steps = -(-BATCHES[ranks] // ACCUMULATED) * EPOCHS
    assert f"finished: step {steps}," in job.log.read_text()
    return job


def test_a_notice_repeats_and_loses_no_sample(undisturbed: Example, tmp_path: Path) -> None:
    """Stopped in the first epoch, and in the last one."""
    with type(undisturbed)(tmp_path, undisturbed.nproc, "--pause", "0.03") as job:
        job.stop_twice(undisturbed, 11, BATCHES[job.nproc] * EPOCHS - 9)


def test_a_killed_rank_is_made_good_for_by_the_last_save(
    undisturbed: Example, tmp_path: Path
) -> None:
    with type(undisturbed)(tmp_path, undisturbed.nproc, "--pause", "0.03", "--every", "3") as job:
        job.start().until_batches(20)
        job.workers()[-1].send_signal(signal.SIGKILL)
        assert job.wait() == 0, job.output()
        assert job.view().restarts.failures == 1
        for rank in range(job.nproc):
            seen, whole = job.samples(rank), undisturbed.samples(rank)
            assert len(seen) >= len(whole) and all(one in whole for one in seen)
        assert job.weights() == undisturbed.weights()


@pytest.mark.parametrize("kind", [Accelerate, Fabric])
def test_another_number_of_ranks_uses_each_sample_once(kind: type[Example], tmp_path: Path) -> None:
    with kind(tmp_path, 2, "--pause", "0.03", "--epochs", "1") as job:
        job.start().until_batches(7)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait() == 75, job.output()
        before = [n for rank in range(2) for _, _, batch in job.samples(rank) for n in batch]
        done = len(job.samples(0))
        job.nproc = 1
        assert job.start().wait() == 0, job.output()
        after = [n for _, _, batch in job.samples(0)[done:] for n in batch]
    assert sorted(before + after) == list(range(SAMPLES))


def test_what_registered_for_checkpointing_is_saved(tmp_path: Path) -> None:
    """Two runs of a script: the second continues the count of the first."""
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        import torch
        from accelerate import Accelerator
        from torch.utils.data import DataLoader, TensorDataset
        from elastic_ckpt.integrations.accelerate import Session

        class Count:
            calls = 0
            def state_dict(self): return {"calls": self.calls}
            def load_state_dict(self, state): self.calls = state["calls"]

        accelerator, count = Accelerator(cpu=True), Count()
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        accelerator.register_for_checkpointing(count)
        with Session(accelerator=accelerator, model=model, optimizer=optimizer) as session:
            for epoch in session.epochs(int(sys.argv[1])):
                for (inputs,) in session.batches(loader):
                    accelerator.backward(model(inputs).sum())
                    optimizer.step()
                    optimizer.zero_grad()
                    count.calls += 1
        print("calls", count.calls)
    """)
    )
    variables = environment() | {"ELASTIC_CKPT_DIR": str(tmp_path / "job")}
    for epochs in (1, 2):
        done = subprocess.run(
            [sys.executable, str(script), str(epochs)],
            env=variables, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert f"calls {4 * epochs}" in done.stdout, done.stderr


# -- what cannot be continued is refused, with the way out ------------------------------------


def accelerator_session(loader, **settings):
    """Return the reading of a prepared loader."""
    import accelerate
    import torch

    from elastic_ckpt.integrations.accelerate import Session

    accelerator = accelerate.Accelerator(cpu=True, **settings)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    session = Session(accelerator=accelerator, model=model, optimizer=optimizer)
    return lambda **how: session._readable(loader, how.get("position"))


def test_loaders_whose_place_is_unknown_are_refused() -> None:
    import torch
    from accelerate.utils import DataLoaderConfiguration
    from torch.utils.data import (
        DataLoader,
        RandomSampler,
        TensorDataset,
        WeightedRandomSampler,
    )

    from elastic_ckpt import ElasticSampler

    data = TensorDataset(torch.ones(8, 2))
    weighted = accelerator_session(DataLoader(data, sampler=WeightedRandomSampler([1.0] * 8, 8)))
    with pytest.raises(UsageError, match=r"a WeightedRandomSampler, also not use_stateful_data"):
        weighted()
    assert len(weighted(position="approximate")) == 8
    setting = DataLoaderConfiguration(use_stateful_dataloader=True)  # it forgets a shuffled order
    stateful = accelerator_session(DataLoader(data, shuffle=True), dataloader_config=setting)
    assert isinstance(stateful().sampler, ElasticSampler)
    part = accelerator_session(DataLoader(data, sampler=RandomSampler(data, num_samples=4)))
    with pytest.raises(UsageError, match=r"a RandomSampler, "):
        part()
    own = accelerator_session(DataLoader(data, sampler=ElasticSampler(data)))
    with pytest.raises(UsageError, match=r"leave a loader that has one out of accelerator.prepare"):
        own()


def test_another_session_says_which_one_reads_a_prepared_loader() -> None:
    import accelerate
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from elastic_ckpt.training.data.loaders import inspect

    loader = DataLoader(TensorDataset(torch.ones(8, 2)), shuffle=True)
    loader = accelerate.Accelerator(cpu=True).prepare(loader)
    with pytest.raises(UsageError, match=r"Session from elastic_ckpt.integrations.accelerate"):
        inspect(loader, None, 1)


def test_fabrics_own_loaders_are_refused() -> None:
    import torch
    from lightning.fabric import Fabric as Lightning
    from torch.utils.data import DataLoader, TensorDataset

    from elastic_ckpt.integrations.fabric import Session

    fabric = Lightning(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(
        model := torch.nn.Linear(2, 1), torch.optim.SGD(model.parameters(), lr=0.1)
    )
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(torch.ones(8, 2))))
    session = Session(fabric=fabric, model=model, optimizer=optimizer)
    with pytest.raises(UsageError, match=r"pass session.batches the DataLoader itself"):
        session.batches(loader)
