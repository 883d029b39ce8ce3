"""The structure of the project: which module may import which, tables that agree, citations that lead somewhere."""

import ast
import inspect
import json
import re
import subprocess
import sys
from collections import UserList
from pathlib import Path

import pytest
import torch
from toolbox import make_params
from torch import nn

from prodigy_fused import Prodigy, estimate, hyper, options, record, state
from prodigy_fused.backends import native
from prodigy_fused.options import OPTIONS

ROOT = Path(__file__).parents[1]
# From the ground up: a module imports only modules that stand before it.
ORDER = (
    "options", "hyper", "dtensor", "inference", "tensors", "sums", "rounding", "eight_bits", "record", "estimate",
    "step", "low_precision", "coded_state", "nonfinite", "sampling", "state", "sharding", "redistribute",
    "backends.native", "backends.gpu", "backends.tensor_list", "backends.elementwise", "backends.flat",
    "backends.pieces", "backends.runs", "backends.numbers", "backends.cpu", "backends.cuda", "backends.triton_tables",
    "backends.triton", "backends.foreach", "backends.reference", "backends",
    "buckets", "plans", "open_step", "groups", "scalars", "settings", "release", "runtime", "readings", "checkpoint",
    "convex.vectors", "convex.base", "convex.subgradient", "convex.prodigy", "convex.distance", "convex.adam",
    "convex", "prodigy", "install", "", "report", "run", "__main__", "stand_in.package.prodigyopt.prodigy",
    "stand_in.package.prodigyopt",
)  # fmt: skip
SOURCES = ("prodigy_fused", "csrc", "triton_kernels")


def tracked(*patterns: str) -> list[Path]:
    """Returns the project's files that match, without what was built."""
    skipped = {".venv", "build", "dist", ".git", ".hypothesis"}
    found = {path for pattern in patterns for path in ROOT.rglob(pattern) if path.is_file()}
    return sorted(path for path in found if not skipped & set(path.relative_to(ROOT).parts))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / "prodigy_fused").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path, package: str) -> set[str]:
    """Returns the modules of the package that a file imports anywhere, also within functions."""
    base = package.split(".") if package else []
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        start = base[: len(base) - node.level + 1] + (node.module.split(".") if node.module else [])
        inner = [".".join([*start, alias.name]) for alias in node.names]
        modules = [name for name in inner if name in ORDER or name == "_C"]
        found |= set(modules or [".".join(start)])
    return {name for name in found if name != "_C" and not name.startswith("triton_kernels")}


def test_imports_point_down():
    """No circle, no arrow up: each module imports only what stands before it in ORDER."""
    files = [path for path in tracked("*.py") if path.is_relative_to(ROOT / "prodigy_fused")]
    files = [path for path in files if "triton_kernels" not in path.parts]
    assert {module_name(path) for path in files} == set(ORDER)
    for path in files:
        name = module_name(path)
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        wrong = [other for other in imports(path, package) if ORDER.index(other) >= ORDER.index(name)]
        assert not wrong, f"{name or '__init__'} imports {wrong}, which stand above it"


def test_the_layers_of_the_design_are_those_of_the_imports():
    """Every module is in the table, and imports from its own layer or from one below."""
    table = (
        (ROOT / "docs" / "design.md")
        .read_text()
        .partition("## Layers")[2]
        .partition("```text\n")[2]
        .partition("\n\n")[0]
    )
    layers, layer = {}, 0
    for line in table.splitlines():
        layer += not line.startswith(" ")
        layers |= dict.fromkeys(re.findall(r"(\w+)(?:\.py|/ )", line), layer)
    top = {name.partition(".")[0] for name in ORDER} - {"", "stand_in"}
    assert top <= layers.keys()
    for name in top:
        files = [ROOT / "prodigy_fused" / f"{name}.py", *(ROOT / "prodigy_fused" / name).rglob("*.py")]
        for path in filter(Path.is_file, files):
            package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
            used = {other.partition(".")[0] for other in imports(path, package)} - {"", "_C"}
            assert [other for other in used if layers.get(other, 99) < layers[name]] == [], path


@pytest.mark.parametrize("folder", SOURCES)
def test_no_file_is_longer_than_300_lines(folder):
    suffixes = {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh"}
    files = [path for path in tracked(f"{folder}/**/*") if path.suffix in suffixes]
    assert files
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: lines for name, lines in lengths.items() if lines > 300} == {}


