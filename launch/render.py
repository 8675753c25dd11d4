"""One small description of a job (launch/example.yaml), rendered for the system it runs on.

    python launch/render.py slurm JOB.yaml | bash       # a command: sbatch ... launch/slurm.sbatch ...
    python launch/render.py sky JOB.yaml > task.yaml    # a SkyPilot task
    python launch/render.py gke JOB.yaml                # a JobSet, for launch/gke.sh
    python launch/render.py shell JOB.yaml              # variables, for launch/tpu_vm.sh

Everything is printed, nothing is submitted. Submitting the same description again resumes the run.
A description that is not valid gives one line and exit code 2.
"""

import dataclasses
import math
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from jaxllm.config import InputError, load, require

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Tpu:
    """What the vendor calls a kind of TPU."""

    gke: str  # value of the node label cloud.google.com/gke-tpu-accelerator
    dimensions: int  # of a slice's shape
    most_on_one_host: int  # chips; a slice of several hosts has 4 on each
    vm: str = ""  # name of the accelerator in Cloud TPU's API, which does not have the newest
    runtime: str = ""  # software version of its VMs
    cores: int = 1  # per chip, in the names of accelerators


# Google's pages on TPU VMs, software versions and TPUs in GKE, read 2026-11.
TPUS = {
    "v4": Tpu("tpu-v4-podslice", 3, 4, "v4", "tpu-ubuntu2204-base", 2),
    "v5e": Tpu("tpu-v5-lite-podslice", 2, 8, "v5litepod", "v2-alpha-tpuv5-lite"),
    "v5p": Tpu("tpu-v5p-slice", 3, 4, "v5p", "v2-alpha-tpuv5", 2),
    "v6e": Tpu("tpu-v6e-slice", 2, 8, "v6e", "v2-alpha-tpuv6e"),
    "tpu7x": Tpu("tpu7x", 3, 4),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A job for many machines."""

    name: str
    """Of the job, and of the run directory in the bucket."""
    config: str
    """Config file, seen from the repository's root."""
    topology: str
    """KIND:SHAPE: a TPU slice (v5p:4x4x4), nodes x GPUs (H100:2x8), or nodes (cpu:2)."""
    bucket: str
    """Where run directories are: gs://BUCKET/PATH, s3://BUCKET/PATH, or a directory that all machines see."""
    slices: int = 1
    """TPU slices, joined by the data-centre network."""
    image: str = ""
    """Container image whose working directory is the repository."""
    options: tuple[str, ...] = ()
    """More options of jaxllm run."""
    spot: bool = False
    """Machines that may be taken away at any time."""
    project: str = ""
    """Google Cloud project."""
    zone: str = ""
    """Google Cloud zone."""
    service_account: str = ""
    """Kubernetes service account that may write the bucket."""
    claim: str = ""
    """Kubernetes volume claim that is mounted where `bucket` is a directory."""
    prepare: str = ""
    """TPU VM, SkyPilot: a shell command for every machine before the run."""
    min_nodes: int = 0
    """Slurm: nodes with which the job goes on, if no more are free; 0: all of the topology's."""
    slurm_options: tuple[str, ...] = ()
    """More options of sbatch."""
    max_restarts: int = 100
    """GKE: restarts until a job counts as failed; a preemption is one."""

    def __post_init__(self) -> None:
        label = re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", self.name)
        require(bool(label), "name: at most 40 of a-z, 0-9 and -, beginning with a letter")
        kind, _, shape = self.topology.partition(":")
        known = f"KIND:SHAPE, as v5p:4x4x4, H100:2x8 or cpu:2; TPUs: {', '.join(TPUS)}"
        require(
            bool(kind and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape)),
            f"topology: must be {known}",
        )
        if tpu := TPUS.get(kind):
            whole = self.chips <= tpu.most_on_one_host or self.chips % 4 == 0
            good = len(self.shape) == tpu.dimensions and whole
            require(
                good,
                f"topology: {kind} has {tpu.dimensions} dimensions, and 4 chips on each of several hosts",
            )
        else:
            require(len(self.shape) <= 2, f"topology: must be {known}")
        require(
            self.slices >= 1 and (kind in TPUS or self.slices == 1),
            "slices: more than one only of TPUs",
        )
        require(self.max_restarts >= 0, "max_restarts: must not be negative")
        require(
            not self.min_nodes or (kind not in TPUS and 0 < self.min_nodes <= self.shape[0]),
            f"min_nodes: must be 0, or a number of nodes up to that of the topology, {self.topology}",
        )

    @property
    def kind(self) -> str:
        return self.topology.partition(":")[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(size) for size in self.topology.partition(":")[2].split("x"))

    @property
    def chips(self) -> int:
        """Of one slice."""
        return math.prod(self.shape)

    @property
    def chips_per_host(self) -> int:
        return self.chips if self.chips <= TPUS[self.kind].most_on_one_host else 4

    @property
    def environment(self) -> dict[str, str]:
        """Of every process."""
        # Machines come and go: what they have compiled is kept where the runs are.
        in_store = "://" in self.bucket
        return {"JAXLLM_CACHE": f"{self.bucket.rstrip('/')}/compiled"} if in_store else {}

    @property
    def arguments(self) -> list[str]:
        """Of `jaxllm run` on every host."""
        return [self.config, "--run-dir", f"{self.bucket.rstrip('/')}/{self.name}", *self.options]


