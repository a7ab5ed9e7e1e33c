"""``weft convert``: pickles, research checkpoints and fine-tuned models as adapters that weft serves."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from weft.adapters_store.parts import TAPS
from weft.server.commands.terminal import Terminal, UsageError, size, table

if TYPE_CHECKING:
    from weft.server.convert.diff import Report
    from weft.server.convert.pickled_folder import Converted

FAILED = 1
FORMS = ("auto", "sparse", "rows", "low-rank", "dense")
Actions: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_parser(commands: Actions) -> None:
    """Add the command with its own subcommands."""
    text = "make adapters of pickles, research checkpoints and fine-tuned models; talks to no server"
    parser = commands.add_parser("convert", help=text, description=text)
    actions = parser.add_subparsers(dest="action", required=True, metavar="WHAT")
    for add in (_add_pickle, _add_diff, _add_sft, _add_pissa, _add_adamix, _add_sparse_adapter, _add_tfew):
        made = add(actions)
        made.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _add_pickle(actions: Actions) -> argparse.ArgumentParser:
    text = "a folder with adapter_model.bin (PEFT) or pytorch_adapter.bin (AdapterHub), as one with safetensors"
    made = actions.add_parser("pickle", help=text, description=f"{text}. Nothing that a pickle brings is ever run.")
    made.add_argument("folder", help="folder of the adapter")
    made.add_argument("out", help="new folder to write")
    made.set_defaults(run=_guarded(run_pickle))
    return made


def _add_diff(actions: Actions) -> argparse.ArgumentParser:
    text = "what fine-tuning changed in a model, as the smallest adapter that says it"
    made = actions.add_parser("diff", help=text, description=text)
    made.add_argument("--base", required=True, metavar="FOLDER", help="the model as it was, with safetensors")
    made.add_argument("--tuned", required=True, metavar="FOLDER", help="the same model after fine-tuning")
    made.add_argument("--out", required=True, metavar="FOLDER", help="new folder to write")
    made.add_argument(
        "--error",
        type=float,
        default=0.0,
        metavar="E",
        help="most that may be lost of the change of any matrix, relative, in the Frobenius norm (default 0: nothing)",
    )
    made.add_argument(
        "--form", choices=FORMS, default="auto", help="say all matrices in this form (default: the smallest)"
    )
    made.add_argument("--device", default="cpu", help="where singular values are computed (default cpu)")
    made.set_defaults(run=_guarded(run_diff))
    return made


def _add_sft(actions: Actions) -> argparse.ArgumentParser:
    text = "pytorch_diff.bin of composable-sft (LT-SFT), as X_SPARSE"
    made = actions.add_parser("sft", help=text, description=text)
    made.add_argument("file", help="the file, or its folder")
    made.add_argument("out", help="new folder to write")
    made.add_argument("--base", required=True, metavar="FOLDER", help="the backbone; only its config.json is read")
    made.set_defaults(run=_guarded(run_sft))
    return made


def _add_pissa(actions: Actions) -> argparse.ArgumentParser:
    text = "a LoRA that began as PiSSA, OLoRA, CorDA or LoRA-GA, as a plain LoRA of twice the rank"
    made = actions.add_parser("pissa", help=text, description=text)
    made.add_argument("adapter", help="its folder after training")
    made.add_argument("initial", help="its folder as saved before training")
    made.add_argument("out", help="new folder to write")
    made.set_defaults(run=_guarded(run_pissa))
    return made


def _add_adamix(actions: Actions) -> argparse.ArgumentParser:
    text = "a state dict of AdaMix, its experts averaged, as X_BOTTLENECK or LORA"
    made = actions.add_parser("adamix", help=text, description=text)
    _add_research(made, "gelu_new")
    made.set_defaults(run=_guarded(run_adamix))
    return made


def _add_sparse_adapter(actions: Actions) -> argparse.ArgumentParser:
    text = "a state dict of SparseAdapter, its masks multiplied in, as X_BOTTLENECK or LORA"
    made = actions.add_parser("sparse-adapter", help=text, description=text)
    _add_research(made, "relu")
    made.add_argument("--scale", type=float, default=1.0, metavar="S", help="adapter_scalar, where it is no parameter")
    made.add_argument("--norm", choices=("none", "in"), default="none", help="adapter_layernorm_option (default none)")
    made.set_defaults(run=_guarded(run_sparse_adapter))
    return made


def _add_tfew(actions: Actions) -> argparse.ArgumentParser:
    text = "finish.pt of t-few: (IA)³ and LoRA as PEFT's, biases and norms as X_BITFIT and X_NORM"
    made = actions.add_parser("t-few", help=text, description=text)
    made.add_argument("file", help="what torch.save wrote")
    made.add_argument("out", help="new folder to write")
    made.add_argument("--base", metavar="FOLDER", help="the backbone, for biases; only its tensors' names are read")
    made.set_defaults(run=_guarded(run_tfew))
    return made


def _add_research(made: argparse.ArgumentParser, act: str) -> None:
    made.add_argument("file", help="what torch.save wrote")
    made.add_argument("out", help="new folder to write")
    made.add_argument("--act", default=act, metavar="NAME", help="function of the bottlenecks (default %(default)s)")
    made.add_argument("--tap", choices=TAPS, default="h", help="what the bottlenecks read (default %(default)s)")
    made.add_argument("--alpha", type=float, metavar="A", help="lora_alpha, for LoRA: the file does not say it")


def _guarded(run: Callable[[argparse.Namespace, Terminal], None]) -> Callable[[argparse.Namespace, Terminal], int]:
    """The same command with what goes wrong as a text and an exit status."""

    def guarded(arguments: argparse.Namespace, terminal: Terminal) -> int:
        from weft.server.convert.problems import CannotConvert

        try:
            run(arguments, terminal)
        except CannotConvert as error:
            terminal.fail(str(error), "CANNOT_CONVERT")
            return FAILED
        except OSError as error:
            terminal.fail(f"{error.filename or arguments.out}: {error.strerror or error}", "IO_ERROR")
            return FAILED
        return 0

    return guarded


def run_pickle(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """A folder with a pickle."""
    from weft.server.convert.pickled_folder import convert_pickle

    show_converted(convert_pickle(Path(arguments.folder), Path(arguments.out)), terminal)


def run_diff(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """Two models."""
    if not 0 <= arguments.error < 1:
        raise UsageError(f"--error must be a number from 0 to below 1, got {arguments.error:g}")
    if arguments.form == "low-rank" and not arguments.error:
        raise UsageError("--form low-rank needs an --error above 0: a product of matrices is never exact")
    from weft.server.convert.diff import Options, convert_diff

    options = Options(arguments.error, arguments.form, arguments.device)
    with terminal.upload("comparing") as progress:
        found = convert_diff(Path(arguments.base), Path(arguments.tuned), Path(arguments.out), options, progress)
    if terminal.as_json:
        terminal.json(found)
    else:
        _show_diff(found, terminal)


def run_sft(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """A file of composable-sft."""
    from weft.server.convert.sft import convert_sft

    show_converted(convert_sft(Path(arguments.file), Path(arguments.base), Path(arguments.out)), terminal)


def run_pissa(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """A LoRA and its beginning."""
    from weft.server.convert.pissa import convert_pissa

    folders = Path(arguments.adapter), Path(arguments.initial)
    show_converted(convert_pissa(*folders, Path(arguments.out)), terminal)


def run_adamix(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """A mixture of adapters."""
    from weft.server.convert.adamix import convert_adamix

    paths = Path(arguments.file), Path(arguments.out)
    show_converted(convert_adamix(*paths, arguments.act, arguments.tap, arguments.alpha), terminal)


def run_sparse_adapter(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """Adapters with masks."""
    from weft.server.convert.sparse_adapter import convert_sparse_adapter

    a = arguments
    found = convert_sparse_adapter(Path(a.file), Path(a.out), a.scale, a.tap, a.act, a.norm, a.alpha)
    show_converted(found, terminal)


def run_tfew(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """Trained parameters of t-few."""
    from weft.server.convert.tfew import convert_tfew

    base = None if arguments.base is None else Path(arguments.base)
    show_converted(convert_tfew(Path(arguments.file), Path(arguments.out), base), terminal)


def show_converted(found: "Converted", terminal: Terminal) -> None:
    """What became of a file."""
    if terminal.as_json:
        terminal.json(found)
        return
    terminal.line(f"wrote {found.out}: {found.tensors} tensors, {size(found.bytes)}, of {found.read_from}")
    for note in found.notes:
        terminal.note(f"note: {note}")


def _show_diff(found: "Report", terminal: Terminal) -> None:
    shown = table("parameter", "form", "device", "error", right=("device", "error"))
    for line in found.parameters:
        shown.add_row(line.name, line.form, size(line.bytes), f"{line.error:.2g}")
    terminal.table(shown)
    terminal.line(
        f"wrote {found.out}: {found.peft_type}, {len(found.parameters)} parameters changed, {found.unchanged} did not; "
        f"{size(found.device_bytes)} on the device, {size(found.file_bytes)} on disk, error {found.error:.2g}"
    )
    for note in found.notes:
        terminal.note(f"note: {note}")
