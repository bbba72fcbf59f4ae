#!/bin/sh
# GPTQ and its peers in turns, quality on the shipped model and speed on the 1.1 B shape; then every method
# against its peers at equal bytes: some hours on two cores. Environments, checkpoint and logs go to $WORK
# (default: build/peers); tables are printed and kept in results/.
set -eu
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
WORK=${WORK:-build/peers}
mkdir -p "$WORK"
[ -f "$WORK/llama-1.1b/config.json" ] ||
    "$PYTHON" benchmarks/make_llama.py "$WORK/llama-1.1b" --shape 1.1b
"$PYTHON" benchmarks/peers/gptq.py quality --model src/onecard/shipped/model \
    --text src/onecard/shipped/held_out.txt --calibration src/onecard/shipped/calibration.txt \
    --work "$WORK" --check
"$PYTHON" benchmarks/peers/gptq.py speed --model "$WORK/llama-1.1b" --work "$WORK" --bits 4 --check
"$PYTHON" benchmarks/peers/quality.py --work "$WORK"
