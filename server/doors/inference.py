"""``InferenceService``: requests become tickets, tickets become messages."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from weft.adapters_store.errors import AdapterInvalid
from weft.proto.v1.inference_pb2 import (
    Delta,
    EffectiveParams,
    Finished,
    FinishReason,
    GenerateRequest,
    GenerateResponse,
    Started,
    StreamGenerateRequest,
    StreamGenerateResponse,
    Usage,
)
from weft.server import validation
from weft.server.completion import Completion
from weft.server.doors.edge import Call
from weft.server.engine import messages
from weft.server.engine.messages import EngineInfo, Submit
from weft.server.errors import DeadlineExceeded, InvalidRequest
from weft.server.registration import Registrar
from weft.server.relay import Relay
from weft.server.text import Tokenizer
from weft.server.threads import Threads
from weft.server.ticket import Ticket

logger = logging.getLogger(__name__)

# longer texts are encoded in a thread: the event loop must not wait for them
ENCODE_BYTES_MAX = 4096
REASONS = {
    messages.FinishReason.STOP: FinishReason.FINISH_REASON_STOP,
    messages.FinishReason.LENGTH: FinishReason.FINISH_REASON_LENGTH,
}


@dataclass(frozen=True, slots=True)
class Job:
    """An admitted request."""

    ticket: Ticket
    completion: Completion
    started: Started

    def usage(self) -> Usage:
        """Token counts so far."""
        prompt_tokens = len(self.ticket.submit.prompt)
        return Usage(prompt_tokens=prompt_tokens, completion_tokens=self.completion.completion_tokens)


class InferenceService:
    """Generates text."""

    def __init__(
        self,
        relay: Relay,
        registrar: Registrar,
        tokenizer: Tokenizer | None,
        threads: Threads,
        *,
        new_tokens_default: int,
        duration_s_max: float,
    ) -> None:
        self._relay = relay
        self._registrar = registrar
        self._tokenizer = tokenizer
        self._threads = threads
        self._new_tokens_default = new_tokens_default
        self._duration_s_max = duration_s_max

    async def Generate(self, request: GenerateRequest, call: Call) -> GenerateResponse:
        """Answer with the whole completion."""
        job = await self._admit(request, call)
        response = GenerateResponse(started=job.started)
        text: list[str] = []
        with job.ticket:
            async with job.completion as completion:
                finish = None
                while finish is None:
                    piece = await completion.take()
                    text.append(piece.text)
                    response.token_ids.extend(piece.tokens)
                    finish = piece.finish
        response.text = "".join(text)
        response.reason = REASONS[finish]
        response.usage.CopyFrom(job.usage())
        return response

    async def StreamGenerate(
        self, request: StreamGenerateRequest, call: Call
    ) -> AsyncGenerator[StreamGenerateResponse, None]:
        """Answer with the completion as it grows."""
        with _fields_under("request"):
            job = await self._admit(request.request, call)
            with job.ticket:
                async with job.completion as completion:
                    yield StreamGenerateResponse(started=job.started)
                    finish = None
                    while finish is None:
                        piece = await completion.take()
                        if piece.tokens or piece.text:
                            yield StreamGenerateResponse(delta=Delta(text=piece.text, token_ids=piece.tokens))
                        finish = piece.finish
            yield StreamGenerateResponse(finished=Finished(reason=REASONS[finish], usage=job.usage()))

    async def _admit(self, request: GenerateRequest, call: Call) -> Job:
        """Validate a request and queue it; nothing is held before, and nothing waits after."""
        self._relay.admit()
        duration_s = call.time_s(self._duration_s_max)
        expires_s = asyncio.get_running_loop().time() + duration_s
        info = self._relay.engine()
        wish = validation.read_wish(request, info, self._tokenizer)
        prompt = await self._encode(request, info, duration_s)
        chosen = self._registrar.resolve(wish.adapters)
        taken = len(prompt) + chosen.context_tokens
        new_tokens = validation.fit_new_tokens(request, taken, info, self._new_tokens_default)
        submit = Submit(
            id=self._relay.next_id(),
            prompt=prompt,
            max_new_tokens=new_tokens,
            sampling=wish.sampling,
            adapter=chosen.digest,
            stop_ids=wish.stop_ids,
            members=chosen.members,
        )
        started = Started(
            request_id=wish.request_id,
            adapter_digest=submit.adapter or "",
            prompt_tokens=len(prompt),
            effective=EffectiveParams(
                max_new_tokens=new_tokens,
                temperature=wish.sampling.temperature,
                top_k=wish.sampling.top_k,
                top_p=wish.sampling.top_p,
                seed=wish.sampling.seed,
            ),
        )
        logger.debug("request %r is %s to the engine", wish.request_id, submit.id)
        ticket = self._relay.submit(submit, chosen.names)
        return Job(ticket, Completion(ticket, self._tokenizer, wish.stops, duration_s, expires_s), started)

    async def _encode(self, request: GenerateRequest, info: EngineInfo, duration_s: float) -> tuple[int, ...]:
        """Encode the prompt, beside the event loop when it is long; meanwhile it waits in the queue."""
        size = validation.prompt_bytes(request)
        if size <= ENCODE_BYTES_MAX:
            return validation.read_prompt(request, info, self._tokenizer)
        read = validation.read_prompt
        try:
            # a token has a byte at least, and what does not fit the context is refused
            with self._relay.place(min(size, info.context_tokens)):
                async with asyncio.timeout(duration_s):
                    return await self._threads.run_while_wanted(read, request, info, self._tokenizer)
        except TimeoutError:
            raise DeadlineExceeded(f"prompt was not encoded after {duration_s:g} s") from None


@contextmanager
def _fields_under(parent: str) -> Iterator[None]:
    """Name the fields of a nested message as the caller sees them."""
    try:
        yield
    except (InvalidRequest, AdapterInvalid) as error:
        error.field = f"{parent}.{error.field}" if error.field else parent
        raise
