"""Products of two matrices in the engine, with and without what they leave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_llama
from test_engine_families import fed_logits
from test_storage import held

from onecard.checkpoint.load import Source, load_model
from onecard.checkpoint.save import save_model
from onecard.core.format import parse_format
from onecard.kernels import cpu, storage
from onecard.runtime.cpu import CpuSettings, CpuStepper

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the native library is not built")

NAMES = ("lowrank24(fp32)", "lowrank32(int8-row)+int4-g32", "lowrank8(bf16)+sparse0.5(int8-g32)",
         "lowrank16(int4-row-zp)+nf4-g32")  # fmt: skip


def made(folder: Path, names: tuple[str, ...]) -> Path:
    """A model whose linears are products of two; every third stays as it is."""
    model = load_model(make_llama(folder / "plain"), tokenizer=False)
    for i, (path, linear) in enumerate(model.linears()):
        if i % 3 != 2 and not path.endswith("head"):
            format = parse_format(names[i % len(names)]).for_row(linear.shape[1])
            format = storage.rescaled(format, linear.weight.dtype)
            linear.replace(held(linear.matrix(), format))
    save_model(model, folder / "out")
    return folder / "out"


@pytest.mark.parametrize("name", NAMES)
def test_products_of_two(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With inputs in float32 they are what torch says; rounded ones are near, to the bit in any company."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    folder = made(tmp_path, (name,))
    ids = torch.arange(2, 22)
    with torch.no_grad():
        wanted = load_model(folder, "fp32", tokenizer=False).network(ids[None])[0].numpy()
    spread = float(wanted.std())

    def logits(cut: tuple[int, ...], threads: int, exact: tuple[str, ...] = ()) -> np.ndarray:
        settings = CpuSettings(threads=threads, rows=32, head="stored", exact=exact)
        return fed_logits(CpuStepper(Source(folder), settings), ids.tolist(), cut)

    exact = logits((20,), 2, ("all",))
    room = 0.1 if "nf4" in name else 2e-3  # what a table's entries lose, and fp16 keys and values
    assert np.abs(exact - wanted).max() < room * spread
    first = logits((20,), 1)
    assert np.abs(first - wanted).max() < 0.2 * spread
    for cut, threads in (((20,), 3), ((1,) * 20, 2), ((7, 1, 9, 3), 2)):
        np.testing.assert_array_equal(logits(cut, threads), first)
    np.testing.assert_array_equal(logits((5, 15), 2, ("all",)), exact)