# A machine's own Python may be too old; uv brings one.
SETUP = """\
set -e
export PATH="$HOME/.local/bin:$PATH"
command -v uv > /dev/null || python3 -m pip install --quiet --user uv
source launch/venv.sh
make_venv {extra}
"""


def need(job: Job, place: str, *fields: str) -> None:
    """Raise InputError where the description lacks what this place needs."""
    for field in fields:
        if not getattr(job, field):
            raise InputError(f"{field}: {place} needs it")


def need_tpu(job: Job, place: str) -> Tpu:
    if job.kind not in TPUS:
        raise InputError(f"topology {job.topology}: {place} is for TPUs: {', '.join(TPUS)}")
    return TPUS[job.kind]


def slurm(job: Job) -> str:
    if job.kind in TPUS:
        raise InputError(
            f"topology {job.topology}: Slurm takes nodes x GPUs, as H100:2x8, or nodes, as cpu:2"
        )
    nodes, *gpus = job.shape
    fewest = f"{job.min_nodes}-" if job.min_nodes else ""
    export = ",".join(["ALL", *(f"{name}={value}" for name, value in job.environment.items())])
    command = [
        "sbatch",
        f"--job-name={job.name}",
        f"--nodes={fewest}{nodes}",
        *([f"--export={export}"] if job.environment else []),
        *(f"--gpus-per-node={n}" for n in gpus),
    ]
    return shlex.join([*command, *job.slurm_options, "launch/slurm.sbatch", *job.arguments])


