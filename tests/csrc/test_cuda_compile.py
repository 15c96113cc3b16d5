"""What nvcc makes of the CUDA kernels: docs/internals/cuda_kernels.md, and the program that reads ptxas and machine
code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.machine_code import compiled, tables  # noqa: E402

# CI compiles for these alone, and not the packed products, which take a minute; FLATLORA_COMPILE=all for all.
REPRESENTATIVE = ("80", "90a")
LONG = "csrc/cuda/linear_sm80_packed.cu"
SAMPLE = ("csrc/cuda/perturb.cu", "80")  # is compiled even where nothing has changed
EVERYTHING = os.environ.get("FLATLORA_COMPILE") == "all"

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8flatlora1fEv' for 'sm_80'
ptxas info    : Function properties for _ZN8flatlora1fEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 121 registers, used 1 barriers, 1024 bytes smem, 504 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN8flatlora1gEv' for 'sm_80'
ptxas info    : Function properties for _ZN8flatlora1gEv
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers
"""


def test_what_ptxas_says_is_understood() -> None:
    assert compiled.usages(LOG) == {
        "_ZN8flatlora1fEv": {
            "stack": 0,
            "spill stores": 0,
            "spill loads": 0,
            "registers": 121,
        },
        "_ZN8flatlora1gEv": {"stack": 16, "spill stores": 12, "spill loads": 8, "registers": 255},
    }
    assert compiled.warnings(LOG) == []
    serialised = (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    )
    assert compiled.warnings(LOG + serialised) == [serialised]
    assert compiled.warnings("a.cu(3): warning #177-D: variable was declared but never referenced")


def listing(*lines: str) -> str:
    body = [
        line if line.endswith(":") else f"        /*{16 * i:04x}*/   {line} ;" for i, line in enumerate(lines)
    ]
    return "\n".join(['\t.section\t.text.kernel,"ax",@progbits', ".text.kernel:", *body])


DRAW = ["IMAD.WIDE.U32 R4, R5, -0x326172a9, RZ"] * 8
PAIRS = ["MUFU.LG2 R7, R8", "MUFU.SQRT R7, R7"] * 4
LINEAR = ["LDGSTS.E.BYPASS.128 [R1], [R2]", "LDSM.16.M88.4 R4, [R1]", "HMMA.16816.F32 R4, R8, R12, R4"]
END = ["@P0 BRA `(.L_x_0)", "EXIT"]
USAGE = {"stack": 0, "spill stores": 0, "spill loads": 0, "registers": 100}


def read(*lines: str, name: str = "linear_sm80<bf16, false, gaussian, 0>", **usage: int) -> compiled.Row:
    return compiled.read(listing(*lines), "kernel", name, "80", USAGE | usage)


def test_instructions_of_the_main_loop_by_value() -> None:
    row = read("MOV R1, R2", ".L_x_0:", *LINEAR, *DRAW, *PAIRS, *END)
    assert row.problems == ()
    assert (row.instr, row.besides, row.values, row.tensor, row.special) == (2.5, 2.25, 8, "1 HMMA", 8)
    # Without logarithms a call serves 32 signs.
    row = read(".L_x_0:", *LINEAR, *DRAW, *END, name="linear_sm80<bf16, false, rademacher, 0>")
    assert (row.instr, row.values) == (round(12 / 32, 2), 32)
    row = read(".L_x_0:", *LINEAR, *DRAW, *DRAW, *END, name="linear_sm80<bf16, false, rademacher, 2>")
    assert row.values == 32  # the second call is for rows that begin within a word


