"""``weft generate``: streams a completion to the terminal, or prints it as one JSON object."""

import argparse
import re
import sys
import time

from weft.client import Adapters, Client, Delta, Finished, GenerateOptions, Message, Prompt
from weft.server.commands import connect
from weft.server.commands.terminal import Terminal, UsageError

TOKENS = re.compile(r"\d+(?:[\s,]+\d+)*", re.ASCII)


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    text = "generate text, with an adapter or with the bare backbone, and print it as it comes"
    parser = commands.add_parser("generate", help=text, description=text)
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME[=WEIGHT]",
        help="registered adapter (default: the bare backbone); repeated, they act together in this order",
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt (default: standard input, less its last newline)")
    prompt.add_argument("--tokens", metavar="IDS", help="the prompt as token ids, e.g. 1,2,3")
    parser.add_argument("--chat", action="store_true", help="send the prompt as a user's turn, in the chat template")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="most tokens to generate")
    parser.add_argument("--temperature", type=float, metavar="T", help="softmax temperature; 0 is greedy")
    parser.add_argument("--top-k", type=int, metavar="K", help="keep the k most likely tokens; 0 keeps all")
    parser.add_argument("--top-p", type=float, metavar="P", help="keep tokens up to this probability, in (0, 1]")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the request's random numbers")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    parser.add_argument("--ignore-eos", action="store_true", help="go on past end-of-sequence tokens")
    parser.add_argument("--request-id", default="", metavar="ID", help="names the request in the server's logs")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="give up after this time")
    connect.add_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Generate."""
    prompt = _prompt(arguments)
    options = GenerateOptions(
        adapter=_adapters(arguments.adapter),
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stop=arguments.stop,
        ignore_eos=arguments.ignore_eos,
        request_id=arguments.request_id,
    )
    with connect.connect(arguments) as client:
        if terminal.as_json:
            terminal.json(client.generate(prompt, timeout_s=arguments.timeout, **options))
        else:
            _stream(client, prompt, options, arguments.timeout, terminal)
    return 0


def _stream(
    client: Client, prompt: Prompt, options: GenerateOptions, timeout_s: float | None, terminal: Terminal
) -> None:
    began_s = time.monotonic()
    said, ids, finished = False, list[int](), None
    try:
        with client.stream(prompt, timeout_s=timeout_s, **options) as stream:
            for event in stream:
                if isinstance(event, Delta):
                    terminal.text(event.text)
                    said = said or bool(event.text)
                    ids.extend(event.token_ids)
                elif isinstance(event, Finished):
                    finished = event
    finally:
        if said:
            terminal.text("\n")
    if finished is None:
        return
    if ids and not said:
        # no text: the backbone has no tokenizer, or a stop string hid everything
        terminal.line(" ".join(str(each) for each in ids))
    took_s = time.monotonic() - began_s
    count = finished.usage.completion_tokens
    terminal.note(f"{count} tokens in {took_s:.2f} s ({count / took_s:.0f} tokens/s), ended by {finished.reason}")


def _adapters(said: list[str]) -> Adapters:
    """One name as it is; several, or one with a weight, in order."""
    if not said:
        return ""
    if len(said) == 1 and "=" not in said[0]:
        return said[0]
    found = []
    for each in said:
        name, _, weight = each.partition("=")
        try:
            found.append((name, float(weight) if "=" in each else 1.0))
        except ValueError:
            raise UsageError(f"--adapter must be NAME or NAME=WEIGHT, a number; got {each!r}") from None
    return found


def _prompt(arguments: argparse.Namespace) -> Prompt:
    if arguments.tokens is not None:
        if arguments.chat:
            raise UsageError("expected a text with --chat, got --tokens")
        if not TOKENS.fullmatch(arguments.tokens.strip()):
            raise UsageError(f"--tokens must be token ids between commas, e.g. 1,2,3; got {arguments.tokens!r}")
        return [int(each) for each in re.split(r"[\s,]+", arguments.tokens.strip())]
    text = arguments.prompt if arguments.prompt is not None else _standard_input()
    return [Message("user", text)] if arguments.chat else text


def _standard_input() -> str:
    if sys.stdin.isatty():
        raise UsageError("expected a prompt: --prompt TEXT, --tokens IDS, or a text on standard input")
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompt on standard input must be UTF-8, got {error.reason} at {error.start}") from None
