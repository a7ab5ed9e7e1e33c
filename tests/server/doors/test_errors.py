"""The table of errors: complete, within the codes that callers were promised, and fit for the wire."""

import json

import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st

from weft.adapters_store import errors as store
from weft.server import errors
from weft.server.doors.status import DETAILS_KEY, PUSHBACK_KEY, clipped, verdict
from weft.server.engine.messages import Failure
from weft.server.relay import raised

NEVER = {StatusCode.OK, StatusCode.UNKNOWN, StatusCode.CANCELLED, StatusCode.UNIMPLEMENTED, StatusCode.OUT_OF_RANGE}


def leaves(kind: type[Exception]) -> list[type[Exception]]:
    below = kind.__subclasses__()
    return [leaf for each in below for leaf in leaves(each)] if below else [kind]


EVERY = leaves(errors.ServerError) + leaves(store.AdapterError)


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_every_error_has_its_own_row(kind):
    assert kind in errors.TABLE
    assert errors.TABLE[kind].code not in NEVER


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_every_error_is_in_the_docstring_of_its_tree(kind):
    module = errors if issubclass(kind, errors.ServerError) else store
    assert kind.__name__ in str(module.__doc__)


def test_unavailable_says_when_to_come_back_and_nothing_else_does():
    for row in errors.TABLE.values():
        assert (row.retry_after_s is not None) == (row.code is StatusCode.UNAVAILABLE)


def test_one_reason_means_one_code():
    codes: dict[str, StatusCode] = {}
    for row in errors.TABLE.values():
        assert codes.setdefault(row.reason, row.code) is row.code


@pytest.mark.parametrize("failure", Failure)
def test_every_failure_of_the_engine_has_a_row(failure):
    assert errors.row(raised(failure, "text")) is not None


def details(error: Exception) -> status_pb2.Status:
    return status_pb2.Status.FromString(dict(verdict(error).metadata)[DETAILS_KEY])


def test_a_bug_tells_the_caller_an_incident_and_nothing_else():
    end = verdict(KeyError("/secret/path"))
    assert (end.code, end.reason) == (StatusCode.INTERNAL, "BUG")
    assert "secret" not in end.text
    assert b"secret" not in details(KeyError("/secret/path")).SerializeToString()
    assert end.text != verdict(KeyError("/secret/path")).text


def test_an_io_error_of_the_store_keeps_its_reason_and_hides_its_text():
    end = verdict(store.StoreIOError("writing: Input/output error"))
    assert (end.code, end.reason) == (StatusCode.INTERNAL, "STORE_IO_ERROR")
    assert "Input" not in end.text


def test_an_adapter_that_is_not_there_is_named():
    rich = details(store.AdapterNotFound("name: expected a registered adapter, got 'x'", "name", "x"))
    about = error_details_pb2.ResourceInfo()
    assert rich.details[1].Unpack(about)
    assert (about.resource_type, about.resource_name) == ("weft.v1.Adapter", "x")


def test_a_precondition_and_a_quota_say_what_is_unmet():
    unmet, over = error_details_pb2.PreconditionFailure(), error_details_pb2.QuotaFailure()
    assert details(store.AdapterIncompatible("why", "adapter")).details[1].Unpack(unmet)
    (violation,) = unmet.violations
    assert (violation.type, violation.subject, violation.description) == ("ADAPTER_INCOMPATIBLE", "adapter", "why")
    assert details(errors.UploadTooLarge("why", field="header.weights_size")).details[1].Unpack(over)
    assert [(each.subject, each.description) for each in over.violations] == [("header.weights_size", "why")]


def test_field_violations_name_the_field():
    rich = details(errors.InvalidRequest("top_p must be in (0, 1], got 2", field="sampling.top_p"))
    bad = error_details_pb2.BadRequest()
    assert rich.details[1].Unpack(bad)
    assert [each.field for each in bad.field_violations] == ["sampling.top_p"]


def test_retry_info_comes_with_pushback():
    end = verdict(errors.Overloaded("full"))
    retry = error_details_pb2.RetryInfo()
    assert details(errors.Overloaded("full")).details[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 1000
    assert dict(end.metadata)[PUSHBACK_KEY] == "1000"


@given(st.text(st.characters(codec=None)), st.integers(10, 50))
def test_texts_are_cut_to_valid_utf8_that_fits(text, limit):
    cut = clipped(text, limit)
    assert len(cut.encode("utf-8")) <= limit


def test_the_largest_refusal_fits_into_the_metadata_of_grpc():
    surrogates = json.loads('"\\ud800"') * 10000
    end = verdict(store.AdapterInvalid("é" * 10000 + surrogates, "ü" * 10000))
    size = 3 * len(end.text.encode()) + sum(len(key) + len(value) * 4 // 3 for key, value in end.metadata)
    assert size < 8192
