"""The committed stubs are what the committed contract generates, and the contract says what it must."""

import re
from pathlib import Path

import pytest

from weft.proto import generate
from weft.proto.v1 import adapters_pb2, common_pb2, inference_pb2, server_pb2

V1 = Path(generate.__file__).parent / "v1"
MODULES = (adapters_pb2, common_pb2, inference_pb2, server_pb2)


def test_the_stubs_are_fresh():
    fresh = generate.stubs()
    assert set(fresh) == {path.name for path in V1.glob("*_pb2*")}
    stale = [name for name, text in fresh.items() if (V1 / name).read_text() != text]
    assert not stale, "run `make proto`"


def test_every_file_of_the_contract_has_stubs():
    assert {path.stem for path in V1.glob("*.proto")} == {Path(module.DESCRIPTOR.name).stem for module in MODULES}


@pytest.mark.parametrize("path", sorted(V1.glob("*.proto")), ids=lambda path: path.name)
def test_every_name_of_the_contract_has_a_comment(path):
    lines = path.read_text().splitlines()
    named = re.compile(r"\s*(message|enum|service|rpc|oneof|optional|repeated|map<|\w+ \w+ = \d+|[A-Z_]+ = \d+)")
    bare = [
        line for i, line in enumerate(lines)
        if named.match(line) and not lines[i - 1].lstrip().startswith("//")
    ]  # fmt: skip
    assert not bare


def test_every_rpc_has_messages_of_its_own():
    for module in MODULES:
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                assert method.input_type.name == f"{method.name}Request"
                assert method.output_type.name == f"{method.name}Response"


def test_every_enum_begins_with_unspecified():
    for module in MODULES:
        for name, enum in module.DESCRIPTOR.enum_types_by_name.items():
            prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper()
            assert enum.values_by_number[0].name == f"{prefix}_UNSPECIFIED"
            assert all(value.name.startswith(f"{prefix}_") for value in enum.values)
