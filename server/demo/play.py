"""What the demonstration does with a running server, all of it through the client: register, stream, ask, count."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from weft.client import Adapter, AsyncClient, AsyncStream, Completion, Delta, ServerInfo
from weft.server.demo import tasks

BASE = ""
SEED = 11
# one word each is shown, all are counted
QUESTIONS_PER_ADAPTER = 12
QUESTIONS_TO_BASE = 16
# long enough that an adapter can be registered and asked meanwhile
STREAM_TOKENS = 480
STREAM_TOKENS_BEFORE = 16
ACCURACY_MIN = 0.98
ACCURACY_MIN_OF = {"IA3": 0.95}
BASE_ACCURACY_MAX = 0.05
READY_S_MAX = 60.0
REQUEST_S_MAX = 60.0


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out word, whom to ask, and the right answer. No adapter means the bare backbone."""

    adapter: str
    prompt: str
    expected: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    question: Question
    text: str
    tokens: int

    @property
    def right(self) -> bool:
        """Whether it is the right answer, to the letter."""
        return self.text == self.question.expected


@dataclass(frozen=True, slots=True)
class Score:
    """How one adapter, or the bare backbone (no ``adapter``), did; ``example`` is the first of its answers."""

    name: str
    adapter: Adapter | None
    asked: int
    right: int
    example: Answer

    @property
    def share(self) -> float:
        """Right answers as a share of all."""
        return self.right / self.asked

    @property
    def bar(self) -> float:
        """The share that an adapter must reach, and that the bare backbone must not exceed."""
        if self.adapter is None:
            return BASE_ACCURACY_MAX
        return ACCURACY_MIN_OF.get(self.adapter.method, ACCURACY_MIN)

    @property
    def passed(self) -> bool:
        """Whether it did what it should."""
        return self.share <= self.bar if self.adapter is None else self.share >= self.bar


@dataclass(frozen=True, slots=True)
class LateArrival:
    """The adapter that was registered while a stream ran; counts are tokens of that stream."""

    adapter: str
    answer: Answer
    registered_s: float
    tokens_before: int
    tokens_while_registering: int
    tokens_until_answer: int
    tokens_after: int

    @property
    def passed(self) -> bool:
        """Whether the answer was right and came before the stream ended."""
        return self.answer.right and self.tokens_after > 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that the demonstration found."""

    late: LateArrival
    scores: tuple[Score, ...]
    batch_s: float
    batch_tokens: int
    info: ServerInfo

    @property
    def passed(self) -> bool:
        """Whether everything went as it should."""
        return self.late.passed and all(each.passed for each in self.scores)


async def play(address: str, progress: Callable[[int, int], None]) -> Outcome:
    """Do all of it. ``progress(done, total)`` counts registered adapters."""
    async with AsyncClient(address) as client:
        await client.wait_ready(READY_S_MAX)
        adapters: dict[str, Adapter] = {}
        *early, late = tasks.DEMO_ADAPTERS
        for each in early:
            adapters[each.name] = await _register(client, each)
            progress(len(adapters), len(tasks.DEMO_ADAPTERS))
        arrival, adapters[late.name] = await _register_while_streaming(client, late)
        progress(len(adapters), len(tasks.DEMO_ADAPTERS))
        asked = questions()
        began_s = time.monotonic()
        answers = await asyncio.gather(*(ask(client, each) for each in asked))
        batch_s = time.monotonic() - began_s
        info = await client.info()
    tokens = sum(each.tokens for each in answers)
    return Outcome(arrival, score(answers, adapters), batch_s, tokens, info)


def questions() -> list[Question]:
    """The mixed batch: held-out words for every adapter and for the bare backbone, well shuffled."""
    found = [
        Question(each.name, prompt, expected)
        for number, each in enumerate(tasks.DEMO_ADAPTERS)
        for prompt, expected in tasks.held_out(each.task, QUESTIONS_PER_ADAPTER, SEED + number)
    ]
    # nothing tells the backbone which task is meant: it can only be right by chance
    names = list(tasks.TASKS)
    for number, word in enumerate(tasks.held_out_words(QUESTIONS_TO_BASE, SEED)):
        found.append(Question(BASE, tasks.prompt(word), tasks.TASKS[names[number % len(names)]](word)))
    random.Random(SEED).shuffle(found)
    return found


async def ask(client: AsyncClient, question: Question) -> Answer:
    """Ask one question."""
    completion: Completion = await client.generate(
        question.prompt,
        adapter=question.adapter,
        max_new_tokens=tasks.ANSWER_LENGTH_MAX + 1,
        temperature=0,
        timeout_s=REQUEST_S_MAX,
    )
    return Answer(question, completion.text, completion.usage.completion_tokens)


def score(answers: Sequence[Answer], adapters: dict[str, Adapter]) -> tuple[Score, ...]:
    """Count right answers by adapter, in the order of registration, the bare backbone last."""
    scores = []
    for name in (*adapters, BASE):
        own = [each for each in answers if each.question.adapter == name]
        right = sum(each.right for each in own)
        scores.append(Score(name, adapters.get(name), len(own), right, own[0]))
    return tuple(scores)


async def _register(client: AsyncClient, each: tasks.DemoAdapter) -> Adapter:
    return await client.register(each.name, tasks.ASSETS_DIR / "adapters" / each.name)


class _Counter:
    """Counts the tokens of a stream as they come."""

    def __init__(self) -> None:
        self.tokens = 0

    async def read(self, stream: AsyncStream, tokens_max: int) -> None:
        """Read until this many tokens have come, or to the stream's end."""
        async for event in stream:
            if isinstance(event, Delta):
                self.tokens += len(event.token_ids)
                if self.tokens >= tokens_max:
                    return


async def _register_while_streaming(client: AsyncClient, late: tasks.DemoAdapter) -> tuple[LateArrival, Adapter]:
    ((prompt, expected),) = tasks.held_out(late.task, 1, SEED)
    counter = _Counter()
    stream = client.stream(
        prompt, max_new_tokens=STREAM_TOKENS, temperature=0, ignore_eos=True, timeout_s=REQUEST_S_MAX
    )
    async with stream:
        await counter.read(stream, STREAM_TOKENS_BEFORE)
        rest = asyncio.create_task(counter.read(stream, STREAM_TOKENS))
        try:
            before, began_s = counter.tokens, time.monotonic()
            adapter = await _register(client, late)
            registered, registered_s = counter.tokens, time.monotonic() - began_s
            answer = await ask(client, Question(late.name, prompt, expected))
            answered = counter.tokens
            await rest
        finally:
            rest.cancel()
    arrival = LateArrival(
        adapter=late.name,
        answer=answer,
        registered_s=registered_s,
        tokens_before=before,
        tokens_while_registering=registered - before,
        tokens_until_answer=answered - registered,
        tokens_after=counter.tokens - answered,
    )
    return arrival, adapter
