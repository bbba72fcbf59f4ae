"""llm-compressor's GPTQ on one model: runs inside that peer's own environment, started by gptq.py.

    python gptq_llmcompressor.py MODEL TOKENS.json OUT --bits 4 --group 128

Everything is the library's default (damping 0.01, blocks of 128 columns, activation order "static",
min-max scales, errors propagated from block to block) but the weights' scheme. Token ids are passed as a
DataLoader of one-sample batches: a `Dataset` would be shuffled and cut by `oneshot`. "seconds" is `oneshot`
alone: imports, loading and saving are apart.

The last line printed is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from llmcompressor import __version__ as version
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, required=True, help="0 for one group per row")
    parser.add_argument("--dtype", default="auto", help="of the loaded weights")
    asked = parser.parse_args()

    samples = json.loads(asked.tokens.read_text())
    batches = [{"input_ids": torch.tensor(s), "attention_mask": torch.ones(len(s), dtype=torch.long)}
               for s in samples]  # fmt: skip
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=asked.dtype)
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    loaded = time.perf_counter()

    weights = {"num_bits": asked.bits, "type": "int", "symmetric": True, "strategy": "channel"}
    if asked.group:
        weights |= {"strategy": "group", "group_size": asked.group}
    gptq = GPTQModifier(
        config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]
    )
    oneshot(
        model=model, processor=tokenizer, dataset=DataLoader(batches, batch_size=1), recipe=[gptq]
    )
    solved = time.perf_counter()

    model.save_pretrained(asked.out, save_compressed=True)
    tokenizer.save_pretrained(asked.out)
    saved = time.perf_counter()
    args = gptq.resolved_config.config_groups["all"].weights
    print(
        json.dumps(
            {
                "peer": f"llm-compressor {version}",
                "used": f"damp {gptq.dampening_frac}, block {gptq.block_size}, "
                f"act-order {args.actorder.value}, observer {args.observer}, "
                f"{model.dtype}, {torch.get_num_threads()} threads",
                "load_seconds": loaded - began,
                "seconds": solved - loaded,
                "save_seconds": saved - solved,
            }
        )
    )


if __name__ == "__main__":
    main()
