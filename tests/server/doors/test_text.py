"""Text and tokens: templates in their sandbox, characters made of several tokens, stop strings cut anywhere."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tests.server.doors.harness import TEMPLATE, byte_tokenizer, make_backbone
from weft.server.config import ConfigError
from weft.server.errors import InvalidRequest
from weft.server.text import ChatTemplate, Detokenizer, StopStrings, Tokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog", "déjà vu: naïve café", "日本語のテキスト", "🙂🙃 smile"]


def trained_bytes() -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    return Tokenizer(backend)


def trained_words() -> Tokenizer:
    """Words with a mark for the space before them, as sentencepiece writes them."""
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(pieces)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special[:3], show_progress=False)
    backend.train_from_iterator([f"▁{line.replace(' ', '▁')}" for line in CORPUS[:2]], trainer)
    return Tokenizer(backend)


BYTES, WORDS = trained_bytes(), trained_words()


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer)
    return "".join([detokenizer.feed(each) for each in ids]) + detokenizer.flush()


@given(st.text())
def test_a_text_streamed_token_by_token_is_the_text(text):
    ids = list(BYTES.encode(text))
    assert streamed(BYTES, ids) == BYTES.decode(ids)


@given(st.text("the quickbrownfox", max_size=40))
def test_spaces_between_words_survive_streaming(text):
    ids = list(WORDS.encode(text))
    assert streamed(WORDS, ids) == WORDS.decode(ids)


@given(st.lists(st.integers(0, 255)))
def test_bytes_that_are_no_text_stream_like_they_decode(ids):
    tokenizer = Tokenizer(byte_tokenizer())
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)


def test_no_piece_ends_inside_a_character():
    tokenizer = Tokenizer(byte_tokenizer())
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.feed(byte) for byte in "a🙂é日".encode()]
    assert pieces == ["a", "", "", "", "🙂", "", "é", "", "", "日"]
    assert detokenizer.flush() == ""


def test_an_incomplete_character_at_the_end_shows_as_a_replacement():
    assert streamed(Tokenizer(byte_tokenizer()), list("a🙂".encode())[:-1]) == "a�"


def test_the_window_stays_small_whatever_comes():
    tokenizer = Tokenizer(byte_tokenizer())
    for ids in ([0xE2] * 500, [256] * 500, [999] * 500, [0x80] * 500, [97] * 500):
        detokenizer = Detokenizer(tokenizer)
        for each in ids:
            detokenizer.feed(each)
            assert len(detokenizer._window) <= 16


def test_special_tokens_and_padding_ids_have_no_text():
    tokenizer = Tokenizer(byte_tokenizer())
    assert streamed(tokenizer, [104, 256, 105, 999]) == "hi"


@given(
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text("abc", max_size=3), max_size=12),
)
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(stops, pieces):
    text = "".join(pieces)
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    expected = text[: min(ends)[1]] if ends else text
    filtered, shown, stopped = StopStrings(stops), "", False
    for piece in pieces:
        more, stopped = filtered.feed(piece)
        shown += more
        if stopped:
            break
    if not stopped:
        shown += filtered.flush()
    assert (shown, stopped) == (expected, bool(ends))


def test_only_what_may_become_a_stop_string_is_held_back():
    filtered = StopStrings(["\n\n", "END"])
    assert filtered.feed("one\n") == ("one", False)
    assert filtered.feed("two E") == ("\ntwo ", False)
    assert filtered.feed("N") == ("", False)
    assert filtered.feed("D of it") == ("", True)


def test_a_saved_limit_of_the_tokenizer_does_not_cut_prompts():
    backend = byte_tokenizer()
    backend.enable_truncation(3)
    backend.enable_padding(length=10)
    assert len(Tokenizer(backend).encode("hello")) == 5


def test_a_folder_without_tokenizer_has_none(tmp_path):
    assert Tokenizer.load(tmp_path) is None


def test_the_template_sees_messages_and_special_tokens(tmp_path):
    template = ChatTemplate(
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}", {"bos_token": "<s>"}
    )
    assert template.render([("user", "a"), ("assistant", "b")]) == "<s>ab"


@pytest.mark.parametrize(
    ("files", "rendered"),
    [
        ({"tokenizer_config.json": {"chat_template": "A{{ eos_token }}", "eos_token": {"content": "E"}}}, "AE"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "B"}]}}, "B"),
        ({"tokenizer_config.json": {"chat_template": "A"}, "chat_template.jinja": "C"}, "C"),
        ({"tokenizer_config.json": {}}, None),
        ({}, None),
        ({"chat_template.jinja": "{% broken"}, None),
        ({"chat_template.jinja": "{% generation %}G{% endgeneration %}"}, "G"),
    ],
)
def test_the_template_is_found_where_models_keep_it(tmp_path, files, rendered):
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    template = ChatTemplate.load(tmp_path)
    assert (template.render([("user", "x")]) if template else None) == rendered


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 // 0 }}",
        "{{ messages[7].content.x }}",
        "{{ range(10000000000) }}",
    ],
)
def test_whatever_a_template_does_wrong_is_told_as_the_message_s_fault(source):
    with pytest.raises(InvalidRequest) as refused:
        ChatTemplate(source, {}).render([("user", "x")])
    assert refused.value.field == "chat.messages"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"{", b"", b"[]", b"\xff\xfe", b"[" * 100_000], ids=lambda content: content[:2])
def test_a_file_that_cannot_be_read_is_named(name, content, tmp_path):
    folder = make_backbone(tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        Tokenizer.load(folder)


def test_a_template_that_is_no_text_is_named(tmp_path):
    folder = make_backbone(tmp_path)
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja must be text in UTF-8"):
        Tokenizer.load(folder)


def test_chat_is_rendered_up_to_the_assistant_s_turn(tmp_path):
    tokenizer = Tokenizer.load(make_backbone(tmp_path))
    assert tokenizer is not None
    assert tokenizer.template is not None
    assert "add_generation_prompt" in TEMPLATE
    ids = tokenizer.encode_chat(tokenizer.template, [("system", "s"), ("user", "hi")])
    assert tokenizer.decode(ids) == "<system>s<user>hi<assistant>"


def test_the_template_s_json_keeps_letters_as_they_are():
    assert ChatTemplate("{{ messages | tojson }}", {}).render([("user", "é<")]) == '[{"role": "user", "content": "é<"}]'
