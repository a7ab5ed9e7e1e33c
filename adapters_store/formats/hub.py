"""Adapters as AdapterHub's ``adapters`` saves them, and adapter-transformers before it: one method, or a union of them.

``adapter_config.json`` has the same name as PEFT's and no ``peft_type``: ``model_type``, ``hidden_size``, ``name`` of
the adapter, ``version``, and the method's own settings in ``config``, whose ``architecture`` says which reader they
are for. Its tensors lie in ``adapter.safetensors``. Members of a union (MAM, UniPELT) know nothing of each other.

Three rules of the library's own for older files are kept: LoRA before 1.1.0 was trained with alpha = r whatever it
says; files without a version mean ``gelu_new`` by ``gelu``; two names of places were others (``hub_common``).
Source: ``adapters`` 1.3.0, ``loading.py``, ``configuration/``.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from weft.adapters_store.errors import expected, quoted
from weft.adapters_store.formats import hub_bottleneck, hub_lora, hub_prefix
from weft.adapters_store.formats.about import Served
from weft.adapters_store.formats.hub_common import DIALECT, Context, Member, MemberSettings, Shelf
from weft.adapters_store.formats.hub_families import read_family
from weft.adapters_store.formats.settings import Settings, show
from weft.adapters_store.operators import ParsedAdapter
from weft.adapters_store.safetensors_header import Header
from weft.adapters_store.sites import CatalogueInfo

UNION = "UNION"
_REFUSES = "two members that would have the same tensors, as the library does"

SERVES = (
    Served("MAM adapter", "2110.04366", "kv_prefix, bottleneck", "AdapterHub MAMConfig", True, _REFUSES),
    Served(
        "UniPELT", "2110.07577", "gated kv_prefix, bottleneck, low_rank", "AdapterHub UniPELTConfig", True, _REFUSES
    ),
)

READERS: Mapping[str | None, Callable[[MemberSettings, Context], Member]] = {
    None: hub_bottleneck.read,
    "lora": hub_lora.read,
    "prefix_tuning": hub_prefix.read,
}
REFUSED = {
    "reft": "ReFT edits hidden states of single tokens, which is none of weft's operators",
    "mtl_lora": "MTL-LoRA picks its matrices by a task that no request names",
    "prompt_tuning": "AdapterHub has no prompt tuning for the families that weft serves",
}

# of files without a version
_ACTIVATIONS_RENAMED = {"gelu": "gelu_new", "gelu_orig": "gelu"}
_VERSION = re.compile(r"(?:adapters\.)?(\d+)\.(\d+)(?:\.(\d+))?(.*)")
_LORA_SCALED_SINCE = (1, 1, 0)


def is_hub(values: Mapping[str, Any]) -> bool:
    """Whether a config without ``peft_type`` is one of AdapterHub's."""
    return isinstance(values.get("config"), dict)


def parse(values: Mapping[str, Any], header: Header, catalogue: CatalogueInfo) -> ParsedAdapter:
    """Config and header to operators; values are not looked at."""
    inner: dict[str, Any] = dict(values["config"])
    settings = Settings({key: value for key, value in values.items() if key != "config"})
    places = read_family(settings, catalogue)
    name = settings.text("name", required=True) or ""
    if not name or "." in name:
        raise expected("name", "the adapter's name, without dots", f'"{quoted(name)}"')
    notes = _kept_rules(settings.text("version"), inner)
    for opaque in ("model_name", "model_class"):
        settings.text(opaque)
    settings.finish("AdapterHub")
    base = catalogue.layers[0].path.split(".")[0]
    context = Context(Shelf(header, name, base), places, catalogue)
    members = _members(inner, context)
    context.shelf.finish()
    union = inner.get("architecture") == "union"
    sites = {path: operators for member in members for path, operators in member.sites.items()}
    return ParsedAdapter(
        UNION if union else members[0].method,
        DIALECT,
        {path: sites[path] for path in sorted(sites, key=catalogue.index.__getitem__)},
        notes=(*notes, *(note for member in members for note in member.notes)),
        parts=tuple(part for member in members for part in member.parts),
    )


def _members(config: dict[str, Any], context: Context) -> list[Member]:
    if config.get("architecture") != "union":
        return [_member(config, "config", context)]
    listed = config.pop("configs", None)
    if not isinstance(listed, list) or not listed or not all(isinstance(entry, dict) for entry in listed):
        raise expected("config.configs", "a list of configs", show(listed))
    settings = MemberSettings(config, "config")
    settings.ignore("architecture")
    settings.finish(UNION)
    # whatever two members would both have has the same names in the file, so no place gets two of a kind
    return [_member(entry, f"config.configs.{i}", context) for i, entry in enumerate(listed)]


def _member(config: Mapping[str, Any], at: str, context: Context) -> Member:
    settings = MemberSettings({key: value for key, value in config.items() if key != "architecture"}, at)
    architecture = config.get("architecture")
    reader = READERS.get(architecture) if architecture is None or isinstance(architecture, str) else None
    if reader is None:
        served = ", ".join(name or "null" for name in READERS)
        why = REFUSED.get(str(architecture), "")
        wanted = f"one of {served}, union" if at == "config" else f"one of {served}"
        raise expected(f"{at}.architecture", wanted, show(architecture), why)
    return reader(settings, context)


def _kept_rules(version: str | None, config: dict[str, Any]) -> tuple[str, ...]:
    """What the library changes in configs of older versions; ``config`` is changed."""
    if version is None:
        said = config.get("non_linearity")
        if said in _ACTIVATIONS_RENAMED:
            config["non_linearity"] = _ACTIVATIONS_RENAMED[said]
            return (f"non_linearity {said} means {config['non_linearity']} in files without a version",)
        return ()
    found = _VERSION.fullmatch(version)
    if found is None:
        raise expected("version", "adapters. and numbers, adapters.1.3.0", f'"{quoted(version)}"')
    number = (int(found[1]), int(found[2]), int(found[3] or 0))
    # a version with letters behind it stands in front of the one without
    early = number < _LORA_SCALED_SINCE or (
        number == _LORA_SCALED_SINCE and bool(re.match(r"\.?(dev|a|b|rc)", found[4]))
    )
    scaled = version.startswith("adapters.") and early and config.get("architecture") == "lora"
    if scaled and "r" in config and config["r"] != config.get("alpha"):
        note = f"alpha {show(config.get('alpha'))} taken as r, {show(config['r'])}: before 1.1.0 the library ignored it"
        config["alpha"] = config["r"]
        return (note,)
    return ()
