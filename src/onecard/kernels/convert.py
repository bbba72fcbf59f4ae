"""Matrix in, Weight out: the native kernel where it is built and the input suits it, else the reference.

The native kernel rounds and packs in one pass over memory and gives the reference's bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onecard.core.format import Format, Weight, words
from onecard.kernels import cpu, reference


def round_to_nearest(w: Tensor, format: Format) -> Weight:
    """w [out, in] (fp32, fp16 or bf16) rounded to the nearest grid points of an integer format."""
    if not cpu.available() or w.device.type != "cpu" or not w.is_contiguous():
        return reference.round_to_nearest(w, format)
    rows, columns = w.shape
    groups = format.groups((rows, columns))
    packed = torch.empty(rows, words(columns, format.bits), dtype=torch.int32)
    scale = torch.empty(rows, groups, dtype=reference.DTYPES[format.scale])
    zero = torch.zeros(rows, groups, dtype=torch.int8)
    cpu.round_pack(
        w.data_ptr(), reference.NAMES[w.dtype], rows, columns, format,
        packed.data_ptr(), scale.data_ptr(), zero.data_ptr(), threads=torch.get_num_threads(),
    )  # fmt: skip
    parts = {"weight_packed": packed, "weight_scale": scale,
             "weight_shape": torch.tensor([rows, columns], dtype=torch.int64)}  # fmt: skip
    if format.zero_point:
        parts["weight_zero_point"] = reference.pack(zero.T, format.bits).T.contiguous()
    return Weight(format, (rows, columns), parts)
