"""llm-compressor on one model for quality.py: GPTQ or AWQ, in that peer's own environment.

    python quality_llmcompressor.py MODEL TOKENS.json OUT --bits 4 --group 64 [--method awq]

GPTQ is the library's default as in gptq_llmcompressor.py: symmetric. AWQ is its usual recipe: scales found on
the data, then asymmetric rounding; it asks for pinned memory, which there is none of without an accelerator,
so that is left out. The library itself decompresses what it saved.
"""

from __future__ import annotations

import time
from pathlib import Path

import dense
import peer
import torch
from llmcompressor import __version__ as version
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from perplexity import load
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    words = peer.parser()
    words.add_argument("--method", choices=("gptq", "awq"), default="gptq")
    asked = words.parse_args()
    batches = [{"input_ids": torch.tensor(s), "attention_mask": torch.ones(len(s), dtype=torch.long)}
               for s in peer.samples(asked.tokens)]  # fmt: skip
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=asked.dtype)
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    loaded = time.perf_counter()
    weights = {"num_bits": asked.bits, "type": "int", "strategy": "channel"}
    if asked.group:
        weights |= {"strategy": "group", "group_size": asked.group}
    weights["symmetric"] = asked.method == "gptq"
    how = {
        "config_groups": {"all": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    recipe = [GPTQModifier(**how)]
    if asked.method == "awq":
        if not torch.accelerator.is_available():
            IntermediatesCache.pin_memory = lambda *_: None
        recipe = [AWQModifier(), QuantizationModifier(**how)]
    oneshot(
        model=model, processor=tokenizer, dataset=DataLoader(batches, batch_size=1), recipe=recipe
    )
    solved = time.perf_counter()
    packed = Path(asked.out).with_name(f"{Path(asked.out).name}-packed")
    model.save_pretrained(packed, save_compressed=True)
    dense.write_module(Path(asked.model), Path(asked.out), load(str(packed)))
    saved = time.perf_counter()
    used = f"{asked.method}, {'symmetric' if weights['symmetric'] else 'asymmetric'}, {model.dtype}"
    peer.say(f"llm-compressor {version}", used, began, loaded, solved, saved,
             bytes=dense.stored(packed, Path(asked.model)))  # fmt: skip


if __name__ == "__main__":
    main()
