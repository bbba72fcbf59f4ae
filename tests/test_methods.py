"""Six ways side by side make six folders, measures them, and shows something true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onecard import methods
from onecard.checkpoint.hub import SHIPPED
from onecard.checkpoint.load import Source, load_model
from onecard.core.errors import BadRequest
from onecard.core.report import Report
from onecard.methods import VARIANTS, run_methods
from onecard.windows import Reading


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, run_methods(out)


def test_every_variant_is_a_folder_that_runs(found: tuple[Path, Report]) -> None:
    out, report = found
    folders = [path for path in out.iterdir() if path.is_dir()]
    assert len(folders) == len(VARIANTS) == 6
    assert json.loads((out / "report.json").read_text())["rows"]
    for folder in folders:
        assert (folder / "manifest.json").is_file() and load_model(folder).parameters > 7e6
    for recipe in VARIANTS:
        assert report.value("decode_tokens_per_second", recipe.name)
        assert dict(report.notes)[f"sample: {recipe.name}"].startswith("The function returns")


def test_sizes_and_quality_are_in_order(found: tuple[Path, Report]) -> None:
    """8 bits are nearly free, 3 bits by rounding clearly hurt, and GPTQ saves most of it."""
    _, report = found

    def of(what: str, where: str) -> float:
        value = report.value(what, where)
        assert isinstance(value, float | int)
        return float(value)

    assert of("file_bytes", "int3 GPTQ") < of("file_bytes", "int4 GPTQ") < of("file_bytes", "int8")
    assert of("file_bytes", "int4 GPTQ") == of("file_bytes", "int4 rounding")
    assert of("kl", "dense") == pytest.approx(0, abs=1e-9)
    assert of("kl", "int8") < 0.002 and of("top1_agreement", "int8") > 0.97
    assert of("kl", "int4 GPTQ") < 0.6 * of("kl", "int4 rounding")
    assert of("kl", "int3 GPTQ") < 0.5 * of("kl", "int3 rounding")
    dense = of("perplexity", "dense")
    lost = of("perplexity", "int3 rounding") - dense
    assert lost > 0.03 * dense
    assert of("perplexity", "int3 GPTQ") - dense < 0.6 * lost


def test_shipped_model_is_small() -> None:
    """At most 16 MB, a Llama that needs nothing but this package, with text and licences beside it."""
    source = Source(SHIPPED)
    assert source.checkpoint.nbytes <= 16_000_000 and source.spec.family == "llama"
    for name in ("held_out.txt", "calibration.txt", "NOTICE"):
        assert (SHIPPED.parent / name).stat().st_size > 100


def test_it_does_not_overwrite(found: tuple[Path, Report]) -> None:
    with pytest.raises(BadRequest, match="not empty"):
        run_methods(found[0])


@pytest.mark.parametrize("name", ["notes.txt", "mine/notes.txt", "int8/notes.txt", "int8/a/b.txt"])
def test_force_keeps_what_was_added(found: tuple[Path, Report], name: str) -> None:
    """To the folder of all or to that of one variant."""
    path = found[0] / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("precious")
    try:
        with pytest.raises(BadRequest, match="not the result's own"):
            run_methods(found[0], force=True)
        assert (
            path.read_text() == "precious" and len(list(found[0].glob("int*/manifest.json"))) == 5
        )
    finally:
        path.unlink()
        if path.parent.name in ("mine", "a"):
            path.parent.rmdir()


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps the variants that it has, with and without force; a stranger's folder stays one."""
    monkeypatch.setattr(methods, "VARIANTS", VARIANTS[:2])
    monkeypatch.setattr(methods, "DOCUMENTS", Reading(documents="<|endoftext|>", limit=1))
    monkeypatch.setattr(methods, "ROUNDS", 1)
    out = tmp_path / "out"

    def stop(done: int, total: int, what: str) -> None:
        if what == "int4 rounding":
            raise KeyboardInterrupt

    for force in (False, True):
        with pytest.raises(KeyboardInterrupt):
            run_methods(out, force, stop)
        assert [path.name for path in out.iterdir()] == ["int8"]
    made = (out / "int8" / "model.safetensors").stat().st_mtime_ns
    run_methods(out)
    assert (out / "int8" / "model.safetensors").stat().st_mtime_ns == made
    assert (out / "report.json").is_file()
    run_methods(out, force=True)
    assert (out / "int8" / "model.safetensors").stat().st_mtime_ns > made
    (tmp_path / "strange" / "int8").mkdir(parents=True)
    (tmp_path / "strange" / "notes.txt").write_text("precious")
    with pytest.raises(BadRequest, match="not empty"):
        run_methods(tmp_path / "strange", force=True)
