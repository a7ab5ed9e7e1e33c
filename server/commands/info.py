"""``weft info``: what a running server is, its limits and its memory."""

import argparse

from weft.client import ServerInfo
from weft.server.commands import connect
from weft.server.commands.terminal import Terminal, pairs, size


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    text = "show what a running server is: backbone, limits, memory, methods"
    parser = commands.add_parser("info", help=text, description=text)
    connect.add_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Print it."""
    with connect.connect(arguments) as client:
        found = client.info()
    if terminal.as_json:
        terminal.json(found)
    else:
        terminal.table(pairs(_rows(found)))
    return 0


def _rows(found: ServerInfo) -> dict[str, str]:
    backbone, limits, memory, runtime = found.backbone, found.limits, found.memory, found.runtime
    prompts = ["token ids"] + ["text"] * backbone.has_tokenizer + ["chat"] * backbone.has_chat_template
    return {
        "weft": found.version,
        "backbone": f"{backbone.name}: {backbone.family}, {backbone.parameters:,} parameters in {backbone.dtype}",
        "digest": backbone.digest,
        "context": f"{backbone.context_tokens:,} tokens of a vocabulary of {backbone.vocabulary:,}",
        "prompts": ", ".join(prompts),
        "sites": f"{backbone.site_count:,} modules that adapters can change",
        "methods": ", ".join(found.methods),
        "computes": f"{runtime.kernels} kernels on {runtime.device}",
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(runtime.versions.items())),
        "memory": memory_line(found),
        "keys, values": f"{size(memory.kv_bytes)} in use of {size(limits.kv_bytes_max)}",
        "adapters": f"at most {size(limits.adapter_memory_bytes_max)} on the device",
        "queue": f"at most {limits.queue_requests_max:,} requests and {limits.queue_tokens_max:,} tokens wait",
        "step": f"at most {limits.batch_tokens_max:,} tokens",
        "request": f"at most {limits.request_duration_ms_max / 1000:g} s",
        **({"notes": "; ".join(runtime.notes)} if runtime.notes else {}),
        "uploads": f"at most {limits.uploads_max} at once, {size(limits.upload_bytes_max)} each",
    }


def memory_line(found: ServerInfo) -> str:
    """M + ΣA in words."""
    memory = found.memory
    return (
        f"M = {size(memory.backbone_bytes)} backbone, N = {memory.adapters_resident} adapters resident, "
        f"ΣA = {size(memory.adapters_bytes)}"
        + (f", shared {size(memory.shared_bytes)}" * (memory.shared_bytes > 0))
        + (f", composed {size(memory.composed_bytes)}" * (memory.composed_bytes > 0))
    )
