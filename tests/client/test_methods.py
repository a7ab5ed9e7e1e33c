"""``weft methods``: the same rows as text, as JSON and as a table between two markers of a file."""

import json

import pytest

from weft.adapters_store.formats import served
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.refused import REFUSED
from weft.server import cli
from weft.server.commands import methods

ROWS = (
    Served("LoRA", "arXiv 2106.09685", "low_rank", "PEFT LORA", survey=True, refuses="experts"),
    Served("KaSA", "arXiv 2412.06071", "low_rank", "PEFT LORA, kasa_config", counts_as="LoRA"),
    Served("BD-LoRA", "PEFT 0.21", "low_rank", "PEFT LORA, use_bdlora"),
    Served("PiSSA, OLoRA", "2404.02948, 2406.01775", "low_rank", "PEFT LORA, init_lora_weights"),
)


def test_people_see_every_method_and_every_refusal(capsys):
    assert cli.main(["methods"]) == 0
    out, err = capsys.readouterr()
    for row in served():
        assert any(line.startswith(row.name) and row.format in line for line in out.splitlines()), row
    for name in REFUSED:
        assert f"\n{name}" in out
    assert err.endswith("are of the survey arXiv 2303.15647.\n")


def test_programs_get_one_json_object(capsys):
    assert cli.main(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["served"]) == len(served())
    assert {"name", "reference", "operators", "format", "survey", "refuses", "counts_as"} == set(found["served"][0])
    assert {each["peft_type"]: each["why"] for each in found["refused"]} == dict(REFUSED)


def test_the_table_marks_the_survey_and_links_papers():
    lines = methods.markdown(ROWS).splitlines()
    assert lines[2:6] == [
        "| LoRA * | PEFT LORA | low_rank | [2106.09685](https://arxiv.org/abs/2106.09685) | experts |",
        "| KaSA | PEFT LORA, kasa_config | low_rank | [2412.06071](https://arxiv.org/abs/2412.06071) |  |",
        "| BD-LoRA | PEFT LORA, use_bdlora | low_rank | PEFT 0.21 |  |",
        "| PiSSA, OLoRA | PEFT LORA, init_lora_weights | low_rank | "
        "[2404.02948](https://arxiv.org/abs/2404.02948), [2406.01775](https://arxiv.org/abs/2406.01775) |  |",
    ]
    assert lines[7] == "3 methods, of which the 1 with a * are of the survey arXiv 2303.15647."


def test_the_table_is_put_between_its_markers_and_nothing_else_changes(tmp_path, capsys):
    file = tmp_path / "README.md"
    file.write_text(f"above\n{methods.BEGIN}\nold\n{methods.END}\nbelow\n")
    assert cli.main(["methods", "--markdown", str(file)]) == 0
    assert file.read_text() == f"above\n{methods.BEGIN}\n{methods.markdown(served())}{methods.END}\nbelow\n"
    before = file.read_text()
    assert cli.main(["methods", "--markdown", str(file)]) == 0
    assert file.read_text() == before
    assert cli.main(["methods", "--markdown"]) == 0
    assert capsys.readouterr().out == methods.markdown(served())


@pytest.mark.parametrize("text", ["no markers", methods.BEGIN, f"{methods.END}\n{methods.BEGIN}"])
def test_a_file_without_markers_is_left_alone(tmp_path, capsys, text):
    file = tmp_path / "README.md"
    file.write_text(text)
    assert cli.main(["methods", "--markdown", str(file)]) == 2
    assert f"expected a line {methods.BEGIN} and, below it, a line {methods.END}" in capsys.readouterr().err
    assert file.read_text() == text


def test_a_missing_file_is_said_to_be_missing(tmp_path, capsys):
    assert cli.main(["methods", "--markdown", str(tmp_path / "none.md")]) == 2
    assert "got: No such file or directory" in capsys.readouterr().err
