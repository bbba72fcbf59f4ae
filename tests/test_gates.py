"""What a fit is judged on: the engine that serves it, and questions where some are given."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import call

from onecard.checkpoint.source import Source
from onecard.core.errors import BadRequest
from onecard.evaluate import choose, read_questions
from onecard.fit import fit as fits
from onecard.fit import gates, timing
from onecard.fit import job as jobs
from onecard.fit.goal import Goal
from onecard.fit.result import Gate, read_fit
from onecard.kernels import cpu
from onecard.passes import RoundToNearest
from onecard.passes.base import Recipe
from onecard.passes.job import Settings, compress, prepare
from onecard.runtime.cpu import CpuSettings

QUESTIONS = [
    {"question": "What is a model?", "choices": ["a list of names", "numbers", "the text"], "gold": 1},
    {"question": "Where is the file?", "choices": ["in a folder", "nowhere at all"], "gold": 0},
    {"question": "Who reads?", "choices": ["a walk", "blocks", "an engine", "nobody"], "gold": 3},
]  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "asked.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)))
    return path


@pytest.fixture(scope="module")
def rough(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in int3."""
    out = tmp_path_factory.mktemp("rough") / "out"
    compress(prepare(str(tiny), out, Recipe("r", (RoundToNearest(3, 64),)), Settings()))
    return out


@pytest.fixture(scope="module")
def texts(
    tiny: Path, text_file: Path, task: Path, tmp_path_factory: pytest.TempPathFactory
) -> gates.Texts:
    kept = tmp_path_factory.mktemp("texts") / "texts.json"
    found = gates.texts_of(Source(tiny), text_file, 512, kept, task)
    assert found == gates.texts_of(Source(tiny), text_file, 512, kept, task)
    return found


def test_torch_and_the_engine_judge_alike(tiny: Path, rough: Path, texts: gates.Texts) -> None:
    """What int8 inputs and head cost is all that is between them."""
    served = gates.judged(tiny, rough, texts)
    plain = gates.judged(tiny, rough, texts, here=False)
    assert [g.text for g in served] == ["held-out", "own words", "asked.jsonl"]
    for a, b in zip(served, plain, strict=True):
        assert a.tokens == b.tokens and a.before == pytest.approx(b.before, rel=1e-3)
        assert a.kl == pytest.approx(b.kl, rel=0.05) and a.kl > 0
        assert a.perplexity == pytest.approx(b.perplexity, rel=0.01)


def test_nothing_is_lost_where_nothing_changes(tiny: Path, texts: gates.Texts) -> None:
    for gate in gates.judged(tiny, tiny, texts, here=False):
        assert gate.kl == pytest.approx(0, abs=1e-6) and gate.agreement == 1
        assert all(
            gates.kept(gate, m) == pytest.approx(1, abs=1e-6)
            for m in ("likelihood", "perplexity", "agreement", "accuracy")
        )


@pytest.mark.skipif(not cpu.available(), reason="no native library")
def test_questions_are_a_text_and_an_examination(
    tiny: Path, rough: Path, texts: gates.Texts, task: Path
) -> None:
    """KL is that of the right answers' tokens; shares of right ones are those that `choose` finds."""
    *_, gate = gates.judged(tiny, rough, texts)
    tokenizer = Source(tiny).tokenizer()
    assert gate.questions == 3
    assert gate.tokens == sum(
        len(tokenizer.encode(f"Question: {q['question']}\nAnswer: {q['choices'][q['gold']]}"))
        - len(tokenizer.encode(f"Question: {q['question']}\nAnswer:"))
        for q in QUESTIONS
    )  # fmt: skip
    for folder, seen in ((rough, gate.right), (tiny, gate.right_before)):
        scorer = gates.native_scorer(folder, CpuSettings(context=256))
        assert choose(scorer, read_questions(task)).value("accuracy_by_length") == seen


def test_accuracy_is_of_the_original() -> None:
    gate = Gate("t", 0.1, 0.9, 10.0, 9.0, 50, questions=10, right=0.3, right_before=0.4)
    text = replace(gate, text="held-out", kl=0.2, questions=0)
    assert gates.quality((text, gate), "accuracy") == pytest.approx(0.75)
    assert gates.quality((text, gate), "likelihood") == pytest.approx(math.exp(-0.2))
    assert gates.kept(replace(gate, right=0.5), "accuracy") == 1
    assert gates.kept(replace(gate, right=0.0, right_before=0.0), "accuracy") == 1


def test_questions_are_asked_for_and_checked(tmp_path: Path, task: Path) -> None:
    with pytest.raises(BadRequest, match="right answers"):
        gates.require_questions(None, "accuracy")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "x"}\n')
    with pytest.raises(BadRequest, match="line 1"):
        gates.require_questions(bad, "likelihood")
    gates.require_questions(task, "accuracy")
    assert gates.name_of(None) == "" and gates.name_of(task) != gates.name_of(bad)


def test_a_fit_answers_questions(
    tiny: Path, text_file: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["fit", tiny, tmp_path / "out", "--size", "300KiB", "--effort", "quick", "--context", 64,
             "--calibration", text_file, "--held-out", text_file]  # fmt: skip
    assert call(*words, "--measure", "accuracy", "--quality", "0.01") == 2
    assert "--task FILE" in capsys.readouterr().err and not (tmp_path / "out").exists()
    code = call(*words, "--measure", "accuracy", "--quality", "0.01", "--task", task)
    result = read_fit(tmp_path / "out")
    gate = result.gates[-1]
    assert gate.questions == 3 and gate.text == "asked.jsonl"
    assert code == (0 if gates.kept(gate, "accuracy") >= 0.01 else 1)
    assert {"accuracy", "right answers"} <= {p.what for p in result.promises}


@pytest.mark.parametrize("rounded, whole, passed, exact", [
    (0.009, 0.001, True, False),  # good as it is
    (0.0105, 0.0099, True, True),  # inputs are what is missing
    (0.0105, 0.0102, False, False),  # they are not all of it
    (0.02, 0.001, False, False),  # far off: inputs cannot be it, and are not looked at
])  # fmt: skip
def test_inputs_stay_whole_where_that_keeps_the_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounded: float, whole: float, passed: bool, exact: bool
) -> None:  # fmt: skip
    def judged(*words: object) -> tuple[Gate, ...]:
        runs = words[3]
        assert isinstance(runs, CpuSettings) and runs.cache == "int8"
        return (Gate("held-out", whole if runs.exact else rounded, 0.9, 10.0, 9.9, 50),)

    (tmp_path / "manifest.json").write_text("{}")
    monkeypatch.setattr(gates, "judged", judged)
    monkeypatch.setattr(fits, "carried_out", lambda *_: (tmp_path, None))
    job = SimpleNamespace(goal=Goal(quality=0.99), costs=SimpleNamespace(here=True), work=tmp_path,
                          source=SimpleNamespace(folder=tmp_path))  # fmt: skip
    planning = SimpleNamespace(chosen=lambda: {"cache": SimpleNamespace(format="int8")})
    for _ in range(2):  # the second time from what is kept
        found = fits.one_try(job, planning, None, "attempt-1", "as planned", jobs.Quiet)
        assert (found.passed, bool(found.runs.exact)) == (passed, exact)
        assert timing.flags(found.runs) == ["--cache", "int8"] + ["--exact", "all"] * exact
