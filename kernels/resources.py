"""Compiles every Triton kernel in its shipped configurations for NVIDIA GPUs, with no GPU present, and reads off what
each needs: registers per thread, bytes spilled, shared memory, and whether the matrix products use the tensor cores.

    python -m fastkl.kernels.resources            prints the table for sm_80, sm_90 and sm_100
    python -m fastkl.kernels.resources --json     the same as JSON

Read with the cuobjdump that Triton ships. Not to be run under TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import triton_chunks, triton_epilogue, triton_gradient, triton_linear

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Shared memory one block may use (CUDA programming guide, table of compute capabilities)."""

ROWWISE = {
    "z_ptr": "*fp32", "z_stride": "i64", "r_ptr": "*fp32", "r_stride": "i64", "bias_ptr": "*fp32",
    "ref_bias_ptr": "*fp32", "keep_ptr": "*u8", "target_ptr": "*i64", "row_ids_ptr": "*i64",
    "temperature_ptr": "*fp32", "stats_ptr": "*fp32", "support_stats_ptr": "*fp32", "stats_stride": "i64",
    "factors_ptr": "*fp32", "factors_stride": "i64", "grad_ptr": "*bf16", "grad_stride": "i64", "vocab": "i32",
    "softcap": "fp32", "scale": "fp32",
}  # fmt: skip
ALIGNED = ("_ptr", "h", "w", "hr", "wr", "h_stride", "w_stride", "hr_stride", "wr_stride", "z_stride", "r_stride",
           "grad_stride", "vocab", "hidden")  # fmt: skip
"""How the names of arguments end that are multiples of 16 in practice."""