def test_values_that_a_call_serves() -> None:
    loop, moves = [".L_x_0:", *LINEAR, *DRAW], ["PRMT R1, R2, R3, R4"] * 64
    for name, values in (
        ("linear_sm80<bf16, false, near_gaussian, 0>", 32),
        ("linear_sm80<bf16, false, rademacher, 0>", 32),
        ("perturb<bf16, near_gaussian, true>", 32),
        ("perturb<f16, rademacher, true>", 128),
        ("perturb<f16, rademacher, false>", 32),
        ("perturb<f16, hadamard, true>", 32),
        ("perturb<f16, hadamard, false>", 8),
        ("perturb_packed_rows<bf16, rademacher, 4, 1>", 128),
        ("perturb_packed<bf16, rademacher>", 32),
        ("perturb_packed<bf16, hadamard>", 8),
        ("linear_packed_sm80<bf16, true, rademacher, 0, 4 bits>", 32),
        ("transform<bf16, 12, true>", 16),
        ("transform_small<bf16>", 1),
    ):
        assert read(*loop, *END, name=name).values == values
    # A producer has all rows of a call where it moves the signs of so many.
    hopper = "linear_sm90<bf16, false, rademacher, 1>"
    assert read(*loop, *END, name=hopper).values == 32
    assert read(*loop, *moves, *END, name=hopper).values == 128
    assert read(*LINEAR, "EXIT", name="add_parts").instr is None


def test_what_must_hold_of_every_kernel() -> None:
    loop = [".L_x_0:", *LINEAR, *DRAW, *PAIRS, *END]
    assert "16 bytes of stack" in read(*loop, stack=16).problems
    assert "4 bytes of spill stores" in read(*loop, **{"spill stores": 4}).problems
    assert any("local memory" in p for p in read("STL [R1], R2", *loop).problems)
    for missing in ("HMMA", "LDSM", "LDGSTS"):
        rest = [line for line in loop if not line.startswith(missing)]
        assert f"no {missing}" in read(*rest).problems
    hopper = compiled.read(listing(*loop), "kernel", "linear_sm90<bf16>", "90a", USAGE)
    assert {"no HGMMA", "no UTMALDG"} <= set(hopper.problems)
    assert any("GPU-wide" in p for p in read(loop[0], "MEMBAR.ALL.GPU", *loop[1:]).problems)
    assert any("GPU-wide" in p for p in read(loop[0], "CCTL.IVALL", *loop[1:]).problems)
    assert not read("MEMBAR.ALL.GPU", loop[0], "MEMBAR.ALL.CTA", *loop[1:]).problems
    assert any("calls inside" in p for p in read(".L_x_0:", "CALL.ABS.NOINC R10", *loop[1:]).problems)
    assert "no loop that draws noise" in read(*LINEAR, *DRAW, *PAIRS, "EXIT").problems


def test_main_loop_is_the_one_without_the_edges() -> None:
    edges = [".L_x_1:", "NOP", *LINEAR, *DRAW, *PAIRS, "@P0 BRA `(.L_x_1)"]
    start = [".L_x_2:", *DRAW, *PAIRS, "@P0 BRA `(.L_x_2)"]
    row = read(*start, *edges, ".L_x_0:", *LINEAR, *DRAW, *PAIRS, *END)
    assert (row.instr, row.problems) == (2.5, ())


def row(**changed: object) -> compiled.Row:
    base = compiled.Row("linear_sm80<bf16, false, gaussian, 0>", "sm_80", 15.0, 12.0, 32, "64 HMMA", 64, 200)
    return base._replace(**changed)  # type: ignore[arg-type]


def compare(rows: list[compiled.Row], known: tables.Known, **options: float) -> list[str]:
    return tables.compare(compiled.PAGE, "", rows, known, ("sm_80",), **options)


def test_figures_may_only_go_down() -> None:
    other = row(kernel="add_parts", instr=None, values=None)
    known = tables.read(compiled.PAGE, tables.document(compiled.PAGE, {"": [row(), other]}))
    assert known[""][row()[:2]] == {"instr": 15.0, "registers": 200}
    assert compare([row(), other], known) == []
    assert compare([row(instr=10.0, registers=99), other], known) == []
    (problem,) = compare([row(instr=15.6), other], known)
    assert "instr 15.6" in problem and "may only go down" in problem
    (problem,) = compare([row(registers=210), other], known)
    assert "registers 210" in problem
    assert compare([row(instr=15.01), other], known, slack=1.0)
    (problem,) = compare([row(), other, row(target="sm_86")], known)
    assert compiled.PAGE.regenerate in problem and "not in" in problem
    (problem,) = compare([row()], known)
    assert "add_parts, sm_80" in problem and "nothing compiles" in problem


