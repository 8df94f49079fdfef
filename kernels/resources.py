"""Compiles every Triton kernel in its shipped configurations for NVIDIA GPUs, with no GPU present, and reads off what
each needs: registers per thread, bytes spilled, shared memory, and whether the matrix products use the tensor cores.

    python -m fastkl.kernels.resources            prints the table for sm_80, sm_90 and sm_100
    python -m fastkl.kernels.resources --brief    of most kernels the configuration that does most
    python -m fastkl.kernels.resources --json     the same as JSON

Compiled by as many processes as there are cores. Read with the cuobjdump that Triton ships. Not to be run under
TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .gpu import divergences, heads, passes, rows, slices, supports

ARCHITECTURES = (80, 90, 100)
ALIGNED = ("z_stride", "r_stride", "out_stride", "strides", "vocab", "hidden")
"""Numbers that are multiples of 16 in practice. All pointers are."""


@dataclass(frozen=True)
class Configuration:
    """One kernel as it is launched: types of its arguments (tuples as the kernel takes them), compile-time constants,
    and launch options."""

    name: str
    kernel: Any
    signature: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 3


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs."""

    name: str
    kernel: str
    architecture: int
    registers: int  # per thread
    spilled_bytes: int  # per thread: local memory
    spills_in_loops: int  # how many instructions in loops store to it or load from it
    shared_bytes: int  # per block
    tensor_cores: str  # the instruction of the matrix product, or ""


def _rowwise(name: str, kernel: Any, flags: rows.Flags, logits: str) -> Configuration:
    f32, z = "*fp32", f"*{logits}"
    signature = {
        "inputs": rows.Inputs(z, "i64", z, "i64", f32, f32, "*u8", "*i64", "*i64", "*i64", "*i64", f32),
        "stats": rows.Stats(f32, f32, "i64", "*i64", f32),
        "gradient": rows.Gradient(f32, "i64", "*bf16", "i64"),
        "numbers": rows.Numbers("i32", "fp32", "fp32"),
    }
    if kernel is rows.score_kernel:
        shape = passes.score_shape(flags)
        constants = {"FLAGS": flags, "BLOCK": shape.block, "LANES": shape.lanes}
        return Configuration(name, kernel, signature, constants, shape.warps)
    if kernel is divergences.divergence_kernel:
        del signature["gradient"]
        shape = passes.DIVERGENCES
        constants = {"FLAGS": flags, "BLOCK": shape.block, "LANES": shape.lanes}
        return Configuration(name, kernel, signature, constants, shape.warps)
    of_divergences = flags.forward_kl, flags.jsd, flags.forward_kl_support, flags.jsd_support
    flags = flags._replace(reads_reference=any((flags.has_c, flags.has_c_support, *of_divergences)))
    constants = {"FLAGS": flags, "BLOCK": passes.gradient_block_of(flags)}
    return Configuration(name, kernel, signature, constants, passes.GRADIENT_WARPS)


def _support(name: str, flags: rows.Flags, logits: str, **limits: bool) -> Configuration:
    """support_kernel with some limits; or support_sums_kernel, for none."""
    signature = _rowwise(name, rows.gradient_kernel, flags, logits).signature
    del signature["gradient"]
    numbers = signature.pop("numbers")
    f32, i64, i32 = "*fp32", "*i64", "*i32"
    signature["limits"] = supports.Limits(i64, f32, f32, f32, i64, i64, i64, i32, i32)
    signature["numbers"] = numbers
    if not limits:
        constants: dict[str, Any] = {"FLAGS": flags, "BLOCK": supports.SUMS_BLOCK, "LANES": supports.SUMS_LANES}
        return Configuration(name, supports.support_sums_kernel, signature, constants, supports.SUMS_WARPS)
    which = supports.Which(
        limits.get("top_k", False), limits.get("top_p", False), limits.get("min_p", False), False, supports.LIST,
        supports.SHORT_LIST,
    )  # fmt: skip
    constants = {"FLAGS": flags, "WHICH": which, "BLOCK": supports.SUPPORT_BLOCK, "LANES": supports.SUPPORT_LANES}
    return Configuration(name, supports.support_kernel, signature, constants, supports.SUPPORT_WARPS)


