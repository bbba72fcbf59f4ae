"""onecard distill: students made of a teacher's parts, resume, bad input, and that it helps."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import call, make_llama

from onecard.calibrate.train import Training, training_ids
from onecard.checkpoint.load import load_model
from onecard.checkpoint.shards import read_json, sha256_of
from onecard.core.errors import BadRequest, FailedWork
from onecard.core.report import Report
from onecard.core.spec import parameter_count
from onecard.nn.families import family_of
from onecard.passes.distill import Distil, Targets
from onecard.passes.student import fresh, inherit, prepare_distillation, teach

SHORT = Distil(training=Training(12, batch=4, length=32, rate=1e-3, dtype="fp32", save_minutes=0.0))


def smaller(tiny: Path, path: Path, **changes: int) -> Path:
    """A config.json of a student beside the teacher's."""
    path.write_text(json.dumps({**read_json(tiny / "config.json"), **changes}))
    return path


SIZES = {
    "layers": {"num_hidden_layers": 2},
    "neurons": {"intermediate_size": 128},
    "groups": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
    "heads": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32},
    "hidden": {"hidden_size": 64, "head_dim": 32},
    "all": {"num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 2,
            "num_key_value_heads": 1, "hidden_size": 64, "head_dim": 32},
}  # fmt: skip


@pytest.mark.parametrize("changes", SIZES.values(), ids=SIZES)
def test_a_student_of_a_teachers_parts(tiny: Path, changes: dict[str, int]) -> None:
    teacher = load_model(tiny)
    config = {**teacher.config, **changes}
    spec = family_of(config).spec(config)
    made = inherit(teacher, spec)
    assert made.spec == spec and made.parameters == parameter_count(spec) < teacher.parameters
    logits = made.network(torch.arange(20)[None])
    assert logits.shape == (1, 20, 300) and bool(torch.isfinite(logits).all())
    if changes == SIZES["layers"]:  # the first and the last
        old, new = list(teacher.blocks()), list(made.blocks())
        assert torch.equal(new[0].attention.q.matrix(), old[0].attention.q.matrix())
        assert torch.equal(new[1].attention.q.matrix(), old[2].attention.q.matrix())


def test_the_heaviest_neurons_stay(tiny: Path) -> None:
    teacher = load_model(tiny, "fp32")
    f = next(teacher.blocks()).feed_forward
    with torch.no_grad():
        f.down.weight[:, [3, 250]] *= 100  # type: ignore[union-attr, index]
    config = {**teacher.config, "intermediate_size": 2}
    made = inherit(teacher, family_of(config).spec(config))
    kept = next(made.blocks()).feed_forward.down.weight  # type: ignore[union-attr]
    assert torch.equal(kept, f.down.weight[:, [3, 250]])  # type: ignore[union-attr, index]


@pytest.mark.parametrize("changes, what", [
    ({"num_hidden_layers": 4}, "larger than its teacher"), ({"intermediate_size": 512}, "wider"),
    ({"vocab_size": 301}, "different vocabularies"),
    ({"num_attention_heads": 4, "num_key_value_heads": 1}, "share a key"),
    ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "the teacher a Llama"),
])  # fmt: skip
def test_students_that_cannot_be(
    tiny: Path, text_file: Path, tmp_path: Path, changes: dict, what: str
) -> None:
    config = smaller(tiny, tmp_path / "student.json", **changes)
    with pytest.raises(BadRequest, match=what):
        prepare_distillation(tiny, config, tmp_path / "out", SHORT, text_file)
    assert not list(tmp_path.glob(".out*"))


