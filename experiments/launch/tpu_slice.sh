#!/usr/bin/env bash
# A Cloud TPU slice: the same command on every host of it, this folder copied there first. Usage:
#   TPU=my-slice ZONE=us-east5-a experiments/launch/tpu_slice.sh --config=configs/math.py:mistral \
#     --workdir=/mnt/shared/run
# The workdir must lie on a file system that all hosts mount (Filestore, for instance).
# The same command resumes after a maintenance event or a preemption.
set -euo pipefail

: "${TPU:?the name of the slice}" "${ZONE:?its zone}"
ssh=(gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all)

gcloud compute tpus tpu-vm scp --recurse --zone="$ZONE" --worker=all . "$TPU:rho1_jax"
"${ssh[@]}" --command="cd rho1_jax && python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt 'jax[tpu]'"
"${ssh[@]}" --command="cd rho1_jax && .venv/bin/python -m rho1_jax.main $(printf '%q ' "$@")"
