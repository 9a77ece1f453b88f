"""A private SLURM cluster on this host: a real controller and two real nodes, n1 and n2.

Its daemons, ports, key and files are its own, so it can run beside others of its kind. Needs
root, SLURM and munge; everything goes when the context ends.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import psutil

from tests.job import environment, is_tracker
from tests.ports import free_ports

NODES = ("n1", "n2")
START_SECONDS = 90.0
MAX_DIRECTORY = 80  # characters: SLURM's sockets are below it, and a socket's path ends at 107
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
_FIELD = re.compile(r"(?:^|\s)([A-Z][\w:/]*)=(.*?)(?=\s[A-Z][\w:/]*=|\s*$)")

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=6
CredType=cred/munge
SlurmctldPidFile={root}/slurmctld.pid
SlurmctldDebug=verbose
StateSaveLocation={root}/state
SlurmdPidFile={root}/%n.pid
SlurmdLogFile={root}/%n-steps.log
SlurmdDebug=verbose
SlurmdSpoolDir={root}/%n
PlugStackConfig={root}/plugstack.conf
SlurmdTimeout={node_timeout}
KillWait={kill_wait}
MessageTimeout=2
MinJobAge=600
ReturnToService=2
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2{gres[0]}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2{gres[1]}
PartitionName=DEFAULT Nodes=ALL OverSubscribe=EXCLUSIVE
PartitionName=low Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=cut PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=gone PriorityTier=1 PreemptMode=CANCEL GraceTime=0
PartitionName=high PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str:
    """Return why such a cluster cannot be made here; empty if it can."""
    if os.geteuid() != 0:
        return "slurmd needs root to start a job"
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_path()) is None]
    return f"no {', '.join(missing)}" if missing else ""


class Slurm:
    """The cluster in a directory of its own, with four partitions.

    A job in ``high`` preempts those in ``low``, after a time of grace, those in ``cut``, with none,
    and cancels those in ``gone``. Nodes are not shared: a job has its nodes to itself.

    Args:
        directory: for everything; its path must be short.
        grace: seconds that a preempted job in ``low`` has.
        kill_wait: seconds from SIGTERM to SIGKILL when a job is cancelled or out of time.
        requeue_exit: exit codes of a batch script that ask for another run, such as "75,76".
        node_timeout: seconds of a node's silence until it is lost.
        settings: further lines of slurm.conf, by name.
        gpus: of n1 and n2: SLURM allocates them as it does real ones, although they are none.
    """

    def __init__(
        self,
        directory: Path,
        grace: int = 4,
        kill_wait: int = 3,
        requeue_exit: str = "",
        node_timeout: int = 10,
        settings: dict[str, str] | None = None,
        gpus: tuple[int, int] = (0, 0),
    ):
        self.root = directory.resolve()
        self.host = socket.gethostname().partition(".")[0]
        self.grace = grace
        self.kill_wait = kill_wait
        self.node_timeout = node_timeout
        self.settings = dict(settings or {})
        self.gpus = gpus
        if any(gpus):
            self.settings["GresTypes"] = "gpu"
        if requeue_exit:
            self.settings["RequeueExit"] = requeue_exit
        self.conf = self.root / "slurm.conf"
        self.environment = {
            **environment(),  # what a job gets from sbatch, so it finds this package
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), _path()]),
            "SLURM_CONF": str(self.conf),
        }
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    # -- starting and ending --------------------------------------------------------------

    def __enter__(self) -> "Slurm":
        assert not why_not(), why_not()
        assert len(str(self.root)) <= MAX_DIRECTORY, f"too long for sockets: {self.root}"
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            self.configure()
            self.start_munge()
            self.start("slurmctld", "slurmctld", "-D", "-c")
            for name in NODES:
                self.start_slurmd(name)
            for name in NODES:
                self.until_node(name, "idle")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def configure(self) -> None:
        text = _CONF.format(
            root=self.root,
            host=self.host,
            ports=free_ports(3),
            grace=self.grace,
            kill_wait=self.kill_wait,
            node_timeout=self.node_timeout,
            gres=[f" Gres=gpu:{count}" if count else "" for count in self.gpus],
        )
        for name, value in self.settings.items():  # a line given twice is an error
            text = re.sub(rf"^{name}=.*\n", "", text, flags=re.MULTILINE)
            text = f"{name}={value}\n{text}"
        self.conf.write_text(text)
        gres = [
            f"NodeName={name} Name=gpu File=/dev/tty[1-{count}]\n"
            for name, count in zip(NODES, self.gpus, strict=True)
            if count
        ]
        (self.root / "gres.conf").write_text("".join(gres))
        (self.root / "plugstack.conf").write_text("")  # not the host's plug-ins
        (self.root / "state").mkdir(exist_ok=True)

    def start_munge(self) -> None:
        key, at = self.root / "munge.key", self.root / "munge"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        self.start(
            "munged", "munged", "--foreground", "--force", f"--key-file={key}",
            f"--socket={at}.socket", f"--pid-file={at}.pid", f"--log-file={at}.log",
            f"--seed-file={at}.seed",
        )  # fmt: skip
        self.wait_for(at.with_suffix(".socket").exists, "munged's socket")

    def start_slurmd(self, name: str) -> None:
        self.start(name, "slurmd", "-D", "-N", name, SLURMD_NODENAME=name)  # for its steps' daemons

    def start(self, name: str, *command: str, **variables: str) -> None:
        with open(self.root / f"{name}.log", "ab") as log:
            self.daemons[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.root,
                env={**self.environment, **variables},
                start_new_session=True,  # Ctrl-C is for the test, which ends them
            )

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        limit = time.monotonic() + START_SECONDS
        while not condition():
            for name, daemon in self.daemons.items():
                if daemon.poll() is not None:
                    self.fail(f"{name} ended with {daemon.returncode} before {what}")
            if time.monotonic() > limit:
                self.fail(f"not within {START_SECONDS} s: {what}")
            time.sleep(0.05)

    def close(self) -> None:
        """Kill every process of the cluster by id, first those that start others."""
        for name in ["slurmctld", *NODES]:
            self.end(name)
        try:
            self.kill(lambda _: True)
        finally:
            self.end("munged")

    def end(self, name: str) -> None:
        daemon = self.daemons.pop(name, None)
        if daemon is not None:
            daemon.kill()
            daemon.wait(10)

    # -- nodes ------------------------------------------------------------------------------

    def kill_node(self, name: str) -> None:
        """Lose a node: all its processes end, without a message to any other."""
        self.end(name)
        self.kill(lambda process: _variable(process, "SLURMD_NODENAME") == name)

    def start_node(self, name: str) -> None:
        """Restart a lost node and wait until it is available."""
        assert name not in self.daemons, f"{name} runs"
        self.start_slurmd(name)
        self.until_node(name, "idle", "mixed", "allocated", "completing")

    def node_state(self, name: str) -> str:
        """Return sinfo's state; a trailing star means that the node does not answer."""
        return self.run("sinfo", "--noheader", "--nodes", name, "--format=%T").split("\n")[0]

    def until_node(self, name: str, *states: str) -> None:
        """Wait, bounded, until the node's state is one of these."""

        def is_so() -> bool:
            with contextlib.suppress(AssertionError):  # the controller may not listen yet
                return self.node_state(name) in states
            return False

        self.wait_for(is_so, f"{name} {' or '.join(states)}")

    # -- jobs -------------------------------------------------------------------------------

    def run(self, *command: str, seconds: float = 60.0) -> str:
        """Return the output of a command of the cluster, which must succeed."""
        found = self.call(*command, seconds=seconds)
        reported = f"{' '.join(command)}: {found.returncode}: {found.stderr}{found.stdout}"
        assert found.returncode == 0, reported
        return found.stdout

    def call(
        self, *command: str, seconds: float = 60.0, text: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of the cluster with ``text`` as input, whether it succeeds or not."""
        try:
            return subprocess.run(
                command,
                input=text or "",
                capture_output=True,
                text=True,
                timeout=seconds,
                cwd=self.root,
                env=self.environment,
            )
        except subprocess.TimeoutExpired:
            self.fail(f"not within {seconds} s: {' '.join(command)}")

    def sbatch(self, *arguments: str, script: str | None = None) -> str:
        """Submit a job, return its id. Without ``script`` the arguments name a file or --wrap."""
        if script is not None and not script.startswith("#!"):
            script = f"#!/bin/bash\n{script}"
        found = self.call("sbatch", "--parsable", *arguments, text=script)
        if found.returncode != 0:
            self.fail(f"sbatch: {found.stderr}")
        return found.stdout.strip().partition(";")[0]

    def scancel(self, job: str, *options: str) -> None:
        self.run("scancel", *options, job)

    def show(self, job: str) -> dict[str, str]:
        """Return what scontrol shows about one job or one task of an array."""
        lines = self.run("scontrol", "-o", "show", "job", job).strip().splitlines()
        assert len(lines) == 1, f"name one task of the array {job}"
        return dict(_FIELD.findall(lines[0]))

    def until(
        self,
        job: str,
        condition: Callable[[dict[str, str]], bool],
        what: str,
        seconds: float = 180.0,
    ) -> dict[str, str]:
        """Wait, bounded, until ``condition(show(job))`` is true; returns what it saw."""
        limit = time.monotonic() + seconds
        while True:
            seen = self.show(job)
            if condition(seen):
                return seen
            if time.monotonic() > limit:
                self.fail(f"not within {seconds} s: {what}\n{seen}\n{self.output(job)}")
            time.sleep(0.1)

    def until_state(self, job: str, *states: str, seconds: float = 180.0) -> dict[str, str]:
        what = f"job {job} {' or '.join(states)}"
        return self.until(job, lambda seen: seen["JobState"] in states, what, seconds)

    def output(self, job: str) -> str:
        """Return the end of a job's output in sbatch's default file."""
        return _tail(self.root / f"slurm-{job}.out")

    def logs(self) -> str:
        """Return the ends of the daemons' logs, for a message."""
        tails = {name: _tail(self.root / f"{name}.log") for name in ("munged", "slurmctld", *NODES)}
        return "\n".join(f"-- {name}\n{tail}" for name, tail in tails.items() if tail)

    def fail(self, what: str) -> NoReturn:
        raise AssertionError(f"{what}\n{self.logs()}")

    # -- processes --------------------------------------------------------------------------

    def processes(self) -> list[psutil.Process]:
        """Return the cluster's processes but its daemons, by SLURM_CONF or by parent."""
        this = psutil.Process()
        others = {process.pid for process in (this, *this.parents())}
        others |= {daemon.pid for daemon in self.daemons.values()}
        found: set[psutil.Process] = set()
        for process in psutil.process_iter():
            if process.pid not in others and _variable(process, "SLURM_CONF") == str(self.conf):
                found |= {process, *_children(process)}
        return [process for process in found if process.pid not in others and _lives(process)]

    def kill(self, chosen: Callable[[psutil.Process], bool], seconds: float = 10.0) -> None:
        """Kill the chosen processes and their children.

        The steps' daemons first: they would report how the others ended. Multiprocessing's
        trackers last: they remove the semaphores of those that are gone, and then end.
        """
        limit = time.monotonic() + seconds
        while True:
            roots = [process for process in self.processes() if chosen(process)]
            if not roots:
                return
            victims = {*roots, *(child for root in roots for child in _children(root))}
            assert time.monotonic() < limit + seconds, f"cannot be killed: {victims}"
            patient = time.monotonic() < limit
            for victim in sorted(victims, key=lambda process: not _is_daemon(process)):
                if not (patient and is_tracker(victim)):
                    with contextlib.suppress(psutil.Error):
                        victim.send_signal(signal.SIGKILL)
            time.sleep(0.05)


def _variable(process: psutil.Process, name: str) -> str:
    """Read a variable from the raw text: a step daemon overwrites its start with a title."""
    prefix = f"{name}=".encode()
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
            if line.startswith(prefix):
                return os.fsdecode(line.removeprefix(prefix))
    return ""


def _children(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return process.children(recursive=True)
    return []


def _is_daemon(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.name() == "slurmstepd"
    return False


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def _path() -> str:
    """Return the path of commands and daemons, which is not in every user's PATH."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-2000:] if path.exists() else ""
