#!/usr/bin/env bash
# Every GPU figure of the documentation, each with the device's name in its rows; and first the tests that need one.
# bash scripts/bench_gpu.sh [DIR]; PYTHON picks the interpreter. Under ten minutes on an H100.
set -u
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/gpu} python=${PYTHON:-.venv/bin/python} status=0
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
peers=()
[ -d .peers ] && peers=(--peers_path .peers)
mkdir -p "$out"
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "no GPU that torch can use"; exit 2; }
"$python" -m pytest -n 0 -q -rs tests/moe/test_gpu.py || status=1
"$python" benchmarks/moe_layer.py "${peers[@]}" --compiled true --csv "$out/moe_layer.csv" || status=1
"$python" benchmarks/train_step.py --csv "$out/train_step.csv" || status=1
"$python" benchmarks/train_step.py --networks '[vmoe_small_patch32_224, vmoe_small_patch16_224]' --rules '[HeavyBall]' \
  --compiled true --csv "$out/train_step_compiled.csv" || status=1
"$python" benchmarks/moe_layer.py --grow true --csv "$out/moe_layer_growth.csv" --plot_to "$out/moe_layer_growth.png" || status=1
exit $status
