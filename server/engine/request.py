"""One completion, from admission to its last token."""

from dataclasses import dataclass, field

from torch import Tensor

from weft.adapters_store.leases import Lease
from weft.adapters_store.report import Traits
from weft.server.engine.messages import Submit

NO_TRAITS = Traits()


@dataclass(eq=False, slots=True)
class Request:
    """Only the scheduler changes it. Its tokens are the adapter's extra rows, the prompt, and the output.

    computed:   tokens whose keys and values are cached
    slots:      [slots_max] int64, the KV slot of each token, then those that its side network shares out, from
                admission to the end
    traits:     of its adapter, from admission on
    acts_from:  the first token on which the adapter acts
    """

    submit: Submit
    submitted_s: float
    output: list[int] = field(default_factory=list)
    computed: int = 0
    lease: Lease | None = None
    missed_s: float | None = None  # when it could first have run, had its adapter been there
    cramped_s: float | None = None  # when its adapter first found no room
    pages: tuple[int, ...] = ()
    slots: Tensor | None = None
    traits: Traits = NO_TRAITS
    acts_from: int = 0

    @property
    def length(self) -> int:
        """Tokens known so far."""
        return self.traits.extra_rows + len(self.submit.prompt) + len(self.output)

    @property
    def pending(self) -> int:
        """Known tokens whose keys and values are not cached yet; 1 while decoding."""
        return self.length - self.computed

    @property
    def length_max(self) -> int:
        """Tokens it may grow to; pages for all of them are reserved at admission."""
        return self.traits.extra_rows + len(self.submit.prompt) + self.submit.max_new_tokens

    @property
    def slots_max(self) -> int:
        """KV slots that these tokens take, with those of a side network, which shares each out among several."""
        reduction = self.traits.side_reduction
        return self.length_max + (-(-self.length_max // reduction) if reduction else 0)

    def token(self, index: int) -> int:
        """The token at a known index; 0 stands for an extra row, which has no token."""
        prompt, at = self.submit.prompt, index - self.traits.extra_rows
        if at < 0:
            return 0
        return prompt[at] if at < len(prompt) else self.output[at - len(prompt)]


def acts_from(traits: Traits, prompt: tuple[int, ...], length_max: int) -> int:
    """The first token on which an adapter acts: where its token mask begins last, or behind the end."""
    mask = traits.token_mask
    if not mask:
        return 0
    starts = range(len(prompt) - len(mask), -1, -1)
    found = next((start for start in starts if prompt[start : start + len(mask)] == mask), None)
    return length_max if found is None else traits.extra_rows + found
