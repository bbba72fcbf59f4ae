"""From MODEL and flags to what runs: the native engine on a processor, or the network in torch.

`opened` reads headers and the tokenizer; weights are laid out or loaded when it is known what for: a
`runner` for so many positions of keys and values, or a `scorer` for contexts of so many. Nothing here
imports torch unless the reference engine is asked for. Flags that the chosen engine does not know are
refused rather than ignored.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from cyclopts import Parameter, Token, convert

from onecard.core.errors import BadRequest, nearest
from onecard.core.report import Value

if TYPE_CHECKING:
    from onecard.checkpoint.source import Source
    from onecard.checkpoint.tokenizer import Tokenizer
    from onecard.nn.model import Model
    from onecard.runtime.cpu import CpuSettings, CpuStepper
    from onecard.runtime.engine import Runner
    from onecard.runtime.score import Scorer


def whole(kind: type, tokens: Sequence[Token]) -> Any:
    """Whole numbers as they were typed: 1.5 is not one, where cyclopts would round it."""
    for token in tokens:
        if not re.fullmatch("[+-]?[0-9]+", token.value):
            raise ValueError(f"{token.value!r} is no whole number")
        if len(token.value.lstrip("+-")) > 18:
            raise ValueError(f"{token.value[:40]} is too large")
    return convert(kind, tokens)


Whole = Annotated[int, Parameter(converter=whole)]
Wholes = Annotated[tuple[int, ...], Parameter(converter=whole)]

DEVICES = ("cpu", "cuda")
CONTEXT = 8192
"""Positions of a conversation, at most, unless --context says otherwise."""
LONGEST = 32768
"""Ids of a text that is read, at most, unless --context says otherwise."""


@Parameter(name="*")
@dataclass(frozen=True)
class Compute:
    """What runs a model."""

    engine: Annotated[
        Literal["auto", "native", "reference"],
        Parameter(help="native kernels, or plain torch (auto: native on a CPU)"),
    ] = "auto"
    device: Annotated[str, Parameter(help="cpu, cuda or cuda:N")] = "cpu"
    dtype: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        Parameter(help="reference engine: what to compute in (auto: as stored, or what is fast)"),
    ] = "auto"


@Parameter(name="*")
@dataclass(frozen=True)
class Native:
    """How the native engine runs it."""

    threads: Annotated[Whole | None, Parameter(help="threads (none: one per usable core)")] = None
    context: Annotated[
        Whole | None, Parameter(help="positions that there is memory for (none: as many as needed)")
    ] = None
    cache: Annotated[
        Literal["fp16", "bf16", "int8", "fp8", "int4"] | None,
        Parameter(
            help="how keys and values are held (none: bf16 with tile units, else fp16; reference "
            "engine: in what it computes in)"
        ),
    ] = None
    head: Annotated[
        Literal["int8", "stored"],
        Parameter(help="a dense head rounded to int8, or as it is stored"),
    ] = "int8"
    exact: Annotated[
        tuple[str, ...],
        Parameter(
            help="linears whose inputs are not rounded to int8, `down,attention.o` say; or all"
        ),
    ] = ()

    def settings(self, context: int | None = None) -> CpuSettings:
        """For so many positions, unless the flags say otherwise."""
        from onecard.core.device import usable_cores
        from onecard.runtime.cpu import CpuSettings

        if self.threads is not None and self.threads > (cores := usable_cores()):
            seen = f"{cores} can run at a time here; more wait for each other"
            print(f"onecard: --threads {self.threads}: {seen}", file=sys.stderr)
        exact = tuple(name for names in self.exact for name in names.split(",") if name)
        positions = context if self.context is None else self.context
        return CpuSettings(threads=self.threads, context=positions, cache=self.cache,
                           head=self.head, exact=exact)  # fmt: skip


USUAL, AS_STORED = Native(), Compute()


def is_native(compute: Compute, native: Native) -> bool:
    """Whether the native engine is meant. BadRequest for flags that do not go together."""
    kind = compute.device.split(":", maxsplit=1)[0]
    if kind not in DEVICES:
        raise BadRequest(
            f"there is no device {compute.device!r}", do=nearest(compute.device, DEVICES)
        )
    chosen = compute.engine == "native" or (compute.engine == "auto" and kind == "cpu")
    if chosen and kind != "cpu":
        raise BadRequest("the native engine runs on a CPU", do="--engine reference, or no --device")
    if chosen and compute.dtype != AS_STORED.dtype:
        raise BadRequest("--dtype is for the reference engine", do="--engine reference")
    for name, value in asdict(native).items():
        if not chosen and name not in ("threads", "cache") and value != getattr(USUAL, name):
            raise BadRequest(f"--{name} is for the native engine", do="--engine native")
    return chosen


def opened(model: str, compute: Compute = AS_STORED, native: Native = USUAL) -> Opened:
    """A model's headers and tokenizer, checked; its weights are read by what is asked of it."""
    if is_native(compute, native):
        return OnCpu(model, native)
    return InTorch(model, compute, native.threads, native.cache)


