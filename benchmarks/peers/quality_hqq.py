"""HQQ on one model for quality.py, in that peer's own environment. It takes no data.

    python quality_hqq.py MODEL TOKENS.json OUT --bits 4 --group 64

The library's defaults (groups along rows, float16 scales and zero points) but bits and group; its own packing
is counted: 3 bits take 3.2.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path

import dense
import peer
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from transformers import AutoModelForCausalLM


def main() -> None:
    asked = peer.parser().parse_args()
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32)
    loaded = time.perf_counter()
    config = BaseQuantizeConfig(nbits=asked.bits, group_size=asked.group or None)
    packed, count = 0, 0
    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        count += module.weight.numel()
        made = HQQLinear(module, config, compute_dtype=torch.float16, device="cpu", del_orig=False)
        parts = (made.W_q, made.meta["scale"], made.meta["zero"])
        packed += sum(part.numel() * part.element_size() for part in parts)
        module.weight.data = made.dequantize().float()
    solved = time.perf_counter()
    source = Path(asked.model)
    dense.write_module(source, Path(asked.out), model)
    saved = time.perf_counter()
    whole = dense.stored(source, source)
    each = whole // sum(p.numel() for p in model.parameters())  # bytes of a number in the source
    used = f"axis {config['weight_quant_params']['axis']}, no data"
    peer.say(f"HQQ {version('hqq')}", used, began, loaded, solved, saved,
             bytes=whole - each * count + packed)  # fmt: skip


if __name__ == "__main__":
    main()
