"""AutoRound on one model for quality.py, in that peer's own environment.

    python quality_autoround.py MODEL TOKENS.json OUT --bits 4 --group 64 [--asymmetric]

The library's defaults (200 steps of sign descent, batches of 8) but bits, group and the data, and nothing is
compiled, which changes seconds alone.
"""

from __future__ import annotations

import time
from pathlib import Path

import dense
import peer
import torch
from auto_round import AutoRound
from auto_round.version import __version__ as version
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    words = peer.parser()
    words.add_argument("--asymmetric", action="store_true")
    asked = words.parse_args()
    samples = peer.samples(asked.tokens)
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=asked.dtype)
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    dtype = model.dtype
    loaded = time.perf_counter()
    rounding = AutoRound(
        model, tokenizer, scheme=f"W{asked.bits}A16", bits=asked.bits, group_size=asked.group or -1,
        sym=not asked.asymmetric, dataset=[torch.tensor([ids]) for ids in samples],
        seqlen=len(samples[0]), nsamples=len(samples), device_map="cpu",
        enable_torch_compile=False,
    )  # fmt: skip
    rounding.quantize()
    solved = time.perf_counter()
    out = Path(asked.out)
    dense.write_module(Path(asked.model), out, rounding.model)
    packed = out.with_name(f"{out.name}-packed")
    rounding.save_quantized(str(packed), format="auto_round")
    saved = time.perf_counter()
    used = f"{'asymmetric' if asked.asymmetric else 'symmetric'}, 200 steps, {dtype}"
    found = next(iter(sorted(packed.rglob("config.json")))).parent
    peer.say(f"AutoRound {version}", used, began, loaded, solved, saved,
             bytes=dense.stored(found, Path(asked.model)))  # fmt: skip


if __name__ == "__main__":
    main()
