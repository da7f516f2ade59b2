#!/usr/bin/env bash
# On a machine with one GPU: the tests that need it, the benchmarks, and a dated page of what came out.
#
#   scripts/gpu_check.sh                        writes docs/results/gpu-YYYY-MM-DD.md
#   PYTHON=python3 scripts/gpu_check.sh page.md --no-hf
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
page=${1:-docs/results/gpu-$(date +%F).md}
shift || true
export PYTHONPATH=.

"$python" -c 'import torch, sys; sys.exit(None if torch.cuda.is_available() else "error: no GPU here")'
tests=$("$python" -m pytest -q tests/model/test_gpu.py)
echo "$tests"
{
    echo "# GPU, $(date +%F)"
    echo
    echo "\`scripts/gpu_check.sh\`, revision $(git rev-parse --short HEAD 2>/dev/null || echo unknown)."
    echo "Tests: $(tail -n 1 <<<"$tests")"
    echo
} >"$page"
"$python" scripts/bench_kernels.py --out "$page" "$@"
echo "written: $page"
