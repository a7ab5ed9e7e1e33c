"""The string tasks of the demonstration: what each does, how a prompt looks, which words are held out.

Standard library only, so that tests and the client can name tasks and expected answers without torch.
"""

from __future__ import annotations

import random
import string
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ASSETS_DIR = Path(__file__).resolve().parent / "assets"
"""Where the trained backbone and adapters lie: ``backbone/`` and ``adapters/NAME/``."""

ALPHABET = "\n" + "".join(chr(code) for code in range(ord(" "), ord("~") + 1))
"""Every character the tokenizer knows; the tasks use few of them, visitors may type any."""

VOWELS = "aeiou"
CONSONANTS = "".join(letter for letter in string.ascii_lowercase if letter not in VOWELS)

WORD_LENGTH_MIN = 3
WORD_LENGTH_MAX = 8
VOWEL_SHARE = 0.4
CAESAR_SHIFT = 3
HELD_OUT_ONE_IN = 10
ANSWER_LENGTH_MAX = 2 * WORD_LENGTH_MAX

_CAESAR = str.maketrans(
    string.ascii_lowercase, string.ascii_lowercase[CAESAR_SHIFT:] + string.ascii_lowercase[:CAESAR_SHIFT]
)
_ATBASH = str.maketrans(string.ascii_lowercase, string.ascii_lowercase[::-1])
_STAR = str.maketrans(VOWELS, "*" * len(VOWELS))
_DEVOWEL = str.maketrans("", "", VOWELS)


def upper(word: str) -> str:
    """hello -> HELLO."""
    return word.upper()


def reverse(word: str) -> str:
    """hello -> olleh."""
    return word[::-1]


def sort(word: str) -> str:
    """hello -> ehllo."""
    return "".join(sorted(word))


def caesar(word: str) -> str:
    """hello -> khoor: every letter moves three places on, z wraps to c."""
    return word.translate(_CAESAR)


def double(word: str) -> str:
    """hello -> hheelllloo."""
    return "".join(letter * 2 for letter in word)


def devowel(word: str) -> str:
    """hello -> hll."""
    return word.translate(_DEVOWEL)


def rotate(word: str) -> str:
    """hello -> elloh: the first letter goes to the end."""
    return word[1:] + word[:1]


def atbash(word: str) -> str:
    """hello -> svool: a becomes z, b becomes y, and so on."""
    return word.translate(_ATBASH)


def star(word: str) -> str:
    """hello -> h*ll*."""
    return word.translate(_STAR)


def dash(word: str) -> str:
    """hello -> h-e-l-l-o."""
    return "-".join(word)


def swap(word: str) -> str:
    """hello -> ehllo: neighbours change places two by two, an odd last letter stays."""
    return "".join(word[start : start + 2][::-1] for start in range(0, len(word), 2))


def skip(word: str) -> str:
    """hello -> hlo: every second letter is left out."""
    return word[::2]


TASKS: dict[str, Callable[[str], str]] = {
    task.__name__: task
    for task in (upper, reverse, sort, caesar, double, devowel, rotate, atbash, star, dash, swap, skip)
}

TAGS: dict[str, str] = {
    "upper": "U",
    "reverse": "R",
    "sort": "S",
    "caesar": "C",
    "double": "D",
    "devowel": "V",
    "rotate": "T",
    "atbash": "A",
    "star": "X",
    "dash": "H",
    "swap": "W",
    "skip": "K",
}


def prompt(word: str) -> str:
    """The untagged prompt: nothing in it says which task is meant, only an adapter can know."""
    return f"{word}="


def tagged_prompt(task: str, word: str) -> str:
    """The prompt the backbone was pre-trained on: one capital letter names the task."""
    return f"{TAGS[task]}:{prompt(word)}"


def is_held_out(word: str) -> bool:
    """Whether training must never see the word; a hash of the word itself decides, so no list is kept."""
    return zlib.crc32(word.encode()) % HELD_OUT_ONE_IN == 0


def _random_word(rng: random.Random) -> str:
    """A pronounceable-looking word with at least one vowel and one consonant, so every task shows."""
    while True:
        length = rng.randint(WORD_LENGTH_MIN, WORD_LENGTH_MAX)
        letters = [rng.choice(VOWELS if rng.random() < VOWEL_SHARE else CONSONANTS) for _ in range(length)]
        if 0 < sum(letter in VOWELS for letter in letters) < length:
            return "".join(letters)


def words(seed: int, *, held_out: bool) -> Iterator[str]:
    """An endless, seeded stream of words from one side of the split."""
    rng = random.Random(seed)
    while True:
        word = _random_word(rng)
        if is_held_out(word) == held_out:
            yield word


def held_out(task: str, count: int, seed: int) -> list[tuple[str, str]]:
    """``count`` different held-out words as (untagged prompt, right answer) pairs."""
    return [(prompt(word), TASKS[task](word)) for word in held_out_words(count, seed)]


def held_out_words(count: int, seed: int) -> list[str]:
    """``count`` different words that no training run has seen."""
    found: dict[str, None] = {}
    stream = words(seed, held_out=True)
    while len(found) < count:
        found.setdefault(next(stream))
    return list(found)


@dataclass(frozen=True)
class DemoAdapter:
    """One shipped adapter: its folder name, the task it was trained for, and what its method is called.

    detail:  what of the method was chosen
    peft:    whether peft trained it, and can load it
    """

    name: str
    task: str
    method: str
    detail: str = ""
    peft: bool = True


DEMO_ADAPTERS: tuple[DemoAdapter, ...] = (
    DemoAdapter("reverse-lora-r2", "reverse", "LoRA", "r=2"),
    DemoAdapter("swap-lora-r4", "swap", "LoRA", "r=4"),
    DemoAdapter("rotate-rslora-r8", "rotate", "rsLoRA", "r=8"),
    DemoAdapter("skip-lora-r16", "skip", "LoRA", "r=16"),
    DemoAdapter("sort-krona", "sort", "KronA"),
    DemoAdapter("devowel-krona", "devowel", "KronA"),
    DemoAdapter("double-krona", "double", "KronA"),
    DemoAdapter("dash-krona", "dash", "KronA"),
    DemoAdapter("upper-ia3", "upper", "(IA)³"),
    DemoAdapter("caesar-ia3", "caesar", "(IA)³"),
    DemoAdapter("atbash-ia3", "atbash", "(IA)³"),
    DemoAdapter("star-ia3", "star", "(IA)³"),
    DemoAdapter("reverse-dora", "reverse", "DoRA", "r=4"),
    DemoAdapter("swap-loha", "swap", "LoHa", "r=4"),
    DemoAdapter("double-hra", "double", "HRA", "r=8"),
    DemoAdapter("rotate-vera", "rotate", "VeRA", "r=64"),
    DemoAdapter("upper-norms", "upper", "LN tuning"),
    DemoAdapter("skip-prompt", "skip", "Prompt tuning", "8 tokens"),
    DemoAdapter("atbash-prefix", "atbash", "Prefix tuning", "8 tokens"),
    DemoAdapter("reverse-houlsby", "reverse", "Houlsby", "r=16", False),
    DemoAdapter("sort-compacter", "sort", "Compacter", "n=4", False),
    DemoAdapter("caesar-bitfit", "caesar", "BitFit", "", False),
    DemoAdapter("star-difffit", "star", "DiffFit", "", False),
    DemoAdapter("dash-fishmask", "dash", "FishMask", "4 %", False),
    DemoAdapter("devowel-far", "devowel", "FAR", "12 %", False),
)
