"""The embedding and the head in integers: block passes leave them dense, and in small models they are
a quarter of the weights and, once the blocks have four bits, half of the bytes.

A table E [vocabulary, hidden] that is the head too (tied) is read in two ways, and an error d of a row costs

    as embedding   |d|^2                       every direction of the hidden state alike
    as head        d H d^T, H = 2 X^T X / n    X what the head reads: the error of the row's logit

so the table is rounded by GPTQ's column loop under H + mean(diag H) I. A head of its own has H alone, with
the usual damping; an embedding of its own I alone, which is rounding to the grid with the least square error
of each group. Learned positions stay as they are.

Integers are symmetric. It comes behind the passes that round the blocks, and before `distil` if there is
one, which trains everything else around what was rounded. Only onecard reads such a folder, transformers
does not. Memory: the model, H, and codes and errors of the table, 20 bytes per weight. Time: vocabulary *
hidden^2.

Frantar et al., GPTQ, arXiv 2210.17323 (the column loop); Press and Wolf, arXiv 1608.05859 (tied tables).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from onecard.calibrate.stats import HESSIAN, Statistics
from onecard.calibrate.walk import batches
from onecard.core.errors import BadRequest
from onecard.core.format import Format
from onecard.core.report import Row
from onecard.core.spec import Spec
from onecard.kernels import convert
from onecard.kernels.reference import NAMES
from onecard.nn.layers import Matrix
from onecard.nn.model import Model
from onecard.passes.base import Data, ModelPass, check_width
from onecard.passes.gptq import Rounding, refined, solve
from onecard.passes.quantize import AUTO, make_format, require_finite_scale
from onecard.passes.refine import damped


@dataclass(frozen=True)
class Tables(ModelPass):
    """Settings: the grid of both tables, rounds of better scales and codes, and tokens that are looked at."""

    bits: int = 6
    group: int | Literal["auto"] | None = AUTO
    sweeps: int = 1
    tokens: int = 16384

    key: ClassVar[str] = "tables"
    title: ClassVar[str] = "rounded embedding and head"
    paper: ClassVar[str] = "Frantar et al., GPTQ, arXiv 2210.17323"
    takes_packed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        make_format(self.bits, self.group, False, 128)
        if not 0 <= self.sweeps <= 100 or not 1 <= self.tokens <= 1 << 24:
            raise BadRequest(
                f"tables: sweeps {self.sweeps} or tokens {self.tokens} is out of range",
                do="0 to 100 sweeps; 1 to 16777216 tokens",
            )

    @property
    def quantizes(self) -> bool:
        return True

    def table_for(self, spec: Spec) -> Format | None:
        return make_format(self.bits, self.group, False, spec.embed_size)

    def check(self, spec: Spec) -> None:
        check_width(make_format(self.bits, self.group, False, spec.embed_size), spec.embed_size)

    def model_bytes(self, spec: Spec, ids: Tensor | None) -> int:
        table, hidden = spec.vocab_size * spec.embed_size, 8 * 4 * 2048 * spec.hidden
        return 20 * table + 16 * spec.embed_size**2 + hidden

    def model(self, model: Model, data: Data) -> tuple[Model, list[Row]]:
        embedding, head = model.network.stem.embedding, model.network.tail.head
        assert data.ids is not None
        rows = []
        hessian = head_hessian(model, data.ids, self.tokens)
        if model.spec.tied:
            both = hessian + torch.eye(len(hessian)) * hessian.diagonal().mean()
            rows += self.rounded("stem.embedding", embedding, both)
            model.network.tie()
        else:
            rows += self.rounded("stem.embedding", embedding, torch.eye(embedding.shape[1]))
            rows += self.rounded("tail.head", head, damped(hessian, 0.01))
        return model, rows

    def rounded(self, where: str, matrix: Matrix, hessian: Tensor) -> list[Row]:
        """A table replaced by integers under H [hidden, hidden], and what that lost."""
        w, stored = matrix.matrix(), matrix.held().parts["weight"].dtype
        format = make_format(self.bits, self.group, False, w.shape[1]).scaled(NAMES[stored])
        solution = solve(w, hessian, format, Rounding(damp=0.0))
        for _ in range(self.sweeps):
            solution = refined(w, solution, hessian, format)
        require_finite_scale(solution.scale, format, where)
        matrix.replace(convert.hold(solution.codes, solution.scale, solution.zero, format))
        lost, power = solution.loss.sum(), torch.linalg.vecdot(w @ hessian, w).sum()
        return [
            Row(where, "format", format.name),
            Row(where, "relative_output_error", float(lost / power.clamp(min=1e-30))),
        ]


@torch.no_grad()
def head_hessian(model: Model, ids: Tensor, tokens: int) -> Tensor:
    """2 X^T X / n of what the head reads, over about so many tokens."""
    network = model.network
    stats = Statistics(model.spec.embed_size, frozenset({HESSIAN}))
    for batch in batches(ids[: max(1, tokens // ids.shape[1])]):
        h, context = network.start(batch)
        for block in network.blocks:
            h = block(h, context)
        stats.add(network.tail.read(h))
    return stats.hessian
