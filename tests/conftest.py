"""Where the tests find real data, and small models made on the spot."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["ONECARD_TUNE"] = "off"
torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("ONECARD_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture
def data() -> Path:
    """The folder of real data; tests that need it are skipped, with a message, where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA}: set ONECARD_DATA to its folder")
    return DATA


@pytest.fixture
def stories(data: Path) -> Path:
    """A trained Llama of 264 k parameters."""
    return data / "stories260K"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """Measurements are made up: a weight takes as long as it has bytes, whatever the cache."""
    from onecard import cost
    from onecard.kernels import cpu, layout, rates
    from onecard.kernels.rates import Form

    asked: list[str] = []

    def elsewhere(module: str, seconds: float, *arguments: str) -> Any:
        asked.append(module)
        if module == "onecard.cost":
            return {
                "layer": 8e-6,
                "step": 1e-6,
                "choice": 1e-9,
                "decode": 1.1,
                "prompt": 1.2,
                "program": 10_000_000,
                "keeps": 2.0,
            }
        if module == "onecard.kernels.cpu":
            return cpu.cpu_facts().to_dict()
        made: list[Any] = []
        for kind, *values in json.loads(arguments[0])[1]:
            if kind == "heads":
                made.append([2e-8, 1e-8, 1e-7, 1e-9])
                continue
            matrix = Form(*values).matrix(1024, 1024)
            each = layout.size(matrix) / 1024**2 * 1e-10
            made.append([[[each * n for n in rates.ROWS]] * 3, each])
        return made

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu, "elsewhere", elsewhere)
    cost.measured.cache_clear()
    yield asked
    cost.measured.cache_clear()


def make_tokenizer(folder: Path, size: int = 300) -> None:
    """A byte-level tokenizer with `<|endoftext|>` as 0, trained on a little English."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>",
              "tokenizer_class": "PreTrainedTokenizerFast"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


TEXT = (
    "The quick brown fox jumps over the lazy dog while seven wizards quietly mix a potion. "
    "Numbers such as 12, 345 and 6789 appear now and then, and so do words like memory, matrix, "
    "model and measure. Nothing here is remarkable; it is text, and it is enough. "
) * 40


def make_llama(folder: Path, dtype: str = "bfloat16", seed: int = 0, **more: object) -> Path:
    """A random Llama of awkward depth with rows that groups of 128, 64 and 32 divide, and a tokenizer."""
    settings = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 256,
                "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
                "max_position_embeddings": 256, "tie_word_embeddings": True,
                "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
    import transformers

    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **more}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bf16 Llama folder. Tests must not change it."""
    return make_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """English text of about a thousand tokens for the tiny model."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    ignored = shutil.ignore_patterns(".onecard")  # the engine's, from whatever ran it before
    return Path(shutil.copytree(tiny, tmp_path / "model", ignore=ignored))


def call(*words: object) -> int:
    """Run the command line in this process; its exit code."""
    from onecard.cli import main

    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return int(end.value.code or 0)
