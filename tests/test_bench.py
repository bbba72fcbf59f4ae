"""The bench measures what it says: ids computed and written, bytes read, shares of given roofs."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import call, make_llama

from onecard import bench as benches
from onecard.bench import CALL, LEAD, Case, Sizes, Timed, bench, serve
from onecard.core.device import Device
from onecard.core.errors import BadRequest
from onecard.kernels import cpu
from onecard.passes import Hash, RoundToNearest
from onecard.passes.base import Recipe
from onecard.passes.job import Settings, compress, prepare
from onecard.runtime.cpu import CpuSettings, CpuStepper
from onecard.runtime.steps import Fed, Feed, Ids

ROOF = Device("made up", cores=2, caches=(("L3", 1 << 10),), read_bandwidth=((1, 1e9), (2, 2e9)),
              peaks=(("int8", 4e12), ("fp32", 1e11)), units=(("int8", "dot"), ("fp32", "fma")))  # fmt: skip
FEW = CpuSettings(threads=2, context=1024)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[list[Feed], list[Fed]]]]:
    """What steppers were given and gave."""
    calls: list[tuple[list[Feed], list[Fed]]] = []
    whole = CpuStepper.step

    def kept(self: CpuStepper, batch: Sequence[Feed], steps: int, cancel: Ids) -> list[Fed]:
        fed = whole(self, batch, steps, cancel)
        calls.append((list(batch), fed))
        return fed

    monkeypatch.setattr(CpuStepper, "step", kept)
    yield calls


def positions(feed: Feed) -> list[tuple[int, int]]:
    """(page, place in it) of each new id."""
    return [(int(feed.table[p // 32]), p % 32) for p in range(feed.past, feed.past + len(feed.ids))]


def test_what_is_written_behind(tiny: Path, seen: list) -> None:
    """With `behind`, the ids written follow so many, and all positions in front of them are computed."""
    bench([str(tiny)], Sizes((), (20,), (2,), 1, 70), CpuSettings(threads=1), roofs=lambda: ROOF)
    feeds = [feed for given, _ in seen for feed in given]
    assert max(feed.past for feed in feeds) >= 70
    assert {p for feed in feeds[:4] for p in range(feed.past, feed.past + len(feed.ids))} >= set(
        range(70)
    )
    with pytest.raises(BadRequest, match="behind is 0"):
        Sizes(behind=0)


@pytest.mark.parametrize(
    "count, batch, rows", [(40, 1, 512), (70, 3, 64), (200, 2, 512), (1, 1, 8)]
)
def test_a_prompt_is_computed_once(
    tiny: Path, seen: list, count: int, batch: int, rows: int
) -> None:
    timed = Timed(str(tiny), CpuSettings(threads=2, context=1024, rows=rows))
    assert timed.measure(Case("prompt", count, batch)) > 0
    feeds = [feed for given, _ in seen for feed in given]
    places = [place for feed in feeds for place in positions(feed)]
    assert len(places) == len(set(places)) == count * batch
    assert all(sum(len(feed.ids) for feed in given) <= rows for given, _ in seen)
    assert sum(feed.draw is not None for feed in feeds) == batch


@pytest.mark.parametrize("count, batch", [(1, 1), (CALL, 2), (2 * CALL + 3, 3)])
def test_decoding_writes_every_id(tiny: Path, seen: list, count: int, batch: int) -> None:
    """As many ids as asked for, each from the one before: what one greedy request would give."""
    timed = Timed(str(tiny), FEW)
    assert timed.measure(Case("decode", count, batch)) > 0
    (lead, first), rest = seen[0], seen[1:]
    assert [len(feed.ids) for feed in lead] == [LEAD] * batch
    for i in range(batch):
        written = [id for _, fed in rest for id in fed[i].ids]
        assert len(written) == count
        again = CpuStepper(tiny, FEW)
        ids, found = np.append(lead[i].ids, first[i].ids[0]).astype(np.int32), []
        for _ in range(count):
            feed = Feed(ids, 0, np.arange(32, dtype=np.int32), "last")
            (fed,) = again.step([feed], 1, np.zeros(1, np.int32))
            found.append(int(fed.logits[0].argmax()))
            ids = np.append(ids, np.int32(found[-1]))
        assert written == found


def test_what_a_step_reads(tiny: Path, tmp_path: Path) -> None:
    """All linears once; of a tied table the head's copy, not the rows that are looked up."""
    timed = Timed(str(tiny), CpuSettings(threads=2, context=64, head="stored"))
    linears = 3 * (128 * (128 + 2 * 64 + 128) + 3 * 128 * 256)
    assert timed.step_bytes() == 2 * (linears + 304 * 128)  # rows are padded to 16
    assert timed.operations(Case("prompt", 10, 2)) == {
        "int8": 0.0, "int4": 0.0, "fp32": 2.0 * (20 * linears + 2 * 300 * 128),
    }  # fmt: skip
    rounded = Timed(str(tiny), CpuSettings(threads=2, context=64))
    assert rounded.operations(Case("prompt", 10, 2))["int8"] == 2.0 * 2 * 300 * 128
    recipe = Recipe("narrow", (RoundToNearest(4, 32),))
    compress(prepare(tiny, tmp_path / "narrow", recipe, Settings()))
    narrow = Timed(str(tmp_path / "narrow"), CpuSettings(threads=2, context=64))
    assert narrow.operations(Case("prompt", 10, 2)) == {
        "int8": 2.0 * 2 * 300 * 128, "int4": 2.0 * 20 * linears, "fp32": 0.0,
    }  # fmt: skip


