"""From MODEL and flags to what runs: the native engine on a processor, or the network in torch.

`opened` reads headers and the tokenizer; weights are laid out or loaded when it is known what for: a
`runner` for so many positions of keys and values, or a `scorer` for contexts of so many. Nothing here
imports torch unless the reference engine is asked for. Flags that the chosen engine does not know are
refused rather than ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

from cyclopts import Parameter

from onecard.checkpoint.tokenizer import Tokenizer
from onecard.core.errors import BadRequest, nearest
from onecard.core.report import Value

if TYPE_CHECKING:
    from onecard.nn.model import Model
    from onecard.runtime.cpu import CpuStepper
    from onecard.runtime.engine import Runner
    from onecard.runtime.score import Scorer

DEVICES = ("cpu", "cuda")
CONTEXT = 8192
"""Positions of a conversation, at most, unless --context says otherwise."""
LONGEST = 32768
"""Ids of a text that is read, at most, unless --context says otherwise."""


@Parameter(name="*")
@dataclass(frozen=True)
class Compute:
    """What runs a model, and how."""

    engine: Annotated[
        Literal["auto", "native", "reference"],
        Parameter(help="native kernels, or plain torch (auto: native on a CPU)"),
    ] = "auto"
    device: Annotated[str, Parameter(help="cpu, cuda or cuda:N")] = "cpu"
    threads: Annotated[int | None, Parameter(help="threads (none: one per usable core)")] = None
    context: Annotated[
        int | None, Parameter(help="native: positions that there is memory for (none: as needed)")
    ] = None
    cache: Annotated[
        Literal["fp16", "bf16", "int8"], Parameter(help="native: how keys and values are held")
    ] = "fp16"
    head: Annotated[
        Literal["int8", "stored"], Parameter(help="native: a dense head rounded, or as stored")
    ] = "int8"
    exact: Annotated[
        tuple[str, ...],
        Parameter(help="native: linears whose inputs are not rounded to int8, such as down; or all"),
    ] = ()
    dtype: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        Parameter(help="reference: what to compute in (auto: as stored)"),
    ] = "auto"

    @property
    def native(self) -> bool:
        """Whether the native engine is meant. BadRequest for flags that do not go together."""
        kind = self.device.split(":", maxsplit=1)[0]
        if kind not in DEVICES:
            raise BadRequest(f"there is no device {self.device!r}", do=nearest(self.device, DEVICES))
        native = self.engine == "native" or (self.engine == "auto" and kind == "cpu")
        if native and kind != "cpu":
            raise BadRequest("the native engine runs on a CPU", do="--engine reference, or no --device")
        usual = Compute()
        for name in ("dtype",) if native else ("context", "cache", "head", "exact"):
            if getattr(self, name) != getattr(usual, name):
                engine, other = ("native", "reference") if native else ("reference", "native")
                raise BadRequest(f"the {engine} engine has no --{name}", do=f"--engine {other}")
        return native


def opened(model: str, compute: Compute) -> Opened:
    """A model's headers and tokenizer, checked; its weights are read by what is asked of it."""
    return Native(model, compute) if compute.native else Reference(model, compute)


class Opened(Protocol):
    """A model that can be made to run."""

    tokenizer: Tokenizer

    def runner(self, positions: int | None = None) -> Runner:
        """What generates; with memory for so many ids (None: a conversation)."""

    def scorer(self, longest: int | None = None) -> Scorer:
        """What reads contexts of so many ids (None: of the model's own size)."""

    def facts(self) -> dict[str, Value]:
        """What a number must be read with."""


class Native:
    """Runs on this processor, without torch."""

    def __init__(self, model: str, compute: Compute) -> None:
        from onecard.checkpoint.source import Source

        self.compute = compute
        self.source = Source(model)
        self.tokenizer = self.source.tokenizer()
        self.stepper: CpuStepper | None = None

    def open(self, positions: int) -> CpuStepper:
        from onecard.runtime.cpu import CpuSettings, CpuStepper

        c = self.compute
        exact = tuple(name for names in c.exact for name in names.split(",") if name)
        context = c.context or min(positions, self.source.spec.max_context)
        settings = CpuSettings(
            threads=c.threads, context=context, cache=c.cache, head=c.head, exact=exact
        )
        self.stepper = CpuStepper(self.source, settings)
        return self.stepper

    def runner(self, positions: int | None = None) -> Runner:
        from onecard.runtime.scheduler import Engine, Limits

        rows = Limits().tokens
        return Engine(
            self.open(CONTEXT if positions is None else positions), self.tokenizer,
            Limits(chunk=rows),
        )  # fmt: skip

    def scorer(self, longest: int | None = None) -> Scorer:
        from onecard.runtime.score import NativeScorer

        return NativeScorer(self.open(longest or LONGEST), self.tokenizer)

    def facts(self) -> dict[str, Value]:
        from onecard.kernels import cpu

        c, threads = self.compute, self.stepper.threads if self.stepper else 0
        inputs = "int8" + (f", but for {','.join(c.exact)}" if c.exact else "")
        return {"engine": f"native {cpu.isa()}", "threads": threads, "inputs": inputs,
                "cache": c.cache, "head": c.head}  # fmt: skip


class Reference:
    """Runs in torch, on a processor or a card."""

    def __init__(self, model: str, compute: Compute) -> None:
        import torch

        from onecard.checkpoint.source import Source

        self.compute = compute
        if compute.device != "cpu" and not torch.cuda.is_available():
            raise BadRequest("no CUDA device is available here", do="--device cpu")
        if compute.threads is not None:
            if compute.threads < 1:
                raise BadRequest(f"threads is {compute.threads}", do="1 or more is possible")
            torch.set_num_threads(compute.threads)
        self.source = Source(model)
        self.tokenizer = self.source.tokenizer()

    def load(self, device: str) -> Model:
        """The model in memory, its result folder verified against its manifest."""
        from onecard.checkpoint.load import load_model

        dtype = None if self.compute.dtype == "auto" else self.compute.dtype
        return load_model(self.source.folder, dtype, device)

    def runner(self, positions: int | None = None) -> Runner:
        from onecard.runtime.reference import TorchExecutor

        return TorchExecutor(self.load("cpu"), self.compute.device)

    def scorer(self, longest: int | None = None) -> Scorer:
        from onecard.runtime.reference import TorchScorer

        return TorchScorer(self.load(self.compute.device))

    def facts(self) -> dict[str, Value]:
        return {"engine": f"reference {self.compute.device}", "dtype": self.compute.dtype}
