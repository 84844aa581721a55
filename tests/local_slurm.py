"""A real Slurm for tests: munged, slurmctld and two slurmd on loopback, all state in one folder, without systemd.

The nodes claim 64 CPUs, 1 TB and 8 GPUs each, so that the files meant for a cluster are accepted as they are. The GPUs
are /dev/null under other names: Slurm counts them and sets CUDA_VISIBLE_DEVICES, nobody opens them. The daemons run in
the foreground as children of the test process, which ends them by their process ids.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
HOSTS = Path("/etc/hosts")
GPUS = 8
NODE_LOST_S = 10  # without a sign of life from its slurmd
WAIT_S = 900  # for anything: a slow or busy machine does not fail a test, only what never comes

SLURM_CONF = """
ClusterName=tests
SlurmctldHost={host}({address})
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it starts again (120 s by default)
AuthInfo=socket={root}/munge/socket,cred_expire=5
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
# Neither cgroups nor binding: they want a delegated cgroup tree, and as many cores as the nodes claim to have
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2,batch_sched_delay=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
EnforcePartLimits=ALL
JobRequeue=1
ReturnToService=2
SlurmdTimeout={node_lost_s}
SlurmctldTimeout=60
KillWait=5
MinJobAge=86400
FirstJobId={first_job}
AccountingStorageType=accounting_storage/none
NodeName={nodes} NodeHostname={host} NodeAddr={address} Port=[{ports[1]}-{ports[2]}] CPUs=64 Boards=1 \
SocketsPerBoard=1 CoresPerSocket=64 ThreadsPerCore=1 RealMemory=1000000 Gres=gpu:a100:{gpus} State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES MaxTime=7-0 DefaultTime=02:00:00 State=UP PriorityTier=2 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=7-0 DefaultTime=02:00:00 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
"""


def missing() -> list[str]:
    """Programs of Slurm and munge that are not on this machine."""
    return [name for name in PROGRAMS if not shutil.which(name, path=PATH)]


def wait_until(ready: Callable[[], object], what: str, seconds: float = WAIT_S):
    """Wait for ``ready()`` to be true and return its value; AssertionError after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.2)
    return found


