#!/usr/bin/env bash
# One machine with several GPUs. Usage:
#   experiments/launch/one_node.sh [--processes=N] --config=configs/math.py [more flags]
# One process sees all GPUs (the default; nothing else is needed). With --processes=N there are N,
# each with every N-th GPU: for machines whose CPU side is too slow for one process, and to try
# the many-hosts path on one machine (without GPUs it runs on CPU devices).
set -euo pipefail

processes=1
if [[ "${1:-}" == --processes=* ]]; then
  processes=${1#--processes=}
  shift
fi
if ((processes == 1)); then
  exec python -m rho1_jax.main --num_processes=1 "$@"
fi

port=${PORT:-$((20000 + RANDOM % 20000))}
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
pids=()
stop() { kill -TERM "${pids[@]}" 2>/dev/null || true; }
trap stop TERM INT
for ((i = 0; i < processes; i++)); do
  # An empty list hides all GPUs from a process; without GPUs there is nothing to hide.
  mine=$( ((gpus == 0)) || seq -s, "$i" "$processes" $((gpus - 1)))
  env ${mine:+CUDA_VISIBLE_DEVICES="$mine"} python -m rho1_jax.main "$@" \
    --coordinator="127.0.0.1:$port" --num_processes="$processes" --process_id="$i" &
  pids+=($!)
done

status=0
for pid in "${pids[@]}"; do
  # A trapped signal ends `wait` early: wait again until the process itself has ended.
  while true; do
    code=0
    wait "$pid" || code=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  ((code == 0)) || status=$code
done
exit "$status"