def test_citations_lead_to_something_in_the_tree():
    """Every ``*.md`` that a source, a test or a page names is a file, and a cited heading is one of its headings."""
    files = tracked("*.py", "*.pyi", "*.h", "*.cuh", "*.cpp", "*.cu", "*.md", "CMakeLists.txt", "Makefile", "gpu_check")
    cited, dead = 0, []
    for path in files:
        text = re.sub(r"\n\s*(#|//|\*)? ?", " ", path.read_text())
        for name, heading in re.findall(r"(?<![\w/])([\w./-]*\w\.md)\b(?:, \"([^\"]+)\")?", text):
            folders = (ROOT, path.parent, ROOT / "docs", ROOT / "bench" / "results")
            target = next((folder / name for folder in folders if (folder / name).is_file()), None)
            headings = re.findall(r"^#+ (.+?)\s*$", target.read_text(), re.MULTILINE) if target else []
            if target is None or (heading and heading not in headings):
                dead.append((str(path.relative_to(ROOT)), name, heading))
            cited += 1
    assert not dead
    assert cited > 20


def test_cited_notes_exist():
    """``Note [Name]`` is written once, with that name, wherever it is cited."""
    text = "\n".join(path.read_text() for path in tracked("*.py", "*.h", "*.cuh", "*.cpp", "*.cu", "*.md"))
    cited = set(re.findall(r"see\s+(?:\W+\s)?Note \[([^\]]+)\]", text))
    written = set(re.findall(r"(?:^|\"\"\")[ /#]*Note \[([^\]]+)\]\s*$", text, re.MULTILINE))
    assert cited <= written and len(cited) >= 3


def functions(stub: ast.Module | ast.ClassDef) -> dict[str, list[str]]:
    """Returns the parameters of a stub's functions, by their names, without ``__init__``."""
    found = [node for node in stub.body if isinstance(node, ast.FunctionDef) and node.name != "__init__"]
    return {node.name: [arg.arg for arg in (*node.args.args, *node.args.kwonlyargs)] for node in found}


@pytest.mark.skipif(bool(native.MISSING), reason="no compiled module")
def test_the_stub_of_the_compiled_module_is_what_it_has():
    """Functions and classes, with the names of the parameters, which pybind11 writes into docstrings."""

    def compiled(holder):
        lines = {name: str(value.__doc__).splitlines()[0] for name, value in vars(holder).items() if callable(value)}
        return {name: re.findall(r"(\w+): ", line) for name, line in lines.items() if f"{name}(" in line}

    stub = ast.parse((ROOT / "prodigy_fused" / "_C.pyi").read_text())
    classes = {node.name: node for node in stub.body if isinstance(node, ast.ClassDef)}
    has_cuda = native._C.CUDA is not None
    assert compiled(native._C) == {n: a for n, a in functions(stub).items() if has_cuda or n != "cuda_problem"}
    for name in ("TensorList", "CpuPlan", *["CudaPlan"] * has_cuda):
        found = compiled(getattr(native._C, name))
        found.pop("__init__")
        assert found == functions(classes["_Tensors"]) | functions(classes[name]), name


# -- tables ------------------------------------------------------------------------------------------------------------


def test_the_signature_is_the_table_of_options():
    parameters = inspect.signature(Prodigy.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if name not in ("self", "params", "process_group")}
    assert defaults == options.defaults()
    documented = re.findall(r"^        (\w+):", inspect.getdoc(Prodigy).replace("    ", "        "), re.MULTILINE)
    assert [name for name in OPTIONS if name not in documented] == []


def test_the_default_of_every_option_is_valid_and_stored_as_it_is():
    options.check(options.defaults())
    assert options.stored(options.defaults()) == options.defaults()


def test_every_number_of_the_rule_reaches_the_kernels():
    """An option of role "rule" or "estimate" is a word of the record under its own name; betas are two words."""
    words = {name for name, option in OPTIONS.items() if option.role in ("rule", "estimate")} - {"betas"}
    fields = {*hyper.Hyper._fields, *hyper.EstimateOptions._fields}
    # Whether an estimate is frozen is no option: `prodigy_steps` decides it.
    assert words | {"beta1", "beta2", "frozen"} == fields
    assert fields <= {*record.GROUP_FIELDS}
    flags = {name for name, option in OPTIONS.items() if option.role == "rule" and option.stored is bool}
    assert {*record.FLAGS} == flags | {"frozen"}


def test_what_of_a_checkpoint_is_the_references():
    """As prodigyopt writes its groups."""
    prodigyopt = pytest.importorskip("prodigyopt")
    theirs = prodigyopt.Prodigy([nn.Parameter(torch.ones(2))]).param_groups[0]
    assert {*options.IN_REFERENCE, *estimate.IN_REFERENCE} <= set(theirs)
    assert {name for name in OPTIONS if name in theirs} == set(options.IN_REFERENCE)


@pytest.mark.parametrize("module", ["ESTIMATE_FIELDS", "STEP_FIELDS", "GROUP_FIELDS", "STATE_KEYS"])
def test_a_forgotten_word_is_noticed_on_import(module):
    """As if C++, or Triton, had been given a field that Python lacks."""
    ours = {
        "ESTIMATE_FIELDS": estimate.FIELDS,
        "STEP_FIELDS": record.STEP_FIELDS,
        "GROUP_FIELDS": record.GROUP_FIELDS,
        "STATE_KEYS": state.KEYS,
    }[module]
    there = type(sys)("there")
    setattr(there, module, (*ours, "another"))
    with pytest.raises(ImportError, match=rf"{module}.*another"):
        native.check_layout(there, {module: ours})
    with pytest.raises(ImportError, match=module):
        native.check_layout(type(sys)("older"), {module: ours})