def test_other_bad_requests(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    config = smaller(tiny, tmp_path / "student.json", num_hidden_layers=2)
    other = make_llama(tmp_path / "other", seed=3)
    words = json.loads((other / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    a, b = list(vocabulary)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(words))
    short = tmp_path / "short.txt"
    short.write_text("too short")

    def refused(what: str, student: Path = config, settings: Distil = SHORT, text: Path = text_file,
                memory: int | None = None) -> None:  # fmt: skip
        with pytest.raises(BadRequest, match=what):
            prepare_distillation(tiny, student, tmp_path / "out", settings, text, memory=memory)

    refused("different vocabularies", student=other)
    refused("one sample needs 32", text=short)
    refused("the context is 256", settings=replace(SHORT, training=Training(length=300)))
    refused("smallest cap that works", memory=1 << 20)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("mine")
    refused("not empty")


@pytest.mark.parametrize("start", ["teacher", "fresh"])
def test_distilling_into_a_smaller_model(
    tiny: Path, text_file: Path, tmp_path: Path, start: str, capsys: pytest.CaptureFixture
) -> None:
    """It loads, its report counts it, and it says more of what the teacher says than before."""
    config = smaller(tiny, tmp_path / "student.json", **SIZES["all"])
    out = tmp_path / "out"
    words = ["distill", tiny, config, out, "--data", text_file, "--steps", 60, "--batch", 4, "--length",
             32, "--rate", 3e-4, "--start", start, "--hidden", 0.5, "--relations", 0.5, "--held-out",
             text_file, "--json"]  # fmt: skip
    assert call(*words, "--dry-run") == 0
    plan = Report.from_json(capsys.readouterr().out)
    assert plan.value("student_parameters") == parameter_count(
        family_of(read_json(config)).spec(read_json(config))
    )
    assert not out.exists()
    assert call(*words) == 0
    report = Report.from_json(capsys.readouterr().out)
    made, teacher = load_model(out), load_model(tiny)
    assert made.spec.hidden == 64 and made.parameters == report.value("parameters")
    loss = next(row for row in report.rows if row.what == "training_loss")
    assert loss.value < loss.before  # type: ignore[operator]
    ids = training_ids(teacher.tokenizer, text_file, SHORT.training, 300)[:16]
    spec = made.spec
    before = inherit(teacher, spec) if start == "teacher" else fresh(teacher, spec, 0)

    def kl(student: torch.nn.Module) -> float:
        from onecard.calibrate.losses import soft_targets

        return float(soft_targets(student(ids), teacher.network(ids)))

    assert kl(made.network) < kl(before.network)
    assert report.value("kl") > 0  # type: ignore[operator]
    assert sorted(p.name for p in out.iterdir() if p.name.startswith("report")) == [
        "report.html",
        "report.json",
    ]
    assert not list(tmp_path.glob(".out*"))
    assert call(*words, "--resume") == 0
    assert "is finished" in capsys.readouterr().err
    assert call(*words) == 2


def test_killed_and_resumed(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    """kill -9 while it trains: the same command goes on and gives the same bytes."""
    config = smaller(tiny, tmp_path / "student.json", num_hidden_layers=2)
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from onecard.calibrate.train import Training\n"
        "from onecard.passes.distill import Distil\n"
        "from onecard.passes.student import prepare_distillation, teach\n"
        "t = Training(60, batch=4, length=32, dtype='fp32', save_minutes=0.0)\n"
        "teach(prepare_distillation(*sys.argv[1:4], Distil(training=t), Path(sys.argv[4])))\n"
    )

    def run(out: Path) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", code, tiny, config, out, text_file])

    assert run(tmp_path / "whole").wait() == 0
    out, state = tmp_path / "out", tmp_path / ".out.training" / "training.safetensors"
    process, until = run(out), time.monotonic() + 60
    while not state.is_file() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert state.is_file() and not out.exists()
    assert run(out).wait() == 0
    first, second = (sha256_of(f / "model.safetensors") for f in (tmp_path / "whole", out))
    assert first == second and not state.parent.exists()


def test_unfinished_work_of_another_kind(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    """Other settings are refused; --resume goes on with them, --force starts anew."""
    config, out = smaller(tiny, tmp_path / "student.json", num_hidden_layers=2), tmp_path / "out"

    def job(force: bool = False, **more: float) -> object:
        settings = replace(SHORT, training=replace(SHORT.training, **more))  # type: ignore[arg-type]
        return prepare_distillation(tiny, config, out, settings, text_file, force=force)

    class Stop(Exception):
        pass

    def stop(done: int, total: int, what: str) -> None:
        if done == 5:
            raise Stop

    with pytest.raises(Stop):
        teach(job(), progress=stop)  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match="differs in: rate"):
        teach(job(rate=1e-4))  # type: ignore[arg-type]
    seen: list[int] = []
    teach(job(rate=1e-4), True, lambda done, total, what: seen.append(done))  # type: ignore[arg-type]
    assert seen[0] == 5 and seen[-1] == 12
    seen.clear()
    teach(job(True), False, lambda done, total, what: seen.append(done))  # type: ignore[arg-type]
    assert seen[0] == 1


def test_distilling_back_into_a_packed_student(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    assert call("compress", tiny, tmp_path / "small", "--recipe", "rtn-int4", "--no-prove") == 0
    teach(prepare_distillation(tiny, tmp_path / "small", tmp_path / "out", SHORT, text_file))
    made = load_model(tmp_path / "out")
    assert {linear.format.name for _, linear in made.linears()} == {"int4-g128"}


def test_what_is_added_while_it_works_stays(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    config, out = smaller(tiny, tmp_path / "student.json", num_hidden_layers=2), tmp_path / "out"
    job = prepare_distillation(tiny, config, out, SHORT, text_file)

    def add(folder: Path, report: Report) -> Report:
        out.mkdir()
        (out / "notes.txt").write_text("precious")
        return report

    with pytest.raises(FailedWork, match="no longer empty"):
        teach(job, finish=add)
    assert (out / "notes.txt").read_text() == "precious"
    shutil.rmtree(out)
    seen: list[int] = []
    teach(job, progress=lambda done, total, what: seen.append(done))
    assert load_model(out).spec.num_layers == 2 and set(seen) <= {12}, "it was trained already"


def test_targets_from_the_command_line(tiny: Path, tmp_path: Path) -> None:
    config = smaller(tiny, tmp_path / "student.json", num_hidden_layers=2)
    assert call("distill", tiny, config, tmp_path / "out", "--soft", 0) == 2
    assert call("distill", tiny, config, tmp_path / "out", "--temperature", 0) == 2
    assert Targets(soft=0, hard=1.0).hard == 1.0
