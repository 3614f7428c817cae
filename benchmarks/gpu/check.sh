#!/usr/bin/env bash
# On a machine with a GPU: tests/gpu, then the GPU benchmark, all within LIMIT_S seconds. `make gpu-check` runs it; it also
# runs without make. Needs no network: what $GPU_PYTHON lacks comes along as wheels in $GPU_WHEELS. Everything that is
# printed goes to $OUT/gpu-check.log too. Arguments are benchmarks/gpu/run.py's.
set -uo pipefail
python=${GPU_PYTHON:-python3} wheels=${GPU_WHEELS:-.whl} out=${OUT:-results/gpu} limit=${LIMIT_S:-570}
site=build/gpu-site
export PYTHONPATH=$site:. PYTHONUNBUFFERED=1
rm -rf "$site" && mkdir -p "$site" "$out"
left() { echo $((limit - SECONDS)); }

check() {
  found=("$wheels"/*.whl)
  if [ -e "${found[0]}" ]; then
    "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --target "$site" "${found[@]}" || exit 1
  fi
  needed='aiohttp, einops, jinja2, msgspec, numpy, pytest, pytest_asyncio, pytest_timeout, tokenizers, torch, tqdm, transformers, yaml'
  "$python" -c "import $needed" || { echo "The packages named above are missing: put their wheels into $wheels."; exit 1; }
  # Without it the tests would skip and the benchmark measure plain PyTorch, with nothing but a line in the log.
  "$python" -c 'from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache' ||
    { echo "flash-attn does not load: put its wheel into $wheels."; exit 1; }
  "$python" -c 'import torch; torch.cuda.is_available() or exit("torch sees no NVIDIA GPU")' || exit 2
  free -g; nproc; df -h . | tail -n 1; nvidia-smi || true

  status=0
  # Warnings of other packages are ignored. A wait for a hanging device is in C, where a signal does not end it.
  timeout -k 5 "$((limit / 3))" "$python" -m pytest tests/gpu -v -p no:cacheprovider -rs -W default \
    --timeout=90 --timeout-method=thread --junitxml="$out/gpu-tests.xml" || status=1
  "$python" -m benchmarks.gpu.run --output "$out/benchmarks/results/gpu.json" --ends-in "$(left)" "$@" || status=1
  # The profiler may disturb what is timed after it, or crash: in a process of its own, last, and no failure if it does.
  if [ $# -eq 0 ] && [ "$(left)" -gt 60 ]; then
    timeout -k 5 "$(left)" "$python" -m benchmarks.gpu.run --only kernels --output "$out/benchmarks/results/gpu_kernels.json" \
      --ends-in "$(left)" || echo 'no kernel times'
  fi
  exit $status
}

# The log is whole when this ends, which `exec > >(tee ...)` does not promise.
check "$@" 2>&1 | tee "$out/gpu-check.log"
