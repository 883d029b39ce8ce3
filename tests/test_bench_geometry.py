"""``bench/geometry.py``, as far as a machine without a GPU allows."""

import re

import benchmarks
import geometry
import rows

POLICIES = (geometry.ROOT / "csrc" / "cuda" / "policy.h").read_text()


def rows_of(text, table="Update"):
    return re.findall(r"    Policy<.*>[,>]", text.split(f"using {table}Policies")[1].split(";")[0])


def test_every_row_of_the_table_gets_another_geometry():
    assert geometry.rewritten(POLICIES, "as it is") == POLICIES
    before = rows_of(POLICIES)
    assert len(before) == len(geometry.ROW.findall("\n".join(before))) > 20
    half, double = (rows_of(geometry.rewritten(POLICIES, f"{what} chunks")) for what in ("half", "double"))
    assert all(a != b for a, b in zip(before, half, strict=True))
    assert "    Policy<Stored<float, float>,       EveryPth,     512, 2,  4, 2>," in half
    assert "    Policy<Stored<BFloat16, BFloat16>, EveryElement, 128, 5, 32>," in double
    small, large = (rows_of(geometry.rewritten(POLICIES, f"{what} blocks")) for what in ("small", "large"))
    assert "    Policy<Stored<float, float>,       EveryPth,     256, 4,  8, 4>," in small
    assert "    Policy<Stored<BFloat16, float>,    EveryElement, 256, 2,  8>," in large
    assert rows_of(geometry.rewritten(POLICIES, "small blocks"), "Finish") == rows_of(POLICIES, "Finish")


def test_a_copy_has_what_a_build_needs_and_the_table_shows_variants_side_by_side(tmp_path):
    tree = geometry.copied("half chunks", tmp_path)
    assert (tree / "setup.py").is_file() and (tree / "bench" / "run.py").is_file() and not (tree / "build").exists()
    assert (tree / "csrc" / "cuda" / "policy.h").read_text() == geometry.rewritten(POLICIES, "half chunks")
    results = {"as it is": tmp_path / "a.csv", "half chunks": tmp_path / "b.csv", "failed": tmp_path / "c.csv"}
    rows.append(results["as it is"], benchmarks.race(fused=10.0, adamw=8.0))
    rows.append(results["half chunks"], benchmarks.race(fused=12.0, adamw=8.0))
    assert ["float32", benchmarks.FUSED, "1.250", "1.500", ""] in geometry.table(results)
