"""Hugging Face's Trainer, and those built on it (TRL): ``docs/transformers.md``.

The step agreement decides when all ranks save, the Trainer writes its own checkpoint directory,
and that is sealed where it lies. Importing this file imports nothing beyond the Trainer's own
callbacks; the rest follows once a Trainer is made.
"""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import transformers

from elastic_ckpt.errors import UsageError

MINIMUM: Final = (5, 0)
"""The oldest that is accepted: 4.52 does not resume to the bit. CI has 5.24."""

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < MINIMUM:
    raise UsageError(
        f"transformers {transformers.__version__} is too old for ElasticCallback: "
        "pip install 'transformers>=5.0'"
    )

from transformers.trainer_callback import ExportableState, TrainerCallback  # noqa: E402

if TYPE_CHECKING:
    from elastic_ckpt.training.own.loop import OwnLoop

_MARKER: Final = "trainer_state.json"


@dataclass
class _Part:
    """This process's part in the job: one, because a process has one job.

    Attributes:
        loop: the step agreement.
        output_dir: absolute; where the Trainer writes.
        made_for: the state of the Trainer that was made last.
        trains: the state of the one that trains, or has trained last.
    """

    loop: OwnLoop
    output_dir: str
    made_for: Any = None
    trains: Any = None


_part: _Part | None = None


class ElasticCallback(TrainerCallback, ExportableState):
    """Saves and stops a Trainer at a notice, after the same step on all ranks.

    ``Trainer(..., callbacks=[ElasticCallback()])``, then
    ``trainer.train(resume_from_checkpoint=ElasticCallback.newest())``.
    """

    def __init__(self, save_dir: str | os.PathLike[str] | None = None) -> None:
        """Make the callback of one Trainer.

        Args:
            save_dir: the job directory; the supervisor's, else ``ELASTIC_CKPT_DIR``, else
                ``elastic-ckpt`` in the Trainer's ``output_dir``.
        """
        self._save_dir = save_dir
        self._loop: Any = None
        self._go: Any = None
        self._control: Any = None
        self._owes_save = False

    @staticmethod
    def newest() -> str | None:
        """Return the newest intact checkpoint, the same on every rank; None if there is none.

        Collective. It was verified to its last byte, by the supervisor if there is one.

        Raises:
            UsageError: no Trainer was made with the callback yet, or the newest checkpoint is
                another output_dir's.
        """
        part = _part
        if part is None or part.loop.checkpoints is None:
            raise UsageError(
                "ElasticCallback.newest() before a Trainer has the callback: make "
                "Trainer(..., callbacks=[ElasticCallback()]) first"
            )
        newest = part.loop.checkpoints.newest()
        if newest and os.path.dirname(newest) != part.output_dir:
            raise UsageError(
                f"the job's newest checkpoint is {newest}, not in output_dir {part.output_dir}: "
                "pass its output_dir, or start another job with another --dir"
            )
        return newest or None

    # -- called by the Trainer, on every rank ----------------------------------------------------

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Join the job; check the arguments."""
        self._attach(args)
        self._own().made_for = _alone(state, self._own().made_for)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take part in the agreement from the step that the Trainer resumed from."""
        self._attach(args)
        part = self._own()
        part.trains = _alone(state, part.trains)
        if state.is_hyper_param_search:
            raise UsageError(
                "ElasticCallback in a hyperparameter search: run each trial as a job of its own"
            )
        newest = self.newest()
        if newest and state.global_step == 0:
            raise UsageError(
                f"the Trainer would start at step 0 although {newest} is intact: call "
                "trainer.train(resume_from_checkpoint=ElasticCallback.newest()), or take another "
                "output_dir and --dir"
            )
        if args.load_best_model_at_end:
            self._loop.say(
                "load_best_model_at_end: a stop saves before that step's evaluation, which is not "
                "made later; the best checkpoint is chosen among the other evaluations"
            )
        self._control = control
        self._loop.begin(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask all ranks' agreement what to do after this step."""
        loop = self._loop
        if not loop.stops:  # after the agreed step there is nothing left to agree on
            action = loop.after_step(state.global_step)
            if action is self._go and not self._owes_save:
                return
        self._owes_save = control.should_save = True
        if loop.stops:
            # It would use up the notice's time before the save, and may take the save back.
            control.should_evaluate = False

    def state(self) -> dict[str, Any]:
        """Wait until every rank has written, before the Trainer writes its last file.

        The Trainer calls this on the rank that writes ``trainer_state.json``, the sign that a
        checkpoint is complete. The other ranks are in :meth:`on_save` by then, or will be.
        """
        if self._control is not None and self._control.should_save:
            self._loop.meet("trainer_state.json")
        return {"args": {}, "attributes": {}}

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Have the checkpoint sealed; leave if the job stops."""
        if not args.should_save:
            self._loop.meet("trainer_state.json")
        self._owes_save = False
        self._loop.saved(state.global_step)
        if self._loop.stops:
            self._loop.leave()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget the training; what the script does after it needs no agreement."""
        self._control = None

    # -- inside ----------------------------------------------------------------------------------

    def _own(self) -> _Part:
        assert _part is not None
        return _part

    def _attach(self, args: Any) -> None:
        global _part
        if self._loop is not None:
            return
        _check(args)
        output_dir = os.path.abspath(args.output_dir)
        if _part is None:
            _part = _Part(_join(self._save_dir, output_dir), output_dir)
        elif _part.output_dir != output_dir or _part.trains is not None:
            raise UsageError(
                f"ElasticCallback belongs to the Trainer of {_part.output_dir}: a job has one "
                "Trainer; run the second as a job of its own, with another --dir"
            )
        from elastic_ckpt.protocol.agreement import ActionKind

        self._loop, self._go = _part.loop, ActionKind.GO


def _join(save_dir: str | os.PathLike[str] | None, output_dir: str) -> OwnLoop:
    """Join the job, and have its checkpoints sealed. Collective."""
    from elastic_ckpt.training import runtime
    from elastic_ckpt.training.own.loop import OwnLoop

    if save_dir is None and "ELASTIC_CKPT_DIR" not in os.environ:
        save_dir = os.path.join(output_dir, "elastic-ckpt")
    runtime.join(save_dir)
    loop = OwnLoop()
    loop.watch(os.path.join(glob.escape(output_dir), "checkpoint-*"), _MARKER)
    return loop


def _alone(state: Any, before: Any) -> Any:
    """Return the state of a Trainer that has not called another callback of ours before."""
    if state is before:
        raise UsageError("the Trainer has two ElasticCallbacks: pass one")
    return state


def _check(args: Any) -> None:
    """Refuse arguments with which a save would be no whole one, or be made twice."""
    if getattr(args, "enable_jit_checkpoint", False):
        raise UsageError(
            "enable_jit_checkpoint and ElasticCallback both save on SIGTERM, and the former on "
            "each rank at another step: remove enable_jit_checkpoint"
        )
    if args.save_only_model:
        raise UsageError(
            "save_only_model leaves the optimizer out, so no checkpoint can be resumed from: "
            "remove save_only_model"
        )