def gke(job: Job) -> str:
    """A JobSet: one Job a slice, one pod a host."""
    tpu = need_tpu(job, "GKE")
    need(job, "GKE", "image")
    hosts = job.chips // job.chips_per_host
    if job.bucket.startswith("/") != bool(job.claim):
        raise InputError(
            "claim: GKE needs it where bucket is a directory, to mount it there, and nowhere else"
        )
    if job.slices > 1 and hosts == 1:
        raise InputError(
            f"slices: GKE joins only slices of several hosts, and {job.topology} is one host"
        )
    # Status 2 is bad input, 3 a stop on purpose: starting again would not help. All others restart all slices.
    unmendable = {"containerName": "jaxllm", "operator": "In", "values": [2, 3]}
    pods = {
        "completionMode": "Indexed",
        "parallelism": hosts,
        "completions": hosts,
        "backoffLimit": 0,  # one lost pod is a lost slice
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": unmendable}]},
        "template": _pod(job, tpu),
    }
    stop = {"name": "badInput", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    # New pods would wait for the lease that the old ones hold while they are saving.
    policy = {
        "maxRestarts": job.max_restarts,
        "restartStrategy": "BlockingRecreate",
        "rules": [stop],
    }
    # A slice's pods get a node pool for themselves.
    alone = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return _yaml(
        {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": {"name": job.name, "annotations": alone},
            "spec": {
                "failurePolicy": policy,
                "network": {
                    "enableDNSHostnames": True,
                    "subdomain": job.name,
                },  # the headless service
                "replicatedJobs": [
                    {"name": "slice", "replicas": job.slices, "template": {"spec": pods}}
                ],
            },
        }
    )


def _pod(job: Job, tpu: Tpu) -> Tree:
    """GKE itself adds the variables by which the hosts find each other: TPU_WORKER_* and, of slices, MEGASCALE_*."""
    labels = {
        "cloud.google.com/gke-tpu-accelerator": tpu.gke,
        "cloud.google.com/gke-tpu-topology": "x".join(map(str, job.shape)),
    }
    chips = {"google.com/tpu": str(job.chips_per_host)}
    # Without a TPU it is an error, and not a run on the CPU.
    environment = {"JAX_PLATFORMS": "tpu,cpu", **job.environment}
    container = {
        "name": "jaxllm",
        "image": job.image,
        "command": ["python", "-u", "launch/worker.py", "run", *job.arguments, "--distributed"],
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        "ports": [
            {"containerPort": port} for port in (8471, 8080, 8482)
        ],  # TPU, slices, JAX's coordinator
        "resources": {"requests": chips, "limits": chips},
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 300,  # to save in; a spot node gives 25 s at most whatever is written here
        "nodeSelector": labels,
        "containers": [container],
    }
    if job.spot:
        spot = "cloud.google.com/gke-spot"
        labels[spot] = "true"
        pod["tolerations"] = [
            {"key": spot, "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        ]
    if job.claim:
        pod["volumes"] = [{"name": "runs", "persistentVolumeClaim": {"claimName": job.claim}}]
        container["volumeMounts"] = [{"name": "runs", "mountPath": job.bucket}]
    if job.service_account:
        pod["serviceAccountName"] = job.service_account
    if job.slices > 1:  # between slices the pods' own network would be the bottleneck
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    # The annotation is asked for where the claim is a bucket that Cloud Storage FUSE mounts; elsewhere it says nothing.
    return (
        {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}, "spec": pod}
        if job.claim
        else {"spec": pod}
    )


def sky(job: Job) -> str:
    """A SkyPilot task, for `sky jobs launch`: managed, so that it is started again elsewhere after a preemption."""
    resources: Tree = {
        "use_spot": job.spot,
        "job_recovery": {
            "max_restarts_on_errors": 5,
            "recover_on_exit_codes": [75, 143],
        },  # stopped by a signal
    }
    rendezvous = ""
    if job.kind in TPUS:
        tpu = need_tpu(job, "SkyPilot")
        if job.slices > 1 or not tpu.vm:
            raise InputError(
                f"topology {job.topology}: SkyPilot takes one slice of {', '.join(_vm_kinds())}"
            )
        need(job, "SkyPilot with TPUs", "zone")
        resources["infra"] = f"gcp/{job.zone.rpartition('-')[0]}/{job.zone}"
        resources["accelerators"] = f"tpu-{tpu.vm}-{job.chips * tpu.cores}"
        resources["accelerator_args"] = {"tpu_vm": True, "runtime_version": tpu.runtime}
        nodes, extra = 1, "tpu,data"  # a slice is one node; the command runs on each of its hosts
    else:
        nodes, *gpus = job.shape
        extra = "cuda,data" if gpus else "data"
        if gpus:
            resources["accelerators"] = f"{job.kind}:{gpus[0]}"
        if job.image:
            resources["image_id"] = f"docker:{job.image}"
        rendezvous = (
            'export JAX_COORDINATOR_ADDRESS="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):8482"\n'
            'export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES" JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"\n'
        )
    worker = shlex.join(
        [".venv/bin/python", "-u", "launch/worker.py", "run", *job.arguments, "--distributed"]
    )
    return _yaml(
        {
            "name": job.name,
            "workdir": ".",
            "num_nodes": nodes,
            "resources": resources,
            "setup": SETUP.format(extra=extra) + (f"{job.prepare}\n" if job.prepare else ""),
            "run": f"{rendezvous}{_exports(job)}exec {worker}\n",
        }
    )


def _exports(job: Job) -> str:
    """Lines of a script that set the environment of a process."""
    return "".join(
        f"export {name}={shlex.quote(value)}\n" for name, value in job.environment.items()
    )


def shell(job: Job) -> str:
    """Assignments that bash reads."""
    tpu = need_tpu(job, "a TPU VM")
    need(job, "a TPU VM", "project", "zone")
    if not tpu.vm:
        raise InputError(
            f"topology {job.topology}: Cloud TPU's API has {', '.join(_vm_kinds())}; take GKE for {job.kind}"
        )
    values = {
        "name": job.name,
        "project": job.project,
        "zone": job.zone,
        "type": tpu.vm,
        "runtime": tpu.runtime,
    }
    values |= {
        "topology": job.topology.partition(":")[2],
        "slices": job.slices,
        "spot": "yes" if job.spot else "",
    }
    values |= {
        "prepare": job.prepare or "true",
        "environment": shlex.join(f"{name}={value}" for name, value in job.environment.items()),
        "run_dir": job.arguments[2],
        "arguments": shlex.join(job.arguments),
    }
    return "\n".join(f"{name}={shlex.quote(str(value))}" for name, value in values.items())


def _vm_kinds() -> list[str]:
    return [kind for kind, tpu in TPUS.items() if tpu.vm]


class _Plain(yaml.SafeDumper):
    """Without anchors, and with scripts as they are written."""

    def ignore_aliases(self, data: Any) -> bool:
        del data
        return True


_Plain.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def _yaml(tree: Tree) -> str:
    return yaml.dump(tree, Dumper=_Plain, sort_keys=False, width=200).rstrip()


PLACES: dict[str, Callable[[Job], str]] = {"slurm": slurm, "gke": gke, "sky": sky, "shell": shell}


def main(arguments: list[str]) -> None:
    """Print the job rendered for a place."""
    if len(arguments) != 2 or arguments[0] not in PLACES:
        raise InputError(f"usage: python launch/render.py {'|'.join(PLACES)} JOB.yaml")
    place, path = arguments
    job = load(Job, path)
    if not Path(job.config).exists():
        raise InputError(
            f"{path}: config: {job.config}: no such file; run this from the repository's root"
        )
    try:
        print(PLACES[place](job))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(print(f"render: {error}", file=sys.stderr) or 2)
