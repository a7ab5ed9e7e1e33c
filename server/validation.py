"""The one validator: turns what a caller sent into what the engine runs, or says which field is wrong.

Every limit of a request is here. Order: cheap checks of single fields first, then the prompt, which must be
encoded, then what must hold between fields.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from weft.adapters_store.entry import check_name
from weft.proto.v1 import adapters_pb2, inference_pb2
from weft.server.engine.messages import EngineInfo, Sampling
from weft.server.errors import InvalidRequest, PromptTooLong, TokenizerMissing, UploadTooLarge
from weft.server.text import Tokenizer

ADAPTERS_MAX = 8
STOPS_MAX = 16
STOP_BYTES_MAX = 256
REQUEST_ID_CHARACTERS_MAX = 128
TEMPERATURE_MAX = 100.0
# below this the division of logits leaves the range of floats; 0 says what is meant
TEMPERATURE_MIN = 0.001
TOP_K_MAX = 2**31 - 1
CHUNK_BYTES_MAX = 1 << 20
CHUNKS_MAX = 1 << 16
CONFIG_BYTES_MAX = 1 << 20
PAGE_SIZE_MAX = 1000
PAGE_SIZE_DEFAULT = 100


@dataclass(frozen=True, slots=True)
class Wish:
    """What a caller asked for, with defaults filled in; all but the prompt and the number of tokens.

    adapters:  names and weights, in order
    """

    request_id: str
    sampling: Sampling
    stops: tuple[str, ...]
    stop_ids: frozenset[int]
    adapters: tuple[tuple[str, float], ...]


def read_wish(request: inference_pb2.GenerateRequest, info: EngineInfo, tokenizer: Tokenizer | None) -> Wish:
    """Check every field of a request but its prompt and token count; unset ones take the backbone's defaults."""
    return Wish(
        request_id=_request_id(request.request_id),
        sampling=_sampling(request.sampling, info.default_sampling),
        stops=_stops(request.stop, tokenizer),
        stop_ids=frozenset() if request.ignore_eos else frozenset(info.eos_ids),
        adapters=_adapters(request),
    )


def prompt_bytes(request: inference_pb2.GenerateRequest) -> int:
    """Bytes of text that must be encoded: what decides whether that may happen on the event loop."""
    return len(request.text) + sum(len(each.content) + len(each.role) for each in request.chat.messages)


def read_prompt(
    request: inference_pb2.GenerateRequest, info: EngineInfo, tokenizer: Tokenizer | None
) -> tuple[int, ...]:
    """Return the prompt's token ids, at least one, each in the vocabulary. May take long for long texts."""
    match request.WhichOneof("prompt"):
        case "text":
            ids = _text(request.text, tokenizer, info.context_tokens)
        case "tokens":
            if len(request.tokens.ids) > info.context_tokens:
                raise _too_long(f"{len(request.tokens.ids)} tokens", info.context_tokens, "prompt")
            ids = tuple(request.tokens.ids)
            if ids and max(ids) >= info.vocabulary:
                at = next(i for i, each in enumerate(ids) if each >= info.vocabulary)
                text = f"token ids must be < {info.vocabulary}, got {ids[at]}"
                raise InvalidRequest(text, field=f"tokens.ids[{at}]")
        case "chat":
            ids = _chat(request.chat, tokenizer, info.context_tokens)
        case _:
            raise InvalidRequest("expected one of text, tokens and chat, got none", field="prompt")
    if not ids:
        raise InvalidRequest("expected a prompt of at least one token, got none", field="prompt")
    return ids


def fit_new_tokens(request: inference_pb2.GenerateRequest, prompt_tokens: int, info: EngineInfo, default: int) -> int:
    """Return how many tokens may be generated. An unset number is the default, or what the context leaves."""
    room = info.context_tokens - prompt_tokens
    if room < 1:
        raise _too_long(f"{prompt_tokens} tokens", info.context_tokens, "prompt")
    if not request.HasField("max_new_tokens"):
        return min(default, room)
    wanted = request.max_new_tokens
    if wanted < 1:
        raise InvalidRequest(f"max_new_tokens must be >= 1, got {wanted}", field="max_new_tokens")
    if wanted > room:
        text = f"prompt of {prompt_tokens} tokens leaves room for {room}, got max_new_tokens {wanted}"
        raise PromptTooLong(text, field="max_new_tokens")
    return wanted


def _too_long(got: str, context_tokens: int, field: str) -> PromptTooLong:
    return PromptTooLong(f"prompt must leave room in a context of {context_tokens} tokens, got {got}", field=field)


def _adapters(request: inference_pb2.GenerateRequest) -> tuple[tuple[str, float], ...]:
    if not request.adapters:
        return ((check_name(request.adapter, "adapter"), 1.0),) if request.adapter else ()
    if request.adapter:
        raise InvalidRequest("expected adapter or adapters, got both", field="adapters")
    if len(request.adapters) > ADAPTERS_MAX:
        text = f"expected at most {ADAPTERS_MAX} adapters, got {len(request.adapters)}"
        raise InvalidRequest(text, field="adapters")
    for i, each in enumerate(request.adapters):
        if not each.name:
            raise InvalidRequest("expected the name of an adapter, got none", field=f"adapters[{i}].name")
        check_name(each.name, f"adapters[{i}].name")
        if not isfinite(each.weight):
            text = f"weight must be finite, got {each.weight}"
            raise InvalidRequest(text, field=f"adapters[{i}].weight")
    return tuple((each.name, each.weight if each.HasField("weight") else 1.0) for each in request.adapters)


