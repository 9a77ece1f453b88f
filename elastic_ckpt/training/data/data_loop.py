"""A session's loop over its data: the remaining epochs, and the remaining batches of each."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import msgspec

from elastic_ckpt.checkpoint.manifest import SealHeader
from elastic_ckpt.errors import UsageError
from elastic_ckpt.journal.events import RestoredInexactly
from elastic_ckpt.policy.accumulation import accumulation_steps, step_size_changed
from elastic_ckpt.protocol.slot import Phase
from elastic_ckpt.training.data.fingerprint import DataIdentity
from elastic_ckpt.training.data.loaders import (
    Batches,
    Pass,
    cannot_continue,
    check_position,
    inspect,
    length_left,
)
from elastic_ckpt.training.data.opening import Opening, difference_from, open_pass
from elastic_ckpt.training.data.sampler import ElasticSampler
from elastic_ckpt.training.data.stream import Beside, OrderStream, Stream
from elastic_ckpt.training.departure import end_together
from elastic_ckpt.training.runtime import Runtime
from elastic_ckpt.training.save_points import LoopState, SavePoints
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
        self._stream = Stream(state.consumption, self._saved(0), scale=rank_state.scale)
        self._beside: list[Beside] = []
        rank_state.places_now = self._places

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

    def batches(self, loaders: tuple[Any, ...], position: str | None) -> Batches:
        """Return the remaining micro-batches of this epoch; see ``Session.batches``."""
        check_position(loaders, position)
        return Batches(self._batches(loaders, position), lambda: self._length(loaders[0], position))

    def _batches(self, loaders: tuple[Any, ...], position: str | None) -> Iterator[Any]:
        now = self._prepare(loaders[0], position)
        problem = self._prepare_beside(loaders[1:], position)
        self._rank_state.restore_rng(iterating=False)
        iterator = self._begin(now, problem)
        state = self._state
        state.pass_start, state.counted = state.position, 0
        state.consumption.begin(state.accumulation_steps)
        if now.count == 0 and now.stream is None:
            self._end(now)
            self._compare_frozen()
            return
        accumulation, slot = state.accumulation_steps, self._runtime.slot
        try:
            for index in count():
                begins = index % accumulation == 0
                if begins and now.in_process:
                    self._points.before_step()
                slot.phase(Phase.FETCHING)
                self._timer.fetching()
                batch = self._next(iterator, now)
                if batch is now:
                    break
                if not index and type(now.sampler) is ElasticSampler:
                    now.sampler.set_position(state.position.epoch, 0)  # for an evaluation's pass
                self._timer.fetched()
                slot.phase(Phase.TRAINING)
                if begins and not now.in_process:
                    self._points.before_step()
                self._state.step_ends = (index + 1) % accumulation == 0 or index + 1 == now.count
                self._group_batches = index % accumulation + 1
                yield from self._hand_out(batch)
                self._check_step()
                if self._state.step_ends:
                    self._points.count_step(self._group_batches)
                    self._compare_frozen()
                    self._points.after_step()
                if index + 1 == now.count and now.stream is None:
                    break
            state.consumption.exhaust()
            self._end(now)
        finally:  # the script may leave by break
            self._timer.interrupted()
            slot.phase(Phase.BETWEEN)

    def _check_step(self) -> None:
        """Raise UsageError if the script does not accumulate, and so makes too many steps."""
        if not self._state.step_ends and self._state.consumption.has_main_stepped:
            steps = self._state.accumulation_steps
            why = f"global batch of {self._global_batch}" if self._global_batch else "accumulation"
            raise UsageError(
                f"the optimizer stepped with batch {self._group_batches} of the {steps} that make "
                f"a step by the {why}: step it only `if session.step_ends`, with the loss divided "
                "by session.accumulation_steps (docs/elastic.md)"
            )

    def _compare_frozen(self) -> None:
        if said := self._rank_state.frozen_otherwise(self._state.position.epoch):
            self._runtime.leader_says(said)

    def _begin(self, now: Pass, problem: str) -> Iterator[Any]:
        """Open the pass on all ranks, and begin to read its loader. Collective."""
        if now.stream is None:
            self._open(now.count or 0, problem)
            self._show_remaining(now)
            iterator: Iterator[Any] = iter(now.loader) if now.count else iter(())
            self._rank_state.restore_rng()
            return iterator
        iterator = iter(())
        try:
            iterator = now.stream.begin(now.loader, now.how, self._state.position.epoch)
        except Exception as error:  # other people's code
            problem = problem or cannot_continue(now.loader, error)
        if now.count is not None:
            now.count = max(0, now.count - now.stream.handed)
        self._open(-1 if now.count is None else now.count, problem)
        self._show_remaining(now)
        self._say_anew(now)
        self._rank_state.restore_rng()
        return iterator

    def _end(self, now: Pass) -> None:
        """Leave a pass that has been read to its end."""
        if now.stream is None:
            if now.count == 0 and now.sampler is not None:
                now.sampler.set_position(self._state.position.epoch, 0)
            return
        now.stream.end()
        stepped = self._state.consumption.stepped_since
        if stepped and not self._state.step_ends:  # the end cut the last group short
            self._points.count_step(self._group_batches)
        end_together(self._runtime, self._state.position)

    def _next(self, iterator: Iterator[Any], now: Pass) -> Any:
        """Fetch a batch; ``now`` itself at the end of a stream. UsageError if another loop has
        read them."""
        try:
            batch = next(iterator)
        except StopIteration:
            if now.stream is not None:
                return now
            why = (
                "another loop reads the same DataLoader, whose persistent workers serve only one "
                "at a time: give the evaluation a DataLoader of its own"
                if now.loader.persistent_workers
                else "its length is wrong, or the script changed the data set"
            )
            raise UsageError(
                f"the DataLoader ended before the epoch's last batch, after step "
                f"{self._state.position.step}: {why}"
            ) from None
        if now.stream is not None:
            now.stream.hand_out()
        if self._beside:
            return (batch, *(one.next() for one in self._beside))
        return batch

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

    def _prepare(self, loader: Any, position: str | None) -> Pass:
        now, state = inspect(loader, position, self._runtime.peers.world_size), self._state
        epoch = state.position.epoch
        if state.iterated_epoch == epoch:
            raise UsageError(
                "session.batches may be called once per epoch: loop over "
                "session.epochs(max_epochs), as in `for epoch in session.epochs(3):`; read several "
                "DataLoaders with session.batches(first, second)"
                if not self._max_epochs
                else f"session.batches was called before in epoch {epoch}, and may be called once "
                "per epoch: read several DataLoaders with session.batches(first, second), one for "
                "evaluation without it, or join the data sets"
            )
        state.iterated_epoch = epoch
        state.replicas = now.replicas
        state.samples_per_batch = now.batch_size * now.replicas
        if self._global_batch:
            state.accumulation_steps = self._accumulation(now)
        if self._unchecked is not None:
            before = self._unchecked.samples_per_step
            self._runtime.slot.samples_before(before)
            steps = state.samples_per_batch * state.accumulation_steps
            if changed := step_size_changed(before, steps):
                self._runtime.leader_says(changed)
        self._sampler = now.sampler
        if now.sampler is None:
            now.stream = self._stream
            state.position = msgspec.structs.replace(
                state.position, dataset_size=0, order_seed=None, dataset_fingerprint="",
                dataset_fields={},
            )  # fmt: skip
            now.count = length_left(now)
        else:
            self._prepare_order(now, now.sampler)
        return now

    def _prepare_order(self, now: Pass, sampler: ElasticSampler) -> None:
        state = self._state
        if self._dataset is not now.loader.dataset:  # once per data set: it reads samples
            self._dataset, self._identity = now.loader.dataset, DataIdentity(now.loader.dataset)
        identity = self._identity
        state.position = msgspec.structs.replace(
            state.position,
            dataset_size=sampler.dataset_size,
            order_seed=sampler.order_seed,
            dataset_fingerprint=identity.digest,
            dataset_fields=identity.fields,
        )
        sampler.order_version = state.position.order_version
        sampler.set_position(state.position.epoch, state.position.sample_start_index)
        now.count = self._whole_groups(now, len(now.loader))
        resumes = self._unchecked is not None and state.position.sample_start_index > 0
        if resumes and now.count and not now.in_process:
            self._runtime.leader_says(
                "the loader's workers draw other random numbers than before the restart: bit for "
                "bit only if the data set draws none there (docs/state.md#loaders)"
            )

    def _accumulation(self, now: Pass) -> int:
        if not self._global_batch:
            return self._state.accumulation_steps
        if not now.batch_size:
            raise UsageError(
                "global_batch needs a loader with a batch_size: give accumulation_steps instead"
            )
        return accumulation_steps(self._global_batch, now.batch_size, now.replicas)

    def _whole_groups(self, now: Pass, count: int) -> int:
        dropped = now.drop_last or (now.sampler is not None and now.sampler.drop_last)
        return count - count % self._accumulation(now) if dropped else count

    def _prepare_beside(self, loaders: tuple[Any, ...], position: str | None) -> str:
        """Begin to read the loaders beside the one that counts steps, in the first epoch; return
        why that is impossible, for all ranks, or nothing."""
        if self._beside:
            return ""
        for number, loader in enumerate(loaders, 1):
            found = inspect(loader, position, self._runtime.peers.world_size)
            saved = self._saved(number)
            epoch = saved["epoch"] if saved is not None else 0
            kind = OrderStream if found.sampler is not None else Stream
            stream = kind(self._state.consumption, saved, scale=self._rank_state.scale)
            try:
                beside = Beside(stream, loader, found.how, epoch)
            except Exception as error:  # other people's code
                return cannot_continue(loader, error)
            self._beside.append(beside)
        return ""

    def _saved(self, number: int) -> dict[str, Any] | None:
        places = self._rank_state.places
        return places[number] if number < len(places) else None

    def _places(self) -> list[dict[str, Any] | None]:
        """Return the places of all loaders, for a checkpoint that is made now."""
        used, epoch = self._state.consumption, self._state.consumed.epoch
        unused = used.handed - used.consumed if used.counts else 0
        beside = (one.stream.entry(one.epoch, unused) for one in self._beside)
        return [self._stream.entry(epoch, unused), *beside]

    def _open(self, count: int, problem: str = "") -> None:
        """Check that all ranks have the checkpoint's data, and equally many batches. Collective."""
        state, saved = self._state, self._unchecked
        self._unchecked = None
        if not problem and saved is not None and saved.dataset_fingerprint:
            problem = difference_from(saved, state.position, self._identity)
        state.position = open_pass(self._runtime.peers, Opening(state.position, count, problem))

    def _length(self, loader: Any, position: str | None) -> int | None:
        """Return how many batches of this epoch are left, before or while they are read."""
        now, place = inspect(loader, position, self._runtime.peers.world_size), self._state.position
        if now.sampler is None:
            whole, saved = length_left(now), self._stream.entry(place.epoch)
            used = saved["batches"] if saved and saved["epoch"] == place.epoch else 0
            return None if whole is None else max(0, whole - used)
        samples = now.sampler.length_from(place.sample_start_index)
        batches = samples // now.batch_size if now.drop_last else -(-samples // now.batch_size)
        return self._whole_groups(now, batches)

    def _show_remaining(self, now: Pass) -> None:
        """Show ``status`` how many steps the script will make."""
        state, sampler = self._state, now.sampler
        accumulation = state.accumulation_steps
        epochs = max(0, self._max_epochs - state.position.epoch - 1)
        if now.count is None:
            total = 0
        elif sampler is None:
            whole = length_left(now) or 0
            total = state.position.step - (-now.count // accumulation)
            total += epochs * -(-whole // accumulation)
        else:
            dropped = sampler.drop_last or now.drop_last
            parts = (now.replicas, now.batch_size, accumulation)
            steps = sampler.dataset_size
            for part, floor in zip(parts, (sampler.drop_last, now.drop_last, dropped), strict=True):
                steps = steps // part if floor else -(-steps // part)
            total = state.position.step - (-now.count // accumulation) + epochs * steps
        self._runtime.slot.goal(
            total if self._max_epochs else 0, state.samples_per_batch * accumulation
        )

    def _say_anew(self, now: Pass) -> None:
        anew = now.stream.anew if now.stream is not None else 0
        if anew:
            reason = (
                f'the {type(now.loader).__name__} begins anew, as position="approximate" says: '
                f"the {anew} batches that each rank has used of epoch "
                f"{self._state.position.epoch} are not skipped"
            )
            self._runtime.leader_says(reason)
            if self._runtime.peers.is_leader:
                self._runtime.journal.write(RestoredInexactly(reason=reason))