def _linear(name: str, flags: rows.Flags, architecture: int, shared: bool = False) -> Configuration:
    shape = heads.tile_shape(architecture, 2 if flags.has_ref else 1, flags.has_bias)
    descriptors = architecture >= heads.DESCRIPTOR_ARCHITECTURE

    def matrix(block_rows: int, columns: int) -> str:
        return f"tensordesc<bf16[{block_rows}, {columns}]>" if descriptors else "*bf16"

    states, weights = matrix(heads.BLOCK_ROWS, shape.hidden), matrix(shape.vocab, shape.hidden)
    tile = heads.Tile(heads.BLOCK_ROWS, shape.vocab, shape.hidden, heads.GROUP, descriptors, shared, "tf32")
    constants: dict[str, Any] = {"FLAGS": flags, "TILE": tile}
    heads_of = {"h": states, "w": weights, "hr": states, "wr": weights}
    vectors = heads.Vectors("*fp32", "*fp32", "*i64", "*fp32", "*fp32", "i64")
    sizes = {"sizes": heads.Sizes("i32", "i32", "i32", "i32", "i32"), "softcap": "fp32", "scale": "fp32"}
    if not flags.write_gradient:
        signature = {**heads_of, "strides": ("i64",) * 4, "vectors": vectors, **sizes}
        return Configuration(name, heads.linear_score_kernel, signature, constants, heads.NUM_WARPS, shape.stages)
    signature = {
        **heads_of, "out": matrix(heads.BLOCK_ROWS, shape.vocab), "strides": ("i64",) * 4, "out_stride": "i64",
        "vectors": vectors, "known": slices.Known("*fp32", "i64", "*fp32", "i64", "i32"), **sizes,
    }  # fmt: skip
    constants |= {"FLAGS": flags._replace(write_gradient=False), "OUT": tl.bfloat16}  # as it is launched
    return Configuration(name, slices.linear_gradient_kernel, signature, constants, heads.NUM_WARPS, shape.stages)


