"""Where a session saves and stops.

Step ``s`` ends when the script requests the next batch. A save that follows from the step number
(the interval) is made there. A save or stop that was requested is made where step ``s + 1`` would
begin, because a rank may learn of it as late as that. Whatever the script does at the end of an
epoch lies before that point on every rank, so the position is then the start of the next epoch.

The random state is saved at the same moment, so a batch must not draw random numbers between the
two points. With ``num_workers=0``, where fetching runs in this process, it counts as part of the
step, and the step begins before it.

The position of a save is what the optimizers have consumed. Where the last step left gradients or a
batch half used, all ranks postpone the save to the next step (see ``Postponement``); they agree on
that in the exchange with which a save begins, so that a step without a save costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from elastic_ckpt.checkpoint.manifest import Reason
from elastic_ckpt.checkpoint.position import Position
from elastic_ckpt.protocol.agreement import ActionKind
from elastic_ckpt.protocol.slot import SessionStage
from elastic_ckpt.training.auto_interval import Interval
from elastic_ckpt.training.data.consumption import Consumption
from elastic_ckpt.training.data.postponement import Postponement
from elastic_ckpt.training.digests import DigestChain
from elastic_ckpt.training.reported_metrics import ReportedMetrics
from elastic_ckpt.training.runtime import Runtime
from elastic_ckpt.training.state.holding import Holding, Names
from elastic_ckpt.training.state.meeting import Arrival, meet
from elastic_ckpt.training.state.rank_state import RankState
from elastic_ckpt.training.state.saver import Saver
from elastic_ckpt.training.state.snapshot import REASONS, Snapshot
from elastic_ckpt.training.step_timer import StepTimer


@dataclass
class LoopState:
    """Where a session is in its data, and how samples make a step.

    Attributes:
        accumulation_steps: micro-batches per optimizer step.
        samples_per_batch: of one micro-batch on all ranks together; 0 before the first loader.
        replicas: ranks that see different samples.
        iterated_epoch: the epoch whose DataLoader iterator exists; -1 before the first.
        step_ends: whether the current micro-batch is the last one of its optimizer step.
        consumption: what the optimizers have used of the pass that began at ``pass_start``.
        counted: micro-batches of that pass up to ``position``.
    """

    accumulation_steps: int
    consumption: Consumption
    position: Position = field(default_factory=Position)
    samples_per_batch: int = 0
    replicas: int = 1
    iterated_epoch: int = -1
    step_ends: bool = False
    pass_start: Position = field(default_factory=Position)
    counted: int = 0

    @property
    def consumed(self) -> Position:
        """The position that the state belongs to; ``position`` unless the script looks ahead,
        accumulates unasked, or skipped its last step."""
        used, start = self.consumption.consumed, self.pass_start
        if not self.consumption.counts or used == self.counted:
            return self.position
        steps = used // self.accumulation_steps
        samples = start.sample_start_index + used * self.samples_per_batch
        return msgspec.structs.replace(
            self.position,
            step=start.step + steps,
            step_in_epoch=start.step_in_epoch + steps,
            sample_start_index=min(samples, start.dataset_size or samples),
        )


class SavePoints:
    """Counts steps, and saves or stops between them.

    Attributes:
        is_sealed: whether the loop is over and its last step in a checkpoint.
    """

    is_sealed = False

    def __init__(
        self,
        runtime: Runtime,
        saver: Saver,
        interval: Interval,
        timer: StepTimer,
        loop: LoopState,
        rank_state: RankState,
        metrics: ReportedMetrics,
        optimizer: Any,
        version: Callable[[], int],
        digests: DigestChain,
    ) -> None:
        """``version`` returns a number that changes when the script writes to the model."""
        self._runtime = runtime
        self._saver = saver
        self._interval = interval
        self._timer = timer
        self._loop = loop
        self._rank_state = rank_state
        self._metrics = metrics
        self._version = version
        self._digests = digests
        self._mark: object = None
        self._postponement = Postponement(loop.consumption, runtime, optimizer)
        self._is_due = False
        self._wanted: Reason | None = None
        self._stopping = False

    def before_step(self) -> None:
        """Do what all ranks agreed to do before the next step. Collective. SystemExit after the
        seal at the agreed stop step."""
        here, postponed = self._loop.position, False
        if self.is_sealed:
            self.is_sealed = False
            self._runtime.slot.session_stage(SessionStage.OPEN)
        while True:
            action = self._runtime.steps.enter(here.step, here.epoch, here.sample_start_index)
            if action.kind is ActionKind.GO:
                if self._wanted is None or postponed:
                    return
            elif not self._stopping:
                self._wanted = REASONS[action.kind]
                self._stopping = action.kind is ActionKind.STOP
            postponed = not self._serve()

    def count_step(self, micro_batches: int) -> None:
        """Count a finished step. Its samples count together: an incomplete step is repeated."""
        loop = self._loop
        self._runtime.steps.stepped()
        loop.position = loop.position.advance(micro_batches * loop.samples_per_batch)
        loop.counted += micro_batches
        due = self._interval.due(loop.position.step)  # collective where it is automatic
        self._is_due = self._is_due or due

    def after_step(self) -> None:
        """Note the state's digests and save, if the step that was counted is due for it, or
        completes an earlier save."""
        self._timer.stepped()
        here = self._loop.position
        if self._digests.is_due(here.step) and self._loop.consumed == here:
            self._digests.note(here, self._metrics.values.get("loss"))
        if not self._saver.complete() or self._is_due:
            self._save("interval")

    def after_epoch(self) -> None:
        """Make the save of a step at which the script left the epoch."""
        if self._is_due:
            self._save("interval")

    def end_loop(self) -> None:
        """Save the final state after the last step, before the script evaluates or exports.

        A notice that comes meanwhile loses nothing: the next run does that work again.
        """
        here = self._loop.consumed
        self._saver.complete()
        if self._loop.consumption.is_half_done:
            self._runtime.leader_says(
                f"warning: the script left within step {here.step + 1}: a later run repeats that "
                "step with other random numbers; leave after optimizer.step() to resume exactly"
            )
        if here.step > 0 and (here.epoch, here.step) != self._saver.last:
            self._save("final")
        self.is_sealed, self._mark = True, self._state_mark()
        self._runtime.slot.session_stage(SessionStage.SEALED)

    def finish(self) -> None:
        """Save the final state unless that was done, and finish the deletion of old checkpoints."""
        if self.is_sealed and self._mark != self._state_mark():
            self._runtime.leader_says(
                "warning: the model, the metrics or session.state changed after the last step, "
                f"{self._loop.position.step}: the final checkpoint has them as they were at the "
                "end of session.epochs(); change them inside that loop"
            )
        if not self.is_sealed:
            self.end_loop()
        steps = self._runtime.steps
        self._runtime.retain.finish(lambda: steps.requested)

    @property
    def is_saved(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return self._saver.last[-1] >= 0

    def _state_mark(self) -> object:
        return self._version(), dict(self._metrics.values), self._runtime.state()

    @property
    def _leaves_shares(self) -> bool:
        """Whether a node that leaves at this stop takes its share of the newest checkpoint along:
        that has to be on disk as well."""
        return self._stopping and self._saver.is_shared

    def _serve(self) -> bool:
        """Make the save that was requested, and leave at a stop; return False to try later."""
        here, wanted = self._loop.position, self._wanted
        self._saver.complete()
        if (
            wanted is not None
            and (self._saver.last[-1] != here.step or self._leaves_shares)
            and here.step > 0
            and not self._save(wanted)
        ):
            return False
        self._wanted = None
        if self._stopping:
            self._runtime.leave(saved=self.is_saved)
        return True

    def _save(self, reason: Reason) -> bool:
        """Save, if the state of all ranks is that of their position; else return False: it is due
        again after the next step. The final save has no later step to wait for."""
        loop = self._loop.position
        name = f"the save after step {loop.step}, epoch {loop.epoch}"
        ready = reason == "final" or self._postponement.is_ready(hurried=self._stopping)
        here, peers = self._loop.consumed, self._runtime.peers
        is_new = (here.epoch, here.step) != self._saver.last or self._leaves_shares
        held = self._rank_state.hold() if ready and is_new else None
        compared = held.digests() if held is not None and peers.world_size > 1 else ()
        unequal = meet(peers, name, Arrival(here, ready, *compared))
        if unequal is None:
            self._is_due = self._is_due or reason == "interval"
            self._postponement.count(loop.step, reason)
            return False
        self._is_due = False
        self._postponement.end(loop.step)
        if held is not None:
            self._timer.interrupted()
            self._saver.save(self._snapshot(reason, held, unequal))
        return True

    def _snapshot(self, reason: Reason, held: Holding, unequal: Names) -> Snapshot:
        loop, here = self._loop, self._loop.consumed
        replicas = loop.replicas if loop.samples_per_batch else self._runtime.peers.world_size
        iterating = loop.iterated_epoch == here.epoch
        return Snapshot(
            reason=reason,
            position=here,
            running_states={
                "epoch": here.epoch,
                "step": here.step_in_epoch,
                "sample_start_index": here.sample_start_index // replicas,
            },
            samples_per_step=loop.samples_per_batch * loop.accumulation_steps,
            data_parallel_size=replicas,
            rank_state=lambda: self._rank_state.capture(
                self._runtime.peers.rank, held, unequal, iterating=iterating
            ),
            metrics=self._metrics.values,
        )
