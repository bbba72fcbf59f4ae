"""Embedding and head in integers: what they stand for, saved, loaded, run, trained around, refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, make_llama
from test_engine_families import distance, fed_logits, network_logits
from test_stages import same, settings

from onecard.checkpoint.load import load_model
from onecard.checkpoint.save import save_model
from onecard.checkpoint.source import Source
from onecard.core.errors import BadRequest
from onecard.core.format import Integers
from onecard.kernels import convert, layout
from onecard.nn.model import Model
from onecard.passes import GPTQ, Distil, DropLayers, Rotate, Tables, recipe_of
from onecard.passes.base import Recipe
from onecard.passes.distill import Training
from onecard.passes.job import compress, prepare
from onecard.passes.tables import head_hessian
from onecard.passes.walked import apply
from onecard.runtime.cpu import CpuSettings, CpuStepper
from onecard.runtime.reference import TorchExecutor

IDS = torch.randint(0, 300, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose embedding is the head, and one with a head of its own."""
    folder = tmp_path_factory.mktemp("tables")
    return make_llama(folder, tie_word_embeddings=request.param)


def made(source: Path, *passes: object, dtype: str = "fp32") -> Model:
    model = load_model(source, dtype)
    apply(model, Recipe("r", passes), IDS)  # type: ignore[arg-type]
    return model


def test_the_tables_are_what_they_say(source: Path) -> None:
    """Rows come out of the packed table as its matrix has them, and the head multiplies by the same."""
    before, model = load_model(source, "fp32"), made(source, Tables(bits=6))
    embedding, head = model.network.stem.embedding, model.network.tail.head
    assert embedding.format == Integers(6, 128, scale="fp32") == head.format
    assert torch.equal(embedding(IDS), embedding.matrix()[IDS])
    if before.spec.tied:
        assert torch.equal(embedding.matrix(), head.matrix())
    else:
        assert not torch.equal(embedding.matrix(), head.matrix())
    assert model.parameters == before.parameters
    for new, old in ((embedding, before.network.stem.embedding), (head, before.network.tail.head)):
        apart = (new.matrix() - old.matrix()).abs().mean()
        assert 0 < apart < 0.05 * old.matrix().abs().mean()
    for ours, theirs in zip(model.blocks(), before.blocks(), strict=True):
        assert torch.equal(ours.attention.q.matrix(), theirs.attention.q.matrix())


def test_the_head_is_rounded_for_its_inputs(source: Path) -> None:
    """The error of the logits is below that of a table rounded without looking at them, at 3 bits."""
    before = load_model(source, "fp32")
    h = head_hessian(before, IDS, 128)
    w = before.network.tail.head.matrix()

    def lost(model: Model) -> float:
        d = model.network.tail.head.matrix() - w
        return float(torch.linalg.vecdot(d @ h, d).sum())

    plain = load_model(source, "fp32")
    rounded = convert.round_to_nearest(w, Integers(3, 128, scale="fp32"))
    plain.network.tail.head.replace(rounded)
    assert lost(made(source, Tables(bits=3))) < 0.9 * lost(plain)


def test_saved_and_loaded(source: Path, tmp_path: Path) -> None:
    """The same logits from the folder, exactly as many bytes as the formats say, and a second save alike."""
    model = made(source, GPTQ(4, 64), Tables(bits=5, group=32), dtype="bf16")
    folder = save_model(model, tmp_path / "saved")
    again = load_model(folder)
    assert torch.equal(model.network(IDS), again.network(IDS))
    assert torch.equal(load_model(folder, "fp32").network.stem.embedding.matrix(),
                       model.network.stem.embedding.matrix())  # fmt: skip
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "onecard"
    assert "model.embed_tokens" in config["formats"]["int5-g32"]
    table = Integers(5, 32).bytes((300, 128))
    dense = 300 * 128 * 2
    tables = 1 if model.spec.tied else 2
    both = [Source(source).checkpoint.nbytes, Source(folder).checkpoint.nbytes]
    blocks = sum(linear.format.bytes(linear.shape) for _, linear in model.linears())
    count = sum(linear.shape[0] * linear.shape[1] for _, linear in model.linears())
    assert both[0] - both[1] == tables * (dense - table) + 2 * count - blocks
    save_model(again, tmp_path / "twice")
    assert same(folder, tmp_path / "twice")