def test_experts_are_read_as_they_are_chosen(tmp_path: Path) -> None:
    import torch
    import transformers
    from conftest import make_tokenizer

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
        max_position_embeddings=128,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer(tmp_path)
    timed = Timed(str(tmp_path), FEW)
    linears = timed.stepper.weights.linears()
    experts = sum(size for path, size in linears.items() if ".expert" in path)
    others = sum(linears.values()) - experts
    assert experts > others
    assert timed.step_bytes(1) == pytest.approx(others + experts / 4)
    assert timed.step_bytes(2) == pytest.approx(others + experts * (1 - 0.75**2))
    assert timed.measure(Case("decode", 3, 2)) > 0


def test_the_report(tiny: Path) -> None:
    """The names that DESIGN fixes, and shares of the roofs that were given."""
    sizes = Sizes(prompt=(16, 40), decode=(20,), batch=(1, 2), repeat=2)
    found = bench([str(tiny)], sizes, CpuSettings(threads=2), roofs=lambda: ROOF)
    speed = found.value("decode_tokens_per_second", "decode 20")
    timed = Timed(str(tiny), FEW)
    assert found.value("bandwidth_share", "decode 20") == pytest.approx(
        timed.step_bytes() * speed / 2e9
    )
    operations = timed.operations(Case("prompt", 40, 2))
    seconds = 80 / found.value("prompt_tokens_per_second", "prompt 40 x 2")
    assert found.value("operations_share", "prompt 40 x 2") == pytest.approx(
        (operations["int8"] / 4e12 + operations["fp32"] / 1e11) / seconds
    )
    assert found.value("time_to_first_token", "prompt 16") > 0
    assert found.value("peak_memory_bytes", "model") > timed.stepper.weights.nbytes
    assert found.value("native_class") == cpu.isa()
    assert 0 <= (found.value("foreign_share") or 0) <= 1
    (said,) = [text for title, text in found.notes if title == "answer"]
    assert "would allow" in said and "2.0 GB/s" in said and "fit into" not in said
    with pytest.raises(KeyError):
        found.value("time_to_first_token", "prompt 40 x 2")


def test_bytes_that_are_no_time_are_told(tiny: Path, tmp_path: Path) -> None:
    """By what made them, and by what measures them; of formats that are read as they are, nothing."""
    for passes, name in ((Hash(4, weigh=False), "hashed4"), (RoundToNearest(4), None)):
        out = tmp_path / passes.key
        made = compress(prepare(tiny, out, Recipe("r", (passes,)), Settings()))
        sizes = Sizes(prompt=(), decode=(8,), batch=(1,), repeat=1)
        found = bench([str(out)], sizes, CpuSettings(threads=2), roofs=lambda: ROOF)
        for report in (made, found):
            told = [title for title, _ in report.notes if title.startswith("not all of it is time")]
            assert told == ([f"not all of it is time: {name}"] if name else [])


