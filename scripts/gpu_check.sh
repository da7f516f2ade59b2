#!/usr/bin/env bash
# On a machine with one GPU: the tests that need it, the benchmarks, and a page with what came out beside its goals.
#
#   scripts/gpu_check.sh                        all parts but tune and costs, about a quarter of an hour:
#                                               docs/results/gpu-YYYY-MM-DD.md
#   scripts/gpu_check.sh tests kernels          some of: tests clusters kernels decode transfer serve tune costs
#   scripts/gpu_check.sh --dry                  without a GPU: every command runs, no figure means anything
#
# Each part has a time limit; one that fails or runs past it is named at the end, and the others go on. At its limit a
# part is interrupted, so that tests still say what has failed so far. PYTHON names another interpreter, PAGE another page
# (a part is appended to it). Where a command may take ten minutes at most, these end before: `kernels decode`,
# `tests serve`, `clusters transfer`, `tune`, `costs`, in this order if time is short.
#
# Images with a GPU's torch have few of the other packages. For such a machine, and its Python, say 3.12:
#
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
#       --platform manylinux2014_x86_64 -c constraints.txt -d wheels hydra-core omegaconf msgspec pyzmq gguf
#   pip wheel --no-deps -c constraints.txt -w wheels antlr4-python3-runtime
#   PYTHON=python3 WHEELS=wheels PAGE=page.md scripts/gpu_check.sh kernels decode    # there
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE NVIDIA_TF32_OVERRIDE # NVIDIA's images set one: float32 is to be float32
device=cuda dry=()
# Half a billion weights, drawn; 16 heads of 128 over 4 kv heads.
model=(model=tiny model.random.hidden_size=2048 model.random.intermediate_size=5632 model.random.num_hidden_layers=10
    model.random.num_attention_heads=16 model.random.num_key_value_heads=4 model.random.head_dim=128
    model.random.vocab_size=32000 model.dtype=bfloat16 model.compile=true)
workload=(workload=synthetic workload.num_sessions=64 workload.num_turns=3 workload.prompt_tokens=1500
    workload.max_output_tokens=64 workload.rate=16 kvcache.num_hbm_blocks=20000)
megabytes=4096
if [[ -n ${WHEELS:-} ]]; then
    brought=$(mktemp -d)
    trap 'rm -rf "$brought"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$brought" "$WHEELS"/*.whl || exit 1
    PYTHONPATH+=:$brought
fi
needs=(torch triton numpy transformers tokenizers safetensors jinja2 gguf hydra omegaconf antlr4 msgspec zmq rich matplotlib
    pytest pytest_timeout)
find='import sys; from importlib.util import find_spec; print(*(name for name in sys.argv[1:] if not find_spec(name)))'
missing=$("$python" -c "$find" "${needs[@]}")
if [[ -n $missing ]]; then
    echo "error: $python has no $missing: the head of this script says how to bring them"
    exit 1
fi
header='import sysconfig, sys; from pathlib import Path; sys.exit(not Path(sysconfig.get_path("include"), "Python.h").exists())'
if [[ ${1:-} == --dry ]]; then
    shift
    export TRITON_INTERPRET=1
    device=cpu dry=(--dry) model=(model=tiny) megabytes=48
    workload=(workload=synthetic workload.num_sessions=2 workload.num_turns=1 workload.prompt_tokens=40
        workload.max_output_tokens=3 workload.rate=50 kvcache.num_hbm_blocks=64)
elif ! "$python" -c 'import torch, sys; sys.exit(None if torch.cuda.is_available() else "error: no GPU here")'; then
    exit 1
elif ! { command -v gcc cc clang >/dev/null && "$python" -c "$header"; }; then
    echo "error: Triton compiles its launchers with a C compiler and Python.h, and $python finds not both"
    exit 1
fi
page=${PAGE:-docs/results/gpu-$(date +%F).md}
parts=("$@")
[[ $# -gt 0 ]] || parts=(tests clusters kernels decode transfer serve)
for part in "${parts[@]}"; do
    case $part in
    tests | clusters | kernels | decode | transfer | serve | tune | costs) ;;
    *)
        echo "error: $part: expected of tests, clusters, kernels, decode, transfer, serve, tune, costs"
        exit 2
        ;;
    esac
