"""Compile every kernel for devices that are not here, and read what the compilers made of it.

``python -m tests.kernels.aot [pattern]`` prints the table, of the variants whose name has the pattern.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from weft.kernels.kron import kron_kernel
from weft.kernels.kron_staged import fold_kernel, join_kernel
from weft.kernels.lowrank import expand_kernel, shrink_kernel
from weft.kernels.override import norm_kernel
from weft.kernels.scale import scale_input_kernel
from weft.kernels.sparse import entries_kernel, rows_kernel
from weft.kernels.tiles import tiles_for

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

KERNELS = {
    "shrink": shrink_kernel,
    "expand": expand_kernel,
    "kron": kron_kernel,
    "fold": fold_kernel,
    "join": join_kernel,
    "scale": scale_input_kernel,
    "entries": entries_kernel,
    "rows": rows_kernel,
    "norm": norm_kernel,
}
ITEM = {"fp32": 4, "bf16": 2, "fp16": 2}

# (in_features, planes, sites of the group) of Llama-3.1-8B's qkv, gate and up, and down, and of SmolLM2-135M's qkv
GROUPS = {"qkv": (4096, 8, 3), "gate_up": (4096, 8, 2), "down": (14336, 8, 1), "tiny_qkv": (576, 2, 3)}


@dataclass(frozen=True)
class Variant:
    """One specialisation that serving compiles.

    factors, tensors:  dtypes of the arena's factors and of x and y
    aligned:           pointers and strides divide by 16, as those of whole tensors do; sizes likewise
    """

    kernel: str
    factors: str
    tensors: str
    aligned: bool
    group: str
    height: str = ""

    def __str__(self) -> str:
        marks = [self.kernel, self.height, self.group, self.factors]
        marks += [] if self.tensors == self.factors else [self.tensors]
        return "-".join([mark for mark in marks if mark] + ([] if self.aligned else ["odd"]))

    @property
    def exact(self) -> bool:
        """Whether products are made in fp32."""
        return self.factors == "fp32" or self.tensors != self.factors

    def constants(self, nvidia: bool) -> dict[str, int | bool]:
        """Values of all constexpr parameters and compiler options."""
        tiles = tiles_for("default", self.exact, nvidia)
        features, planes, sites = GROUPS[self.group]
        span, split = tiles.split(features)
        assert split == planes
        common = {"SITES": sites, "SITES_CEIL": triton.next_power_of_2(sites), "ITEM": ITEM[self.factors]}
        # short segments have a program for every part of a long sum, long ones sum up in one
        fold, splits = (split, 1) if self.height == "large" else (1, split)
        common |= {"UPCAST": self.exact, "SPLITS": splits, "SPAN": span, "FOLD": fold}
        common |= {"FEATURES": features, "EVEN": self.aligned}
        common |= {"CEIL": triton.next_power_of_2(features)}
        common |= {"HEIGHT": tiles.kron["BM"], "DEPTH": tiles.kron["BK"]}
        options = {
            "shrink": lambda: tiles.shrink[self.height],
            "expand": lambda: tiles.expand[self.height],
            "kron": lambda: tiles.kron,
            "fold": lambda: tiles.fold[self.height],
            "join": lambda: tiles.join,
            "scale": lambda: tiles.scale,
            "entries": lambda: tiles.entries,
            "rows": lambda: tiles.rows,
            "norm": lambda: {**tiles.norm, **dict.fromkeys(("CENTRED", "BIASED"), self.height == "centred")},
        }[self.kernel]()
        return {**common, **options}


def variants() -> Iterator[Variant]:
    """What a server of bf16, fp16 or fp32 backbones launches, whole tensors and views of wider ones."""
    for height in ("small", "large"):
        for group in GROUPS:
            yield Variant("shrink", "bf16", "bf16", True, group, height)
        yield Variant("shrink", "fp16", "fp16", True, "qkv", height)
        yield Variant("shrink", "bf16", "bf16", False, "qkv", height)
        yield Variant("shrink", "fp32", "fp32", True, "tiny_qkv", height)
        yield Variant("shrink", "bf16", "fp32", True, "tiny_qkv", height)
        for group in ("qkv", "tiny_qkv"):
            yield Variant("expand", "bf16", "bf16", True, group, height)
            yield Variant("expand", "fp32", "fp32", True, group, height)
        yield Variant("expand", "fp16", "fp16", True, "qkv", height)
        yield Variant("expand", "bf16", "bf16", False, "qkv", height)
        yield Variant("expand", "fp32", "fp32", False, "qkv", height)
    for aligned in (True, False):
        yield Variant("kron", "bf16", "bf16", aligned, "qkv")
        yield Variant("kron", "fp32", "fp32", aligned, "qkv")
        yield Variant("scale", "bf16", "bf16", aligned, "down")
    for height in ("small", "large"):
        for aligned in (True, False):
            for dtype in ("bf16", "fp32"):
                yield Variant("fold", dtype, dtype, aligned, "qkv", height)
                yield Variant("join", dtype, dtype, aligned, "qkv", height)
        yield Variant("fold", "bf16", "fp32", True, "tiny_qkv", height)
    yield Variant("join", "fp16", "fp16", True, "qkv", "small")
    for kernel in ("entries", "rows"):
        for aligned in (True, False):
            yield Variant(kernel, "bf16", "bf16", aligned, "qkv")
            yield Variant(kernel, "fp32", "fp32", aligned, "tiny_qkv")
        yield Variant(kernel, "bf16", "fp32", True, "down")
    for group in ("tiny_qkv", "qkv", "down"):
        for form in ("rms", "centred"):
            yield Variant("norm", "bf16", "bf16", True, group, form)
    yield Variant("norm", "fp32", "fp32", False, "qkv", "centred")
    yield Variant("kron", "fp16", "fp16", True, "qkv")
    yield Variant("kron", "bf16", "bf16", True, "qkv", "large")
    yield Variant("scale", "fp32", "fp32", True, "tiny_qkv")


def compile_variant(variant: Variant, target: str) -> Mapping[str, int]:
    """Compile; returns ``registers``, ``spilled`` bytes (or lanes) of scratch memory and ``shared`` bytes."""
    kernel, constants = KERNELS[variant.kernel], variant.constants(TARGETS[target].backend == "cuda")
    types = {"x_ptr": f"*{variant.tensors}", "y_ptr": f"*{variant.tensors}", "factors_ptr": f"*{variant.factors}"}
    types |= {"vectors_ptr": "*fp32", "h_ptr": "*fp32", "t_ptr": "*fp32", "eps": "fp32", "offset": "fp32"}
    types |= dict.fromkeys(("out_ptr", "weight_ptr", "bias_ptr"), f"*{variant.tensors}")
    signature, values, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name.isupper():
            signature[name], values[name] = "constexpr", constants[name]
            continue
        signature[name] = types.get(name, "*i32" if name.endswith("_ptr") else "i32")
        # our own buffers always are; x and y and their strides if they are not views
        theirs = name in ("x_ptr", "y_ptr", "stride_xt", "stride_yt")
        if variant.aligned if theirs else name.endswith("_ptr"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {name: value for name, value in constants.items() if name.islower()}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    usage = _amd(compiled.asm["amdgcn"]) if "amdgcn" in compiled.asm else _nvidia(compiled.asm["cubin"])
    return {**usage, "shared": compiled.metadata.shared}


def _nvidia(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"]}


def _amd(assembly: str) -> dict[str, int]:
    def last(name: str) -> int:
        return int(re.findall(rf"{re.escape(name)}:?\s+(\d+)", assembly)[-1])

    # scalar registers that overflow go to vector registers, not to memory
    return {
        "registers": last(".vgpr_count"),
        "spilled": last(".private_segment_fixed_size") + last(".vgpr_spill_count"),
    }


if __name__ == "__main__":
    print(f"triton {triton.__version__}: registers / spilled bytes / shared KiB")
    print(f"{'':36}" + "".join(f"{target:>18}" for target in TARGETS))
    for each in variants():
        if not re.search(sys.argv[1] if len(sys.argv) > 1 else "", str(each)):
            continue
        cells = [compile_variant(each, target) for target in TARGETS]
        row = "".join(f"{c['registers']:>8} /{c['spilled']:>2} /{c['shared'] / 1024:>4.0f}" for c in cells)
        print(f"{each!s:36}{row}", flush=True)
