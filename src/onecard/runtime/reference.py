"""The executor in plain PyTorch: the network as it is, a dense cache per session.

It is the oracle for faster executors and the fallback where there is none. Packed weights would be
unpacked again on every forward, so they are expanded once, to dense in the compute dtype: speed of
a dense model, memory of a dense model. `expand=False` keeps them packed: their memory, much slower,
the same logits. Keys and values of all layers are allocated when a session opens, for exactly the
ids it was opened for. The logits of a prompt's last token alone are computed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np
import torch

from onecard.checkpoint.tokenizer import Tokenizer
from onecard.core.errors import BadRequest, FailedWork, nearest
from onecard.kernels.reference import DTYPES, from_dense
from onecard.nn.layers import Matrix
from onecard.nn.model import Model
from onecard.nn.transformer import Cache, Transformer
from onecard.runtime.sample import Logits
from onecard.runtime.score import Scores, check

COMPUTE = ("fp32", "bf16", "fp16")
POSITIONS = 256
"""Positions whose logits are made at once: a large vocabulary costs no memory."""
SCORED_TOKENS = 2048
"""Tokens that are run together, about."""


class TorchExecutor:
    """A Model on a device, ready to run. The Model itself is left as it was.

    `dtype` is the compute dtype: fp32, bf16, fp16, or None for the model's own. `cache`: keys and values
    are rounded as the native engine would hold them (None: not at all).
    """

    def __init__(
        self, model: Model, device: str = "cpu", dtype: str | None = None, expand: bool = True,
        cache: str | None = None,
    ) -> None:  # fmt: skip
        self.cache = cache
        self.spec = model.spec
        self.vocab_size, self.max_context = model.spec.vocab_size, model.spec.max_context
        self.device = _device(device)
        if dtype is not None and dtype not in COMPUTE:
            raise BadRequest(f"there is no compute dtype {dtype!r}", do=nearest(dtype, COMPUTE))
        self.dtype = DTYPES[dtype] if dtype else model.network.stem.embedding.dtype
        self.network = _placed(model.network, self.device, self.dtype)
        if expand:
            _expand(self.network, self.dtype)

    def open(self, capacity: int) -> TorchSession:
        if not 0 < capacity <= self.max_context:
            raise BadRequest(
                f"a session for {capacity} tokens was asked for",
                do=f"this model's context is {self.max_context}",
            )
        return TorchSession(self, capacity)


class TorchSession:
    """One request: its cache, and the forward that fills it."""

    def __init__(self, executor: TorchExecutor, capacity: int) -> None:
        self.network = executor.network
        self.cache: Cache | None = Cache(
            executor.spec, 1, capacity, executor.dtype, executor.device, executor.cache
        )

    def prefill(self, ids: Sequence[int]) -> Logits:
        return self._forward(list(ids))

    def step(self, id: int) -> Logits:
        return self._forward([id])

    def close(self) -> None:
        self.cache = None

    @torch.inference_mode()
    def _forward(self, ids: list[int]) -> Logits:
        if self.cache is None:
            raise ValueError("the session is closed")
        try:
            tokens = torch.tensor([ids], device=self.cache.valid.device)
            h, context = self.network.start(tokens, None, self.cache)
            for block in self.network.blocks:
                h = block(h, context)
            self.cache.length += len(ids)
            logits: Logits = self.network.tail(h[:, -1:])[0, 0].float().cpu().numpy()
        except torch.OutOfMemoryError as error:
            raise FailedWork(
                f"the device ran out of memory at token {self.cache.length + len(ids)}",
                do="shorten the prompt, ask for fewer tokens, or use a smaller format",
            ) from error
        return logits.astype(np.float32, copy=False)


class TorchScorer:
    """The network of a Model as a Scorer (score.py), on the device where it lies; `cache` as above."""

    def __init__(self, model: Model, cache: str | None = None) -> None:
        assert isinstance(model.tokenizer, Tokenizer)
        self.cache = cache
        self.network, self.tokenizer = model.network, model.tokenizer
        self.vocab_size, self.max_context = model.spec.vocab_size, model.spec.max_context

    def scores(
        self,
        contexts: Sequence[Sequence[int]],
        firsts: Sequence[int],
        reference: Self | None = None,
    ) -> Iterator[tuple[int, Scores]]:
        check(self, contexts, firsts)
        if reference is not None:
            check(reference, contexts, firsts)
        for group in _alike(contexts):
            yield from self._scores(group, contexts, firsts, reference)

    @torch.no_grad()
    def _scores(
        self, group: list[int], contexts: Sequence[Sequence[int]], firsts: Sequence[int],
        reference: Self | None,
    ) -> Iterator[tuple[int, Scores]]:  # fmt: skip
        device = next(self.network.parameters()).device
        ids = torch.tensor([list(contexts[i]) for i in group], device=device)  # [B, T]
        h = self._hidden(ids)
        theirs = None if reference is None else reference._hidden(ids)
        for start in range(min(firsts[i] for i in group), ids.shape[1], POSITIONS):
            end = min(start + POSITIONS, ids.shape[1])
            targets = ids[:, start:end]
            logp = torch.log_softmax(self.network.tail(h[:, start - 1 : end - 1]).float(), -1)
            nats = -logp.gather(-1, targets[..., None])[..., 0]
            top = logp.argmax(-1)
            found = [nats.double(), top == targets]
            if reference is not None and theirs is not None:
                told = reference.network.tail(theirs[:, start - 1 : end - 1])
                wanted = torch.log_softmax(told.float(), -1)
                found += [(wanted.exp() * (wanted - logp)).sum(-1).double()]
                found += [wanted.argmax(-1) == top]
            columns = [each.cpu().numpy() for each in found]
            for row, i in enumerate(group):
                skip = max(0, firsts[i] - start)
                if start + skip < end:
                    yield i, Scores(*(column[row, skip:] for column in columns))

    def _hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """The last hidden states [B, T - 1, hidden]; the last id is not read."""
        cache = None
        if self.cache is not None:
            batch, count = ids[:, :-1].shape
            dtype = self.network.stem.embedding.dtype
            cache = Cache(self.network.spec, batch, count, dtype, ids.device, self.cache)
        h, context = self.network.start(ids[:, :-1], None, cache)
        for block in self.network.blocks:
            h = block(h, context)
        return h


def _alike(contexts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Neighbours of equal length, about SCORED_TOKENS tokens together."""
    group: list[int] = []
    for i, context in enumerate(contexts):
        if len(context) < 2:
            continue
        other = bool(group) and len(contexts[group[0]]) != len(context)
        if group and (other or (len(group) + 1) * len(context) > SCORED_TOKENS):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadRequest(f"there is no device {name!r}", do="cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise BadRequest(f"the device {name!r} is not supported", do="cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadRequest(
            f"the device {name!r} was asked for", f"{torch.cuda.device_count()} GPUs are seen"
        )
    return device


def _placed(network: Transformer, device: torch.device, dtype: torch.dtype) -> Transformer:
    """A copy of the network's modules; weights are shared where they need not move or change."""
    moved: dict[int, object] = {}
    for parameter in network.parameters():
        tensor = parameter.detach().to(device, dtype)
        moved[id(parameter)] = torch.nn.Parameter(tensor, requires_grad=False)
    for buffer in network.buffers():
        moved[id(buffer)] = buffer.to(device)
    placed = copy.deepcopy(network, moved).eval()
    placed.stem.embedding.compute = dtype
    return placed


def _expand(network: Transformer, dtype: torch.dtype) -> None:
    for module in network.modules():
        if isinstance(module, Matrix) and not module.format.dense:
            module.replace(from_dense(module.matrix(dtype)))
