"""Scales on a site's inputs: folding them changes nothing, searching them lowers the error; AWQ, HQQ."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_families import CASES, batch, random_model
from test_gptq import output_error, problem
from test_walk import SETTINGS, ids_of, same

from onecard.calibrate.stats import ABSMAX, HESSIAN, MEAN, NORM, Statistics
from onecard.calibrate.walk import Reached, compress_block, walk
from onecard.checkpoint.load import load_model
from onecard.checkpoint.save import save_model
from onecard.core.errors import BadRequest
from onecard.core.format import parse_format
from onecard.core.report import Row
from onecard.core.spec import producer, sites
from onecard.kernels import reference
from onecard.passes import AWQ, GPTQ, HQQ, RoundToNearest, Scale, Smooth
from onecard.passes.awq import clip_grid
from onecard.passes.base import Recipe
from onecard.passes.gptq import Rounding, solve
from onecard.passes.hqq import fit_grid
from onecard.passes.job import Settings, compress, prepare
from onecard.passes.memory import ModelBlocks
from onecard.passes.scales import output_error as traced
from onecard.passes.scales import rounded, search_scale, smooth_scale
from onecard.passes.walked import apply


class Stretch:
    """Divides the inputs of every site that allows it by random numbers from 0.1 to 10."""

    needs = frozenset({HESSIAN, ABSMAX})

    def __init__(self) -> None:
        self.reached: list[str] = []

    def site(self, site: Reached) -> Iterator[Row]:
        if site.made is not None:
            self.reached.append(f"{site.block}.{site.name}")
            count = int(site.made.source.max()) + 1
            generator = torch.Generator().manual_seed(len(self.reached))
            s = torch.exp(torch.empty(count).uniform_(-2.3, 2.3, generator=generator))
            yield site.rescale(site.exact(s))


@pytest.mark.parametrize("case", CASES)
def test_folding_changes_nothing(case: str, tmp_path: Path) -> None:
    """Every site of every family that names a producer, with biases, grouped heads and experts."""
    random_model(case).save_pretrained(tmp_path)
    model = load_model(tmp_path, "fp32", tokenizer=False)
    ids, _ = batch()
    stretch = Stretch()
    with torch.no_grad():
        before = model.network(ids)
        hidden = [model.network.start(ids)[0]]
        walk(ModelBlocks(model), (stretch,), hidden)  # type: ignore[arg-type]
        after = model.network(ids)
    wanted = [f"blocks.{i}.{site.name}" for i, layer in enumerate(model.spec.layers)
              for site in sites(layer) if producer(layer, site.name)]  # fmt: skip
    assert stretch.reached == wanted and wanted
    assert (after - before).abs().max() < 1e-5 * before.abs().max().clamp(min=1)


def test_folding_into_packed_rows_changes_nothing(tiny: Path) -> None:
    """Values and `up` may be rounded already when what reads them is reached; bf16 loses nothing either."""
    model = load_model(tiny, "bf16")
    ids = torch.randint(0, 300, (2, 40))

    class Both(Stretch):
        def site(self, site: Reached) -> Iterator[Row]:
            if site.name.endswith(".out"):
                yield from super().site(site)
            yield from RoundToNearest(4, 32).site(site) if site.name.endswith(".in") else ()

    plain = load_model(tiny, "bf16")
    only_in = type("In", (), {"needs": frozenset({HESSIAN}), "site": lambda self, site: (
        RoundToNearest(4, 32).site(site) if site.name.endswith(".in") else iter(()))})()  # fmt: skip
    with torch.no_grad():
        for m, p in ((model, Both()), (plain, only_in)):
            walk(ModelBlocks(m), (p,), [m.network.start(ids)[0]])  # type: ignore[arg-type]
        assert torch.equal(model.network(ids), plain.network(ids))


def test_what_is_suspended_and_statistics_are_scaled_too(tiny: Path) -> None:
    """The same weights come out suspended and replayed; the statistics are those of the new inputs."""
    model, other = load_model(tiny, "fp32"), load_model(tiny, "fp32")
    ids = torch.randint(0, 300, (3, 40))

    class Checked(Stretch):
        def site(self, site: Reached) -> Iterator[Row]:
            yield from super().site(site)
            if site.inputs:
                fresh = Statistics(site.stats.size, (HESSIAN, NORM, ABSMAX, MEAN))
                for x in site.inputs:
                    fresh.add(x)
                for name in ("hessian", "absmax"):
                    wanted = getattr(fresh, name)
                    got = getattr(site.stats, name)
                    assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-5 * float(wanted.max()))

    with torch.no_grad():
        for m, replay in ((model, False), (other, True)):
            hidden = [m.network.start(ids)[0]]
            walk(ModelBlocks(m), (Checked(),), hidden, replay=replay)  # type: ignore[arg-type]
    for (name, a), (_, b) in zip(model.linears(), other.linears(), strict=True):
        assert torch.allclose(a.matrix(), b.matrix(), rtol=1e-5), name


def test_statistics_divide() -> None:
    x, s = torch.randn(50, 8), torch.rand(8) + 0.5
    both = [Statistics(8, (HESSIAN, NORM, ABSMAX, MEAN)) for _ in range(2)]
    both[0].add(x)
    both[0].divide(s)
    both[1].add(x / s)
    for name in ("hessian", "norm", "absmax", "mean"):
        assert torch.allclose(getattr(both[0], name), getattr(both[1], name), rtol=1e-4)


@pytest.mark.parametrize("recipe", [
    Recipe("awq", (AWQ(4, 64, steps=4, clip=4),)),
    Recipe("scale", (Scale(3, steps=4), GPTQ(3, 32))),
    Recipe("smooth", (Smooth(sites="all"), RoundToNearest(8))),
    Recipe("only", (Smooth(0.7),)),
    Recipe("hqq", (HQQ(3, 32),)),
], ids=lambda r: r.name)  # fmt: skip
def test_streamed_equals_in_memory(
    tiny: Path, text_file: Path, tmp_path: Path, recipe: Recipe
) -> None:
    compress(prepare(tiny, tmp_path / "streamed", recipe, Settings(SETTINGS, text_file, "bf16")))
    model = load_model(tiny)
    apply(model, recipe, ids_of(tiny, text_file))
    save_model(model, tmp_path / "memory")
    assert same(tmp_path / "streamed", tmp_path / "memory")
    plain = load_model(tiny, "fp32")
    ids = ids_of(tiny, text_file)[:2]
    if recipe.name == "only":
        with torch.no_grad():
            made = load_model(tmp_path / "streamed", "fp32")
            off = (made.network(ids) - plain.network(ids)).square().mean()
            assert off < 1e-3 * plain.network(ids).square().mean()


def test_search_lowers_the_output_error() -> None:
    """With outliers in the inputs; without a gain it says so; idle channels keep their scale."""
    w, h = problem(rows=24, columns=128, tokens=600)
    big = torch.ones(128)
    big[::16] = 12.0
    big[5] = 0.0
    h = h * big * big[:, None]
    format = parse_format("int3-g64")
    own = torch.arange(128)
    s = search_scale(w, h, format, own, lambda s: s, 20)
    assert s is not None and s[5] == 1.0
    before = traced(rounded(w, format) - w, h)
    assert traced(rounded(w * s, format) / s - w, h) < 0.9 * before
    assert search_scale(w, torch.zeros(128, 128), format, own, lambda s: s, 20) is None


def test_copies_of_a_channel_share_its_scale() -> None:
    w, h = problem(rows=8, columns=64)
    source = torch.arange(16).repeat(4)
    big = torch.where(source == 3, 15.0, 1.0)
    s = search_scale(w, h * big * big[:, None], parse_format("int3-g32"), source, lambda s: s, 20)
    assert s is not None and s.shape == (16,) and int(s.argmax()) == 3
    absmax = torch.rand(64)
    smooth = smooth_scale(w, absmax, source, 0.5)
    wanted = absmax.view(4, 16).amax(0) ** 0.5 / w.abs().amax(0).view(4, 16).amax(0) ** 0.5
    assert torch.allclose(smooth, wanted)


def test_clipping_is_the_best_of_its_ranges_group_by_group() -> None:
    """Against the loop over stored inputs that the paper describes."""
    x = torch.randn(400, 64) @ (torch.randn(64, 64) * 0.3 + torch.eye(64))
    w, format = torch.randn(6, 64), parse_format("int3-g32")
    format = type(format)(**{**vars(format), "scale": "fp32"})
    h = 2 * x.T @ x / 400
    scale, _ = clip_grid(w, h, format, 12)
    for row in range(6):
        for g in range(2):
            own = slice(32 * g, 32 * g + 32)
            block = w[row, None, own]
            errors = []
            for i in range(13):
                s, z = reference.grid(block * (1 - 0.5 * i / 12), format)
                q = reference.encode(block, s[..., None], z[..., None], format)
                off = reference.decode(q, s[..., None], z[..., None]) - block
                errors.append((float((x[:, own] @ off[0]).square().mean()), float(s)))
            assert scale[row, g] == pytest.approx(min(errors)[1], rel=1e-5)


def test_awq_without_scales_and_clipping_is_rounding(tiny: Path) -> None:
    """No producer, no range to try: the same codes and scales as round to nearest."""
    w, h = problem(columns=128)
    format = parse_format("int4-g32")
    scale, zero = clip_grid(w, h, format, 0)
    nearest = reference.round_to_nearest(w, format)
    assert torch.equal(scale.to(torch.bfloat16), nearest.parts["weight_scale"]) and not zero.any()


def test_one_statistics_pass_serves_all(tiny: Path) -> None:
    """GPTQ at three widths, AWQ's search, norms for Wanda and a factorization: each block runs once."""
    model = load_model(tiny, "fp32")
    ids = torch.randint(0, 300, (4, 32))
    calls = 0
    for block in model.blocks():

        def counted(*args, run=block.stages):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            return run(*args)

        block.stages = counted  # type: ignore[method-assign]
    served = []

    class All:
        needs = frozenset({HESSIAN})

        def site(self, site: Reached) -> Iterator[Row]:
            w = torch.cat([linear.matrix() for linear in site.linears.values()])
            h = site.stats.hessian
            for bits in (2, 3, 4):
                solve(w, h, parse_format(f"int{bits}-g32"), Rounding())
            own = torch.arange(w.shape[1])
            search_scale(w, h, parse_format("int3-g32"), own, lambda s: s, 3)
            assert torch.allclose(site.stats.norm.square(), h.diagonal() * site.stats.count / 2)
            torch.linalg.svd(w @ torch.linalg.cholesky(h + torch.eye(len(h))))
            served.append(site.name)
            return iter(())

    with torch.no_grad():
        walk(ModelBlocks(model), (All(),), [model.network.start(ids)[0]])  # type: ignore[arg-type]
    assert calls == model.spec.num_layers and len(served) == 4 * model.spec.num_layers


