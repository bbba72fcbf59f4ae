"""llm-compressor's GPTQ on one model: runs inside that peer's own environment, started by gptq.py.

    python gptq_llmcompressor.py MODEL TOKENS.json OUT --bits 4 --group 128

Everything is the library's default (damping 0.01, blocks of 128 columns, activation order "static",
min-max scales, errors propagated from block to block) but the weights' scheme. Token ids are passed as a
DataLoader of one-sample batches: a `Dataset` would be shuffled and cut by `oneshot`. "seconds" is `oneshot`
alone: imports, loading and saving are apart.
"""

from __future__ import annotations

import time

import peer
import torch
from llmcompressor import __version__ as version
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    asked = peer.parser().parse_args()
    samples = peer.samples(asked.tokens)
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
    used = (
        f"damp {gptq.dampening_frac}, block {gptq.block_size}, act-order {args.actorder.value}, "
        f"observer {args.observer}, {model.dtype}, {torch.get_num_threads()} threads"
    )
    peer.say(f"llm-compressor {version}", used, began, loaded, solved, saved)


if __name__ == "__main__":
    main()
