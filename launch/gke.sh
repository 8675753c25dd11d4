#!/usr/bin/env bash
# A run on TPU slices of a GKE cluster with JobSet, through kubectl. JOB.yaml: see launch/example.yaml.
#   bash launch/gke.sh up JOB.yaml        submit; a running job is left alone, an ended one is submitted again
#   bash launch/gke.sh logs JOB.yaml      follow the first host of the first slice
#   bash launch/gke.sh status JOB.yaml    the JobSet and its pods
#   bash launch/gke.sh down JOB.yaml      delete it; the pods get SIGTERM and save
# The manifest alone: python launch/render.py gke JOB.yaml
set -euo pipefail
if [[ $# -ne 2 || ! $1 =~ ^(up|logs|status|down)$ ]]; then
  echo "usage: bash launch/gke.sh up|logs|status|down JOB.yaml" >&2
  exit 2
fi
job=$(realpath "$2")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
manifest=$(mktemp --suffix=.yaml)
trap 'rm -f "$manifest"' EXIT
"${PYTHON:-.venv/bin/python}" launch/render.py gke "$job" > "$manifest"
ask() { kubectl get -f "$manifest" --ignore-not-found -o "jsonpath=$1"; }
# Waits until the pods are gone: they may still be saving, and hold the lease of the run directory until then.
remove() { kubectl delete -f "$manifest" --ignore-not-found --cascade=foreground; }

name=$(sed -n '/^metadata:/,/^spec:/s/^  name: //p' "$manifest")
selector=jobset.sigs.k8s.io/jobset-name=$name
case $1 in
  up)
    if [[ -n $(ask '{.metadata.uid}') && -z $(ask '{.status.terminalState}') ]]; then
      echo "$name: running already"
    else
      remove
      kubectl create -f "$manifest"
    fi
    ;;
  logs)
    first=jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0
    kubectl logs --follow --tail=100 --selector="$selector,$first"
    ;;
  status)
    kubectl get -f "$manifest"
    kubectl get pods --selector="$selector" -o wide
    ;;
  down) remove ;;
esac
