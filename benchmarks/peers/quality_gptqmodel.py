"""GPTQModel on one model for quality.py, in that peer's own environment.

    python quality_gptqmodel.py MODEL TOKENS.json OUT --bits 4 --group 64

The library's defaults, as in gptq_gptqmodel.py; the library itself dequantizes what it saved.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

# Its pool of threads cannot start with the one worker it gives a machine of two cores.
if (os.cpu_count() or 1) < 3:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import dense
import peer
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.utils.model_dequant import dequantize_model
from gptqmodel.version import __version__ as version


def main() -> None:
    asked = peer.parser().parse_args()
    samples = [
        {"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in peer.samples(asked.tokens)
    ]
    config = QuantizeConfig(bits=asked.bits, group_size=asked.group or -1)
    began = time.perf_counter()
    model = GPTQModel.load(asked.model, config, dtype=asked.dtype, device="cpu")
    loaded = time.perf_counter()
    model.quantize(samples, batch_size=1)
    solved = time.perf_counter()
    out = Path(asked.out)
    packed, plain = (out.with_name(f"{out.name}-{kind}") for kind in ("packed", "plain"))
    model.save(str(packed))
    dequantize_model(str(packed), str(plain), target_dtype=torch.float32)
    tensors = dense.read(plain)
    dense.write(Path(asked.model), out, lambda name: tensors[name])
    saved = time.perf_counter()
    used = f"damp {config.damp_percent}, act-order {config.desc_act}, sym {config.sym}, {model.model.dtype}"
    peer.say(f"GPTQModel {version}", used, began, loaded, solved, saved,
             bytes=dense.stored(packed, Path(asked.model)))  # fmt: skip


if __name__ == "__main__":
    main()
