"""Compiles Triton's kernels for GPUs that are not there, and reads what became of them in the machine's language.

To be run, with a list of (kernel, policy, target) in JSON, in a process in which Triton compiles: processes.py.
"""

import json
import re
import subprocess
import sys
import tempfile

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prodigy_fused.backends.triton import registers, sizes
from prodigy_fused.step import BucketKey
from prodigy_fused.triton_kernels import elements, kernels

TYPES = dict.fromkeys(["tensors", "owners", "ranges", "grads"], "*i64") | {"counters": "*i32"}
TYPES |= dict.fromkeys(["last", "begin", "end", "adds_up", "chunk_count", "estimate_count"], "i32")
TYPES |= dict.fromkeys(["only", "only_bits"], "i64")
ALIGNED = ("tensors", "counters", "partials", "record", "groups", "grads")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)([^;]*);")


def built(kernel, policy, target):
    """Returns the kernel compiled as the backend would compile it. policy: see test_triton_compiled.py."""
    dtype, state, samples, kept, gradients = policy
    function = getattr(kernels, kernel)
    kinds = kept == "DISPLACED", kept == "EXTENDED"
    size = sizes(BucketKey("triton", "cuda", dtype, state, samples == "SOME", *kinds, samples == "NONE", True))
    constants = {
        "T": tl.float64 if dtype == "float64" else tl.float32,
        "X": getattr(tl, dtype),
        "S": tl.uint8 if state == "8bit" else getattr(tl, state),
        "G": gradients and getattr(tl, gradients),
        "SAMPLES": getattr(elements, samples).value,
        "KEPT": getattr(elements, kept).value,
        "CHUNK": size.chunk,
        "BLOCK": size.block,
    }
    constants |= {"LANES": size.lanes} if "LANES" in function.arg_names else {}
    signature = {name: TYPES.get(name, "*fp64") for name in function.arg_names if name not in constants}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if name in ALIGNED}
    options = {"num_warps": size.warps, "enable_fp_fusion": False}
    options |= {"maxnreg": registers(size)} if target[0] == "cuda" else {}
    source = ASTSource(function, signature, constants, aligned)
    return size, triton.compile(source, target=GPUTarget(*target), options=options)


def disassembled(cubin):
    """Returns the registers of a thread, the bytes it spills, and the lines of the code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tools = (triton.knobs.nvidia.cuobjdump.path, "-res-usage"), (triton.knobs.nvidia.nvdisasm.path, "-c")
        usage, code = (
            subprocess.run([*tool, file.name], capture_output=True, text=True, check=True).stdout for tool in tools
        )
    registers_used, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return registers_used, stack, code.splitlines()


def innermost_loops(lines):
    """Returns the instructions of each loop without a loop in it, as (operation, operands)."""
    instructions, labels, loops = [], {}, []
    for line in lines:
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label.group(1)] = len(instructions)
        elif found := INSTRUCTION.search(line):
            instructions.append(found.groups())
            target = re.search(r"`\((\.L_\w+)\)", line)
            if found.group(1).startswith("BRA") and target and target.group(1) in labels:
                loops.append((labels[target.group(1)], len(instructions)))
    inner = [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]
    return [instructions[a:b] for a, b in inner]


def count(loop, name):
    return sum(operation.startswith(name) for operation, _ in loop)


def widths(loop, name):
    """Returns the bytes of each of a loop's accesses."""
    found = [operation for operation, _ in loop if operation.startswith(name)]
    return sorted(int((re.findall(r"\.[US]?(128|64|16|8)\b", operation) or ["32"])[0]) // 8 for operation in found)


def facts(kernel, policy, target):
    """Returns what the tests ask of a compiled kernel."""
    size, made = built(kernel, policy, target)
    if target[0] != "cuda":
        return {"binary": len(made.asm["hsaco"])}
    used, spilled, lines = disassembled(made.asm["cubin"])
    # The walk over aligned elements is the one of those with a quotient and a store that has the fewest loads.
    walks = [loop for loop in innermost_loops(lines) if count(loop, "MUFU.R") and count(loop, "STG")]
    walk = min(walks, key=lambda loop: count(loop, "LDG"))
    ptx, bits = made.asm["ptx"], 64 if policy[0] == "float64" else 32
    return {
        "triton": triton.__version__,
        "registers": used,
        "spilled": spilled // 4,
        "threads": 32 * size.warps,
        "resident": size.resident,
        "loads": widths(walk, "LDG"),
        "stores": widths(walk, "STG"),
        "reloads": count(walk, "LDL"),
        "shared": count(walk, "STS") + count(walk, "LDS") + count(walk, "BAR"),
        "hashes": sum("0x7feb352d" in operands for _, operands in walk),
        "instructions": len(walk) / (size.block / (32 * size.warps)),
        # (What `ceil` is given is no subnormal number.)
        "inexact": len(re.findall(r"fma\.rn\.f|(?<!cvt\.rpi)\.ftz|\.approx|div\.full", ptx)),
        "exact": len(re.findall(rf"(?:sqrt|div)\.rn\.f{bits}", ptx)),
        # A barrier and no write behind it, then the atomic: what all threads wrote is there for the last program.
        "arrivals": len(
            re.findall(r"bar\.sync\s+0;(?:(?!bar\.sync|st\.)[\s\S])*?atom\.global\.gpu\.acq_rel\.add", ptx)
        ),
    }


if __name__ == "__main__":
    print(json.dumps([facts(*wanted) for wanted in json.loads(sys.argv[1])]))
