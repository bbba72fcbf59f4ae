"""Our own row of the comparison: rounds the checkpoint to int4 and lets `onecard bench --serve` answer.

python cpu_onecard.py prepare CHECKPOINT MODEL --group 32
python cpu_onecard.py serve MODEL --threads 2
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from onecard.checkpoint.shards import Checkpoint, read_json


def prepare(checkpoint: Path, model: Path, group: int) -> None:
    recipe = "rtn-int4"  # groups of 128, or the largest that divides
    if group != 128:
        recipe = str(model.with_name(f"{model.name}.yaml"))
        Path(recipe).write_text(f"passes: [{{rtn: {{bits: 4, group: {group}}}}}]\n")
    command = ["compress", str(checkpoint), str(model), "--recipe", recipe, "--force"]
    subprocess.run([sys.executable, "-m", "onecard", *command], check=True)
    run = ["run", str(model), "a", "--max-tokens", "1"]  # lays the weights out
    subprocess.run([sys.executable, "-m", "onecard", *run], check=True)
    laid = next((model / ".onecard").glob("*.weights")).stat().st_size
    config = read_json(checkpoint / "config.json")
    embedding = config["vocab_size"] * config["hidden_size"]
    weights = Checkpoint(checkpoint).nbytes // 2  # stored as bf16
    tied = config.get("tie_word_embeddings", False)
    facts = {
        "bytes": laid,
        "bits_per_weight": 8 * laid / (weights if tied else weights - embedding),
        "weights": f"int4 g{group}, head int8 g32; embedding bf16, apart",
    }
    (model / "prepared.json").write_text(json.dumps(facts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verb", choices=("prepare", "serve"))
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    if given.verb == "prepare":
        prepare(given.folders[0], given.folders[1], given.group)
        return
    options = ["--serve", "--threads", str(given.threads)]
    command = [sys.executable, "-m", "onecard", "bench", str(given.folders[0]), *options]
    raise SystemExit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