def configurations(architecture: int) -> list[Configuration]:
    """Everything that the operators launch on such a GPU, up to flags that only remove work; of every kernel the one
    that does most comes last."""
    score, gradient, flags = rows.score_kernel, rows.gradient_kernel, rows.Flags
    b_and_c = flags(has_b=True, has_c=True)
    given = flags(has_row_ids=True, has_inf=True)
    extras = flags(has_bias=True, has_softcap=True, has_scale=True, has_inf=True, row_temperature=True)
    both_extras, both_given = extras._replace(has_ref=True, has_ref_bias=True), given._replace(has_ref=True)
    on_threshold = b_and_c._replace(has_threshold=True, has_c_support=True)
    divergence, apart = divergences.divergence_kernel, flags(forward_kl=True, jsd=True)
    everything = on_threshold._replace(forward_kl=True, jsd=True, forward_kl_support=True, jsd_support=True)
    result = [
        _rowwise("score: policy, bf16 logits", score, flags(has_inf=True), "bf16"),
        _rowwise("score: policy + reference, bf16 logits", score, given._replace(has_ref=True), "bf16"),
        _rowwise("score: policy + reference, fp32 logits", score, flags(has_ref=True), "fp32"),
        _rowwise("score: + bias, softcap, row temperature", score, both_extras, "fp32"),
        _rowwise("score + gradient", score, flags(has_ref=True, write_gradient=True, has_b=True, has_c=True), "fp32"),
        _rowwise("score: + bound for top_k", score, given._replace(has_ref=True, find_low=True), "bf16"),
        _rowwise("score: + support", score, flags(has_ref=True, has_keep=True, has_inf=True), "fp32"),
        _rowwise("gradient: logp", gradient, flags(), "bf16"),
        _rowwise("gradient: logp + KL, bf16 logits", gradient, given._replace(has_c=True), "bf16"),
        _rowwise("gradient: all", gradient, b_and_c, "fp32"),
        _rowwise("gradient: all + threshold", gradient, on_threshold, "fp32"),
        _rowwise(
            "gradient: divergences, bf16 logits", gradient, apart._replace(has_inf=True, has_row_ids=True), "bf16"
        ),
        _rowwise("gradient: all + divergences + threshold", gradient, everything, "fp32"),
        _rowwise("gradient: all + support", gradient, b_and_c._replace(has_keep=True, has_c_support=True), "fp32"),
        _rowwise("divergences: bf16 logits", divergence, both_given._replace(forward_kl=True, jsd=True), "bf16"),
        _rowwise("divergences: forward KL, fp32 logits", divergence, flags(has_ref=True, forward_kl=True), "fp32"),
        _rowwise("divergences: + bias, softcap", divergence, both_extras._replace(forward_kl=True, jsd=True), "fp32"),
        _rowwise("divergences: + threshold", divergence, apart._replace(has_ref=True, has_threshold=True), "fp32"),
        _support("support: all", both_given, "bf16", top_k=True, top_p=True, min_p=True),
        _support("support: all + bias, softcap", both_extras, "fp32", top_k=True, top_p=True, min_p=True),
        _support("support: sums", both_given, "bf16"),
        _support("support: sums + bias, softcap", both_extras, "fp32"),
        _linear("linear score: policy", flags(), architecture),
        _linear("linear score: policy + bias, softcap", extras, architecture),
        _linear("linear score: policy + reference", flags(has_ref=True), architecture),
        _linear("linear score: policy + reference, one head", flags(has_ref=True), architecture, shared=True),
        _linear("linear score: + bias, softcap", both_extras, architecture),
        _linear("linear gradient: logp", flags(write_gradient=True), architecture),
        _linear("linear gradient: logp, entropy", flags(write_gradient=True, has_b=True), architecture),
        _linear("linear gradient: logp, KL", flags(write_gradient=True, has_ref=True, has_c=True), architecture),
        _linear("linear gradient: all", b_and_c._replace(write_gradient=True, has_ref=True), architecture),
        _linear(
            "linear gradient: all + bias, softcap",
            both_extras._replace(write_gradient=True, has_b=True, has_c=True),
            architecture,
        ),
    ]
    scale = {"x_ptr": "*bf16", "factor_ptr": "*fp32", "count": "i64"}
    result.append(Configuration("scale", rows.scale_kernel, scale, {"BLOCK": passes.SCALE_BLOCK}, 4))
    merge = {
        "sums_ptr": "*fp32", "sums_stride": "i64", "stats_ptr": "*fp32", "stats_stride": "i64", "num_rows": "i32",
        "num_splits": "i32",
    }  # fmt: skip
    constants = {"HAS_REF": True, "MERGE_ROWS": heads.MERGE_ROWS}
    result.append(Configuration("merge", heads.merge_kernel, merge, constants, 4))
    return result


def _aligned(signature: dict[str, Any]) -> Iterator[tuple[int, ...]]:
    """The places of the arguments that are multiples of 16: (index,), or (index, place in the tuple)."""
    for i, (name, kind) in enumerate(signature.items()):
        kinds: list[tuple[tuple[int, ...], str, Any]] = [((i,), name, kind)]
        if isinstance(kind, tuple):
            names = getattr(kind, "_fields", [name] * len(kind))
            kinds = [((i, j), names[j], k) for j, k in enumerate(kind)]
        yield from (place for place, name, k in kinds if k.startswith("*") or name in ALIGNED)


