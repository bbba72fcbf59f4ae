"""GPTQModel's GPTQ on one model: runs inside that peer's own environment, started by gptq.py.

    python gptq_gptqmodel.py MODEL TOKENS.json OUT --bits 4 --group 128 [--dense OUT]

Everything is the library's default (damping 0.05, activation order within groups, min-max scales in
float16, bfloat16 weights on a CPU) but bits and group. "seconds" is `quantize` alone: imports, loading
and saving are apart. The library sorts the samples by length and packs on threads while it solves, so
packing is part of "seconds".

`--dense` also writes an ordinary folder in float32 whose weights the library itself dequantized, which the
common evaluator reads. The last line printed is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

# Its pool of threads cannot start with the one worker it gives a machine of two cores.
if (os.cpu_count() or 1) < 3:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.utils.cpp import load_pack_block_extension
from gptqmodel.utils.model_dequant import dequantize_model
from gptqmodel.version import __version__ as version


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, required=True, help="0 for one group per row")
    parser.add_argument("--dtype", default="auto", help="of the loaded weights")
    parser.add_argument("--dense")
    asked = parser.parse_args()

    samples = [
        {"input_ids": ids, "attention_mask": [1] * len(ids)}
        for ids in json.loads(asked.tokens.read_text())
    ]
    config = QuantizeConfig(bits=asked.bits, group_size=asked.group or -1)
    load_pack_block_extension()  # its first use compiles it, half a minute that is not GPTQ's
    began = time.perf_counter()
    model = GPTQModel.load(asked.model, config, dtype=asked.dtype, device="cpu")
    loaded = time.perf_counter()
    model.quantize(samples, batch_size=1)
    solved = time.perf_counter()
    model.save(asked.out)
    saved = time.perf_counter()
    found = {
        "peer": f"GPTQModel {version}",
        "used": f"damp {config.damp_percent}, act-order {config.desc_act}, "
        f"act-group-aware {config.act_group_aware}, mse {config.mse}, {model.model.dtype}, "
        f"{torch.get_num_threads()} threads",
        "load_seconds": loaded - began,
        "seconds": solved - loaded,
        "save_seconds": saved - solved,
    }
    if asked.dense:
        dequantize_model(asked.out, asked.dense, target_dtype=torch.float32)
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
