"""One completion, from admission to its last token."""

from dataclasses import dataclass, field

from torch import Tensor

from weft.adapters_store.residency import Lease
from weft.server.engine.messages import Submit


@dataclass(eq=False, slots=True)
class Request:
    """Only the scheduler changes it.

    computed:  tokens whose keys and values are cached
    slots:     [prompt + max_new_tokens] int64, the KV slot of each position, from admission to the end
    """

    submit: Submit
    submitted_s: float
    output: list[int] = field(default_factory=list)
    computed: int = 0
    lease: Lease | None = None
    missed_s: float | None = None  # when it could first have run, had its adapter been there
    pages: tuple[int, ...] = ()
    slots: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens known so far."""
        return len(self.submit.prompt) + len(self.output)

    @property
    def pending(self) -> int:
        """Known tokens whose keys and values are not cached yet; 1 while decoding."""
        return self.length - self.computed

    @property
    def length_max(self) -> int:
        """Tokens it may grow to; pages for all of them are reserved at admission."""
        return len(self.submit.prompt) + self.submit.max_new_tokens

    def token(self, position: int) -> int:
        """The token at a known position."""
        prompt = self.submit.prompt
        return prompt[position] if position < len(prompt) else self.output[position - len(prompt)]
