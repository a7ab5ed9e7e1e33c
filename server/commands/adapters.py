"""``weft adapters add|list|show|rm``."""

import argparse
from datetime import UTC, datetime

from weft.client import Adapter, AdapterState
from weft.server.commands import connect
from weft.server.commands.terminal import Terminal, pairs, size, table

DIGEST_CHARACTERS = 12


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command with its own subcommands."""
    text = "register, list, look at and remove the adapters of a running server"
    parser = commands.add_parser("adapters", help=text, description=text)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    add = actions.add_parser("add", help="upload an adapter and register it under a name")
    add.add_argument("name", help="letters, digits, dots, dashes and underscores; at most 128")
    add.add_argument("folder", help="folder with adapter_config.json and adapter_model.safetensors")
    add.add_argument("--replace", action="store_true", help="point an existing name at these files")
    add.set_defaults(run=run_add)

    listing = actions.add_parser("list", help="list all adapters")
    listing.add_argument("--method", default="", help="only those of this method, e.g. LORA")
    listing.set_defaults(run=run_list)

    show = actions.add_parser("show", help="show one adapter and what it compiled to at each module")
    show.add_argument("name", help="name of the adapter")
    show.set_defaults(run=run_show)

    remove = actions.add_parser("rm", help="forget a name; requests in flight finish")
    remove.add_argument("name", help="name of the adapter")
    remove.set_defaults(run=run_rm)

    for each in (add, listing, show, remove):
        connect.add_arguments(each)


def run_add(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Upload and register."""
    with connect.connect(arguments) as client, terminal.upload(arguments.name) as progress:
        adapter = client.register(arguments.name, arguments.folder, replace=arguments.replace, progress=progress)
    if terminal.as_json:
        terminal.json(adapter)
        return 0
    terminal.line(
        f"registered {adapter.name}: {adapter.method}, {adapter.site_count} sites, "
        f"{size(adapter.device_bytes)} on the device, version {adapter.digest[:DIGEST_CHARACTERS]}"
    )
    for each in adapter.notes:
        terminal.note(f"note: {each}")
    return 0


def run_list(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Print a table of all adapters."""
    with connect.connect(arguments) as client:
        found = client.list(method=arguments.method)
    if terminal.as_json:
        terminal.json({"adapters": found})
        return 0
    if not found:
        terminal.note("no adapters are registered; `weft adapters add NAME FOLDER` registers one")
        return 0
    shown = table(
        "adapter", "method", "sites", "device", "disk", "state", "version", "registered",
        right=("sites", "device", "disk"),
    )  # fmt: skip
    for each in found:
        shown.add_row(
            each.name,
            each.method,
            str(each.site_count),
            size(each.device_bytes),
            size(each.disk_bytes),
            each.state,
            each.digest[:DIGEST_CHARACTERS],
            _date(each),
        )
    terminal.table(shown)
    for each in found:
        if each.state is AdapterState.INCOMPATIBLE:
            terminal.note(f"{each.name} is not served: {each.state_reason}")
    return 0


def run_show(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Print everything about one adapter."""
    with connect.connect(arguments) as client:
        adapter = client.get(arguments.name)
    if terminal.as_json:
        terminal.json(adapter)
        return 0
    rows = {
        "adapter": adapter.name,
        "method": f"{adapter.method}, read as {adapter.dialect}",
        "state": adapter.state + (f": {adapter.state_reason}" if adapter.state_reason else ""),
        "device": size(adapter.device_bytes),
        "disk": size(adapter.disk_bytes),
        "registered": _date(adapter),
        "version": adapter.digest,
    }
    terminal.table(pairs(rows | {f"note {number}": each for number, each in enumerate(adapter.notes, 1)}))
    shown = table(
        "module", "operators", "rank", "bytes", "folds", right=("rank", "bytes"), folded=("operators", "folds")
    )
    for site in adapter.sites:
        rank = str(site.rank) if site.rank else "-"
        shown.add_row(site.module, ", ".join(site.operators), rank, f"{site.bytes:,}", ", ".join(site.folds))
    terminal.line("")
    terminal.table(shown)
    return 0


def run_rm(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Forget a name."""
    with connect.connect(arguments) as client:
        client.delete(arguments.name)
    if terminal.as_json:
        terminal.json({"removed": arguments.name})
    else:
        terminal.line(f"removed {arguments.name}")
    return 0


def _date(adapter: Adapter) -> str:
    return datetime.fromtimestamp(adapter.create_time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