def compile_for(configuration: Configuration, architecture: int) -> Resources:
    """Compiles one configuration for sm_`architecture` and reads its resources from the machine code."""
    constants = configuration.constants
    attributes = {place: [["tt.divisibility", 16]] for place in _aligned(configuration.signature)}
    signature = {**configuration.signature, **dict.fromkeys(constants, "constexpr")}
    assert list(signature) == [parameter.name for parameter in configuration.kernel.params]
    compiled = triton.compile(
        ASTSource(configuration.kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": configuration.num_warps, "num_stages": configuration.num_stages},
    )
    ptx = compiled.asm["ptx"]
    instruction = next((i for i in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if i in ptx), "")
    registers, local, in_loops = _usage(compiled.asm["cubin"])
    name, kernel = configuration.name, configuration.kernel.__name__
    return Resources(name, kernel, architecture, registers, local, in_loops, compiled.metadata.shared, instruction)


def _usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers per thread, bytes of local memory per thread (stack, where spills go), and the uses of it in loops."""
    tools = triton.knobs.nvidia
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = dict(
            re.findall(r"(REG|STACK|LOCAL):(\d+)", _output(tools.cuobjdump.path, "--dump-resource-usage", path))
        )
        local = int(usage["STACK"]) + int(usage["LOCAL"])
        code = _output(tools.nvdisasm.path, "--print-code", path) if local else ""
    return int(usage["REG"]), local, spills_in_loops(code)


def _output(*command: Any) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def spills_in_loops(code: str) -> int:
    """How many instructions of a disassembly that store to local memory (STL) or load from it (LDL) stand between a
    label and a branch back to it."""
    lines = code.splitlines()
    labels = {line.rstrip(":"): place for place, line in enumerate(lines) if line.startswith(".L")}
    branches = ((re.search(r"BRA.*?`\((\.L\w+)\)", line), place) for place, line in enumerate(lines))
    loops = [range(labels[branch[1]], place) for branch, place in branches if branch]
    return sum(
        bool(re.search(r"\b(STL|LDL)\b", line)) and any(place in loop for loop in loops)
        for place, line in enumerate(lines)
    )


def brief(architecture: int) -> list[Configuration]:
    """Of every kernel the configuration that does most: on sm_90 of all of them, on the others of the matrix kernels,
    which have other instructions there. On sm_90 also what fills the registers, and support_kernel with short lists,
    since its own sort takes more than a minute to compile."""
    table = {c.kernel.__name__: c for c in configurations(architecture)}
    if architecture != 90:
        return [c for c in table.values() if c.kernel in (heads.linear_score_kernel, slices.linear_gradient_kernel)]
    whole = table["support_kernel"]
    which = whole.constants["WHICH"]._replace(list=64, short=16)
    constants = {**whole.constants, "WHICH": which, "BLOCK": 128, "LANES": 64}
    table["support_kernel"] = replace(whole, name="support: all, short lists", constants=constants)
    full = ("linear score: policy", "linear score: policy + reference")
    return [*table.values(), *(c for c in configurations(architecture) if c.name in full)]


def _compile(architecture: int, name: str) -> Resources:
    """compile_for, by a configuration's name, which travels between processes where a kernel does not."""
    known = {c.name: c for c in (*configurations(architecture), *brief(architecture))}
    return compile_for(known[name], architecture)


def table_of(architectures: Iterable[int], select: Callable[[int], list[Configuration]]) -> list[Resources]:
    """The resources of all configurations, or of those in brief; compiled by as many processes as there are cores."""
    wanted = [(architecture, c.name) for architecture in architectures for c in select(architecture)]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as processes:
        return list(processes.map(_compile, *zip(*wanted, strict=True)))


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--brief", action="store_true", help="of most kernels one configuration, the one that does most"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHITECTURES, help="compute capabilities, as 90")
    options = parser.parse_args(argv)
    table = table_of(options.arch, brief if options.brief else configurations)
    if options.json:
        print(json.dumps([asdict(row) for row in table]))
        return
    print(f"{'kernel':<42}{'chip':>8}{'registers':>11}{'spilled B':>11}{'shared KiB':>12}  matrix product")
    for row in table:
        shared = row.shared_bytes / 1024
        print(
            f"{row.name:<42}{'sm_' + str(row.architecture):>8}{row.registers:>11}{row.spilled_bytes:>11}{shared:>12.1f}"
            f"  {row.tensor_cores}"
        )


if __name__ == "__main__":
    main()
