"""Builds the messages of the contract from Python values; refuses by name what a message cannot hold.

Everything else is the server's to judge: it knows the limits and the backbone.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import SupportsIndex, TypedDict

from weft.client.errors import invalid_field
from weft.client.values import Message
from weft.proto.v1 import inference_pb2

Prompt = str | Sequence[int] | Sequence[Message]
# a name, or several in order: by their weights, in pairs with them, or alone where the weight is 1
Adapters = str | Mapping[str, float] | Sequence[str | tuple[str, float]]

UINT32_MAX = 2**32 - 1
UINT64_MAX = 2**64 - 1


class GenerateOptions(TypedDict, total=False):
    """What may be said about a generation besides the prompt; what is left out takes the server's default.

    adapter         name of a registered adapter; empty runs the bare backbone. Several at once, in this order:
                    ``{"fr-legal": 1.0, "formal": 0.5}``, or a list of names or of (name, weight)
    max_new_tokens  most tokens to generate, >= 1
    temperature     in [0, 100]; 0 is greedy
    top_k           keep only the k most likely tokens; 0 keeps all
    top_p           keep the smallest set of tokens that reaches this probability, in (0, 1]
    seed            the same seed draws the same random numbers whatever else is in the batch: the same tokens where
                    the logits are equal, which batches of other shapes may round differently
    stop            generation ends before the first of these strings
    ignore_eos      go on past end-of-sequence tokens
    request_id      names the request in the server's logs
    """

    adapter: Adapters
    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    stop: str | Sequence[str]
    ignore_eos: bool
    request_id: str


def generate_request(
    prompt: Prompt,
    *,
    adapter: Adapters = "",
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    ignore_eos: bool = False,
    request_id: str = "",
) -> inference_pb2.GenerateRequest:
    """Build the request; the options are those of ``GenerateOptions``."""
    request = inference_pb2.GenerateRequest(
        adapter=_text("adapter", adapter) if isinstance(adapter, str) else "",
        adapters=[] if isinstance(adapter, str) else _weighted(adapter),
        max_new_tokens=_unsigned("max_new_tokens", max_new_tokens, UINT32_MAX),
        sampling=inference_pb2.SamplingParams(
            temperature=None if temperature is None else float(temperature),
            top_k=_unsigned("sampling.top_k", top_k, UINT32_MAX),
            top_p=None if top_p is None else float(top_p),
            seed=_unsigned("sampling.seed", seed, UINT64_MAX),
        ),
        # one string is a sequence of strings too, of its letters: never what was meant
        stop=[_text("stop", each) for each in ([stop] if isinstance(stop, str) else stop)],
        ignore_eos=ignore_eos,
        request_id=_text("request_id", request_id),
    )
    _set_prompt(request, prompt)
    return request


def _weighted(
    adapters: Mapping[str, float] | Sequence[str | tuple[str, float]],
) -> list[inference_pb2.WeightedAdapter]:
    """One message per adapter, in order; a name alone leaves its weight to the server, which takes 1."""
    found = []
    for i, each in enumerate(adapters.items() if isinstance(adapters, Mapping) else adapters):
        try:
            name, weight = (each, None) if isinstance(each, str) else (each[0], float(each[1]))
            found.append(inference_pb2.WeightedAdapter(name=_text(f"adapters[{i}].name", name), weight=weight))
        except (TypeError, ValueError, AttributeError, IndexError):
            wanted = f"adapters[{i}] must be a name or a name and a number"
            raise invalid_field(f"adapters[{i}]", f"{wanted}, got {each!r}") from None
    return found


def _set_prompt(request: inference_pb2.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = _text("text", prompt)
        return
    messages = [each for each in prompt if isinstance(each, Message)]
    if messages and len(messages) == len(prompt):
        request.chat.messages.extend(
            inference_pb2.ChatMessage(
                role=_text("chat.messages.role", each.role),
                content=_text("chat.messages.content", each.content),
            )
            for each in messages
        )
        return
    if messages:
        raise invalid_field("chat", "prompt must be a text, token ids or Messages, got a mix of them")
    request.tokens.SetInParent()
    request.tokens.ids.extend(
        _integer("tokens.ids", each, UINT32_MAX) for each in prompt if not isinstance(each, Message)
    )


def _unsigned(field: str, value: SupportsIndex | None, maximum: int) -> int | None:
    return None if value is None else _integer(field, value, maximum)


def _integer(field: str, value: SupportsIndex, maximum: int) -> int:
    """Take any integer, numpy's included, that fits the field."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number <= maximum:
        raise invalid_field(field, f"{field} must be an integer of 0 to {maximum}, got {value!r}")
    return number


def _text(field: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise invalid_field(field, f"{field} must be valid Unicode, got a lone surrogate") from None
    return value
