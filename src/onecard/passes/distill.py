"""Distillation: a student learns what a teacher says, and how it comes to say it.

    loss = soft T^2 KL + hard (next token) + hidden sum_l ||P_l h_l - g_l||^2 / ||g_l||^2
         + attention KL(A) + relations KL(Q, K, V relations) + relational (distances + 2 angles)

(calibrate/losses.py has the formulas.) Layer l of S looks at layer ceil((l + 1) L / S) - 1 of the teacher's
L for hidden states; attention and relations at the last of both, as MiniLM does; relational losses at the
last hidden states of a few positions. A projection P_l stands between different widths and is thrown away.

As a pass it distils the original model back into what the passes before made of it: zeros and integers
stay what they are. Into a model of another Spec distils `onecard distill` (passes/student.py).

Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from onecard.calibrate import losses
from onecard.calibrate.forward import Seen, forward
from onecard.calibrate.grids import grid_of
from onecard.calibrate.latent import trainable
from onecard.calibrate.losses import check_loss
from onecard.calibrate.train import Course, Training, computes_bf16, train
from onecard.core.errors import BadRequest
from onecard.core.report import Row
from onecard.core.spec import Spec
from onecard.kernels.reference import causal_mask
from onecard.nn.model import Model
from onecard.passes.base import Data, ModelPass
from onecard.passes.recover import check_length, check_windows, learned_from, training_bytes

SAMPLES = 24
"""Positions of a batch that relational losses compare with each other."""


@dataclass(frozen=True)
class Targets:
    """What is learned from a teacher, each with its weight in the loss; 0 is off."""

    soft: float = 1.0
    hard: float = 0.0
    hidden: float = 0.0
    attention: float = 0.0
    relations: float = 0.0
    relational: float = 0.0
    temperature: float = 1.0
    direction: Literal["forward", "reverse"] = "forward"

    def __post_init__(self) -> None:
        weights = [getattr(self, f.name) for f in fields(self)[:6]]
        if not any(weights):
            raise BadRequest("distillation needs at least one target with a weight above 0",
                             do="soft: 1.0 learns what the teacher says")  # fmt: skip
        check_loss(*weights, temperature=self.temperature)


def check_pair(student: Spec, teacher: Spec, targets: Targets) -> None:
    """BadRequest where this student cannot learn these targets from this teacher."""
    if student.vocab_size != teacher.vocab_size:
        raise BadRequest(
            "teacher and student have different vocabularies",
            f"{teacher.vocab_size} and {student.vocab_size} tokens",
            "the student needs the teacher's tokenizer",
        )
    a, b = student.layers[-1].attention, teacher.layers[-1].attention
    if targets.attention and a.num_heads != b.num_heads:
        raise BadRequest(
            f"attention of {b.num_heads} heads cannot be learned by {a.num_heads}",
            do="use relations, which cut both sides into as many heads",
        )


def relation_heads(student: Spec, teacher: Spec) -> dict[str, int]:
    """Into how many heads queries, keys and values of the last layers are cut on both sides."""
    a, b = student.layers[-1].attention, teacher.layers[-1].attention
    wide = math.gcd(a.num_heads * a.head_dim, b.num_heads * b.head_dim)
    narrow = math.gcd(a.num_kv_heads * a.head_dim, b.num_kv_heads * b.head_dim)
    return {"q": math.gcd(wide, b.num_heads), "kv": math.gcd(narrow, b.num_kv_heads)}


def counterpart(layer: int, layers: int, of: int) -> int:
    """The teacher's layer, of `of`, that a student's layer of `layers` looks at: the last at the last."""
    return -(-(layer + 1) * of // layers) - 1


class Distillation(nn.Module):
    """The loss of a student against a teacher. Its parameters are the projections."""

    def __init__(
        self, student: Model, teacher: Model, targets: Targets, training: Training
    ) -> None:
        super().__init__()
        check_pair(student.spec, teacher.spec, targets)
        self.targets, self.checkpointing = targets, training.checkpointing
        self.specs = student.spec, teacher.spec
        bf16 = computes_bf16(training.dtype, teacher.parameters)
        teacher.network.to(torch.bfloat16 if bf16 else torch.float32)
        self.networks = student.network, teacher.network
        count, of = student.spec.num_layers, teacher.spec.num_layers
        self.pairs = {i: counterpart(i, count, of) for i in range(count)} if targets.hidden else {}
        widths = student.spec.hidden, teacher.spec.hidden
        generator = torch.Generator().manual_seed(training.seed)
        made = torch.randn(len(self.pairs), widths[1], widths[0], generator=generator)
        made = made / math.sqrt(widths[0]) if widths[0] != widths[1] else made[:0]
        self.projections = nn.ParameterList(list(made))

    def forward(self, ids: Tensor) -> Tensor:
        """The loss of windows of ids [B, T]."""
        t = self.targets
        last = bool(t.attention or t.relations)
        ends = [spec.num_layers - 1 for spec in self.specs]
        wanted = [set(self.pairs), set(self.pairs.values())]
        if t.relational:
            wanted = [kept | {end} for kept, end in zip(wanted, ends, strict=True)]
        looks = [{"hidden": kept, "attention": {end} if last else ()}
                 for kept, end in zip(wanted, ends, strict=True)]  # fmt: skip
        with torch.no_grad():
            teacher = forward(self.networks[1], ids, **looks[1])  # type: ignore[arg-type]
        student = forward(self.networks[0], ids, self.checkpointing, **looks[0])  # type: ignore[arg-type]
        loss = torch.zeros(())
        if t.soft:
            said = losses.soft_targets(student.logits, teacher.logits, t.temperature, t.direction)
            loss = loss + t.soft * said
        if t.hard:
            loss = loss + t.hard * losses.next_token(student.logits, ids)
        if t.hidden:
            loss = loss + t.hidden * self._hidden(student, teacher)
        if last:
            loss = loss + self._attention(student, teacher, ids.shape[1])
        if t.relational:
            x, y = (
                sampled(seen.hidden[end])
                for seen, end in zip((student, teacher), ends, strict=True)
            )
            loss = loss + t.relational * (losses.distances(x, y) + 2 * losses.angles(x, y))
        return loss

    def _hidden(self, student: Seen, teacher: Seen) -> Tensor:
        found = []
        for i, other in self.pairs.items():
            h = student.hidden[i]
            if len(self.projections):
                h = h @ self.projections[i].T.to(h.dtype)
            found.append(losses.hidden_states(h, teacher.hidden[other]))
        return torch.stack(found).mean()

    def _attention(self, student: Seen, teacher: Seen, length: int) -> Tensor:
        """Attention maps and relations of the last layers."""
        t, loss = self.targets, torch.zeros(())
        rows = [spec.layers[-1].attention for spec in self.specs]
        sides = [seen.attention[spec.num_layers - 1]
                 for seen, spec in zip((student, teacher), self.specs, strict=True)]  # fmt: skip
        mask = causal_mask(length, length, rows[0].window, torch.device("cpu"))
        if t.attention:
            (q, k, _), (tq, tk, _) = sides
            maps = losses.attention_maps((q, k), (tq, tk), mask, (rows[0].scale, rows[1].scale))
            loss = loss + t.attention * maps
        if t.relations:
            heads = relation_heads(*self.specs)
            for number, part in enumerate(("q", "kv", "kv")):
                x, y = (side[number].transpose(1, 2).flatten(2) for side in sides)  # [B, T, H D]
                loss = loss + t.relations * losses.relations(x, y, heads[part], mask) / 3
        return loss


def sampled(hidden: Tensor) -> Tensor:
    """At most SAMPLES positions [N, C] spread evenly over hidden states [B, T, C]."""
    flat = hidden.flatten(0, 1)
    return flat[torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat))).long()]


@dataclass(frozen=True)
class Distil(ModelPass):
    """Settings: the targets, the rank of a low-rank change (0: everything is trained), the training."""

    targets: Targets = field(default_factory=Targets)
    rank: int = 0
    keep_zeros: bool = False
    training: Training = field(default_factory=Training)

    key: ClassVar[str] = "distil"
    title: ClassVar[str] = "distillation"
    paper: ClassVar[str] = (
        "Hinton et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531"
    )
    takes_packed: ClassVar[bool] = True

    def check(self, spec: Spec) -> None:
        check_length(self.training, spec)
        if not 0 <= self.rank <= spec.hidden:
            raise BadRequest(f"a change of rank {self.rank} in a model {spec.hidden} wide",
                             do=f"a rank from 0 (every weight) to {spec.hidden}")  # fmt: skip

    def beside(self, spec: Spec, original: Spec) -> None:
        check_pair(spec, original, self.targets)

    def reads(self, ids: Tensor) -> str:
        return check_windows(self.training, ids)

    def model_bytes(self, spec: Spec, ids: Tensor | None) -> int:
        return training_bytes(spec, self.training, self.rank, teacher=True)

    def model(self, model: Model, data: Data) -> tuple[Model, list[Row]]:
        if data.original is None:
            raise BadRequest("distillation needs the original model, which is not here",
                             do="give it in Data, or use recover")  # fmt: skip
        course = distil(model, data.original(), learned_from(data, self.training), self, data)
        return model, course.rows(self.key)


def distil(
    student: Model, teacher: Model, ids: Tensor, settings: Distil, data: Data, adopt: bool = False
) -> Course:
    """Train the student in place; it keeps its format."""
    loss = Distillation(student, teacher, settings.targets, settings.training)
    key = {"pass": settings.key, "targets": str(settings.targets), "rank": settings.rank}
    with trainable(student, lambda name, linear: grid_of(linear.held(), settings.keep_zeros), settings.rank,
                   seed=settings.training.seed) as trainee:  # fmt: skip
        own = {f"projection.{i}": p for i, p in enumerate(loss.projections)}
        return train({**trainee.parameters, **own}, loss, ids, settings.training,
                     settle=trainee.settle, folder=data.folder, key=key, adopt=adopt,
                     progress=data.progress)  # fmt: skip