def test_streamed_equals_in_memory(source: Path, text_file: Path, tmp_path: Path) -> None:
    """Also where blocks are dropped behind it, which copies the tables as they lie."""
    recipe = Recipe("r", (GPTQ(4, 64), Tables(), DropLayers(layers=(0,), most=None)))
    job = prepare(source, tmp_path / "streamed", recipe, settings(text_file))
    compress(job)
    model = load_model(source)
    apply(model, recipe, job.ids)
    save_model(model, tmp_path / "memory")
    assert same(tmp_path / "streamed", tmp_path / "memory")


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_native_engine_reads_them(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Its logits are the reference's, but for an embedding in bf16 where that is the model's; mapped, too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if dtype == "fp32":
        tied = load_model(source).spec.tied
        source = make_llama(tmp_path / "wide", "float32", tie_word_embeddings=tied)
    model = made(source, GPTQ(8, 64), Tables(bits=6, group=64), dtype=dtype)
    folder = save_model(model, tmp_path / "saved")
    ids = IDS[0].tolist()
    wanted = network_logits(load_model(folder, "fp32").network, ids)
    for _ in range(2):
        stepper = CpuStepper(folder, CpuSettings(exact=("all",), threads=1, cache="fp16"))
        assert distance(fed_logits(stepper, ids, [20, 12]), wanted) < (
            2e-3 if dtype == "fp32" else 1e-2
        )


def test_the_torch_executor_in_every_dtype(source: Path) -> None:
    model = made(source, Tables(bits=8), dtype="bf16")
    for dtype in (None, "bf16", "fp32"):
        for expand in (False, True):
            network = TorchExecutor(model, dtype=dtype, expand=expand).network
            kind = torch.float32 if dtype == "fp32" else torch.bfloat16
            assert network(IDS).dtype == kind
            exact = load_model(source, "fp32").network(IDS)
            assert (network(IDS).float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_training_goes_around_them(source: Path) -> None:
    """Distillation trains the rest and leaves the tables: the loss falls, codes and scales stay."""
    training = Training(steps=12, batch=4, length=32, rate=1e-3)
    plain, taught = made(source, Tables(bits=2)), load_model(source, "fp32")
    report = apply(taught, Recipe("r", (Tables(bits=2), Distil(training=training))), IDS)
    for path in ("stem.embedding", "tail.head"):
        a, b = (m.network.get_submodule(path).held().parts for m in (plain, taught))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    loss = next(row for row in report.rows if row.what == "training_loss")
    assert loss.value < loss.before  # type: ignore[operator]
    assert taught.network(IDS).isfinite().all()


def test_bad_requests(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="put GPTQ first"):
        made(source, Tables(), GPTQ(4))
    with pytest.raises(BadRequest, match="put rotation"):
        made(source, Tables(), Rotate())
    with pytest.raises(BadRequest, match="tables: sweeps"):
        Tables(sweeps=-1)
    with pytest.raises(BadRequest, match="2 to 8 bits"):
        Tables(bits=9)
    narrow = make_llama(tmp_path / "narrow", hidden_size=96)
    with pytest.raises(BadRequest, match="embedding and head: groups of 64"):
        made(narrow, Tables(group=64))


def test_other_formats_are_refused(source: Path, tmp_path: Path) -> None:
    """A folder that says its embedding is something else than symmetric integers."""
    folder = save_model(made(source, Tables()), tmp_path / "saved")
    (folder / "onecard.json").unlink(missing_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    formats = config["quantization_config"]["formats"]
    for name in ("nf4-g64", "int6-g128-zp"):
        config["quantization_config"]["formats"] = {name: formats["int6-g128"]}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(BadRequest, match="the embedding is stored as"):
            Source(folder)


def test_from_the_command_line(
    source: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("passes:\n  - gptq: {bits: 4}\n  - tables: {bits: 6}\n")
    out = tmp_path / "small"
    words = ["compress", source, out, "--recipe", recipe, "--data", text_file, "--samples", 4,
             "--length", 32, "--no-prove"]  # fmt: skip
    assert call(*words) == 0
    assert call("run", out, "The quick", "--max-tokens", 4) == 0
    assert call("inspect", out, "--json") == 0
    assert recipe_of({"passes": [{"tables": {}}]}, "r").passes == (Tables(),)
    capsys.readouterr()


def test_bf16_ties_go_to_even() -> None:
    x = torch.cat([torch.randn(1000), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 0.0, -0.0])])
    wanted = x.bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(layout.to_bf16(x.numpy()), wanted)
