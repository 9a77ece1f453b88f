"""Disturbances of a running job; each leaves it running, or starts it again."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.slot import Phase
from tests.faults.wild import WildJob
from tests.job import survivors

Disturbance = Callable[[WildJob, random.Random], None]


def term_supervisor(job: WildJob, dice: random.Random) -> None:
    """Give a notice and start again."""
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 75, job.output()
    job.start()


def notice_on_the_heels_of_a_notice(job: WildJob, dice: random.Random) -> None:
    """Send the second notice during the save or the shutdown."""
    job.process.send_signal(signal.SIGTERM)
    time.sleep(dice.uniform(0.0, 0.1))
    with contextlib.suppress(ProcessLookupError):
        job.process.send_signal(dice.choice((signal.SIGTERM, signal.SIGUSR1)))
    assert job.wait() in (75, 76), job.output()
    job.start()


def notice_while_it_starts(job: WildJob, dice: random.Random) -> None:
    """Send a notice before, while or just after the workers load."""
    term_supervisor(job, dice)
    time.sleep(dice.uniform(0.3, 2.5))
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() in (75, -signal.SIGTERM), job.output()
    job.start()


def notice_during_a_save(job: WildJob, dice: random.Random) -> None:
    catch(job, Phase.SAVING)
    term_supervisor(job, dice)


def notice_during_a_load(job: WildJob, dice: random.Random) -> None:
    """Send a notice while the incarnation after a crash, or the next run, loads."""
    job.note_kept()
    if dice.random() < 0.5:
        dice.choice(job.workers()).send_signal(signal.SIGKILL)
    else:
        term_supervisor(job, dice)
    catch(job, Phase.LOADING)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() in (75, -signal.SIGTERM), job.output()
    job.start()


def catch(job: WildJob, phase: Phase, seconds: float = 5.0) -> None:
    """Wait until a rank is in a phase; a short phase can be missed."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        with contextlib.suppress(OSError, IndexError):
            board = Board.open(job.record().board, writable=False)
            for _ in range(2000):  # looked at without a pause: a phase lasts milliseconds
                if any(slot.phase is phase for slot in board.read_slots()):
                    return
        time.sleep(0.001)


def full_disk(job: WildJob, dice: random.Random) -> None:
    """Fill the file system of the job directory for some seconds."""
    before = job.view().incarnation
    filler = job.directory / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(dice.choice((512, 65536))))
    time.sleep(dice.uniform(0.2, 1.0))
    assert job.view().incarnation == before
    filler.unlink()


def kill_supervisor(job: WildJob, dice: random.Random) -> None:
    end_all(job)
    job.start()


def corrupt_the_newest_checkpoint(job: WildJob, dice: random.Random) -> None:
    """Flip a bit while no process runs; the memory tier is lost as well, as with the machine."""
    end_all(job)
    for tier in job.tiers():
        for slot in tier.glob("?"):
            (slot / "seal.json").unlink(missing_ok=True)
    checkpoints = sorted(job.checkpoints(), key=lambda path: int(path.name.rpartition("-")[2]))
    if len(checkpoints) > 1:
        target = dice.choice([p for p in checkpoints[-1].rglob("*") if p.is_file()])
        flip_a_bit(target, dice)
    job.start()
    job.kept = 0


def flip_a_bit(path: Path, dice: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        path.write_bytes(data)


def end_all(job: WildJob) -> None:
    """Kill the supervisor; all its descendants must end with it."""
    tree = job.tree()
    job.process.send_signal(signal.SIGKILL)
    job.process.wait(30)
    assert not survivors(tree), job.output()


def kill_agent(job: WildJob, dice: random.Random) -> None:
    expect_recovery(job, job.agent())


def kill_forkserver(job: WildJob, dice: random.Random) -> None:
    expect_recovery(job, job.forkserver())


def kill_worker(job: WildJob, dice: random.Random) -> None:
    expect_recovery(job, dice.choice(job.workers()))


def kill_a_child_of_the_data_loader(job: WildJob, dice: random.Random) -> None:
    """Kill one; its rank fails, unless the epoch was over and the child was ending anyway."""
    before = job.view()
    job.note_kept()
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):
        children = [child for worker in job.workers() for child in worker.children()]
        dice.choice(children).send_signal(signal.SIGKILL)
    job.until(
        lambda view: (
            view.incarnation > before.incarnation
            or (view.position is not None and view.position.step > before.position.step + 3)
        ),
        "the next incarnation, or that it trains on",
    )


def term_agent_and_worker(job: WildJob, dice: random.Random) -> None:
    """Send SIGTERM to all, as SLURM does; it must be ignored."""
    before = job.view().incarnation
    for process in (job.agent(), *job.workers()):
        for child in process.children():
            if process.pid != job.agent().pid:
                with contextlib.suppress(psutil.NoSuchProcess):  # at an epoch's end
                    child.send_signal(signal.SIGTERM)  # a DataLoader's child
        process.send_signal(signal.SIGTERM)
    step = job.view().position.step
    job.until_step(step + 3)
    assert job.view().incarnation == before


def stop_and_continue(job: WildJob, dice: random.Random) -> None:
    """Pause a process, as a debugger or a busy machine does."""
    workers = job.workers()
    children = [child for worker in workers for child in worker.children()]
    victim = dice.choice([job.supervisor(), job.agent(), *workers, *children[:1]])
    before = job.view().incarnation
    with contextlib.suppress(psutil.NoSuchProcess):  # a child, at an epoch's end
        victim.send_signal(signal.SIGSTOP)
        time.sleep(dice.choice((0.1, 0.5, 4.0)))
        victim.send_signal(signal.SIGCONT)
    assert job.view().incarnation == before


def expect_recovery(job: WildJob, victim: psutil.Process) -> None:
    before = job.view().incarnation
    job.note_kept()
    victim.send_signal(signal.SIGKILL)
    job.until(lambda view: view.incarnation > before, "the next incarnation")


KINDS: list[Disturbance] = [
    term_supervisor, kill_supervisor, kill_agent, kill_forkserver, kill_worker,
    term_agent_and_worker, stop_and_continue, notice_on_the_heels_of_a_notice,
    notice_while_it_starts, corrupt_the_newest_checkpoint, kill_a_child_of_the_data_loader,
    notice_during_a_save, notice_during_a_load,
]  # fmt: skip