class Opened(Protocol):
    """A model that can be made to run."""

    tokenizer: Tokenizer

    def runner(self, positions: int | None = None) -> Runner:
        """What generates; with memory for so many ids (None: a conversation)."""

    def scorer(self, longest: int | None = None) -> Scorer:
        """What reads contexts of so many ids (None: of the model's own size)."""

    def facts(self) -> dict[str, Value]:
        """What a number must be read with."""


def _source(model: str) -> Source:
    """A model's headers, checked; tensors that are left out are named on standard error."""
    from onecard.checkpoint.source import Source

    source = Source(model)
    if extra := source.extra:
        names = ", ".join(extra[:3]) + ", ..." * (len(extra) > 3)
        print(f"onecard: {model}: its architecture does not use: {names}", file=sys.stderr)
    return source


class OnCpu:
    """Runs on this processor, without torch."""

    def __init__(self, model: str, flags: Native) -> None:
        self.flags, self.source = flags, _source(model)
        self.tokenizer = self.source.tokenizer()

    def open(self, positions: int) -> CpuStepper:
        from onecard.runtime.cpu import CpuStepper

        positions = min(positions, self.source.spec.max_context)
        return CpuStepper(self.source, self.flags.settings(positions))

    def runner(self, positions: int | None = None) -> Runner:
        from onecard.runtime.scheduler import Engine, Limits

        limits = Limits(chunk=Limits().tokens)  # nobody else waits for the rest of a step
        return Engine(self.open(positions or CONTEXT), self.tokenizer, limits)

    def scorer(self, longest: int | None = None) -> Scorer:
        from onecard.runtime.score import NativeScorer

        return NativeScorer(self.open(longest or LONGEST), self.tokenizer)

    def facts(self) -> dict[str, Value]:
        from onecard.core.device import usable_cores
        from onecard.kernels import cpu
        from onecard.runtime.cpu import usual_cache

        f = self.flags
        inputs = "int8" + (f" but for {','.join(f.exact)}" if f.exact else "")
        if stated := self.source.schemes.inputs() if self.source.schemes else []:
            inputs += f" ({', '.join(stated)} stated{', fp8 run as int8' * _any_fp8(stated)})"
        return {"engine": f"native {cpu.isa()}", "threads": f.threads or usable_cores(),
                "inputs": inputs, "cache": f.cache or usual_cache(), "head": f.head}  # fmt: skip


def _any_fp8(names: list[str]) -> bool:
    return any(name.startswith("fp8") for name in names)


class InTorch:
    """Runs in torch, on a processor or a card."""

    def __init__(
        self, model: str, compute: Compute, threads: int | None, cache: str | None = None
    ) -> None:
        import torch

        self.compute, self.cache = compute, cache
        if compute.device != "cpu" and not torch.cuda.is_available():
            raise BadRequest("no CUDA device is available here", do="--device cpu")
        if threads is not None:
            if threads < 1:
                raise BadRequest(f"threads is {threads}", do="1 or more is possible")
            torch.set_num_threads(threads)
        self.source = _source(model)
        self.tokenizer = self.source.tokenizer()

    def load(self, device: str) -> Model:
        """The model in memory, its result folder verified against its manifest."""
        from onecard.checkpoint.load import compute_dtype, load_model

        dtype: str | None = self.compute.dtype
        if self.compute.device == "cpu":
            dtype = compute_dtype(self.source, self.compute.dtype)
        elif dtype == "auto":
            dtype = None
        return load_model(self.source.folder, dtype, device)

    def runner(self, positions: int | None = None) -> Runner:
        from onecard.runtime.reference import TorchExecutor

        return TorchExecutor(self.load("cpu"), self.compute.device, cache=self.cache)

    def scorer(self, longest: int | None = None) -> Scorer:
        from onecard.runtime.reference import TorchScorer

        return TorchScorer(self.load(self.compute.device), self.cache)

    def facts(self) -> dict[str, Value]:
        about: dict[str, Value] = {"engine": f"reference {self.compute.device}",
                                   "dtype": self.compute.dtype}  # fmt: skip
        return about | ({"cache": self.cache} if self.cache else {})
