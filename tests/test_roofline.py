"""What a model would take and do on a device: sizes equal what is allocated, speeds follow the roofs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from test_cli import call

from onecard.calibrate.data import Calibration
from onecard.checkpoint.hub import SHIPPED
from onecard.checkpoint.source import Source
from onecard.core.device import Device
from onecard.core.devices import KNOWN, device, names
from onecard.core.errors import BadRequest
from onecard.core.format import Integers, parse_format
from onecard.core.report import Row
from onecard.core.spec import parameter_count
from onecard.cost import cost
from onecard.kernels import cpu
from onecard.passes import RoundToNearest
from onecard.passes.base import Recipe
from onecard.passes.job import Settings, compress, prepare
from onecard.roofline import DECODE, PROMPT, answer, decode_speed, needed, needed_here, prompt_speed
from onecard.runtime.cpu import CpuSettings, CpuStepper
from onecard.runtime.footprint import footprint

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the native library is not built")
SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


def folder(path: Path, kind: str) -> Path:
    config = {
        "llama": transformers.LlamaConfig(**SIZES),
        "gemma": transformers.Gemma2Config(**SIZES, head_dim=16),
        "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    }[kind]
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["llama", "gemma", "mixtral"])
def test_it_is_what_the_engine_takes(tmp_path: Path, kind: str) -> None:
    source = Source(folder(tmp_path / kind, kind))
    for cache, rows, threads in (("fp16", 512, 2), ("int8", 3, 1), ("int4", 64, 2)):
        settings = CpuSettings(threads=threads, rows=rows, cache=cache)
        found = footprint(source, 100, 2, settings)
        stepper = CpuStepper(source, CpuSettings(threads, found.positions, rows, cache))
        assert found.weight_bytes == stepper.weights.nbytes
        assert found.kv_bytes + found.work_bytes == stepper.nbytes
        assert found.positions == 2 * 128
        stepper.close()


def test_a_format_that_it_is_not_in_yet(tmp_path: Path, tiny: Path) -> None:
    compress(
        prepare(
            str(tiny),
            tmp_path / "int4",
            Recipe("r", (RoundToNearest(4, 64),)),
            Settings(calibration=Calibration(6, 48)),
        )
    )
    planned = footprint(Source(tiny), 64, formats=Integers(4, 64))
    assert planned.weights == footprint(Source(tmp_path / "int4"), 64).weights
    assert planned.weight_bytes < footprint(Source(tiny), 64).weight_bytes


def test_the_longest_context_just_fits(tiny: Path, told: list[str]) -> None:
    source = Source(tiny)
    found = needed_here(source, None, 64, 1)
    memory = found.memory + 10_000_000
    longest = found.longest(memory)
    slack = 1 << 20  # pages of every layer are rounded up; what this process holds moves
    program = found.memory - footprint(source, 64, program=0).total
    assert footprint(source, longest, program=program).total <= memory + slack
    assert footprint(source, longest + 4096, program=program).total > memory - slack
    assert found.longest(1) == 0


def test_roofs(tiny: Path, told: list[str]) -> None:
    source = Source(tiny)
    card = Device("x", "cuda", read_bandwidth=((1, 1e9),), peaks=(("bf16", 1e12),))
    dense, int4 = (needed(source, f, 128, 1) for f in (None, Integers(4)))
    table = 2 * source.spec.vocab_size * source.spec.hidden
    own = 0 if source.spec.tied else table
    assert dense.step - 128 * dense.position == 2 * parameter_count(source.spec) - own
    assert decode_speed(card, dense, 1) == pytest.approx(DECODE * 1e9 / dense.step)
    assert prompt_speed(card, dense) == pytest.approx(PROMPT * 1e12 / dense.operations)
    assert int4.step < dense.step and int4.memory < dense.memory
    assert int4.operations == dense.operations
    twice = needed(source, None, 128, 2)
    assert twice.memory == dense.memory + 128 * dense.position
    assert decode_speed(Device("y"), dense, 1) is None and prompt_speed(Device("y"), dense) is None
    here = needed_here(source, parse_format("int8-g32"), 128, 1)
    assert here.fixed < here.memory and here.step < here.memory


def test_known_devices() -> None:
    assert device("rtx4090") == device("RTX 4090") and device("rtx-4090").memory_bytes == 24 << 30
    assert len(set(names())) == len(KNOWN)
    for name in names():
        found = device(name)
        assert Device.from_dict(found.to_dict()) == found
        assert 1e9 < (found.bandwidth() or 0) < 1e13
        assert all(1e11 < peak < 1e16 for _, peak in found.peaks)
    with pytest.raises(BadRequest, match="RTX 4090"):
        device("RTX 4099")


def test_the_answer(tiny: Path) -> None:
    def said(memory: int) -> str:
        rows = [Row("device", "name", "x"), Row("device", "memory_available", memory)]
        for name, size in (("as stored", 16), ("int4-g128", 5)):
            rows += [Row(name, "needed_bytes", size << 30), Row(name, "fits", size << 30 <= memory)]
        return answer(rows, 512, 1)

    assert "16.0" in said(20 << 30) and said(20 << 30).endswith("it fits.")
    assert "in int4-g128 and fewer bits (5" in said(8 << 30)
    assert "does not fit" in said(2 << 30) and "int4-g128 needs 5" in said(2 << 30)


def test_from_the_command_line(capsys: pytest.CaptureFixture, told: list[str]) -> None:
    for name in ("auto", "Raspberry Pi 5"):
        assert call("inspect", "demo", "--device", name, "--context", 512, "--json") == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        found = {(r["where"], r["what"]): r["value"] for r in rows}
        assert found["int4-g128", "fits"] is True and found["int4-g128", "longest_context"] == 512
        assert found["int4-g128", "needed_bytes"] < found["as stored", "needed_bytes"]
        assert found["int4-g128", "decode_tokens_per_second"] > 0
        if name == "auto":
            made = cost(Source(SHIPPED), Integers(4), 512)
            assert found["int4-g128", "decode_tokens_per_second"] == pytest.approx(1 / made.decode)
            assert found["int4-g128", "needed_bytes"] == made.memory
    assert call("inspect", "demo", "--device", "RTX 4099") == 2
    assert "RTX 4090" in capsys.readouterr().err
