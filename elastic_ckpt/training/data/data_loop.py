"""A session's loop over its data: the remaining epochs, and the remaining batches of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from torch.utils.data import DataLoader

from elastic_ckpt.checkpoint.manifest import SealHeader
from elastic_ckpt.errors import UsageError
from elastic_ckpt.policy.accumulation import accumulation_steps, step_size_changed
from elastic_ckpt.protocol.slot import Phase
from elastic_ckpt.training.data.fingerprint import DataIdentity
from elastic_ckpt.training.data.opening import Opening, difference_from, open_pass
from elastic_ckpt.training.data.sampler import ElasticSampler
from elastic_ckpt.training.runtime import Runtime
from elastic_ckpt.training.save_points import LoopState, SavePoints
from elastic_ckpt.training.session_inputs import check_loader
from elastic_ckpt.training.state.rank_state import RankState
from elastic_ckpt.training.step_timer import StepTimer


class DataLoop:
    """Yields batches, and counts the steps that the script makes of them. ``global_batch``, samples
    of a step on all ranks together, sets the accumulation unless it is 0; the data must be those of
    ``resumed_from``."""

    def __init__(
        self,
        runtime: Runtime,
        points: SavePoints,
        timer: StepTimer,
        state: LoopState,
        rank_state: RankState,
        *,
        global_batch: int,
        resumed_from: SealHeader | None,
    ) -> None:
        self._runtime = runtime
        self._points = points
        self._timer = timer
        self._state = state
        self._rank_state = rank_state
        self._global_batch = global_batch
        self._unchecked = resumed_from
        self._max_epochs = 0
        self._group_batches = 0
        self._batch_is_out = False
        self._sampler: ElasticSampler | None = None
        self._dataset: Any = None
        self._identity = DataIdentity(None)

    def epochs(self, max_epochs: int) -> Iterator[int]:
        """Yield the remaining epochs; see ``Session.epochs``."""
        self._rank_state.restore_rng(iterating=False)
        self._max_epochs = max_epochs
        state = self._state
        while state.position.epoch < max_epochs:
            yield state.position.epoch
            self.settle()
            state.position = state.position.next_epoch()
            if self._sampler is not None:
                self._sampler.set_epoch(state.position.epoch)
            state.consumption.end()
            if state.position.epoch < max_epochs:
                self._points.after_epoch()
        self._points.end_loop()

    def batches(self, dataloader: DataLoader[Any]) -> Iterator[Any]:
        """Yield the remaining micro-batches of this epoch; see ``Session.batches``."""
        sampler = self._prepare(dataloader)
        count = len(dataloader)
        if sampler.drop_last or dataloader.drop_last:
            count -= count % self._state.accumulation_steps
        self._open(count)
        self._show_remaining(dataloader, sampler, count)
        state = self._state
        state.pass_start, state.counted = state.position, 0
        state.consumption.begin(state.accumulation_steps)
        self._rank_state.restore_rng(iterating=False)
        if count == 0:
            self._rank_state.restore_rng()
            sampler.set_position(state.position.epoch, 0)
            self._compare_frozen()
            return
        iterator = iter(dataloader)
        self._rank_state.restore_rng()
        in_process = dataloader.num_workers == 0
        accumulation, slot = state.accumulation_steps, self._runtime.slot
        try:
            for index in range(count):
                begins = index % accumulation == 0
                if begins and in_process:
                    self._points.before_step()
                slot.phase(Phase.FETCHING)
                self._timer.fetching()
                batch = self._next(iterator, dataloader)
                if not index and type(sampler) is ElasticSampler:
                    sampler.set_position(state.position.epoch, 0)  # for an evaluation's pass
                self._timer.fetched()
                slot.phase(Phase.TRAINING)
                if begins and not in_process:
                    self._points.before_step()
                self._state.step_ends = (index + 1) % accumulation == 0 or index + 1 == count
                self._group_batches = index % accumulation + 1
                yield from self._hand_out(batch)
                if self._state.step_ends:
                    self._points.count_step(self._group_batches)
                    self._compare_frozen()
                    self._points.after_step()
            state.consumption.exhaust()
        finally:  # the script may leave by break
            self._timer.interrupted()
            slot.phase(Phase.BETWEEN)

    def _compare_frozen(self) -> None:
        if said := self._rank_state.frozen_otherwise(self._state.position.epoch):
            self._runtime.leader_says(said)

    def _next(self, iterator: Iterator[Any], dataloader: DataLoader[Any]) -> Any:
        """Fetch a batch; UsageError if another loop has read them."""
        try:
            return next(iterator)
        except StopIteration:
            why = (
                "another loop reads the same DataLoader, whose persistent workers serve only one "
                "at a time: give the evaluation a DataLoader of its own"
                if dataloader.persistent_workers
                else "its length is wrong, or the script changed the data set"
            )
            raise UsageError(
                f"the DataLoader ended before the epoch's last batch, after step "
                f"{self._state.position.step}: {why}"
            ) from None

    def settle(self) -> None:
        """Count the step of a batch that the script left by ``break``; whatever depends on the
        count calls this first, as Python may close the generator late."""
        stepped = self._state.consumption.stepped_since
        if self._batch_is_out and stepped and self._state.step_ends:
            self._points.count_step(self._group_batches)
        self._batch_is_out = False

    def _hand_out(self, batch: Any) -> Iterator[Any]:
        """Yield a batch; a ``break`` after an optimizer step still counts that step."""
        epoch = self._state.position.epoch
        self._state.consumption.handed += 1
        self._batch_is_out = True
        self._timer.handed_out()
        try:
            yield batch
        except GeneratorExit:
            if self._state.position.epoch == epoch:
                self.settle()
            raise
        self._batch_is_out = False
        self._timer.taken_back()

    def _prepare(self, dataloader: DataLoader[Any]) -> ElasticSampler:
        check_loader(dataloader)
        sampler, state = dataloader.sampler, self._state
        if not isinstance(sampler, ElasticSampler):
            raise UsageError(
                f"session.batches needs a DataLoader with an ElasticSampler, not with a "
                f"{type(sampler).__name__}: DataLoader(dataset, sampler=ElasticSampler(dataset, "
                "seed=0), ...)"
            )
        if dataloader.batch_size is None:
            raise UsageError("session.batches needs a DataLoader with a batch_size")
        epoch = state.position.epoch
        if state.iterated_epoch == epoch:
            raise UsageError(
                "session.batches may be called once per epoch: loop over "
                "session.epochs(max_epochs), as in `for epoch in session.epochs(3):`; a second "
                "DataLoader in the same epoch is read without it"
                if not self._max_epochs
                else f"session.batches was called before in epoch {epoch}, and may be called once "
                "per epoch: read a second DataLoader without it, or join the data sets"
            )
        state.iterated_epoch = epoch
        if self._dataset is not dataloader.dataset:  # once per data set: it reads samples
            self._dataset, self._identity = dataloader.dataset, DataIdentity(dataloader.dataset)
        identity = self._identity
        state.position = msgspec.structs.replace(
            state.position,
            dataset_size=sampler.dataset_size,
            order_seed=sampler.order_seed,
            dataset_fingerprint=identity.digest,
            dataset_fields=identity.fields,
        )
        state.replicas = sampler.num_replicas
        state.samples_per_batch = dataloader.batch_size * sampler.num_replicas
        if self._global_batch:
            state.accumulation_steps = accumulation_steps(
                self._global_batch, dataloader.batch_size, sampler.num_replicas
            )
        if self._unchecked is not None:
            before = self._unchecked.samples_per_step
            self._runtime.slot.samples_before(before)
            now = state.samples_per_batch * state.accumulation_steps
            if changed := step_size_changed(before, now):
                self._runtime.leader_says(changed)
        self._sampler = sampler
        sampler.order_version = state.position.order_version
        sampler.set_position(epoch, state.position.sample_start_index)
        return sampler

    def _open(self, count: int) -> None:
        """Check that all ranks have the checkpoint's data, and equally many batches. Collective."""
        state, saved = self._state, self._unchecked
        self._unchecked = None
        problem = ""
        if saved is not None and saved.dataset_fingerprint:
            problem = difference_from(saved, state.position, self._identity)
        state.position = open_pass(self._runtime.peers, Opening(state.position, count, problem))

    def _show_remaining(
        self, dataloader: DataLoader[Any], sampler: ElasticSampler, count: int
    ) -> None:
        """Show ``status`` how many steps the script will make; ``count`` batches are left here."""
        state = self._state
        accumulation = state.accumulation_steps
        dropped = sampler.drop_last or dataloader.drop_last
        parts = (sampler.num_replicas, dataloader.batch_size or 1, accumulation)
        steps = sampler.dataset_size
        for part, floor in zip(
            parts, (sampler.drop_last, dataloader.drop_last, dropped), strict=True
        ):
            steps = steps // part if floor else -(-steps // part)
        epochs = max(0, self._max_epochs - state.position.epoch - 1)
        total = state.position.step - (-count // accumulation) + epochs * steps
        self._runtime.slot.goal(
            total if self._max_epochs else 0, state.samples_per_batch * accumulation
        )
