"""What the compiler makes of the Triton kernels: docs/internals/kernels.md, and the program that reads machine code."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nodriver
import pytest
import targets

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.machine_code import offline, reader, tables  # noqa: E402

REQUIRED = "triton" in targets.REQUIRED


def sass(*lines: str) -> list[reader.Instruction]:
    """A listing in which a line that ends in a colon is a label."""
    listing = ['\t.section\t.text.other,"ax"', "        /*0000*/   BRA `(.L_other) ;", ".L_other:"]
    listing += [
        '\t.section\t.text.kernel,"ax",@progbits',
        '\t.sectionflags\t@"SHF_BARRIERS=1"',
        ".text.kernel:",
    ]
    listing += [
        line if line.endswith(":") else f"        /*{0x10 * i:04x}*/   {line} ;"
        for i, line in enumerate(lines)
    ]
    return reader.sass("\n".join(listing), "kernel")


def texts(code: list[reader.Instruction], loop: tuple[int, ...]) -> list[str]:
    return [code[i].text for i in loop]


# The shape of a kernel for sm_90: the adapter's loop, the main loop with a wait whose code lies behind the end, and
# the padding after it.
KERNEL = (
    "MOV R1, R2",
    "@P0 BRA `(.L_x_1)",
    ".L_x_0:",
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "@!P0 BRA `(.L_x_0)",
    ".L_x_1:",
    "IMAD.WIDE.U32 R4, R5, -0x2daee0ad, RZ",
    ".L_x_2:",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R6",
    "@!P0 BRA `(.L_x_4)",
    ".L_x_3:",
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24",
    "IMAD.WIDE.U32 R4, R5, -0x326172a9, RZ",
    "MUFU.LG2 R7, R8",
    "BRA.U UP0, `(.L_x_2)",
    "@!P1 EXIT",
    "STG.E [R2], R4",
    "EXIT",
    ".L_x_4:",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R9",
    "@!P0 BRA `(.L_x_4)",
    "BRA `(.L_x_3)",
    ".L_x_5:",
    "BRA `(.L_x_5)",
    "NOP",
)
MAIN = [*KERNEL[9:11], *KERNEL[12:16], *KERNEL[20:23]]
MAIN = [line.removeprefix("@!P0 ") for line in MAIN]


def test_loop_includes_the_code_that_waits_far_behind() -> None:
    code = sass(*KERNEL)
    found = reader.loops(code)
    assert sorted(len(loop) for loop in found) == [2, 3, 9]
    assert texts(code, max(found, key=len)) == MAIN


def test_main_loop_is_the_innermost_with_products_and_philox() -> None:
    code = sass(*KERNEL)

    def wanted(body: list[reader.Instruction]) -> bool:
        return any("HGMMA" in i.text for i in body) and any("IMAD.WIDE" in i.text for i in body)

    assert [i.text for i in reader.main_loop(code, wanted)] == MAIN
    with pytest.raises(ValueError, match="expected one main loop, got 0"):
        reader.main_loop(code, lambda body: False)
    with pytest.raises(ValueError, match="expected one main loop, got 2"):
        reader.main_loop(code, lambda body: len(body) < 4)


def test_innermost_of_nested_loops() -> None:
    code = sass(
        ".L_x_0:", "FADD R1, R2, R3", ".L_x_1:", "HMMA R4, R5, R6", "@P0 BRA `(.L_x_1)", "@P1 BRA `(.L_x_0)", "EXIT"
    )  # fmt: skip

    def wanted(body: list[reader.Instruction]) -> bool:
        return any("HMMA" in i.text for i in body)

    assert [i.text for i in reader.main_loop(code, wanted)] == ["HMMA R4, R5, R6", "BRA `(.L_x_1)"]
    assert len(reader.main_loop(code, wanted, outermost=True)) == 4


def test_code_that_cannot_run_is_not_counted() -> None:
    code = sass(*KERNEL)
    assert [code[i].text for i in range(len(code)) if i not in reader.reachable(code)] == [
        "BRA `(.L_x_5)",
        "NOP",
    ]


@pytest.mark.parametrize(
    "branch, after",
    [
        ("BRA `(.L_x_0)", (0,)),
        ("@PT BRA `(.L_x_0)", (0,)),
        ("@!P3 BRA `(.L_x_0)", (0, 2)),
        ("BRA P2, `(.L_x_0)", (0, 2)),
        ("BRA.U !UP1, `(.L_x_0)", (0, 2)),
        ("BRA.DIV UR4, `(.L_x_0)", (0, 2)),
        ("EXIT", ()),
        ("@P0 EXIT", (2,)),
        ("RET.REL.NODEC R4 `(kernel)", ()),
        ("WARPSYNC.COLLECTIVE R16, `(.L_x_0)", (2,)),
        ("CALL.ABS.NOINC R10", (2,)),
    ],
)
def test_what_may_come_after_a_branch(branch: str, after: tuple[int, ...]) -> None:
    assert sass(".L_x_0:", "NOP", branch, "EXIT")[1].after == after


def test_call_that_does_not_return_is_a_branch() -> None:
    code = sass(".L_x_0:", "NOP", "@P0 CALL.REL.NOINC `(.L_x_1)", "BRA `(.L_x_0)", ".L_x_1:", "EXIT")
    assert (code[1].opcode, code[1].after) == ("BRA", (3, 2))
    assert reader.loops(code) == [(0, 1, 2)]
    code = sass(
        "CALL.REL.NOINC `(.L_x_0)",
        "EXIT",
        ".L_x_0:",
        "BPT.TRAP 0x1",
        "@P0 EXIT",
        "RET.REL.NODEC R4 `(kernel)",
    )
    assert (code[0].opcode, code[0].after) == ("CALL.REL.NOINC", (1,))
    assert reader.reachable(code) == [0, 1]


def test_when_an_instruction_is_issued_is_no_part_of_it() -> None:
    code = sass("@!P0 BRA `(.L_x_0)      &req={4,3}   ?trans5", ".L_x_0:", "EXIT  ?trans5")
    assert [i.text for i in code] == ["BRA `(.L_x_0)", "EXIT"]


def test_branches_that_are_not_understood_are_errors() -> None:
    for branch in ("BRX R4 -0x10", "JMP R2", "BREAK B0"):
        with pytest.raises(ValueError, match="cannot be followed"):
            sass(branch, "EXIT")
    sass(
        "BSSY B0, `(.L_x_0)", "@P0 BRA `(.L_x_1)", "FADD R1, R1, R1", ".L_x_1:", "BSYNC B0", ".L_x_0:", "EXIT"
    )
    with pytest.raises(ValueError, match="not followed by the target"):
        sass("BSSY B0, `(.L_x_0)", "BSYNC B0", "FADD R1, R1, R1", ".L_x_0:", "EXIT")


def test_cycle_with_two_entries_is_an_error() -> None:
    code = sass("@P0 BRA `(.L_x_1)", ".L_x_0:", "NOP", ".L_x_1:", "NOP", "@P1 BRA `(.L_x_0)", "EXIT")
    with pytest.raises(ValueError, match="two entries"):
        reader.loops(code)


def test_loop_of_amd_assembly() -> None:
    code = reader.amdgcn(
        "other:\n\ts_branch .LBB1_0\nkernel:                 ; @kernel\n.Lfunc_begin0:\n; %bb.16:\n"
        '\t.file\t1 "a.py"\n\ts_mov_b32 s0, 0\n\ts_cbranch_scc1 .LBB0_2\n.LBB0_1:   ; in Loop\n'
        "\t.loc\t1 39 0\n\tv_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]\n.Ltmp1:\n"
        "\ts_cbranch_scc0 .LBB0_1\n.LBB0_2:\n\ts_endpgm\n.Lfunc_end0:\n\t.set a, 1\n\tv_nop\n",
        "kernel",
    )
    assert [i.opcode for i in code] == [
        "s_mov_b32", "s_cbranch_scc1", "v_mfma_f32_32x32x8_bf16", "s_cbranch_scc0", "s_endpgm"
    ]  # fmt: skip
    assert reader.loops(code) == [(2, 3)]


def test_hidden_special_functions() -> None:
    def hidden(*lines: str) -> int | None:
        return reader.hidden(sass(*lines, "EXIT"))

    product, wait, special = "HGMMA.64x128x16 R24", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "MUFU.LG2 R1, R2"
    assert hidden(special, product, special, product, special, wait, special) == 2
    assert hidden(special, wait, special, product, special, special) == 3  # the wait is in the next round
    assert hidden(special, "HMMA.16816 R1", special) is None
    assert hidden("HGMMA R1", special) is None


def with_scoreboards(*lines: tuple[str, int | None, tuple[int, ...]]) -> list[reader.Instruction]:
    """A listing of `nvdisasm -hex`: of each line its text, the scoreboard it sets and those it waits for."""
    listing = ['\t.section\t.text.kernel,"ax",@progbits']
    for i, (text, sets, waits) in enumerate(lines):
        control = sum(1 << 11 + j for j in waits) | 7 << 8 | (7 if sets is None else sets) << 5 | 3
        listing.append(f"        /*{0x10 * i:04x}*/   {text} ;    /* 0x{0xFEED << 9:016x} */")
        listing.append(f"{'':40}/* 0x{control << 41 | 0x500:016x} */")
    return reader.sass("\n".join(listing), "kernel")


LOAD = "LDG.E.128 R12, desc[UR56][R12.64]"
PRODUCT = ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24", None, ())
WAIT = ("WARPGROUP.DEPBAR.LE gsb0, 0x0", None, ())


def test_scoreboards_are_read_from_the_control_bits() -> None:
    code = with_scoreboards(
        ("@!P0 " + LOAD, 5, (0, 3)), ("FADD R1, R2, R3", None, ()), ("DEPBAR.LE SB2, 0x1", None, (4,))
    )
    assert [(i.sets, i.waits) for i in code] == [(5, (0, 3)), (None, ()), (None, (2, 4))]
    assert code[0].text == LOAD
    assert [(i.sets, i.waits) for i in sass(LOAD, "EXIT")] == 2 * [(None, ())]
    # Of ptxas: LDC R10, c[0x0][0x24c] sets scoreboard 0, IMAD.IADD R7, R9, 0x1, R10 waits for 0 and 1.
    listing = '\t.section\t.text.kernel,"ax"\n' + "\n".join(
        f"        /*0000*/   NOP ;   /* 0x0000000000007918 */\n      /* {word} */"
        for word in ("0x000e220000000800", "0x003fca0000000000")
    )
    assert [(i.sets, i.waits) for i in reader.sass(listing, "kernel")] == [(0, ()), (None, (0, 1))]


def test_waits_for_loads_while_the_tensor_cores_idle() -> None:
    def exposed(*lines: tuple[str, int | None, tuple[int, ...]]) -> list[str]:
        return reader.exposed_waits(with_scoreboards(*lines))

    load, use = (LOAD, 5, ()), ("FADD R1, R12, R3", None, (0, 5))
    assert exposed(load, use, PRODUCT, WAIT) == [use[0]]
    assert exposed(load, (PRODUCT[0], None, (5,)), WAIT) == [PRODUCT[0]]
    assert exposed(load, PRODUCT, use, WAIT) == []  # under the product
    assert exposed(load, PRODUCT, PRODUCT, WAIT, use) == []  # there was a product's time for it
    assert exposed(PRODUCT, load, PRODUCT, WAIT, use) == [use[0]]  # put off until after the first product
    assert exposed(use, PRODUCT, WAIT, load) == [use[0]]  # of the round before
    assert exposed(use, load, PRODUCT, WAIT) == []
    assert exposed(load, use, use, PRODUCT, WAIT) == [use[0]]  # the second finds it there
    assert exposed(("LDS R12, [R3]", 5, ()), use, PRODUCT, WAIT) == []
    assert exposed(("LDG.E R2, desc[UR4][R2.64]", 4, ()), use, PRODUCT, WAIT) == []
    some = ("WARPGROUP.DEPBAR.LE gsb0, 0x1", None, ())
    assert exposed(PRODUCT, some, load, use, WAIT) == []  # one product still runs


# The table


def row(**changed: object) -> offline.Row:
    base = offline.Row(
        "forward", "sm90", "bfloat16", "gaussian", "256x128x64, 8 warps, 3 stages", "8192 rows",
        15.9, "8 HGMMA", 64, 52, 0, 240, 114712, 8192, (),
    )  # fmt: skip
    return base._replace(**changed)  # type: ignore[arg-type]


def outcome(*rows: offline.Row, version: str = "3.6.0") -> offline.Outcome:
    return offline.Outcome(version, list(rows), [])


EVERYTHING = os.environ.get("FLATLORA_COMPILE") == "all"


@functools.cache
def sampled() -> bool:
    """Whether some rows alone are compiled, because the page was written from these very sources, by these versions."""
    here = {f"Triton {version}" for version in (offline.OLDEST, offline.version() or offline.OLDEST)}
    return offline.unchanged() and here <= tables.read(offline.PAGE).keys() and not EVERYTHING


def compare(found: offline.Outcome, known: tables.Known, whole: bool = True) -> list[str]:
    """whole: all rows of the targets that were compiled are there."""
    targets = {row.target for row in found.rows} if whole else set()
    return tables.compare(offline.PAGE, found.heading, found.rows, known, targets)


def committed(*outcomes: offline.Outcome) -> tables.Known:
    """What is read from a page that is written of these."""
    return tables.read(offline.PAGE, tables.document(offline.PAGE, {o.heading: o.rows for o in outcomes}))


def test_table_round_trip() -> None:
    rows = [row(), row(target="sm80", hidden=None, exposed=None, shared=49152, tensor="16 HMMA")]
    known = committed(outcome(*rows), outcome(*rows, version="3.9.0"))
    assert list(known) == ["Triton 3.6.0", "Triton 3.9.0"]
    assert known["Triton 3.6.0"] == {
        rows[0][:6]: {"instr": 15.9, "special": 64, "KiB": 112.0},
        rows[1][:6]: {"instr": 15.9, "special": 64, "KiB": 48.0},
    }
    assert compare(outcome(*rows), known) == []


def test_figures_may_only_go_down() -> None:
    known = committed(outcome(row()))
    assert compare(outcome(row(instr=10.0, special=60, registers=250)), known) == []
    assert compare(outcome(row(instr=15.9 * 1.069)), known) == []
    (problem,) = compare(outcome(row(instr=15.9 * 1.071)), known)
    assert "instr" in problem and "may only go down" in problem
    assert "special" in compare(outcome(row(special=69)), known)[0]
    assert "KiB" in compare(outcome(row(shared=130000)), known)[0]
    assert tables.compare(offline.PAGE, "Triton 3.6.0", [row(instr=15.91)], known, (), slack=1.0)


def test_rows_must_match_the_configurations() -> None:
    known = committed(outcome(row()))
    new = row(tile="128x128x64, 8 warps, 3 stages")
    problems = compare(outcome(new), known)
    assert len(problems) == 2 and all(offline.PAGE.regenerate in problem for problem in problems)
    assert f"not in {offline.PAGE.place}" in problems[0] and "nothing compiles" in problems[1]


def test_version_without_a_table_is_held_to_the_others() -> None:
    older, newer = outcome(row(instr=15.0)), outcome(row(instr=16.0), version="3.9.0")
    known = committed(older, newer)
    assert compare(outcome(row(instr=17.0), version="3.10.0"), known) == []
    assert compare(outcome(row(instr=17.2), version="3.10.0"), known)
    assert compare(older, {}) == [f"no table in {offline.PAGE.place}; {offline.PAGE.regenerate}"]


@pytest.mark.parametrize(
    "changed, problem",
    [
        ({"instr": 17.51}, "the budget is 17.5"),
        ({"kernel": "input_grad", "instr": 18.61}, "the budget is 18.6"),
        ({"kernel": "perturb", "instr": 15.21, "rows": 0}, "the budget is 15.2"),
        ({"noise": "rademacher", "instr": 9.01}, "the budget is 9.0"),
        ({"noise": "near_gaussian", "instr": 9.51}, "the budget is 9.5"),
        ({"kernel": "perturb", "noise": "near_gaussian", "instr": 6.01, "rows": 0}, "the budget is 6.0"),
        ({"kernel": "perturb", "noise": "rademacher", "instr": 5.51, "rows": 0}, "the budget is 5.5"),
        ({"kernel": "perturb", "noise": "hadamard", "instr": 12.01, "rows": 0}, "the budget is 12.0"),
        ({"exposed": 2}, "2 waits for a global load"),
        ({"exposed": 1, "dtype": "float16", "noise": "rademacher"}, "1 waits for a global load"),
        ({"shared": (227 << 10) + 1}, "bytes of shared memory"),
        ({"registers": 256}, "registers"),
        ({"tensor": "16 HMMA"}, "expected HGMMA"),
        ({"target": "sm100", "hidden": None}, "expected UTCHMMA"),
        ({"target": "sm80", "tensor": "8 HMMA", "shared": 100 << 10}, "101376 fit"),
    ],
)
def test_what_must_hold_of_every_row(changed: dict[str, object], problem: str) -> None:
    arguments = {"num_warps": 8, "BLOCK_M": 256, "CARRY": True}
    assert offline._problems(row(), arguments) == []
    assert problem in "; ".join(offline._problems(row(**changed), arguments))


def test_budgets_of_packed_weights() -> None:
    nf4 = row(case="8192 rows, NF4")
    assert offline.budget(nf4) == 19.2 and offline.budget(nf4._replace(noise="rademacher")) == 9.9
    assert offline.budget(row(case="8192 rows, NF4 with nested scales")) is None
    arguments = {"num_warps": 8, "BLOCK_M": 256, "CARRY": True}
    assert "the budget is 19.2" in offline._problems(nf4._replace(instr=19.21), arguments)[0]
    assert offline._problems(nf4._replace(exposed=1), arguments) == []
    assert offline._problems(nf4._replace(exposed=2), arguments)


def test_waits_that_are_allowed() -> None:
    arguments = {"num_warps": 8, "BLOCK_M": 256, "CARRY": True}
    assert offline._problems(row(exposed=1), arguments)
    assert offline._problems(row(exposed=1), {**arguments, "CARRY": False}) == []
    assert offline._problems(row(exposed=1, rows=128), arguments) == []
    assert offline._problems(row(exposed=1, case="8192 rows, sizes multiples of 8 alone"), arguments) == []
    assert offline._problems(row(hidden=0), arguments) == []


def test_budgets_are_for_whole_tiles_of_aligned_operands() -> None:
    assert offline.budget(row()) == 17.5
    for case in ("8192 rows, odd sizes and offsets", "8192 rows, all operands column-major"):
        assert offline.budget(row(case=case)) is None
        assert not offline._problems(
            row(case=case, hidden=0, exposed=4, instr=40.0),
            {"num_warps": 8, "BLOCK_M": 256, "CARRY": True},
        )
    assert offline.budget(row(rows=64)) is None
    assert offline.budget(row(dtype="float16")) is None


def test_full_float32_takes_no_tensor_cores() -> None:
    arguments = {"num_warps": 4, "BLOCK_M": 64, "CARRY": False}
    full = row(target="sm100", dtype="float32", tensor="-", hidden=None, exposed=None)
    assert offline._problems(full, arguments) == []
    assert "full precision" in offline._problems(full._replace(tensor="2 UTCHMMA"), arguments)[0]
    amd = full._replace(target="gfx942", tensor="8 v_mfma_f32_32x32x2_f32", shared=0)
    assert offline._problems(amd, arguments) == []


def test_changed_sources_are_compiled_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    committed = offline._DIGEST.search(offline.PAGE.path.read_text())
    monkeypatch.setattr(offline, "digest", lambda: committed.group())
    assert offline.unchanged()
    monkeypatch.setattr(offline, "digest", lambda: "0" * 16)
    assert not offline.unchanged()


# The kernels


@pytest.fixture(scope="module")
def outcomes() -> dict[str, offline.Outcome]:
    """Those of the versions that are here, by the names that tests have for them."""
    folders = {"oldest": offline.OLDEST_FOLDER, "environment": None}
    if offline.version() in (None, offline.OLDEST):
        folders.pop("environment")
    if offline.version() == offline.OLDEST:
        folders["oldest"] = None
    here = {
        name: folder for name, folder in folders.items() if folder is None or (folder / "triton").is_dir()
    }
    if sampled():
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda folder: offline.measure(folder, offline.SAMPLE), here.values()))
    else:  # CI has time for each architecture once
        found = offline.measure_all(list(here.values()), shared=not EVERYTHING)
    return dict(zip(here, found, strict=True))


@pytest.fixture(params=["oldest", "environment"])
def compiled(request: pytest.FixtureRequest, outcomes: dict[str, offline.Outcome]) -> offline.Outcome:
    if found := outcomes.get(request.param):
        return found
    if request.param == "environment" and offline.version() == offline.OLDEST:
        pytest.skip(f"the environment's Triton is the oldest supported, {offline.OLDEST}")
    reason = {
        "oldest": f"Triton {offline.OLDEST} is not in {offline.OLDEST_FOLDER.name}: make test-compile puts it there",
        "environment": "triton is not installed: pip install triton",
    }[request.param]
    if REQUIRED:
        pytest.fail(f"backend 'triton' is required: {reason}")
    pytest.skip(reason)


def test_loads_ahead_change_no_bit() -> None:
    """Hopper's loops, which the interpreter runs everywhere else, against those that load a step later."""
    pytest.importorskip("triton")
    program = """
        import torch
        from flatlora_kernels.backends import triton
        from flatlora_kernels.core.records import Draw, Product
        from flatlora_kernels.triton_kernels import configs, forward, input_grad, product

        def products(steps, noise):
            torch.manual_seed(0)
            M, N, K = 40, 64 * steps - 5, 64 * steps - 7
            x, w, y = torch.randn(M, K), torch.randn(N, K), torch.randn(M, N)
            draw = Draw(torch.rand(N), torch.tensor(7), noise=noise)
            both = Product(x, w), Product(y, w, True)
            return [product.product(p, draw, "split", 1 << 24)[0] for p in both]

        def everything():
            noises = ("gaussian", "rademacher", "near_gaussian")
            return [out for steps in (1, 2, 5) for noise in noises for out in products(steps, noise)]

        tiles = {name: ((40, configs.Config(64, 64, 64, 1, 1)),) for name in ("forward", "input_grad")}
        configs.LINEAR["interpreter", "any"] = tiles
        ahead = everything()
        forward.loads_ahead = input_grad.loads_ahead = lambda: False
        assert all(torch.equal(*pair) for pair in zip(ahead, everything()))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=tables.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_no_spills_tensor_cores_and_budgets(compiled: offline.Outcome) -> None:
    assert compiled.rows
    wrong = tables.problems(offline.PAGE, compiled.heading, compiled.rows) + compiled.unreached
    assert not wrong, "\n".join(["", *wrong])


@pytest.mark.slow
def test_matches_the_committed_table(compiled: offline.Outcome) -> None:
    problems = compare(compiled, tables.read(offline.PAGE), not sampled())
    assert not problems, "\n".join(["", *problems])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm80", "sm90", "sm100", "sm120"])
def test_every_configuration_launches(
    architecture: str, compiled: offline.Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Triton's own launcher down to the driver, and a second time without Triton's search for the kernel."""
    if compiled.version != offline.version():
        pytest.skip("of the Triton that this process imports")
    if architecture not in {row.target for row in compiled.rows}:
        pytest.skip("not compiled for it by this Triton, unless FLATLORA_COMPILE=all")
    from flatlora_kernels.triton_kernels import launch

    monkeypatch.setenv("TRITON_CACHE_DIR", str(offline.CACHE / "triton"))
    cases = [case for case in offline.cases() if case.architecture == architecture]
    if sampled():
        cases = [case for case in cases if case.noise == offline.SAMPLE.split()[1]]
    assert cases
    seen = []
    with nodriver.active(architecture, monkeypatch) as driver:
        start = launch.Kernel._launch

        def checked(self: Any, changing: tuple[Any, ...]) -> None:
            before, maps = driver.launches, driver.maps
            start(self, changing)
            # Tensors here have no address, and of an int of 4 bytes the other 4 are anything.
            values = [value & 0xFFFFFFFF for value in driver.values(6)]
            seen.append((self.kernel.__name__, driver.grid, driver.threads, driver.shared, values))
            assert driver.launches == before + 1
            assert driver.grid == self.grid and driver.threads == 32 * self.options["num_warps"]
            assert driver.stream == nodriver.STREAM
            if isinstance(changing[0], TensorDescriptor):
                rows, columns = changing[0].block_shape
                assert driver.maps == maps + 1
                assert driver.box[0] == rows and columns % driver.box[1] == 0
            else:
                assert driver.maps == maps

        from triton.tools.tensor_descriptor import TensorDescriptor

        monkeypatch.setattr(launch.Kernel, "_launch", checked)
        for case in cases:
            seen.clear()
            offline.call(case)
            offline.call(case)
            first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
            assert first == second and len(first) in (1, 2), case
