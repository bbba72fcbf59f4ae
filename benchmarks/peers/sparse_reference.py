"""Wanda and SparseGPT as their papers write them down, in plain torch on transformers' own network.

    python sparse_reference.py MODEL TOKENS.json OUT --method wanda|sparsegpt [--pattern 2:4]

Half of the weights of every linear of the blocks, or 2 of every 4, become zero. As in the authors' code, the
inputs of all linears of a block are those of the block before it is pruned, and what the pruned block gives
goes into the next one; X [in, tokens] are the inputs of a linear.

    Wanda       S_ij = |W_ij| |X_j|_2; of every row the smallest half, or of every 4 neighbours the smallest 2
    SparseGPT   H = X X^T + damp mean(diag), damp 0.01; U upper triangular with H^-1 = U^T U. Blocks of 128
                columns: the mask takes the smallest w_j^2 / U_jj^2 of the block (of every 4 columns for 2:4);
                then column by column e = (w_j - q_j) / U_jj, and all later columns lose e U_j

Sun et al., Wanda, arXiv 2306.11695; Frantar and Alistarh, SparseGPT, arXiv 2301.00774.
"""

from __future__ import annotations

import time
from pathlib import Path

import dense
import peer
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

BLOCK = 128


def wanda(w: Tensor, gram: Tensor, pattern: tuple[int, int] | None) -> Tensor:
    """w [out, in] with zeros; gram = X X^T."""
    score = w.abs() * gram.diagonal().sqrt()
    if pattern:
        kept, of = pattern
        groups = score.unflatten(1, (-1, of))
        gone = torch.zeros_like(groups, dtype=torch.bool)
        gone.scatter_(2, groups.argsort(2)[..., : of - kept], True)
        gone = gone.flatten(1)
    else:
        gone = torch.zeros_like(w, dtype=torch.bool)
        gone.scatter_(1, score.argsort(1)[:, : w.shape[1] // 2], True)
    return w.masked_fill(gone, 0.0)


def sparsegpt(w: Tensor, gram: Tensor, pattern: tuple[int, int] | None) -> Tensor:
    """w [out, in] with zeros, the others making good for them."""
    w, h = w.clone(), gram.clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(0.01 * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for start in range(0, w.shape[1], BLOCK):
        end = min(start + BLOCK, w.shape[1])
        own, u = w[:, start:end].clone(), upper[start:end, start:end]
        errors = torch.zeros_like(own)
        gone = torch.zeros_like(own, dtype=torch.bool)
        if not pattern:
            score = own.square() / u.diagonal().square()
            gone = score <= score.flatten().sort().values[score.numel() // 2]
        for j in range(end - start):
            if pattern and j % pattern[1] == 0:
                kept, of = pattern
                score = own[:, j : j + of].square() / u.diagonal()[j : j + of].square()
                gone.scatter_(1, j + score.argsort(1)[:, : of - kept], True)
            q = own[:, j].masked_fill(gone[:, j], 0.0)
            error = (own[:, j] - q) / u[j, j]
            own[:, j:] -= error[:, None] * u[j, j:]
            own[:, j] = q
            errors[:, j] = error
        w[:, start:end] = own
        w[:, end:] -= errors @ upper[start:end, end:]
    return w


METHODS = {"wanda": wanda, "sparsegpt": sparsegpt}


@torch.no_grad()
def prune(model: nn.Module, ids: Tensor, method: str, pattern: tuple[int, int] | None) -> None:
    """Every linear of the blocks, block after block."""
    body = model.model
    hidden = [body.embed_tokens(row) for row in ids.split(4)]
    positions = torch.arange(ids.shape[1])[None]
    angles = body.rotary_emb(hidden[0], positions)

    def through(layer: nn.Module) -> list[Tensor]:
        made = (layer(h, position_embeddings=angles, position_ids=positions) for h in hidden)
        return [out[0] if isinstance(out, tuple) else out for out in made]

    for layer in body.layers:
        linears = [m for m in layer.modules() if isinstance(m, nn.Linear)]
        grams = {m: torch.zeros(m.in_features, m.in_features) for m in linears}

        def see(module: nn.Module, inputs: tuple[Tensor, ...], grams: dict = grams) -> None:
            x = inputs[0].flatten(0, -2)
            grams[module] += x.T @ x

        hooks = [m.register_forward_pre_hook(see) for m in linears]
        through(layer)
        for hook in hooks:
            hook.remove()
        for m in linears:
            m.weight.data = METHODS[method](m.weight.data, grams[m], pattern)
        hidden = through(layer)


def main() -> None:
    words = peer.parser()
    words.add_argument("--method", choices=METHODS, required=True)
    words.add_argument("--pattern")
    asked = words.parse_args()
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32)
    loaded = time.perf_counter()
    kept, _, of = (asked.pattern or "").partition(":")
    pattern = (int(kept), int(of)) if of else None
    prune(model, torch.tensor(peer.samples(asked.tokens)), asked.method, pattern)
    solved = time.perf_counter()
    source = Path(asked.model)
    for parameter in model.parameters():  # as it would be stored
        parameter.data = parameter.data.to(model_dtype(source)).float()
    dense.write_module(source, Path(asked.out), model)
    saved = time.perf_counter()
    peer.say(f"{asked.method} by its paper", asked.pattern or "50 % of every row or block", began,
             loaded, solved, saved)  # fmt: skip


def model_dtype(folder: Path) -> torch.dtype:
    _, _, entries = next(dense.headers(folder))
    return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[
        next(iter(entries.values()))["dtype"]
    ]


if __name__ == "__main__":
    main()