def test_budgets_hold_whatever_the_table_says() -> None:
    assert not compiled._over_budget(row(instr=30.0, besides=17.0))
    assert compiled._over_budget(row(besides=17.1))
    assert compiled._over_budget(row(kernel="perturb<f16, gaussian, true>", besides=17.1))
    assert not compiled._over_budget(row(kernel="perturb<f16, gaussian, false>", besides=17.1))
    assert not compiled._over_budget(row(kernel="linear_sm80<float, true, gaussian, 3>", besides=30.0))
    assert not compiled._over_budget(row(kernel="linear_sm80<bf16, true, gaussian, 2>", besides=30.0))


def test_each_kind_of_noise_has_a_budget_of_its_own() -> None:
    for kernel, most in (
        ("perturb<bf16, near_gaussian, true>", 6.0),
        ("perturb<f16, near_gaussian, true>", 9.5),
        ("perturb<bf16, gaussian, true>", 17.0),
        ("perturb_packed_rows<bf16, near_gaussian, 4, 1>", 17.0),
        ("perturb_packed_rows<f16, gaussian, 8, 4>", 25.0),
        ("linear_packed_sm80<bf16, true, near_gaussian, 0, 4 bits>", 16.5),
        ("linear_packed_sm80<bf16, false, gaussian, 1, 8 bits>", 24.5),
        ("linear_sm80<bf16, true, near_gaussian, 0>", 9.5),
        ("linear_sm80<bf16, true, near_gaussian, 3, apart>", 14.0),
        ("linear_sm80<bf16, true, rademacher, 1>", 8.0),
        ("linear_sm90<bf16, true, near_gaussian, 0>", 9.5),
        ("linear_sm90<bf16, false, rademacher, 0>", 8.5),
    ):
        assert not compiled._over_budget(row(kernel=kernel, besides=most))
        assert compiled._over_budget(row(kernel=kernel, besides=most + 0.1))


def test_names_are_those_of_the_source() -> None:
    mangled = "_ZN8flatlora14perturb_kernelINS_3gpu4bf16ELNS_5NoiseE1ELb1EEEvNS_11PerturbArgsE"
    for number, noise in ((1, "gaussian"), (2, "rademacher"), (3, "near_gaussian"), (4, "hadamard")):
        other = mangled.replace("NoiseE1", f"NoiseE{number}")
        assert compiled.short_names([other]) == {other: f"perturb<bf16, {noise}, true>"}


def test_names_of_packed_products() -> None:
    arguments = "INS_3gpu4bf16ELb0ELNS_5NoiseE1ELi2ELb{}ELi4EEEvNS_15PackedLinearJobE"
    mangled = "_ZN8flatlora25linear_packed_sm80_kernel" + arguments
    for apart, name in ((0, "gaussian, 2, 4 bits>"), (1, "gaussian, 2, 4 bits, apart>")):
        full = mangled.format(apart)
        assert compiled.short_names([full]) == {full: f"linear_packed_sm80<bf16, false, {name}"}
        assert not compiled.regular(compiled.short_names([full])[full])
    assert compiled.regular("linear_packed_sm80<bf16, false, gaussian, 1, 4 bits>")


