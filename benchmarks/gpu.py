"""The GPU tests and a short benchmark of the reference executor on CUDA; says so where there is no GPU.

    python benchmarks/gpu.py

Numbers go to results/gpu-NAME.json: prompt and decode speed of the shipped model on the card and on the
CPU, interleaved.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from onecard.checkpoint.hub import SHIPPED
from onecard.checkpoint.load import load_model
from onecard.runtime.engine import complete
from onecard.runtime.reference import TorchExecutor
from onecard.runtime.sample import Sampling

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 5


def main() -> None:
    if not torch.cuda.is_available():
        print("no CUDA device here: the GPU tests and the GPU benchmark were not run")
        return
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu"], cwd=ROOT, check=True)
    model = load_model(SHIPPED)
    executors = {device: TorchExecutor(model, device) for device in ("cuda", "cpu")}
    prompt = list(range(5, 261))
    speeds: dict[str, list[float]] = {
        f"{d}_{p}": [] for d in executors for p in ("prompt", "decode")
    }
    for _ in range(ROUNDS):
        for device, executor in executors.items():
            found = complete(executor, model.tokenizer, prompt, Sampling(64, ignore_eos=True))
            speeds[f"{device}_prompt"].append(found.prompt_tokens_per_second)
            speeds[f"{device}_decode"].append(found.decode_tokens_per_second or 0.0)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    name = torch.cuda.get_device_name(0)
    print(name, *(f"{key}: {value:.0f} tokens/s" for key, value in medians.items()), sep="\n")
    target = ROOT / "results" / f"gpu-{name.lower().replace(' ', '-')}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"device": name, "torch": torch.__version__, **medians}, indent=1))


if __name__ == "__main__":
    main()
