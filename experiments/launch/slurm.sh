#!/usr/bin/env bash
# Slurm, one process per GPU. Usage:
#   sbatch --nodes=4 experiments/launch/slurm.sh --config=configs/math.py:mistral --workdir=/shared/run
# jax reads the cluster from Slurm's variables. SIGTERM comes five minutes before the time limit:
# the run saves after the step in hand, and the job puts itself back into the queue.
#SBATCH --job-name=rho1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# A proxy would catch the hosts' own traffic.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY

status=0
srun --kill-on-bad-exit=0 python -m rho1_jax.main "$@" || status=$?
if ((status == 143)); then # 128 + SIGTERM: saved
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
