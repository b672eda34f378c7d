#!/usr/bin/env bash
# make gpu-check FOLDER=...: on a machine with a GPU, nvcc, and torch and Triton that $PYTHON already has: builds, runs the
# tests on the GPU, has compute-sanitizer watch, then measures; results go to the folder that is given. Needs no network.
# Under ten minutes. What fails does not stop the rest; the last lines name it, and the exit status is then 1.
set -uo pipefail
cd "$(dirname "$0")/../.."
folder=${1:?usage: check.sh FOLDER}
python=${PYTHON:-python3}
mkdir -p "$folder" || exit 1
export PYTHONPATH=$PWD
export CUBLAS_WORKSPACE_CONFIG=:4096:8  # without it torch refuses products where algorithms must be deterministic
"$python" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "no CUDA device: make gpu-check needs one")' ||
  exit 1
failures=()

# check WHAT SECONDS COMMAND...
check() {
  local what=$1 limit=$2 status=0
  shift 2
  echo "== $what"
  timeout "$limit" "$@" || status=$?
  [ $status -ne 124 ] || echo "$what: stopped after $limit s"
  [ $status -eq 0 ] || failures+=("$what")
  return $status
}

# In place, without an environment of its own: packages that are missing cannot be fetched here. For this GPU alone.
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c \
  'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')}
check "build" 180 "$python" setup.py --quiet build_ext --inplace
"$python" -c 'import vrm_kernels; print(vrm_kernels.backends.describe())' | tee "$folder/describe.txt"
usable=" $("$python" -c 'from vrm_kernels import backends
print(*(name for name, backend in backends.REGISTRY.items() if backend.status()[0]))') "

backends=()
for name in triton cuda; do
  if [[ $usable == *" $name "* ]]; then
    backends+=("$name")
    check "tests of $name on the GPU" 100 "$python" -m pytest "tests/backends/$name/test_device.py" \
      --junitxml="$folder/$name-tests.xml"
  else
    echo "== the backend $name cannot run here: nothing of it is tested, see $folder/describe.txt"
    failures+=("$name cannot run")
  fi
done

echo "== the suite, on the GPU"
# Hypothesis draws a new shape each time, and the compilers need a CPU: those files are for the CPU.
VRM_TEST_DEVICE=cuda timeout 90 "$python" -m pytest tests/parity/test_extremes.py tests/parity/test_settings.py \
  tests/parity/test_shapes.py tests/graph/test_mask.py tests/loss/test_nan.py tests/loss/test_relation_loss.py tests/ops/test_autograd.py \
  -k "triton or cuda or torch" --junitxml="$folder/suite.xml" || [ $? -eq 124 ] || failures+=("the suite, on the GPU")

# sanitize BACKEND TOOL [OPTION]
sanitize() {
  local log="$folder/$1-$2.txt" status=0
  # Each array an allocation of its own: its end is then known.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 60 compute-sanitizer --tool "$2" --error-exitcode 9 \
    "$python" -m benchmarks.gpu.sanitize "$1" ${3:+"$3"} >"$log" 2>&1 || status=$?
  case $status in
    124) echo "$1, $2: stopped after 60 s, nothing found by then" ;;
    *) echo "$1, $2: $(tail -n 1 "$log") (exit $status)" ;;
  esac
  [ $status -eq 0 ] || [ $status -eq 124 ]
}

echo "== compute-sanitizer"
if command -v compute-sanitizer >/dev/null; then
  declare -A running=()
  for name in ${backends[@]+"${backends[@]}"}; do
    for tool in memcheck racecheck initcheck synccheck; do
      option=
      if [ "$name" = cuda ]; then
        case $tool in racecheck | initcheck) option=--own ;; esac  # the library's kernels are not ours to judge
      else
        case $tool in initcheck | synccheck) continue ;; esac
      fi
      sanitize "$name" "$tool" $option &
      running["$name, $tool"]=$!
    done
  done
  for what in ${running[@]+"${!running[@]}"}; do
    wait "${running[$what]}" || failures+=("compute-sanitizer: $what")
  done
else
  echo "compute-sanitizer is not installed: skipped"
fi

echo "== benchmarks"
left=$((560 - SECONDS))
budget=$((left > 240 ? 240 : left < 60 ? 60 : left))
# shellcheck disable=SC2086
"$python" -m benchmarks.gpu.run "$folder" --budget $budget ${GPU_BENCH_ARGS:-} || failures+=("benchmarks")

echo "== ${#failures[@]} failures after $SECONDS s"
[ ${#failures[@]} -eq 0 ] || { printf '%s\n' "${failures[@]}"; exit 1; }
