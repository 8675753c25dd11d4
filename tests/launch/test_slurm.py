"""launch/slurm.sbatch on a real Slurm cluster: a controller and two nodes, all of them on this machine.

As root, with Debian's packages; seven minutes on 2 cores. Its log is in tests/RESULTS.md.

    apt-get install slurm-wlm munge
    python -m pytest tests/launch/test_slurm.py -m slow -n 0 -s
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faults import harness, stores
from tests.faults.harness import CONFIG, Life, differences, outcome

pytestmark = pytest.mark.slow
STAGES = ("tokenizer", "pretrain", "sft")

# Every job may be preempted by one of the partition `urgent`, with 60 s to save.
CONF = """
ClusterName=jaxllm
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={base}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool-%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd-%n.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={base}/prolog.sh
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname=n1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname=n2 NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=usual Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Cluster:
    """slurmctld, two slurmd and munged, until `stop`."""

    def __init__(self, base: Path):
        self.base, self.daemons = base, []
        self.env = {
            **os.environ,
            "SLURM_CONF": f"{base}/slurm.conf",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
        }
        self.env |= {"JAX_PLATFORMS": "cpu"}
        (base / "state").mkdir()
        (base / "slurm.conf").write_text(CONF.format(base=base, ports=free_ports(3)))
        # A node's own disk, for runs in a store.
        prolog = base / "prolog.sh"
        prolog.write_text(
            f'#!/bin/sh\necho "export JAXLLM_SCRATCH={base}/disk-of-$SLURMD_NODENAME"\n'
        )
        prolog.chmod(0o755)
        (base / "hosts").write_text("127.0.0.1 localhost\n127.0.0.1 n1\n127.0.0.1 n2\n")
        (base / "key").write_bytes(os.urandom(128))
        (base / "key").chmod(0o400)
        munge = {
            name: f"--{name}={base}/munge.{name}"
            for name in ("socket", "pid-file", "log-file", "seed-file")
        }
        self._daemon("munged", "-F", "--force", f"--key-file={base}/key", *munge.values())
        self._until(lambda: (base / "munge.socket").exists(), "munged")
        # A second node of one machine needs a name of its own, and one that resolves.
        mine = 'hostname "$1" && mount --bind "$2"/hosts /etc/hosts && exec slurmd -D -N "$1"'
        for node in ("n1", "n2"):
            self._daemon(
                "unshare", "--uts", "--mount", "bash", "-c", mine, "slurmd", node, str(base)
            )
        self._daemon("slurmctld", "-D", "-c")
        self._until(
            lambda: self("sinfo", "-h", "-o", "%D %t", check=False) == "2 idle", "the nodes"
        )

    def __call__(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(
            command, env=self.env, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert not (check and done.returncode), done.stderr
        return done.stdout.strip()

    def _daemon(self, *command: str) -> None:
        with open(self.base / "daemons.log", "ab") as log:
            self.daemons.append(
                subprocess.Popen(command, env=self.env, cwd=self.base, stdout=log, stderr=log)
            )

    def _until(self, holds, what: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not holds():
            logs = "".join(path.read_text()[-2000:] for path in self.base.glob("*.log"))
            assert time.monotonic() < end, f"waited for {what}\n{logs}"
            time.sleep(0.2)

    def submit(self, run_dir: Path | str, *options: str, stages=STAGES) -> str:
        script = (
            "launch/slurm.sbatch",
            CONFIG,
            "--run-dir",
            str(run_dir),
            "--cpu-devices",
            "2",
            "--stages",
            *stages,
        )
        return self(
            "sbatch", "--parsable", "--nodes=2", f"--output={self.base}/%j.log", *options, *script
        )

    def log(self, job: str) -> str:
        path = self.base / f"{job}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, job: str, text: str, count: int = 1, seconds: float = 180) -> None:
        self._until(
            lambda: self.log(job).count(text) >= count, f"{text!r} in\n{self.log(job)}", seconds
        )

    def state(self, job: str) -> str:
        words = self("scontrol", "show", "job", job).split()
        return next(
            word.removeprefix("JobState=") for word in words if word.startswith("JobState=")
        )

    def stop(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self("scancel", "--user", "root", "--signal", "KILL", "--full", check=False)
            self("scancel", "--user", "root", check=False)
            time.sleep(2)
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(timeout=30)


@pytest.fixture(scope="module")
def cluster():
    missing = [
        name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)
    ]
    if missing:
        pytest.skip(f"no {missing[0]}: apt-get install slurm-wlm munge")
    if (
        os.getuid()
        or subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode
    ):
        pytest.skip("starting a second node on one machine takes root and namespaces")
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch).chmod(0o755)  # munge's clients must get to the socket
        cluster = Cluster(Path(scratch))
        try:
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same life in two processes that nothing happens to."""
    life = Life(
        tmp_path_factory.mktemp("whole") / "life",
        2,
    )
    life.stages = STAGES
    life.start()
    assert life.wait(300) and not any(life.clear()), life.log()
    return outcome(life.directory, STAGES)


def test_preempted_requeued_cancelled_and_submitted_again_it_ends_with_the_same_bits(
    cluster, whole, tmp_path
):
    job = cluster.submit(tmp_path / "run")
    cluster.wait_for(job, "pretrain 15/60")
    cluster(
        "sbatch",
        "--partition=urgent",
        "--nodes=2",
        f"--output={cluster.base}/urgent.log",
        "--wrap",
        "sleep 1",
    )
    cluster.wait_for(job, "stopped by a signal; back into the queue")
    assert "SIGTERM: pretrain: step" in cluster.log(job) or "s after the signal" in cluster.log(job)
    cluster.wait_for(job, "slurm.sbatch: start 2 on n[1-2]")
    cluster.wait_for(job, "pretrain 40/60")
    cluster("scontrol", "requeue", job)
    cluster.wait_for(job, "slurm.sbatch: start 3 on n[1-2]")
    cluster.wait_for(job, "sft 15/40")
    cluster("scancel", job)
    cluster._until(lambda: not cluster("squeue", "-h"), "the cancelled job to end", 60)
    assert cluster.state(job) == "CANCELLED"
    again = cluster.submit(tmp_path / "run")
    cluster.wait_for(again, "slurm.sbatch: finished")
    print(cluster.log(job) + cluster.log(again))
    assert differences(whole, outcome(tmp_path / "run", STAGES)) == []


def test_at_the_time_limit_it_saves_and_goes_on(cluster, whole, tmp_path):
    # A limit of one minute, and the signal due at once. Slurm looks every half minute, so there are stages for a minute.
    job = cluster.submit(
        tmp_path / "run", "--time=1", "--signal=B:USR1@59", stages=harness.STAGES[:-1]
    )
    cluster.wait_for(job, "the time limit is near")
    cluster.wait_for(job, "back into the queue")
    cluster("scontrol", "update", f"jobid={job}", "timelimit=10")
    cluster.wait_for(job, "slurm.sbatch: finished")
    print(cluster.log(job))
    assert differences(whole, outcome(tmp_path / "run", STAGES)) == []


def workers_of(run_dir: Path | str) -> list[int]:
    """The processes of a run on both nodes."""
    mine = f"worker.py\0run\0{CONFIG}\0--run-dir\0{run_dir}"
    workers = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            is_python = os.readlink(path.parent / "exe") == os.path.realpath(sys.executable)
            if is_python and mine in path.read_bytes().decode(errors="replace"):
                workers.append(int(path.parent.name))
    return workers


def test_nodes_that_share_no_folder_work_in_a_store(cluster, whole, tmp_path):
    """Preempted, back with one disk lost, one process killed: the store has the bits of a life on one disk."""
    disks = [cluster.base / f"disk-of-{node}" for node in ("n1", "n2")]
    with stores.place("gs", tmp_path / "server", seed=0) as where:
        url = f"{where.emulator.url}/run"
        before = cluster.env
        cluster.env = {**before, **where.emulator.environment}
        cluster.env["JAXLLM_CACHE"] = f"{where.emulator.url}/compiled"
        try:
            job = cluster.submit(url)
            cluster.wait_for(job, "pretrain 15/60")
            urgent = ("--partition=urgent", "--nodes=2", f"--output={cluster.base}/urgent.log")
            cluster("sbatch", *urgent, "--wrap", "sleep 1")
            cluster.wait_for(job, "stopped by a signal; back into the queue")
            held = [{path.name for path in disk.rglob("[0-9]*.[0-9]*")} for disk in disks]
            shutil.rmtree(disks[0])
            cluster.wait_for(job, "slurm.sbatch: start 2 on n[1-2]")
            cluster.wait_for(job, "pretrain 40/60")
            os.kill(workers_of(url)[-1], signal.SIGKILL)
            cluster.wait_for(job, "slurm.sbatch: failed with status")
            cluster.wait_for(job, "slurm.sbatch: finished", seconds=400)
        finally:
            cluster.env = before
        print(cluster.log(job))
        found = stores.content(where, Life(tmp_path / "job", url=url), tmp_path / "end")
    assert all(held) and disks[0].exists()
    assert differences(whole, outcome(found, STAGES)) == []


def test_a_killed_process_ends_the_others_and_all_start_again(cluster, whole, tmp_path):
    job = cluster.submit(tmp_path / "run")
    cluster.wait_for(job, "pretrain 15/60")
    os.kill(workers_of(tmp_path / "run")[-1], signal.SIGKILL)
    cluster.wait_for(job, "slurm.sbatch: failed with status")
    cluster.wait_for(job, "slurm.sbatch: finished")
    print(cluster.log(job))
    assert differences(whole, outcome(tmp_path / "run", STAGES)) == []


def test_a_sweep_is_an_array_job(cluster, tmp_path):
    command = [
        sys.executable,
        "launch/sweep.py",
        CONFIG,
        "--out",
        str(tmp_path / "out"),
        "--jobs",
        "2",
    ]
    command += [
        "--grid",
        "pretrain.num-steps=10,20",
        "--options=--cpu-devices 1",
        "--slurm=--nodes=1",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=cluster.env, capture_output=True, text=True, timeout=300
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0 and done.stdout.count("| finished |") == 2, (
        done.stdout,
        done.stderr,
    )


def test_bad_input_is_not_tried_again(cluster, tmp_path):
    job = cluster.submit(tmp_path / "run", stages=("pretrian",))
    cluster._until(lambda: cluster.state(job) == "FAILED", "the job to fail", 60)
    assert "'pretrian' is unknown" in cluster.log(job) and "queue" not in cluster.log(job)