def test_hqq_lowers_its_objective() -> None:
    """Heavy tails: the sum of |r|^p falls, and rises in no group."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(32, 256, generator=generator)
    w *= 1 + 4 * (torch.rand(w.shape, generator=generator) > 0.99)
    for name in ("int3-g64", "int4-g64-zp", "int2-g32-zp"):
        format = parse_format(name)
        blocks = reference.grouped(w, format)
        sums = []
        for rounds in (0, 20):
            scale, zero = fit_grid(w, format, 0.7, rounds)
            q = reference.encode(blocks, scale[..., None], zero[..., None], format)
            r = reference.decode(q, scale[..., None], zero[..., None]) - blocks
            sums.append(r.abs().pow(0.7).sum(-1))
        nearest = reference.to_dense(reference.round_to_nearest(w, format))
        start = (nearest - w).abs().pow(0.7).sum()
        assert float(sums[0].sum()) == pytest.approx(float(start), rel=1e-5)
        assert (
            bool((sums[1] <= sums[0] * (1 + 1e-6)).all()) and sums[1].sum() < 0.99 * sums[0].sum()
        )


def test_hqq_runs_no_block(tiny: Path) -> None:
    model = load_model(tiny)
    block = next(model.blocks())
    assert compress_block(ModelBlocks(model), block, (HQQ(4, 32),), [], []) == []


@pytest.mark.parametrize("make", [
    lambda: AWQ(clip=-1), lambda: Scale(steps=0), lambda: Smooth(1.5), lambda: HQQ(power=0.0),
    lambda: HQQ(rounds=-1), lambda: AWQ(bits=9),
])  # fmt: skip
def test_bad_settings(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BadRequest):
        make()


def test_outliers_cost_less_with_awq(tiny: Path, text_file: Path) -> None:
    """Weights that feed on large channels: AWQ's outputs are nearer to the original than rounding's."""
    ids = ids_of(tiny, text_file)
    dense = load_model(tiny, "fp32")
    with torch.no_grad():
        for block in dense.blocks():
            for norm in (block.norm_attention_in, block.norm_feed_forward_in):
                assert norm is not None
                norm.weight[::9] *= 15
        logits = {"dense": dense.network(ids)}
        for p in (RoundToNearest(3, 64), AWQ(3, 64)):
            model = load_model(tiny, "fp32")
            model.network.load_state_dict(dense.network.state_dict())
            apply(model, Recipe("r", (p,)), ids)
            logits[p.key] = model.network(ids)
    off = {key: float((y - logits["dense"]).square().mean()) for key, y in logits.items()}
    assert off["awq"] < 0.7 * off["rtn"]


def test_output_error_is_that_of_the_outputs() -> None:
    x = torch.randn(100, 16)
    d = torch.randn(4, 16)
    h = 2 * x.T @ x / 100
    assert traced(d, h) == pytest.approx(2 * float((x @ d.T).square().sum()) / 100, rel=1e-4)
    assert traced(d, h) == pytest.approx(output_error(d, torch.zeros_like(d), h), rel=1e-4)
