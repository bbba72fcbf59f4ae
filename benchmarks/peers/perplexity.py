"""One evaluator for every result: runs inside llm-compressor's environment, started by gptq.py.

    python perplexity.py tokens MODEL SOURCE OUT.json --length 512 [--samples 16]   windows of ids
    python perplexity.py score FOLDER WINDOWS.json                              mean nats per token

`score` loads the folder with transformers, a compressed-tensors one too, whoever wrote it: its weights
are decompressed by the compressed-tensors library itself, in float32, so 3 bits run where no kernel
exists. Windows do not overlap, nothing is put before them, and every token but a window's first is
predicted.

The last line printed is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig


def cut(model: str, source: Path, out: Path, length: int, samples: int | None) -> dict[str, int]:
    """Whole windows of the text, or `samples` of them spread evenly over it. Ids are windows already."""
    if source.suffix == ".npy":
        windows = np.load(source).tolist()
    elif source.suffix == ".json":
        windows = json.loads(source.read_text())
    else:
        text = source.read_text(encoding="utf-8")
        encoded = AutoTokenizer.from_pretrained(model)(
            text, add_special_tokens=False, verbose=False
        )
        ids = encoded["input_ids"]
        windows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    if samples and samples < len(windows):
        windows = [windows[i * len(windows) // samples] for i in range(samples)]
    out.write_text(json.dumps(windows))
    return {"windows": len(windows), "tokens": len(windows) * length}


def load(folder: str) -> torch.nn.Module:
    config = AutoConfig.from_pretrained(folder)
    packed = getattr(config, "quantization_config", None) is not None
    how = {"quantization_config": CompressedTensorsConfig(run_compressed=False)} if packed else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()


@torch.inference_mode()
def score(folder: str, windows: Path) -> dict[str, float]:
    model = load(folder)
    total, count = 0.0, 0
    for window in json.loads(windows.read_text()):
        ids = torch.tensor([window])
        logits = model(ids).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += len(window) - 1
    nats = total / count
    return {"nats_per_token": nats, "perplexity": math.exp(nats), "predicted": count}


def main() -> None:
    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers(dest="verb", required=True)
    tokens = verbs.add_parser("tokens")
    tokens.add_argument("model")
    tokens.add_argument("source", type=Path)
    tokens.add_argument("out", type=Path)
    tokens.add_argument("--length", type=int, required=True)
    tokens.add_argument("--samples", type=int)
    scoring = verbs.add_parser("score")
    scoring.add_argument("folder")
    scoring.add_argument("windows", type=Path)
    asked = parser.parse_args()
    if asked.verb == "tokens":
        found = cut(asked.model, asked.source, asked.out, asked.length, asked.samples)
    else:
        found = score(asked.folder, asked.windows)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