def _request_id(text: str) -> str:
    if not text:
        return secrets.token_hex(16)
    if len(text) > REQUEST_ID_CHARACTERS_MAX or not text.isprintable():
        expected = f"at most {REQUEST_ID_CHARACTERS_MAX} printable characters"
        raise InvalidRequest(f"request_id must be {expected}, got {len(text)} characters", field="request_id")
    return text


def _sampling(params: inference_pb2.SamplingParams, default: Sampling) -> Sampling:
    temperature = params.temperature if params.HasField("temperature") else default.temperature
    top_k = params.top_k if params.HasField("top_k") else default.top_k
    top_p = params.top_p if params.HasField("top_p") else default.top_p
    seed = params.seed if params.HasField("seed") else secrets.randbits(64)
    if temperature != 0 and not TEMPERATURE_MIN <= temperature <= TEMPERATURE_MAX:
        text = f"temperature must be 0 or in [{TEMPERATURE_MIN}, {TEMPERATURE_MAX:g}], got {temperature}"
        raise InvalidRequest(text, field="sampling.temperature")
    if top_k > TOP_K_MAX:
        raise InvalidRequest(f"top_k must be <= {TOP_K_MAX}, got {top_k}", field="sampling.top_k")
    if not 0 < top_p <= 1:
        raise InvalidRequest(f"top_p must be in (0, 1], got {top_p}", field="sampling.top_p")
    # abs: a temperature of -0.0 is 0
    return Sampling(temperature=abs(temperature), top_k=top_k, top_p=top_p, seed=seed)


def _stops(stops: Sequence[str], tokenizer: Tokenizer | None) -> tuple[str, ...]:
    if len(stops) > STOPS_MAX:
        raise InvalidRequest(f"expected at most {STOPS_MAX} stop strings, got {len(stops)}", field="stop")
    for i, stop in enumerate(stops):
        size = len(stop.encode())
        if not 1 <= size <= STOP_BYTES_MAX:
            text = f"a stop string must have 1 to {STOP_BYTES_MAX} bytes, got {size}"
            raise InvalidRequest(text, field=f"stop[{i}]")
    if stops and tokenizer is None:
        raise TokenizerMissing("stop strings need a tokenizer, and this backbone came without", field="stop")
    return tuple(stops)


def _text(text: str, tokenizer: Tokenizer | None, context_tokens: int) -> tuple[int, ...]:
    if tokenizer is None:
        raise TokenizerMissing("expected a prompt of tokens: this backbone came without tokenizer", field="text")
    if not text:
        raise InvalidRequest("expected a prompt of at least one character, got none", field="text")
    if len(text) > tokenizer.characters_max(context_tokens):
        raise _too_long(f"{len(text)} characters", context_tokens, "text")
    return tokenizer.encode(text)


def _chat(chat: inference_pb2.ChatMessages, tokenizer: Tokenizer | None, context_tokens: int) -> tuple[int, ...]:
    if tokenizer is None or tokenizer.template is None:
        raise TokenizerMissing("expected text or tokens: this backbone came without chat template", field="chat")
    if not chat.messages:
        raise InvalidRequest("expected at least one message, got none", field="chat.messages")
    for i, message in enumerate(chat.messages):
        if not message.role:
            raise InvalidRequest("expected a role, got none", field=f"chat.messages[{i}].role")
    messages = [(each.role, each.content) for each in chat.messages]
    characters = sum(len(role) + len(content) for role, content in messages)
    if characters > tokenizer.characters_max(context_tokens):
        raise _too_long(f"{characters} characters", context_tokens, "chat.messages")
    return tokenizer.encode_chat(tokenizer.template, messages)


def read_header(header: adapters_pb2.AdapterHeader, adapter_bytes_max: int) -> bytes | None:
    """Check the header of an upload; return the sha256 that it announces, None when it announces none."""
    check_name(header.name, "header.name")
    if len(header.config) > CONFIG_BYTES_MAX:
        text = f"config must be at most {CONFIG_BYTES_MAX} bytes, got {len(header.config)}"
        raise InvalidRequest(text, field="header.config")
    if header.weights_size < 1:
        raise InvalidRequest("weights_size must be >= 1, got 0", field="header.weights_size")
    if header.weights_size > adapter_bytes_max:
        text = f"weights_size must be <= adapter_bytes_max {adapter_bytes_max}, got {header.weights_size}"
        raise UploadTooLarge(text, field="header.weights_size")
    if not header.weights_sha256:
        return None
    digest = _sha256(header.weights_sha256)
    if digest is None:
        text = f"weights_sha256 must be 64 hex digits, got {len(header.weights_sha256)} characters"
        raise InvalidRequest(text, field="header.weights_sha256")
    return digest


def _sha256(text: str) -> bytes | None:
    if len(text) != 64 or not text.isascii() or not text.isalnum():
        return None
    try:
        return bytes.fromhex(text)
    except ValueError:
        return None


def read_page_size(page_size: int) -> int:
    """Return the size of a page; 0 takes the default."""
    if page_size > PAGE_SIZE_MAX:
        raise InvalidRequest(f"page_size must be <= {PAGE_SIZE_MAX}, got {page_size}", field="page_size")
    return page_size or PAGE_SIZE_DEFAULT
