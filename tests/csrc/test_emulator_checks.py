"""The emulator's own checks: each has a kernel that breaks its rule, and most a twin that keeps it."""

from __future__ import annotations

import ctypes

import emulator
import pytest
import torch

CASES = {
    "synchronised": "",
    "no_barrier": "data race: store_shared",
    "overwritten_too_early": "data race: load_shared",
    "lanes": "data race: store_shared",
    "lanes_after_shuffle": "data race: store_shared",
    "lanes_after_sync": "",
    "halves_of_a_word": "",
    "same_half": "data race: store_shared",
    "named": "",
    "wrong_named_barrier": "data race: store_shared",
    "copies": "",
    "own_copies_without_barrier": "",
    "copies_without_commit": "data race: cp_async",
    "copies_without_wait": "data race: cp_async",
    "copies_without_barrier": "data race: cp_async",
    "copies_without_barrier_in_warp": "data race: cp_async",
    "one_copy_too_few": "data race: cp_async",
    "copy_over_unread": "data race: load_shared",
    "copy_tail": "",
    "copy_under_way": "data race: cp_async",
    "copy_of_too_much": "20 of 16 bytes",
    "misaligned_copy_from": "is not aligned to 16 bytes",
    "misaligned_copy_to": "is not aligned to 16 bytes",
    "never_written": "",  # but NaN
    "beyond_shared": "of 8192 bytes of shared memory",
    "before_shared": "4 bytes at -4 of 8192",
    "misaligned_shared": "is not aligned to 16 bytes",
    "misaligned_global": "is not aligned to 16 bytes",
    "beyond_global": "that no tensor has",
    "beyond_global_copy": "that no tensor has",
    "read_only": "that no tensor lets it write",
    "one_block_writes": "",
    "two_blocks_write": "wrote in the same launch",
    "reads_what_others_write": "wrote in the same launch",
    "ended_before_barrier": "ended",
    "two_barriers": "threads of one block diverge",
    "half_a_warp": "ended",
    "diverged": "lanes of one warp diverge",
    "not_uniform": "lanes differ",
    "too_few_for_barrier": "deadlock: thread 0 of block 0 waits for ever: sync_named",
    "counts_of_barrier": "sync_named",  # refused, or a deadlock
    "barrier_of_odd_size": "a barrier of 33 threads",
}


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    if emulator.CXX is None:
        pytest.skip("no C++ compiler")
    sources = [emulator.ROOT / "tests/cpp/emulator_checks.cpp", emulator.CSRC / "emulator/machine.cpp"]
    path = emulator.compile_library(sources, tmp_path_factory.mktemp("emulator") / "checks.so")
    machine = emulator.Emulator(ctypes.CDLL(str(path)))
    machine.library.case_names.restype = ctypes.c_char_p
    return machine


def run(machine: emulator.Emulator, name: str) -> tuple[int, torch.Tensor]:
    given, out = torch.arange(4096.0), torch.full((64,), -1.0)
    error = machine.library.run_case(name.encode(), *(ctypes.c_void_p(t.data_ptr()) for t in (out, given)))
    return error, out


def test_every_case_is_judged(machine):
    names = machine.library.case_names().decode().split()
    assert sorted(name for name in names if not name.startswith("banks")) == sorted(CASES)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", CASES)
def test_rule(machine, name, seed):
    """Found under every schedule, and without it nothing is."""
    machine.set(seed=seed)
    error, _ = run(machine, name)
    assert error == (719 if CASES[name] else 0)
    assert CASES[name] in machine.report
    assert CASES[name] or machine.report == ""


def test_values(machine):
    machine.set(seed=0)
    order = torch.arange(64)
    assert run(machine, "synchronised")[1].equal((order ^ 32).float())
    assert run(machine, "copies")[1].equal((order ^ 32).float())
    assert run(machine, "copy_tail")[1].view(torch.int32).tolist() == [0x0000] + [0] * 63
    assert run(machine, "never_written")[1].isnan().all()
    assert run(machine, "copies_without_wait")[1].isnan().all()
    assert run(machine, "copy_under_way")[1].isnan().all()
    assert run(machine, "one_copy_too_few")[1].isnan().all()


@pytest.mark.parametrize("name", ["4_0", "8_1", "128_31", "2_0", "16_0", "32_1", "matrix_16_0", "matrix_64_3",
                                  "matrix_128_7", "matrix_128_0"])  # fmt: skip
def test_bank_conflicts(machine, name):
    machine.set(seed=0)
    machine.statistics()
    run(machine, f"banks_{name}")
    sites = [site for site in machine.statistics() if site.phases]
    assert len(sites) == 1
    assert sites[0].conflicts == sites[0].phases * int(name.rpartition("_")[2])
