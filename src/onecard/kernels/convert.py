"""Matrix in, Weight out, and back: the native kernel where it is built and the input suits it, else
the reference. Both give the same bits.

The last two functions are the native inner loops of rounding, whose plain versions of the same
signature lie in passes/columns.py. They want the library and float32 on the CPU (`native`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from onecard.core.errors import FailedWork
from onecard.core.format import Integers, Weight, words
from onecard.kernels import cpu, reference, storage

SHRINK = 0.5  # the smallest range that search_grid tries, as a share of the whole one


def native(*tensors: Tensor) -> bool:
    """Whether the native library is there and can read these."""
    return cpu.available() and all(t.device.type == "cpu" for t in tensors)


def round_to_nearest(w: Tensor, format: Integers) -> Weight:
    """w [out, in] (fp32, fp16 or bf16) rounded to the nearest grid points of an integer format.

    Weights that are not finite are a FailedWork of the native kernel; the reference makes scales
    of them that are not finite.
    """
    if not native(w) or not w.is_contiguous():
        return reference.round_to_nearest(w, format)
    rows, columns = w.shape
    groups = format.groups((rows, columns))
    packed = torch.empty(rows, words(columns, format.bits), dtype=torch.int32)
    scale = torch.empty(rows, groups, dtype=reference.DTYPES[format.scale])
    zero = torch.zeros(rows, groups, dtype=torch.int8)
    not_finite = cpu.round_pack(
        w.data_ptr(), reference.NAMES[w.dtype], rows, columns, format,
        packed.data_ptr(), scale.data_ptr(), zero.data_ptr(), threads=torch.get_num_threads(),
    )  # fmt: skip
    if not_finite:
        raise FailedWork(
            f"{not_finite} of {w.numel()} weights [{rows}, {columns}] are NaN or infinite",
            do="check the checkpoint, or the pass that wrote these weights",
        )
    return _weight(packed, scale, zero, (rows, columns), format)


def hold(q: Tensor, scale: Tensor, zero: Tensor, format: Integers) -> Weight:
    """Codes [rows, columns], scale and zero point [rows, groups] -> the stored Weight."""
    if not native(q):
        return reference.hold(q, scale, zero, format)
    rows, columns = q.shape
    q = q.to(torch.int8).contiguous()
    packed = torch.empty(rows, words(columns, format.bits), dtype=torch.int32)
    threads = torch.get_num_threads()
    cpu.pack(q.data_ptr(), rows, columns, format.bits, packed.data_ptr(), threads)
    stored = scale.to(reference.DTYPES[format.scale])
    return _weight(packed, stored, zero, (rows, columns), format)


def _weight(
    packed: Tensor, scale: Tensor, zero: Tensor, shape: tuple[int, int], format: Integers
) -> Weight:
    parts = {
        "weight_packed": packed,
        "weight_scale": scale,
        "weight_shape": torch.tensor(shape, dtype=torch.int64),
    }
    if format.zero_point:
        parts["weight_zero_point"] = reference.pack(zero.T, format.bits).T.contiguous()
    return Weight(format, shape, parts)


def to_dense(weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix [out, in] that a Weight stands for."""
    format, (rows, columns) = weight.format, weight.shape
    name = reference.NAMES[dtype]
    suits = isinstance(format, Integers) and name in ("fp32", "fp16", "bf16")
    if not suits or not native(*weight.parts.values()):
        return storage.to_dense(weight, dtype)
    assert isinstance(format, Integers)
    packed = weight.parts["weight_packed"].contiguous()
    scale = weight.parts["weight_scale"].contiguous()
    zero = None
    if format.zero_point:
        along = weight.parts["weight_zero_point"].T.contiguous()
        zero = reference.unpack(along, format.bits, rows).T.contiguous()
    out = torch.empty(rows, columns, dtype=dtype)
    cpu.to_dense(
        packed.data_ptr(), scale.data_ptr(), reference.NAMES[scale.dtype],
        None if zero is None else zero.data_ptr(), rows, columns, format,
        out.data_ptr(), name, torch.get_num_threads(),
    )  # fmt: skip
    return out


# GPTQ --------------------------------------------------------------------------------------------


def round_columns(
    target: Tensor, carried: Tensor, r: Tensor, scale: Tensor, zero: Tensor, keep: Tensor | None,
    format: Integers,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Errors [block, rows], codes int8 [block, rows] and loss [rows] of one block of columns."""
    block, rows = target.shape
    target, carried, r = target.contiguous(), carried.contiguous(), r.contiguous()
    scale, zero = scale.contiguous(), zero.contiguous()
    mask = None if keep is None else keep.contiguous()
    errors, loss = torch.empty(block, rows), torch.zeros(rows)
    codes = torch.empty(block, rows, dtype=torch.int8)
    cpu.round_columns(
        target.data_ptr(), carried.data_ptr(), r.data_ptr(), scale.data_ptr(), zero.data_ptr(),
        None if mask is None else mask.data_ptr(),
        block, rows, format.bits,
        errors.data_ptr(), codes.data_ptr(), loss.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return errors, codes, loss


def search_grid(w: Tensor, weights: Tensor, format: Integers, steps: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point [rows, groups] of w [rows, in] float32, weights [in]."""
    rows, columns = w.shape
    w, weights = w.contiguous(), weights.contiguous()
    scale = torch.empty(rows, format.groups((rows, columns)))
    zero = torch.empty_like(scale)
    shrink = [1 - SHRINK * i / max(steps, 1) for i in range(steps + 1)]
    cpu.search_grid(
        w.data_ptr(), weights.data_ptr(), rows, columns, format, shrink,
        scale.data_ptr(), zero.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return scale, zero