@pytest.mark.nvcc
@pytest.mark.parametrize("name", ["api", "linear_sm80", "linear_sm90", "linear_sm90_ahead"])
def test_host_code_compiles(name: str, tmp_path: Path) -> None:
    """Which what makes cubins does not look at: of the launchers and the choice of a kernel."""
    if reason := compiled.missing():
        pytest.skip(reason)
    code = "-gencode=arch=compute_90a,code=sm_90a"
    source = compiled.ROOT / "csrc" / "cuda" / f"{name}.cu"
    command = [
        str(compiled.nvcc()),
        *compiled.OPTIONS,
        code,
        "-Xptxas=-O0",
        "-DFLATLORA_HAVE_SM90",
        "-c",
        str(source),
    ]
    done = subprocess.run([*command, "-o", str(tmp_path / "x.o")], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout + done.stderr, done.stdout + done.stderr


def test_every_source_is_compiled_for_every_target() -> None:
    jobs = compiled.jobs()
    hopper = compiled.sources()["cuda-sm90a"]
    assert {target for _, target in jobs} == set(compiled.TARGETS) - (set() if hopper else {"90a"})
    assert all((target == "90a") == (path in hopper) for path, target in jobs)


def test_a_changed_header_is_seen() -> None:
    included = {Path(file).name for file in compiled._included("csrc/cuda/perturb.cu")}
    assert {"perturb.cu", "perturb.h", "noise.h", "ptx.h", "args.h", "philox.h"} <= included


# The kernels


@pytest.mark.nvcc
def test_changed_sources_are_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := compiled.missing():
        pytest.skip(reason)
    monkeypatch.setattr(compiled, "COMPARED", tmp_path / "compared.json")
    compiled.COMPARED.write_text('{"gone.cu sm_80": {}}')
    assert compiled.remembered(SAMPLE) is None
    for wrong in ({"instr": 99.0}, {"problems": ("8 bytes of stack",)}, {"kernel": "unknown"}):
        compiled.remember({SAMPLE: [row(), row(**wrong)]})
        assert compiled.remembered(SAMPLE) is None
    compiled.remember({SAMPLE: [row()]})
    assert compiled.remembered(SAMPLE) == {row()[:2]}
    assert compiled.remembered((SAMPLE[0], "90")) is None
    assert "gone.cu" not in compiled.COMPARED.read_text()
    monkeypatch.setattr(compiled, "OPTIONS", ("-O2",))
    assert compiled.remembered(SAMPLE) is None


@pytest.fixture(scope="module")
def found() -> dict[compiled.Job, list[compiled.Row]]:
    """What is compiled here: everything, or what has changed since the page was compared with it."""
    if reason := compiled.missing():
        pytest.skip(reason)
    chosen = compiled.jobs()
    if not EVERYTHING:
        chosen = [job for job in chosen if job[1] in REPRESENTATIVE and job[0] != LONG]
        chosen = [job for job in chosen if job == SAMPLE or compiled.remembered(job) is None]
    return compiled.measure_all(chosen)


@pytest.mark.nvcc
@pytest.mark.slow
def test_no_spills_tensor_cores_and_budgets(found: dict[compiled.Job, list[compiled.Row]]) -> None:
    rows = compiled.all_rows(found)
    assert rows
    problems = tables.problems(compiled.PAGE, "", rows)
    assert not problems, "\n".join(["", *problems])


@pytest.mark.nvcc
@pytest.mark.slow
def test_matches_the_committed_table(found: dict[compiled.Job, list[compiled.Row]]) -> None:
    known = tables.read(compiled.PAGE)
    targets = {f"sm_{target}" for _, target in compiled.jobs() if EVERYTHING or target in REPRESENTATIVE}
    if not EVERYTHING:
        left_out = {key for table in known.values() for key in table if key[0].startswith("linear_packed")}
        for job in set(compiled.jobs()) - set(found):
            left_out |= compiled.remembered(job) or set()
        known = {
            heading: {key: figures for key, figures in table.items() if key not in left_out}
            for heading, table in known.items()
        }
    problems = tables.compare(compiled.PAGE, "", compiled.all_rows(found), known, targets=targets)
    assert not problems, "\n".join(["", *problems])
