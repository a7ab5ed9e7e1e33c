"""The pool of KV pages: who holds which, and never more than the budget."""


class PagePool:
    """Owns the free list. Page 0 is scratch: padding reads it, nobody is given it."""

    def __init__(self, pages: int, page_tokens: int):
        self.page_tokens = page_tokens
        self.total = pages - 1
        self._free = list(range(pages - 1, 0, -1))

    @property
    def used(self) -> int:
        """Pages held by requests."""
        return self.total - len(self._free)

    def count(self, tokens: int) -> int:
        """Pages that this many tokens need."""
        return -(-tokens // self.page_tokens)

    def fits(self, tokens: int) -> bool:
        """Whether pages for this many tokens are free now."""
        return self.count(tokens) <= len(self._free)

    def allocate(self, tokens: int) -> tuple[int, ...]:
        """Pages for this many tokens; the caller has asked whether they fit."""
        assert self.fits(tokens)
        return tuple(self._free.pop() for _ in range(self.count(tokens)))

    def release(self, pages: tuple[int, ...]) -> None:
        """Give pages back."""
        self._free.extend(pages)

    def check(self) -> None:
        """Every page is free at most once."""
        assert len(set(self._free)) == len(self._free)
        assert 0 not in self._free
