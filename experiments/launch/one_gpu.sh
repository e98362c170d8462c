#!/usr/bin/env bash
# One GPU, one process. Install first: pip install -r requirements.txt "jax[cuda12]" (without the
# second JAX trains on the CPU). Usage:
#   experiments/launch/one_gpu.sh --config=configs/math.py [more flags]
set -euo pipefail

: "${CUDA_VISIBLE_DEVICES:=0}"
export CUDA_VISIBLE_DEVICES

exec python -m rho1_jax.main --num_processes=1 "$@"