done
pytest=("$python" -m pytest --verbose --tb=short -W default) # what another version of torch warns of is no failure here
failed=()

run() { # NAME LIMIT GOAL COMMAND...: into the page, as it comes
    local name=$1 limit=$2 goal=$3 start=$SECONDS status=0 copying
    shift 3
    { echo; echo "## $name"; echo; echo "Goal: $goal. Limit: $limit s."; echo; echo '```'; } | tee -a "$page"
    exec 3> >(exec tee -a "$page") # no pipe: that ends with the last who writes, and a rank that hangs may never
    copying=$!
    timeout --signal=INT --kill-after=40 "$limit" "$@" >&3 2>&1 3>&- || status=$? # torchrun kills its ranks after 30 s
    exec 3>&-
    timeout 5 tail --pid="$copying" --sleep-interval=.1 -f /dev/null || kill "$copying"
    { echo '```'; echo; echo "Status $status after $((SECONDS - start)) s."; } | tee -a "$page"
    [[ $status == 0 ]] || failed+=("$name")
}

serve() {
    local words=("${model[@]}" "${workload[@]}" "model.device=$device")
    run "serve, emulated: two instances on one device, measured steps" 160 "TTFT, TPOT and JCT of real steps" \
        "$python" scripts/compare.py --systems pd,pd_cc,1p1d,1p1d_cc "${words[@]}" repeats=1
    run "serve, a process an instance: 1P1D, mapped" 90 "as 1p1d_cc above, without failures" \
        "$python" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 3 scripts/run.py \
        exec=distributed cluster=1p1d mode=pd_caching_3 transport=mapped granularity=by_request_agg layout=aggregated "${words[@]}"
}

costs() { # what steps cost here, beside the data sheet's roofline; the file stays beside the page
    local file=${page%.md}-costs.json few=(--repeats 3 --repeat-s 0.05) sheet=()
    if [[ $device == cpu ]]; then # interpreted attention would take minutes
        few=(--repeats 1 --repeat-s 0 --max-context 64 --max-tokens 64 --max-batch 2 --held-out 4 model.attention=sdpa)
        sheet=(--gpu measured)
    fi
    run "costs, profile" 400 "none: a file for cost_model=fitted" "$python" scripts/profile_cost_model.py --out "$file" \
        "${few[@]}" "${model[@]}" "model.device=$device"
    run "costs, roofline" 100 "none: how far a data sheet is from measured steps, with its shares fitted" \
        "$python" scripts/bench_roofline.py --costs "$file" "${sheet[@]}"
}

for part in "${parts[@]}"; do
    case $part in
    tests)
        run tests 330 "all pass: tokens equal in float32, logits within their bounds in bfloat16, no waits but for tokens" \
            "${pytest[@]}" tests/model/test_gpu.py tests/model/test_gpu_steps.py tests/transfer/test_device.py \
            tests/transfer/test_two_processes.py tests/transfer/test_nccl.py -k "gpu or GPU"
        ;;
    clusters)
        run clusters 400 "all pass: emulated and distributed, tokens equal to a CPU's" \
            "${pytest[@]}" tests/cluster/test_gpu.py
        ;;
    kernels)
        run kernels 150 "the column wanted" "$python" scripts/bench_kernels.py --parts kernels "${dry[@]}"
        ;;
    decode)
        run decode 260 "the column wanted, transformers beside it" "$python" scripts/bench_kernels.py --parts steps \
            "${dry[@]}"
        run "decode, kernel by kernel" 120 "none: where a step's time goes" "$python" scripts/bench_kernels.py \
            --parts profile "${dry[@]}"
        ;;
    tune)
        run tune 580 "none: rows for memserve/model/kernels/configs.py" "$python" scripts/tune_kernels.py "${dry[@]}"
        ;;
    transfer)
        run transfer 180 ".8 of one plain copy within the GPU, but by layer" "$python" scripts/bench_transfer.py \
            --parts device --device "$device" --megabytes "$megabytes" --repeats 5
        ;;
    serve) serve ;;
    costs) costs ;;
    esac
done
{ echo; echo "\`scripts/gpu_check.sh ${parts[*]}\`, revision $(git rev-parse --short HEAD 2>/dev/null || echo unknown)."; } >>"$page"
echo "written: $page"
if [[ ${#failed[@]} -gt 0 ]]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