@dataclass(frozen=True)
class Configuration:
    """One kernel as it is launched: types of its arguments, flags that are true, and launch options."""

    name: str
    kernel: object
    signature: dict[str, str]
    flags: tuple[str, ...]
    constants: dict[str, int]
    num_warps: int
    num_stages: int = 3


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs."""

    name: str
    architecture: int
    registers: int  # per thread
    spilled_bytes: int  # per thread: local memory
    shared_bytes: int  # per block
    tensor_cores: str  # the instruction of the matrix product, or ""


def _rowwise(name: str, kernel: object, flags: tuple[str, ...], logits: str) -> Configuration:
    signature = {**ROWWISE, "z_ptr": f"*{logits}", "r_ptr": f"*{logits}"}
    if kernel is triton_epilogue.score_kernel:
        blocks = {"BLOCK": triton_chunks.FORWARD_BLOCK, "LANES": triton_chunks.FORWARD_LANES}
        return Configuration(name, kernel, signature, flags, blocks, triton_chunks.FORWARD_WARPS)
    blocks = {"BLOCK": triton_chunks.GRADIENT_BLOCK}
    return Configuration(name, kernel, signature, flags, blocks, triton_chunks.GRADIENT_WARPS)


def _linear(name: str, flags: tuple[str, ...], architecture: int) -> Configuration:
    block_vocab, hidden, stages = triton_linear.tile_shape(architecture, "HAS_REF" in flags, "HAS_BIAS" in flags)
    rows = triton_linear.BLOCK_ROWS
    states = weights = "*bf16"
    if architecture >= triton_linear.DESCRIPTOR_ARCHITECTURE:
        flags = (*flags, "DESCRIPTORS")
        states, weights = (f"tensordesc<bf16[{block}, {hidden}]>" for block in (rows, block_vocab))
    signature = {
        "h": states, "w": weights, "hr": states, "wr": weights, "h_stride": "i64", "w_stride": "i64",
        "hr_stride": "i64", "wr_stride": "i64", "bias_ptr": "*fp32",
        "ref_bias_ptr": "*fp32", "target_ptr": "*i64", "temperature_ptr": "*fp32", "sums_ptr": "*fp32",
        "sums_stride": "i64", "num_rows": "i32", "vocab": "i32", "hidden": "i32", "num_row_blocks": "i32",
        "num_splits": "i32", "softcap": "fp32", "scale": "fp32",
    }  # fmt: skip
    blocks = {"BLOCK_ROWS": rows, "BLOCK_VOCAB": block_vocab, "BLOCK_HIDDEN": hidden, "GROUP": triton_linear.GROUP}
    kernel = triton_linear.linear_score_kernel
    return Configuration(name, kernel, signature, flags, blocks, triton_linear.NUM_WARPS, stages)


def configurations(architecture: int) -> list[Configuration]:
    """Everything that the operators launch on such a GPU, up to flags that only remove work."""
    score, gradient = triton_epilogue.score_kernel, triton_gradient.gradient_kernel
    result = [
        _rowwise("score: policy, bf16 logits", score, (), "bf16"),
        _rowwise("score: policy + reference, bf16 logits", score, ("HAS_REF", "HAS_ROW_IDS"), "bf16"),
        _rowwise("score: policy + reference, fp32 logits", score, ("HAS_REF",), "fp32"),
        _rowwise("score: + support", score, ("HAS_REF", "HAS_KEEP"), "fp32"),
        _rowwise(
            "score: + bias, softcap, row temperature", score,
            ("HAS_REF", "HAS_BIAS", "HAS_REF_BIAS", "HAS_SOFTCAP", "HAS_SCALE", "ROW_TEMPERATURE"), "fp32",
        ),
        _rowwise("score + gradient", score, ("HAS_REF", "WRITE_GRADIENT", "HAS_B", "HAS_C"), "fp32"),
        _rowwise("gradient: logp", gradient, (), "bf16"),
        _rowwise("gradient: logp + KL, bf16 logits", gradient, ("HAS_C", "HAS_ROW_IDS"), "bf16"),
        _rowwise("gradient: all", gradient, ("HAS_B", "HAS_C"), "fp32"),
        _rowwise(
            "gradient: all + support", gradient, ("HAS_B", "HAS_C", "HAS_KEEP", "HAS_C_SUPPORT"), "fp32",
        ),
    ]  # fmt: skip
    for name, flags in (
        ("linear score: policy", ()),
        ("linear score: policy + bias, softcap", ("HAS_BIAS", "HAS_SOFTCAP", "HAS_SCALE", "ROW_TEMPERATURE")),
        ("linear score: policy + reference", ("HAS_REF",)),
        (
            "linear score: + bias, softcap",
            ("HAS_REF", "HAS_BIAS", "HAS_REF_BIAS", "HAS_SOFTCAP", "HAS_SCALE", "ROW_TEMPERATURE"),
        ),
    ):
        result.append(_linear(name, flags, architecture))
    merge = {
        "sums_ptr": "*fp32", "sums_stride": "i64", "stats_ptr": "*fp32", "stats_stride": "i64", "num_rows": "i32",
        "num_splits": "i32",
    }  # fmt: skip
    scale = {"x_ptr": "*bf16", "factor_ptr": "*fp32", "count": "i64"}
    blocks = {"BLOCK": triton_chunks.SCALE_BLOCK}
    result.append(Configuration("scale", triton_gradient.scale_kernel, scale, (), blocks, 4))
    rows = {"MERGE_ROWS": triton_linear.MERGE_ROWS}
    result.append(Configuration("merge", triton_linear.merge_kernel, merge, ("HAS_REF",), rows, 4))
    return result


def compile_for(configuration: Configuration, architecture: int) -> Resources:
    """Compiles one configuration for sm_`architecture` and reads its resources from the machine code."""
    kernel = configuration.kernel
    constants, signature, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in configuration.signature:
            signature[name] = configuration.signature[name]
            if name.endswith(ALIGNED) and not signature[name].startswith("tensordesc"):
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[name] = configuration.constants.get(name, name in configuration.flags)
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": configuration.num_warps, "num_stages": configuration.num_stages},
    )
    ptx = compiled.asm["ptx"]
    instruction = next((i for i in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if i in ptx), "")
    registers, local = _usage(compiled.asm["cubin"])
    return Resources(configuration.name, architecture, registers, local, compiled.metadata.shared, instruction)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of local memory per thread (stack, where spills go)."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHITECTURES, help="compute capabilities, as 90")
    options = parser.parse_args(argv)
    rows = [compile_for(c, architecture) for architecture in options.arch for c in configurations(architecture)]
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    print(f"{'kernel':<42}{'chip':>8}{'registers':>11}{'spilled B':>11}{'shared KiB':>12}  matrix product")
    for row in rows:
        shared = row.shared_bytes / 1024
        print(
            f"{row.name:<42}{'sm_' + str(row.architecture):>8}{row.registers:>11}{row.spilled_bytes:>11}{shared:>12.1f}"
            f"  {row.tensor_cores}"
        )


if __name__ == "__main__":
    main()
