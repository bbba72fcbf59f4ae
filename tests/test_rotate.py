"""Rotations: orthogonal matrices of any size, and models that do not change when they are rotated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_llama
from test_families import CASES, batch, random_model
from test_walk import SETTINGS, ids_of, same

from onecard.checkpoint.load import load_model
from onecard.checkpoint.save import save_model
from onecard.core.errors import BadRequest
from onecard.kernels.orthogonal import hadamard, orthogonal, paley
from onecard.passes import GPTQ, RoundToNearest
from onecard.passes.base import Pass, Recipe
from onecard.passes.job import compress, prepare
from onecard.passes.plan import Settings
from onecard.passes.rotate import (
    Rotate,
    check_rotatable,
    rotate_block,
    rotate_stem,
    rotate_tail,
    rotation,
)
from onecard.passes.walked import apply

PLAIN = ("llama", "llama-tied-bias", "llama3", "mistral", "qwen2", "qwen3", "phi3", "mixtral",
         "qwen2-moe", "qwen3-moe")  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 20, 24, 28, 36, 44, 48, 56, 60, 64, 88, 128, 768])
def test_hadamard(size: int) -> None:
    h = hadamard(size)
    assert h is not None and h.shape == (size, size) and bool((np.abs(h) == 1).all())
    assert np.array_equal(h @ h.T, size * np.eye(size))


@pytest.mark.parametrize("size", [3, 5, 7, 18, 92, 172, 576, 688])
def test_orthogonal_where_no_hadamard_is_known(size: int) -> None:
    r = orthogonal(size, 3)
    assert np.allclose(r @ r.T, np.eye(size), atol=1e-12)
    assert not np.array_equal(r, orthogonal(size, 4)) or size == 1
    assert np.array_equal(r, orthogonal(size, 3))


def test_sizes_of_real_models_have_a_hadamard() -> None:
    for size in (2048, 4096, 5120, 5632, 8192, 14336, 28672, 3584, 18944):
        small = size // (size & -size)
        assert any(paley(small << k) is not None for k in range(6)), size


def test_an_outlier_is_spread() -> None:
    x = np.zeros(48)
    x[7] = 1.0
    assert np.allclose(np.abs(x @ orthogonal(48, 0)), 48**-0.5)


@pytest.mark.parametrize("case", PLAIN)
@pytest.mark.parametrize("which", ["residual", "values", "both"])
def test_a_rotated_model_is_the_same(case: str, which: str, tmp_path: Path) -> None:
    """Hidden 48 and 6 heads are no powers of two; biases, grouped heads, experts, tied heads."""
    random_model(case).save_pretrained(tmp_path)
    model = load_model(tmp_path, "fp32", tokenizer=False)
    ids, valid = batch()
    network = model.network
    with torch.no_grad():
        before = network(ids, valid)
        size = model.spec.layers[0].attention.head_dim
        r = rotation(48, 0) if which != "values" else None
        u = rotation(size, 1) if which != "residual" else None
        if r is not None:
            check_rotatable(model.spec)
            network.tail.head.weight = torch.nn.Parameter(network.tail.head.matrix().clone())
            rotate_stem(network.stem, r)
            rotate_tail(network.tail, r)
        for block in model.blocks():
            old = block.attention.o.matrix().clone()
            rotate_block(block, r, u)
            assert not torch.allclose(block.attention.o.matrix(), old, atol=1e-3)
        after = network(ids, valid)
    assert (after - before)[valid].abs().max() < 1e-4 * before[valid].abs().max()


@pytest.mark.parametrize("case", ["gpt2", "opt", "neox", "gemma2", "gemma3"])
def test_others_are_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    random_model(case).save_pretrained(tmp_path)
    with pytest.raises(BadRequest, match="norms"):
        check_rotatable(load_model(tmp_path, "fp32", tokenizer=False).spec)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("second", [(), (RoundToNearest(8),), (GPTQ(4, 64),)])
def test_streamed_equals_in_memory(
    tmp_path: Path, text_file: Path, tied: bool, second: tuple[Pass, ...]
) -> None:
    """What is saved is rotated as a whole, and answers as the original did."""
    folder = make_llama(tmp_path / "model", tie_word_embeddings=tied)
    recipe = Recipe("r", (Rotate(), *second))
    compress(prepare(folder, tmp_path / "streamed", recipe, Settings(SETTINGS, text_file, "bf16")))
    model, ids = load_model(folder), ids_of(folder, text_file)
    apply(model, recipe, ids)
    save_model(model, tmp_path / "memory")
    assert same(tmp_path / "streamed", tmp_path / "memory")
    before, after = load_model(folder, "fp32"), load_model(tmp_path / "streamed", "fp32")
    norms = [block.norm_attention_in.weight for block in after.blocks()]  # type: ignore[union-attr]
    assert all(bool((norm == 1).all()) for norm in norms) != tied
    with torch.no_grad():
        wanted = before.network(ids)
        off = (after.network(ids) - wanted).square().mean() / wanted.square().mean()
    assert off < (0.05 if second else 1e-3)


def test_rotation_comes_first_and_tied_heads_are_told(tiny: Path) -> None:
    with pytest.raises(BadRequest, match="put rotation first"):
        Recipe("r", (RoundToNearest(4), Rotate())).check(load_model(tiny).spec)
    with pytest.raises(BadRequest, match="tied"):
        Rotate("always").check(load_model(tiny).spec)
    with pytest.raises(BadRequest, match="neither"):
        Rotate("never", values=False).check(load_model(tiny).spec)


def test_cases_are_families() -> None:
    assert set(PLAIN) <= set(CASES)
