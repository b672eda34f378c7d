#!/usr/bin/env bash
# make gpu-check FOLDER=...: on a machine with a GPU, nvcc, and torch and Triton that $PYTHON already has: builds, runs the
# tests on the GPU, then measures; results go to the folder that is given. Needs no network. About ten minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?usage: gpu_check.sh FOLDER}
python=${PYTHON:-python3}
mkdir -p "$folder"
export PYTHONPATH=$PWD
export CUBLAS_WORKSPACE_CONFIG=:4096:8  # without it torch refuses products where algorithms must be deterministic
"$python" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "no CUDA device: make gpu-check needs one")'

echo "== build"
# In place, without an environment of its own: packages that are missing cannot be fetched here.
"$python" setup.py --quiet build_ext --inplace
"$python" -c 'import vrm_kernels; print(vrm_kernels.backends.describe())' | tee "$folder/describe.txt"

echo "== tests of the GPU"
"$python" -m pytest tests/test_triton_gpu.py --junitxml="$folder/gpu-tests.xml"
echo "== the suite, on the GPU"
# Hypothesis draws a new shape each time, and the compilers need a CPU: those files are for the CPU.
VRM_TEST_DEVICE=cuda timeout 120 "$python" -m pytest tests/test_parity_extremes.py tests/test_parity_settings.py \
  tests/test_parity_shapes.py tests/test_mask.py tests/test_nan.py tests/test_relation_loss.py tests/test_autograd.py \
  -k "triton or torch" --junitxml="$folder/suite.xml" || [ $? -eq 124 ]

echo "== compute-sanitizer"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    status=0
    timeout 45 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m benchmarks.gpu_small \
      >"$folder/$tool.txt" 2>&1 || status=$?
    tail -2 "$folder/$tool.txt"
    if [ $status -eq 124 ]; then echo "$tool: stopped after 45 s, nothing found by then"; continue; fi
    [ $status -eq 0 ] || exit 1
  done
else
  echo "compute-sanitizer is not installed: skipped"
fi

echo "== benchmarks"
"$python" -m benchmarks.gpu "$folder" ${GPU_BENCH_ARGS:-}