def test_two_models_take_turns(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = make_llama(tmp_path / "other", seed=1, num_hidden_layers=1)
    asked: list[tuple[str, Case]] = []
    seconds = iter(range(1, 100))

    def timed(self: Timed, case: Case) -> float:
        asked.append((self.source.folder.name, case))
        return float(next(seconds))

    monkeypatch.setattr(Timed, "measure", timed)
    sizes = Sizes(prompt=(), decode=(8,), batch=(1,), repeat=3)
    found = bench([str(tiny), str(other)], sizes, roofs=lambda: ROOF)
    assert [name for name, _ in asked] == [tiny.name, "other"] * 4
    row = next(row for row in found.rows if row.what == "decode_tokens_per_second")
    assert row.value == 8 / 5 and row.before == 8 / 6  # the medians of 3, 5, 7 and of 4, 6, 8
    ratios = sorted((4 / 3, 6 / 5, 8 / 7))
    assert found.value("speed_ratio") == pytest.approx(ratios[1])
    assert ratios[0] < found.value("speed_ratio_low") < ratios[1]
    assert ratios[1] < found.value("speed_ratio_high") < ratios[2]


def test_every_class_in_turn(tiny: Path) -> None:
    before = cpu.isa()
    found = bench([str(tiny)], Sizes((9,), (), (1,), 1), CpuSettings(threads=1), ("all",),
                  roofs=lambda: ROOF)  # fmt: skip
    for isa in cpu.isas():
        where = f"prompt 9, {isa}" if len(cpu.isas()) > 1 else "prompt 9"
        assert found.value("prompt_tokens_per_second", where) > 0
    assert cpu.isa() == before


def test_serving(tiny: Path) -> None:
    """The protocol of benchmarks/peers/cpu_serve.py; what cannot be done does not end it."""
    out = io.StringIO()
    lines = ["prompt 40\n", "\n", "decode 12\n", "decode x\n", "prompt 9999\n", "prompt 0\n", "hop\n",
             "decode 5 behind 40\n", "decode 5 behind 252\n", "decode 5 behind\n",
             "prompt 5 behind 40\n", "prompt 7"]  # fmt: skip
    serve(str(tiny), CpuSettings(threads=2), lines, out)  # type: ignore[arg-type]
    ready, *answers = out.getvalue().splitlines()
    told = [json.loads(answer) for answer in answers]
    assert ready == "ready"
    assert [set(one) for one in told] == [
        {"seconds", "tokens", "rss"}, {"seconds", "tokens", "rss"}, {"error"}, {"error"}, {"error"},
        {"error"}, {"seconds", "tokens", "rss"}, {"error"}, {"error"}, {"error"},
        {"seconds", "tokens", "rss"},
    ]  # fmt: skip
    assert [one.get("tokens") for one in told if "tokens" in one] == [40, 12, 5, 7]
    assert told[0]["seconds"] > 0 and told[0]["rss"] > 1 << 20
    assert "256" in told[3]["error"] and "257" in told[7]["error"]


def test_serving_as_a_process(tiny: Path) -> None:
    words = [sys.executable, "-m", "onecard", "bench", str(tiny), "--serve", "--threads", "1"]
    done = subprocess.run(words, input="prompt 8\n", capture_output=True, text=True, check=True)
    ready, answer = done.stdout.splitlines()
    assert ready == "ready" and json.loads(answer)["tokens"] == 8


def test_the_verb(
    tiny: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "probe", lambda refresh: ROOF)
    words = (
        "bench",
        tiny,
        "--prompt",
        8,
        "--prompt",
        16,
        "--decode",
        4,
        "--batch",
        1,
        "--repeat",
        1,
    )
    assert call(*words, "--threads", 1, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    whats = {row["what"] for row in report["rows"]}
    assert {"prompt_tokens_per_second", "decode_tokens_per_second", "time_to_first_token",
            "peak_memory_bytes", "bandwidth_share", "operations_share"} <= whats  # fmt: skip
    assert report["environment"]["threads"] == 1
    assert call(*words) == 0
    assert "would allow" in " ".join(capsys.readouterr().out.split())
    assert call(*words, "--against", tiny, "--cache", "int8", "--exact", "down") == 0
    assert "before" in capsys.readouterr().out


def test_nothing_to_measure() -> None:
    with pytest.raises(BadRequest, match="nothing to measure"):
        Sizes(prompt=(), decode=())


@pytest.mark.parametrize("words, said", [
    (("--prompt", 9999), "context is 256"), (("--prompt", 0), "prompt is 0"), (("--repeat", 0), "repeat"),
    (("--batch", -1), "batch"), (("--threads", 0), "threads"), (("--exact", "dwn"), "did you mean 'down'"),
    (("--isa", "avx9000"), "avx9000"), (("--against", "nowhere"), "no folder"),
    (("--cache", "int5"), "int5"),
])  # fmt: skip
def test_bad_requests(tiny: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
                      words: tuple, said: str) -> None:  # fmt: skip
    monkeypatch.setattr(cpu, "probe", lambda refresh: ROOF)
    assert call("bench", tiny, *words) == 2
    error = capsys.readouterr().err
    assert said in error and 1 <= len(error.strip().splitlines()) <= 3, error


@pytest.mark.parametrize("sizes, said", [
    (Sizes((8, 300), (), (1,)), "context is 256"), (Sizes((), (8, 300), (1,)), "context is 256"),
    (Sizes((8,), (4,), (1, 513)), "512 is the most"),
])  # fmt: skip
def test_what_cannot_be_run_is_refused_before_anything_is_measured(
    tiny: Path, seen: list, sizes: Sizes, said: str
) -> None:
    with pytest.raises(BadRequest) as refused:
        bench([str(tiny)], sizes, CpuSettings(threads=1), roofs=lambda: ROOF)
    assert said in str(refused.value) and not seen


def test_sizes_refuse_nonsense() -> None:
    for bad in ({"prompt": (1 << 21,)}, {"decode": (0,)}, {"batch": ()}, {"repeat": 1001}):
        with pytest.raises(BadRequest):
            Sizes(**bad)  # type: ignore[arg-type]
    assert [str(case) for case in Sizes((8,), (4,), (1, 2)).cases()] == [
        "prompt 8", "prompt 8 x 2", "decode 4", "decode 4 x 2"
    ]  # fmt: skip
    assert benches.SERVED >= 1024
