"""Between text and token ids: encoding, chat templates, decoding as tokens come, stop strings.

Uses the ``tokenizers`` library and never transformers, whose tokenizer classes bring torch with them.
"""

import json
import logging
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import jinja2
import tokenizers
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from weft.server.config import ConfigError
from weft.server.errors import InvalidRequest

logger = logging.getLogger(__name__)

# what a decoder writes for bytes that are not (yet) a character
REPLACEMENT = "\ufffd"
# a character has at most four bytes, and a token at least one
CHARACTER_TOKENS_MAX = 4
# what a template may do wrong with messages that its author did not think of
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class Tokenizer:
    """The backbone's tokenizer and chat template, as they lie in its folder."""

    def __init__(self, backend: tokenizers.Tokenizer, template: "ChatTemplate | None" = None) -> None:
        self.template = template
        self._backend = backend
        # a saved tokenizer may carry the limits of its training
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self._special = frozenset(token for token, each in added.items() if each.special)
        self._longest_characters = max(map(len, backend.get_vocab()), default=1)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer | None":
        """Read ``tokenizer.json``, and the chat template where there is one; None when there is no tokenizer.

        Raises ConfigError naming the file that cannot be read.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            # from_file has no narrower type for what it cannot read than Exception
            backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{path} must be a tokenizer that this version of tokenizers reads, got: {error}"
            ) from None
        return cls(backend, ChatTemplate.load(folder))

    def characters_max(self, tokens: int) -> int:
        """More characters than this cannot be so few tokens: no token stands for more than the longest one does."""
        return tokens * self._longest_characters

    def encode(self, text: str) -> tuple[int, ...]:
        """Encode a prompt with the special tokens that the tokenizer adds."""
        return tuple(self._backend.encode(text, add_special_tokens=True).ids)

    def encode_chat(self, template: "ChatTemplate", messages: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        """Encode a conversation of (role, content); the template writes the special tokens itself."""
        return tuple(self._backend.encode(template.render(messages), add_special_tokens=False).ids)

    def shows(self, token: int) -> bool:
        """Whether a token can have text: special ones and ids that only pad the vocabulary have none."""
        return token not in self._special and self._backend.id_to_token(token) is not None

    def decode(self, ids: Sequence[int]) -> str:
        """Decode tokens, leaving out special ones."""
        return self._backend.decode(list(ids), skip_special_tokens=True)


class ChatTemplate:
    """A chat template, run in a sandbox: it comes with the backbone, what it renders comes from callers."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._template = environment.from_string(source)
        self._special_tokens = special_tokens

    @classmethod
    def load(cls, folder: Path) -> "ChatTemplate | None":
        """Read the template from ``chat_template.jinja`` or ``tokenizer_config.json``; None when neither has one."""
        settings: dict[str, object] = {}
        path = folder / "tokenizer_config.json"
        if path.is_file():
            settings = _read_settings(path)
        source = _source(folder, settings)
        if source is None:
            return None
        tokens = {key: _content(value) for key, value in settings.items() if key.endswith("_token")}
        try:
            return cls(source, {key: text for key, text in tokens.items() if text is not None})
        except jinja2.TemplateError as error:
            logger.warning("the backbone's chat template is not served: %s", error)
            return None

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """Render a conversation up to where the assistant's turn begins."""
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            return self._template.render(messages=turns, add_generation_prompt=True, **self._special_tokens)
        except TEMPLATE_ERRORS as error:
            text = f"expected messages that the backbone's chat template accepts, got: {error}"
            raise InvalidRequest(text, field="chat.messages") from None


class GenerationTag(Extension):
    """``{% generation %}``, which marks what a model learns from in training; serving just renders what is inside."""

    tags = {"generation"}  # noqa: RUF012  (declared by the base class)

    def parse(self, parser: Parser) -> Node | list[Node]:
        """Return what stands between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _read_settings(path: Path) -> dict[str, object]:
    try:
        found = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} must be JSON, got: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must be a JSON object, got {type(found).__name__}")
    return found


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} must be text in UTF-8, got: {error}") from None


def _source(folder: Path, settings: dict[str, object]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read_text(path)
    source = settings.get("chat_template")
    if isinstance(source, list):
        # several templates by name; the others are for tools and retrieval
        source = {each.get("name"): each.get("template") for each in source}.get("default")
    return source if isinstance(source, str) else None


def _content(token: object) -> str | None:
    """Text of a special token, which is saved as text or as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


class Detokenizer:
    """Turns tokens into text as they come; of valid UTF-8, joined, the same text as all tokens decoded at once.

    A token alone does not say what it decodes to: it may hold part of a character, and decoders treat the
    first token of a text differently. So a window that starts at the tokens given out last is decoded with
    and without the new ones, and the difference is given out unless it ends in the middle of a character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        # tokens at the window's start whose text was given out, and that text
        self._given = 0
        self._given_text = ""

    def feed(self, token: int) -> str:
        """Add a token and return the text that is certain now."""
        if not self._tokenizer.shows(token):
            return ""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        if not text.endswith(REPLACEMENT):
            return self._give(len(self._window), text)
        if len(self._window) - self._given < CHARACTER_TOKENS_MAX:
            return ""
        # no character is this long: all but the last tokens are what they are
        stop = len(self._window) - CHARACTER_TOKENS_MAX + 1
        return self._give(stop, self._tokenizer.decode(self._window[:stop]))

    def flush(self) -> str:
        """Return the rest, with replacement characters for what stayed incomplete."""
        return self._give(len(self._window), self._tokenizer.decode(self._window))

    def _give(self, stop: int, text: str) -> str:
        fresh = text[len(self._given_text) :]
        if fresh:
            self._window = self._window[self._given :]
            self._given = stop - self._given
            self._given_text = self._tokenizer.decode(self._window[: self._given])
        return fresh


class StopStrings:
    """Finds the first stop string that is completed, however the text is cut into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Add text; return what can be shown, and whether a stop string was completed (then nothing follows)."""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            return text[: min(found)[1]], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """Return what was held back: it did not become a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that a stop string could begin with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
