"""What Prometheus sees: the right numbers, and never more series than at the start."""

from typing import Any

import grpc
import pytest

from tests.server.doors import fake_engine
from tests.server.doors.harness import adapter_files, running, until
from weft.server.doors import door
from weft.server.engine.messages import StepStats
from weft.server.errors import TABLE
from weft.server.metrics import Metrics
from weft.server.version import VERSION, commit


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server to itself, so that its counters start at zero."""
    with running(tmp_path_factory.mktemp("metrics")) as started:
        yield started


def test_the_number_of_series_does_not_grow_with_names_requests_or_errors(served):
    before = set(served.scrape())
    for i in range(200):
        served.register(f"tenant-{i}", adapter_files(i % 5))
    for i in range(0, 200, 10):
        served.generate(ids=[5], adapter=f"tenant-{i}", max_new_tokens=2)
    for failure in range(len(fake_engine.FAILURES)):
        with pytest.raises(grpc.RpcError):
            served.generate(ids=[fake_engine.FAIL + failure], max_new_tokens=5)
    for name in ("ghost", "..", 'a"} 1\nweft_evil 1'):
        with pytest.raises(grpc.RpcError):
            served.generate(ids=[5], adapter=name)
    page = served.scrape()
    assert set(page) == before
    assert page['weft_adapters{state="active"}'] == 200
    assert not any("tenant" in name or "evil" in name for name in page)
    for i in range(200):
        served.delete(f"tenant-{i}")
    assert served.scrape()['weft_adapters{state="active"}'] == 0


def test_every_method_code_and_reason_is_there_from_the_start(served):
    page = served.scrape()
    for method in door.METHODS:
        assert f'weft_rpc_started_total{{method="{method}"}}' in page
        for code in grpc.StatusCode:
            assert f'weft_rpc_completed_total{{code="{code.name}",method="{method}"}}' in page
    for row in TABLE.values():
        assert f'weft_errors_total{{code="{row.code.name}",reason="{row.reason}"}}' in page


def grown(served, work) -> dict[str, float]:
    before = served.scrape()
    work()
    after = served.scrape()
    return {name: value - before[name] for name, value in after.items() if value != before[name]}


def test_a_request_is_counted_with_its_tokens_and_times(served):
    change = grown(served, lambda: served.generate(ids=[5] * 7, max_new_tokens=11))
    assert change["weft_prompt_tokens_total"] == 7
    assert change["weft_generation_tokens_total"] == 11
    assert change["weft_request_prompt_tokens_sum"] == 7
    assert change["weft_request_generation_tokens_sum"] == 11
    assert change['weft_requests_finished_total{finish_reason="length"}'] == 1
    assert change["weft_time_to_first_token_seconds_count"] == 1
    assert change["weft_inter_token_latency_seconds_count"] == 10
    assert change["weft_request_duration_seconds_count"] == 1
    assert change["weft_request_prefill_seconds_count"] == 1
    decode_s = change["weft_request_decode_seconds_sum"]
    assert 0 < change["weft_request_prefill_seconds_sum"] + decode_s < change["weft_request_duration_seconds_sum"]
    assert change["weft_time_per_output_token_seconds_sum"] == pytest.approx(decode_s / 10)
    assert change["weft_request_queue_seconds_sum"] == pytest.approx(0.001)
    assert change["weft_request_adapter_wait_seconds_count"] == 1
    assert change["weft_step_seconds_count"] == change["weft_batch_rows_count"] >= 11
    assert change["weft_adapter_loads_total"] == change["weft_adapter_load_seconds_count"]
    method = "weft.v1.InferenceService/Generate"
    assert change[f'weft_rpc_started_total{{method="{method}"}}'] == 1
    assert change[f'weft_rpc_completed_total{{code="OK",method="{method}"}}'] == 1
    assert change[f'weft_rpc_duration_seconds_count{{method="{method}"}}'] == 1


def ended(served, finish: str, work) -> bool:
    key = f'weft_requests_finished_total{{finish_reason="{finish}"}}'
    before = served.scrape()[key]
    work()
    until(lambda: served.scrape()[key] == before + 1)
    return True


def failing(served, **fields):
    with pytest.raises(grpc.RpcError):
        served.generate(**fields)


def cancelled(served):
    stream = served.stream(ids=[fake_engine.HANG], max_new_tokens=5)
    next(stream)
    stream.cancel()


def test_every_end_of_a_request_has_its_own_count(served):
    assert ended(served, "stop", lambda: served.generate(ids=[5], max_new_tokens=50, stop=["cd"]))
    assert ended(served, "length", lambda: served.generate(ids=[5], max_new_tokens=3))
    assert ended(served, "cancelled", lambda: cancelled(served))
    assert ended(served, "error", lambda: failing(served, ids=[fake_engine.FAIL], max_new_tokens=5))


def test_a_request_that_ran_out_of_time_has_its_own_count(tmp_path):
    with running(tmp_path, request_duration_s_max=0.3) as server:
        hanging = {"ids": [fake_engine.HANG], "max_new_tokens": 5, "timeout": None}
        assert ended(server, "deadline", lambda: failing(server, **hanging))


def test_open_streams_are_counted_by_method(served):
    key = 'weft_streams_open{method="weft.v1.InferenceService/StreamGenerate"}'
    assert served.scrape()[key] == 0
    stream = served.stream(ids=[fake_engine.HANG], max_new_tokens=5)
    next(stream)
    assert served.scrape()[key] == 1
    stream.cancel()
    until(lambda: served.scrape()[key] == 0)


def test_the_store_says_how_full_it_is(served):
    before = served.scrape()
    files = adapter_files(78)
    served.register("one", files)
    served.register("another", files)
    page = served.scrape()
    assert page["weft_store_objects"] == before["weft_store_objects"] + 1
    assert page["weft_store_bytes"] == before["weft_store_bytes"] + served.get("one").disk_bytes
    assert page["weft_store_free_bytes"] > 0
    for name in ("one", "another"):
        served.delete(name)


def test_the_fullest_step_is_remembered(served):
    streams = [served.stream(ids=[fake_engine.HANG], max_new_tokens=5) for _ in range(5)]
    until(lambda: served.scrape()["weft_batch_rows_max"] >= 5)
    for each in streams:
        each.cancel()
    served.generate(ids=[5], max_new_tokens=1)
    page = served.scrape()
    assert (page["weft_batch_rows_max"], page["weft_batch_adapters_max"]) == (5, 1)


def test_errors_are_counted_by_reason(served):
    change = grown(served, lambda: failing(served, ids=[5], max_new_tokens=0))
    assert change['weft_errors_total{code="INVALID_ARGUMENT",reason="INVALID_REQUEST"}'] == 1
    method = "weft.v1.InferenceService/Generate"
    assert change[f'weft_rpc_completed_total{{code="INVALID_ARGUMENT",method="{method}"}}'] == 1
    assert 'weft_requests_finished_total{finish_reason="error"}' not in change


def test_uploads_are_counted_in_bytes(served):
    files = adapter_files(77)
    change = grown(served, lambda: served.register("counted", files))
    assert change["weft_upload_bytes_total"] == len(files[1])
    assert change['weft_adapters{state="active"}'] == 1
    assert "weft_uploads_in_progress" not in change
    served.delete("counted")


def test_gauges_say_what_the_engine_said_last(served):
    served.generate(ids=[5], max_new_tokens=2)
    page = served.scrape()
    assert page['weft_memory_bytes{kind="backbone",tier="device"}'] == 5000
    assert page['weft_memory_bytes{kind="adapters",tier="device"}'] == 512
    assert page['weft_memory_bytes{kind="kv",tier="device"}'] == 1 << 20
    assert page['weft_memory_bytes{kind="working_set",tier="device"}'] == 64
    assert page["weft_kv_cache_usage_ratio"] == pytest.approx((1 << 20) / (1 << 30))
    assert page["weft_adapters_resident"] == 1
    assert (page["weft_engine_up"], page["weft_ready"], page["weft_draining"]) == (1, 1, 0)
    assert page['weft_kernels_info{implementation="torch"}'] == 1
    assert page['weft_kernels_info{implementation="triton"}'] == 0
    (build,) = [name for name in page if name.startswith("weft_build_info")]
    assert f'version="{VERSION}"' in build
    assert f'commit="{commit()}"' in build
    assert page["process_resident_memory_bytes"] > 0


def test_the_loop_is_never_held_up_for_long(served):
    def work() -> None:
        served.generate(text="x " * 200, max_new_tokens=20)
        served.register("loop", adapter_files(1))
        # a timer that begins now has fired by then
        until(lambda: served.scrape()[fired] >= before + 2)

    fired = "weft_event_loop_lag_seconds_count"
    before = served.scrape()[fired]
    change = grown(served, work)
    served.delete("loop")
    assert change[fired] == change['weft_event_loop_lag_seconds_bucket{le="0.5"}']


def test_only_steps_with_rows_are_steps():
    metrics = Metrics([])
    figures: dict[str, Any] = {
        "kv_bytes": 0,
        "backbone_bytes": 0,
        "adapters_bytes": 0,
        "adapters_resident": 3,
        "working_set_bytes": 0,
    }
    for rows in (0, 4, 0):
        metrics.step(StepStats(step_s=0.5, rows=rows, distinct_adapters=1, working_set_misses=2, **figures))
    read = metrics.registry.get_sample_value
    for name in ("step_seconds", "batch_rows", "batch_adapters"):
        assert read(f"weft_{name}_count") == 1
    assert (read("weft_step_seconds_sum"), read("weft_batch_rows_sum")) == (0.5, 4)
    assert (read("weft_adapters_resident"), read("weft_working_set_misses_total")) == (3, 6)
