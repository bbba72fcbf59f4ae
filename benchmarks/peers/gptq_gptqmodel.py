"""GPTQModel's GPTQ on one model: runs inside that peer's own environment, started by gptq.py.

    python gptq_gptqmodel.py MODEL TOKENS.json OUT --bits 4 --group 128 [--dense OUT]

Everything is the library's default (damping 0.05, activation order within groups, min-max scales in
float16, bfloat16 weights on a CPU) but bits and group. "seconds" is `quantize` alone: imports, loading
and saving are apart. The library sorts the samples by length and packs on threads while it solves, so
packing is part of "seconds".

`--dense` also writes an ordinary folder in float32 whose weights the library itself dequantized, which the
common evaluator reads.
"""

from __future__ import annotations

import os
import time

# Its pool of threads cannot start with the one worker it gives a machine of two cores.
if (os.cpu_count() or 1) < 3:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import peer
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.utils.cpp import load_pack_block_extension
from gptqmodel.utils.model_dequant import dequantize_model
from gptqmodel.version import __version__ as version


def main() -> None:
    words = peer.parser()
    words.add_argument("--dense")
    asked = words.parse_args()

    samples = [
        {"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in peer.samples(asked.tokens)
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
    if asked.dense:
        dequantize_model(asked.out, asked.dense, target_dtype=torch.float32)
    used = (
        f"damp {config.damp_percent}, act-order {config.desc_act}, "
        f"act-group-aware {config.act_group_aware}, mse {config.mse}, {model.model.dtype}, "
        f"{torch.get_num_threads()} threads"
    )
    peer.say(f"GPTQModel {version}", used, began, loaded, solved, saved)


if __name__ == "__main__":
    main()
