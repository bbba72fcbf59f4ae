"""What the engine fuses follows the Spec, and is told by `onecard inspect --fusions`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import call
from test_families import CASES, random_model

from onecard.core.fusions import fusions
from onecard.core.report import Report
from onecard.core.spec import Spec
from onecard.nn.families import spec_of


def spec_named(case: str) -> Spec:
    return spec_of(random_model(case).config.to_dict() | {"architectures": [CASES[case][0]]})


@pytest.mark.parametrize(
    "case", ["llama", "gemma2", "gpt2", "neox", "opt-post", "mixtral", "qwen2-moe"]
)
def test_what_the_engine_fuses_follows_the_spec(case: str) -> None:
    spec = spec_named(case)
    found = [(where, " + ".join(f.parts)) for where, f in fusions(spec)]
    text = "\n".join(parts for _, parts in found)
    layer = spec.layers[0]
    assert "attention.q + attention.k + attention.v" in text
    assert ("gate" in text) == layer.feed_forward.gated
    assert ("rope" in text) == (layer.attention.rope is not None)
    assert ("attention.o + residual sum" in text) == (layer.order == "pre")
    assert ("sum of both branches" in text) == (layer.order == "parallel")
    assert ("each expert" in text) == (layer.feed_forward.experts is not None)
    assert ("their offset" in text) == (spec.norm.offset != 0)
    assert ("head + soft cap" in text) == (spec.final_soft_cap is not None)
    blocks = {where for where, _ in found if where != "model"}
    assert len(blocks) == len(set(spec.layers))


def test_every_fusion_names_a_function_of_the_engine() -> None:
    engine = Path(__file__).parents[1] / "src" / "onecard" / "kernels" / "csrc"
    text = "".join((engine / name).read_text() for name in ("forward.cpp", "attention.cpp"))
    for case in ("llama", "gemma2", "mixtral", "neox"):
        for _, fusion in fusions(spec_named(case)):
            name = fusion.by.rpartition("::")[2]
            if name != "laying out":
                assert re.search(rf"\b{name}\(", text), name


def test_inspect_lists_them(capsys: pytest.CaptureFixture) -> None:
    assert call("inspect", "demo", "--fusions", "--json") == 0
    report = Report.from_json(capsys.readouterr().out)
    rows = {(row.where, row.what) for row in report.rows}
    assert ("blocks.0-7", "attention.q + attention.k + attention.v") in rows
    assert ("model", "cos and sin of all layers") in rows
