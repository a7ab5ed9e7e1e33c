"""`weft bench methods` on a tiny model: what its report and its table hold."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.backbones import build
from weft.bench import methods
from weft.bench.clock import Clock
from weft.server.backbone.model import Backbone
from weft.server.engine.config import EngineConfig
from weft.server.engine.messages import Digest, RequestId, Submit
from weft.server.engine.offline import OfflineEngine, RequestFailed

FIELDS = {
    "case", "words", "method", "disk_bytes", "device_bytes", "shared_bytes", "distinct", "tokens_per_s",
    "base_tokens_per_s", "of_base", "decode_ms", "base_decode_ms", "decode_of_base",
}  # fmt: skip


def test_report_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    build("llama").save_pretrained(tmp_path / "model")
    out = tmp_path / "report.json"
    sizes = ["--requests", "3", "--prompt-tokens", "6", "--new-tokens", "3", "--adapter-memory-gib", "1"]
    arguments = ["--shape", str(tmp_path / "model"), "--device", "cpu", "--dtype", "float32", *sizes]
    assert methods.main([*arguments, "--only", "LoRA", "VeRA", "--out", str(out)]) == 0
    rows = {row["case"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"methods/LoRA", "methods/VeRA"}
    for row in rows.values():
        assert set(row) == FIELDS
        assert row["distinct"] == 3
        assert min(row[key] for key in FIELDS if key.endswith(("_ms", "_s", "of_base"))) > 0
    assert rows["methods/LoRA"]["shared_bytes"] == 0
    assert rows["methods/VeRA"]["shared_bytes"] > 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if "all linears" in line]
    assert [line.split()[1] for line in lines] == ["LoRA", "VeRA"]
    for row, line in zip(rows.values(), lines, strict=True):
        assert f"{row['device_bytes']:,}" in line
        assert f"{row['decode_ms']:.1f}" in line


@pytest.mark.parametrize("said", [["--only", "LoRa"], ["--new-tokens", "1"]])
def test_what_cannot_be_measured_is_refused(said: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        methods.main(said)
    assert said[0] in capsys.readouterr().err


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[OfflineEngine]:
    config = EngineConfig(model="tiny", store=str(tmp_path), device="cpu", kv_bytes_max=1 << 20)
    engine = OfflineEngine(config, Backbone(build("llama")))
    yield engine
    engine.engine.residency.close()


def test_clock_counts_steps_in_which_all_decode(engine: OfflineEngine):
    # the third request outlives the others: its last steps are nobody's measure
    submits = [Submit(RequestId(str(i)), (5, 6, 7), new_tokens) for i, new_tokens in enumerate((4, 4, 6))]
    clock = Clock(engine, 3)
    clock.start(submits)
    steps = 1
    while clock.step():
        steps += 1
    assert steps == 6
    assert len(clock.decode_s) == 3
    assert sum(clock.decode_s) < clock.total_s
    assert not clock.step()


def test_clock_raises_what_fails(engine: OfflineEngine):
    clock = Clock(engine, 1)
    clock.start([Submit(RequestId("0"), (5, 6), 2, adapter=Digest("0" * 64))])
    with pytest.raises(RequestFailed):
        list(iter(clock.step, False))