def free_ports(count: int) -> list[int]:
    """So many free ports in a row."""
    for first in range(17000 + os.getpid() % 2000, 30000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return list(range(first, first + count))
    raise AssertionError("no free ports")


@contextlib.contextmanager
def alone():
    """No other test run starts or ends a Slurm meanwhile: free ports stay free, the hosts file as it was read."""
    with open(HOSTS, encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class LocalSlurm:
    """Start with ``with LocalSlurm(folder) as slurm``; commands find it by ``slurm.environment``."""

    def __init__(self, root: Path):
        self.root = root
        self.mark = f"# tests of {root}"
        self.nodes = [f"ts{os.getpid()}n{number}" for number in (1, 2)]
        own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.environment = {**own, "PATH": PATH, "SLURM_CONF": str(root / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen] = {}

    # --- Start and stop
    def __enter__(self) -> "LocalSlurm":
        try:
            with alone():
                self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        host = socket.gethostname().split(".")[0]
        try:
            address = socket.gethostbyname(host)
        except OSError:
            address = "127.0.0.1"
            self._add_host(address, host)
        for node in self.nodes:  # torchrun's rendezvous looks them up
            self._add_host(address, node)
        for name in ("munge", "state", "gpus", *(f"spool-{node}" for node in self.nodes)):
            (self.root / name).mkdir(parents=True)
        for number in range(GPUS):
            os.mknod(self.root / f"gpus/gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # /dev/null
        nodes = f"{self.nodes[0][:-1]}[1-2]"
        settings = {"root": self.root, "host": host, "address": address, "user": psutil.Process().username()}
        settings |= {"ports": free_ports(3), "nodes": nodes, "gpus": GPUS, "node_lost_s": NODE_LOST_S}
        settings["first_job"] = int(time.time()) % 60_000_000  # no log is an earlier run's
        (self.root / "slurm.conf").write_text(SLURM_CONF.format(**settings))
        gres = f"NodeName={nodes} Name=gpu Type=a100 File={self.root}/gpus/gpu[0-{GPUS - 1}]\n"
        (self.root / "gres.conf").write_text(gres)
        key = self.root / "munge/key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        names = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        words = [f"--{option}={self.root}/munge/{name}" for option, name in names.items()]
        self._daemon("munged", "--foreground", "--force", f"--origin={address}", *words)
        wait_until((self.root / "munge/socket").exists, "munge's socket")
        self._daemon("slurmctld", "-D")
        wait_until(lambda: " is UP" in self("scontrol", "ping", check=False), "slurmctld answers")
        for node in self.nodes:
            self.start_node(node)
        self.wait_for_nodes()

    def _add_host(self, address: str, name: str) -> None:
        with open(HOSTS, "a", encoding="utf-8") as file:
            file.write(f"{address} {name} {self.mark}\n")

    def _daemon(self, program: str, *words: str, name: str = "") -> None:
        with open(self.root / f"{name or program}.log", "ab") as log:
            self.daemons[name or program] = subprocess.Popen(
                [shutil.which(program, path=PATH), *words], env=self.environment, stdout=log, stderr=log, cwd=self.root
            )

    def __exit__(self, *_) -> None:
        if "slurmctld" in self.daemons:
            self("scancel", "--user", psutil.Process().username(), check=False)
            with contextlib.suppress(AssertionError):
                wait_until(lambda: not self("squeue", "--noheader", check=False).strip(), "jobs end", 20)
        for name in reversed(self.daemons):
            self.daemons[name].terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with alone():
            kept = [line for line in HOSTS.read_text().splitlines(keepends=True) if self.mark not in line]
            HOSTS.write_text("".join(kept))  # in place: it may be a mount

    def processes(self) -> list[psutil.Process]:
        """What jobs left running: slurmstepd and its children outlive slurmd."""
        found, mine = [], {os.getpid(), *(daemon.pid for daemon in self.daemons.values())}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                ours = (
                    environment.get("SLURM_CONF") == self.environment["SLURM_CONF"] and "SLURM_JOB_ID" in environment
                )
                stepd = process.name() == "slurmstepd" and process.cwd().startswith(str(self.root))
                if process.pid not in mine and (ours or stepd):
                    found.append(process)
        return found

    # --- Nodes
    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self._daemon("slurmd", "-D", "-N", node, name=node)

    def kill_node(self, node: str) -> None:
        """SIGKILL a node's slurmd; what runs there goes on, as on a node whose network is gone."""
        self.daemons[node].send_signal(signal.SIGKILL)
        self.daemons[node].wait()

    def wait_for_nodes(self) -> None:
        """Wait until both nodes can take jobs."""

        def up() -> bool:
            for name, daemon in self.daemons.items():
                log = self.root / f"{name}.log"
                assert daemon.poll() is None, f"{name} has ended:\n{log.read_text(errors='replace')[-2000:]}"
            states = self("sinfo", "-h", "-N", "-p", "gpu", "-o", "%T").split()
            return sum(states.count(state) for state in ("idle", "mixed", "allocated")) == 2

        wait_until(up, "both nodes are up")

    # --- Jobs
    def __call__(self, *command: object, check: bool = True, **variables: object) -> str:
        """Run a command in the repo's folder; returns what it prints, both streams."""
        environment = {**self.environment, **{name: str(value) for name, value in variables.items()}}
        done = subprocess.run(
            list(map(str, command)),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=Path(__file__).resolve().parents[1],
        )
        assert not check or done.returncode == 0, f"{command} ended with {done.returncode}: {done.stdout}"
        return done.stdout

    def states(self, job: str) -> list[str]:
        """States of a job, or of each of an array's tasks."""
        return self("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%T").split()

    def wait_for(self, job: str) -> list[str]:
        """Wait until a job has ended, each task of an array; returns its states."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}

        def ended() -> list[str]:
            states = self.states(job)
            return states if set(states) <= over else []

        return wait_until(ended, f"job {job} ends")

    def processes_of(self, job: str, word: str) -> list[psutil.Process]:
        """A job's processes that have this word in their command line, but for those that start others with it."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                words, own = process.cmdline(), process.environ().get("SLURM_JOB_ID") == job
                named = any(given == word or given.endswith(f"/{word}") for given in words)
                if own and named and not any(Path(starter).name in ("srun", "torchrun") for starter in words):
                    found.append(process)
        return found