STALE = """
import sys, types, warnings
stale = types.ModuleType("prodigy_fused._C")
stale.ESTIMATE_FIELDS = 8
sys.modules["prodigy_fused._C"] = stale
import prodigy_fused
prodigy_fused._C = stale
import torch
p = torch.nn.Parameter(torch.ones(3))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    opt = prodigy_fused.Prodigy([p])
p.grad = torch.ones(3)
opt.step()
assert opt.step_count == 1
print([str(w.message) for w in said])
"""


# Under -O torch has no bytecode yet, and takes ten seconds.
@pytest.mark.parametrize("flags", [[], pytest.param(["-O"], marks=pytest.mark.slow)], ids=["plain", "optimized"])
def test_a_module_of_other_sources_falls_back_with_its_reason(flags):
    result = subprocess.run([sys.executable, *flags, "-c", STALE], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "slower foreach backend" in result.stdout
    assert "built from other sources (ESTIMATE_FIELDS" in result.stdout


# -- words and numbers -------------------------------------------------------------------------------------------------

CONFIGURATIONS = {
    "default": {},
    "every option": {
        "lr": 0.5, "betas": [0.8, 0.9], "beta3": 0.95, "eps": 1e-7, "weight_decay": 1, "decouple": 0,
        "use_bias_correction": 1, "safeguard_warmup": True, "d0": 1e-5, "d_coef": 2, "growth_rate": 1.02,
        "slice_p": 3, "maximize": True, "d_limit": 0.1, "split_groups": 1, "prodigy_steps": 20,
        "state_dtype": torch.bfloat16, "min_8bit_size": 99, "low_precision": "nearest", "fused": False,
    },
    "numbers of NumPy and of tensors": {
        "lr": "np.float32(0.5)", "betas": "np.array([0.8, 0.9])", "eps": "np.float64(1e-7)",
        "weight_decay": torch.tensor(0.1), "slice_p": "np.int64(2)", "decouple": "np.bool_(True)",
        "d_coef": "np.float32(2)", "d_limit": torch.tensor(0.5), "prodigy_steps": "np.int32(9)",
    },
    "a word, and a list of OmegaConf, say": {"state_dtype": "bfloat16", "betas": UserList([0.8, 0.9])},
    "the parameter's": {"state_dtype": None},
}  # fmt: skip


def of_numpy(value):
    if not (isinstance(value, str) and value.startswith("np.")):
        return value
    return eval(value, {"np": pytest.importorskip("numpy")})


def test_every_option_is_among_the_configurations():
    """But those that say how a step is computed, and not what, of which fused stands for all; and sharding."""
    unnamed = {name for name, option in OPTIONS.items() if option.role == "machine"} - {"fused"}
    assert {*CONFIGURATIONS["every option"]} == {*OPTIONS} - unnamed - {"fsdp_in_use"}


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("where", ["constructor", "group", "later"])
def test_options_are_words_and_numbers(name, where):
    """``defaults`` and ``param_groups`` survive json, whoever wrote the option."""
    chosen = {key: of_numpy(value) for key, value in CONFIGURATIONS[name].items()}
    params = make_params(torch.float32)
    if where == "constructor":
        opt = Prodigy(params, **chosen)
    elif where == "group":
        opt = Prodigy([{"params": params, **chosen}])
    else:
        opt = Prodigy(params)
        for key in ("params", "slice_p", "d0"):
            chosen.pop(key, None)  # not to be changed in a run
        opt.param_groups[0].update(chosen)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    groups = [{key: value for key, value in group.items() if key != "params"} for group in opt.param_groups]
    for stored in (opt.defaults, groups[0]):
        again = json.loads(json.dumps(stored))
        assert again == {**stored, "betas": list(stored["betas"])}
    again = Prodigy(make_params(torch.float32), slice_p=opt.param_groups[0]["slice_p"])
    again.load_state_dict(opt.state_dict())
    assert again.param_groups[0]["state_dtype"] == opt.param_groups[0]["state_dtype"]


def test_a_checkpoint_with_a_dtype_in_it_loads():
    """As version 0.1 wrote them."""
    opt = Prodigy(make_params(torch.float32), state_dtype="bfloat16")
    saved = opt.state_dict()
    saved["param_groups"][0]["state_dtype"] = torch.bfloat16
    again = Prodigy(make_params(torch.float32))
    again.load_state_dict(saved)
    assert again.param_groups[0]["state_dtype"] == "bfloat16"
