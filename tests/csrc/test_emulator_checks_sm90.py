"""What the emulator checks of sm_90a: a kernel for each rule that it breaks, and twins that keep it."""

from __future__ import annotations

import ctypes

import emulator
import pytest
import test_emulator_layouts
import test_wrappers
import torch
import wrappers

# By the kernel's name, what is reported; of several, one, which depends on the schedule.
CASES = {
    "arrive": "",
    "too_few_arrivals": "phase 0: 1 of 33 arrivals and 0 bytes are missing",
    "second_phase_never_ends": "phase 1: 32 of 32 arrivals and 0 bytes are missing",
    "phase_before_the_first": "data race: |phase 1: 32 of 32 arrivals",
    "missed_a_phase": "phase 2: 32 of 32 arrivals",
    "too_many_arrivals": "more arrivals than the 1 expected",
    "elected_without_sync_warp": "data race: store_shared",
    "two_barriers_in_one_place": "there is a barrier already",
    "writes_over_barrier": "data race: mbarrier_init",
    "no_barrier": "no barrier was initialised at 16384",
    "misaligned_barrier": "is not aligned to 8 bytes",
    "no_arrivals": "0 arrivals",
    "tma": "",
    "tma_without_wait": "data race: ",
    "tma_without_end": "block 0 may end before tma_load",
    "one_thread_waits": "data race: ",
    "one_thread_waits_for_all": "",
    "too_many_bytes": "0 of 1 arrivals and 16 bytes are missing",
    "too_few_bytes": "0 of 1 arrivals and -16 bytes are missing",
    "tma_misaligned": "a box at 128; the swizzle begins every 1024 bytes",
    "tma_beyond_shared": "of 16400 bytes of shared memory",
    "tma_over_barrier": "overwrites a barrier",
    "tma_over_unread": "data race: load_shared|data race: tma_load",
    "tma_over_stores_fenced": "",
    "tma_over_stores_unfenced": "missing proxy fence: store_shared",
    "fenced_by_one": "missing proxy fence: store_shared",
    "multicast_to_both": "",
    "multicast_to_one": "0 of 1 arrivals and 2048 bytes are missing",
    "multicast_to_nobody": "blocks 4",
    "multicast_without_wait": "data race: ",
    "multicast_over_unread": "data race: ",
    "copy": "",
    "copy_without_end": "may end before copy_to_block",
    "copy_nobody_waits_for": "may end before copy_to_block",
    "copy_to_itself": "to the block itself",
    "copy_to_nobody": "block 2 of a cluster of 2",
    "copy_of_odd_size": "520 bytes",
    "copy_over_barrier": "overwrites a barrier",
    "source_written_too_early": "data race: ",
    "distant_arrival_at_the_end": "has ended|may end before mbarrier_arrive_cluster",
    "distant_arrival_waited_for": "",
    "part_of_cluster": "waits for ever: cluster_sync|threads of the cluster have ended",
    "store": "",
    "store_without_proxy_fence": "missing proxy fence: store_shared",
    "store_without_sync_warp": "data race: store_shared|data race: tma_store",
    "store_without_wait": "thread 0 of block 0 ended with tma_store under way",
    "store_overwritten_early": "data race: tma_store",
    "store_overwritten_late": "",
    "store_to_no_plane": "plane 1 of 1",
    "store_misaligned": "a box at 128; the swizzle begins every 1024 bytes",
    "load_of_planes": "a map of 1 planes",
    "hand_over": "",
    "hand_over_not_told": "waits for ever: wait_at_least",
    "hand_over_told_by_another": "wrote in the same launch|global memory, then store_global",
    "hand_over_not_waited_for": "wrote in the same launch|global memory, then store_global",
    "hand_over_without_fence": "wrote in the same launch",
    "hand_over_without_first_proxy_fence": "missing proxy fence: thread 0 of block 1: tma_load",
    "hand_over_without_second_proxy_fence": "missing proxy fence: thread 0 of block 1: tma_load",
    "hand_over_overwritten": "reads global memory, then store_global",
    "too_many_at_once": "launch of 5 blocks at once on 4 processors",
    "registers": "",
    "registers_of_three": "",
    "registers_that_are_not_there": "registers_increase: the block has only",
    "increase_downwards": "from 256 to 160 registers",
    "product": "",
    "product_without_proxy_fence": "missing proxy fence: store_shared",
    "product_without_fence": "no wgmma_fence since the last group",
    "product_without_second_fence": "no wgmma_fence since the last group",
    "product_without_commit": "block 0 ended with wgmma under way",
    "product_without_wait": "block 0 ended with wgmma under way",
    "product_read_early": "",  # but NaN
    "product_written_in_flight": "its accumulator was written while in flight",
    "product_operand_written_early": "data race: wgmma",
    "product_operand_written_unfenced": "missing proxy fence: store_shared",
    "product_of_three_warps": "warps of a warpgroup differ",
    "product_of_different_warps": "warps of a warpgroup differ",
    "stage_released_late": "",
    "stage_released_early": "data race: wgmma",
    "descriptor_second_step": "",
    "descriptor_within_pattern": "a matrix that begins within the swizzle's pattern",
    "descriptor_unswizzled": "swizzle mode 0",
    "descriptor_beyond_shared": "of 16400 bytes of shared memory",
    "descriptors_differ": "lanes differ",
}


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    if emulator.CXX is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("emulator")
    kernels = emulator.compile_object(
        emulator.ROOT / "tests/cpp/emulator_checks_sm90.cpp", folder / "checks.o"
    )
    path = emulator.link([kernels, *wrappers.emulator_objects()], folder / "checks.so")
    machine = emulator.Emulator(ctypes.CDLL(str(path)))
    machine.library.case_names.restype = ctypes.c_char_p
    return machine


def run(machine: emulator.Emulator, name: str) -> tuple[int, torch.Tensor]:
    given, out = torch.arange(1024, dtype=torch.int16), torch.full((128,), -1.0)
    error = machine.library.run_case(name.encode(), *(ctypes.c_void_p(t.data_ptr()) for t in (out, given)))
    return error, out


def test_every_case_is_judged(machine):
    assert sorted(machine.library.case_names().decode().split()) == sorted(CASES)


@pytest.mark.parametrize("name", CASES)
def test_rule(machine, name):
    """Found under every schedule, and without it nothing is."""
    for seed in range(5):
        machine.set(seed=seed, architecture=90, processors=4)
        error, _ = run(machine, name)
        assert error == (720 if name == "too_many_at_once" else 719 if CASES[name] else 0)
        assert any(text in machine.report for text in CASES[name].split("|"))
        assert CASES[name] or machine.report == ""


def test_values(machine):
    machine.set(seed=0, architecture=90)
    order = torch.arange(128.0)
    assert run(machine, "arrive")[1][:32].equal(order[:32])
    assert run(machine, "copy")[1].equal(order)
    assert run(machine, "tma")[1][:8].equal(order[:8])
    assert run(machine, "product")[1].eq(3 * 16).all()
    assert run(machine, "product_read_early")[1].isnan().all()
    assert run(machine, "product_without_wait")[1].isnan().all()


def test_older_architectures_refuse(machine):
    machine.set(architecture=80)
    assert run(machine, "arrive")[0] == 719 and "mbarrier_init" in machine.report
    assert run(machine, "copy")[0] != 0 and "clusters of 2" in machine.report


# Kernels of cpp/wrappers.cu in which every synchronisation matters, and the tests that run them.
TESTS = {
    "turns": test_wrappers.test_mbarrier,
    "box": lambda library: test_wrappers.test_tma_load(library, 8, 64),
    "shared_box": lambda library: test_wrappers.test_tma_load_multicast(library, 8, 128),
    "send": test_wrappers.test_copy_to_block,
    "stored_boxes": lambda library: test_wrappers.test_tma_store(library, 8, 64),
    "hand_over": test_wrappers.test_hand_over,
    "products": lambda library: test_emulator_layouts.test_wgmma(library, 64, "mn-major", "k first", "bf16"),
}


@pytest.mark.parametrize("name", TESTS)
def test_every_synchronisation_is_needed(name):
    def library() -> wrappers.Library:
        return found

    found = wrappers.get_emulated()
    machine = emulator.Emulator(found.library)
    for seed in range(4):
        machine.set(seed=seed)
        machine.statistics()
        TESTS[name](library)
        sites = [site for site in machine.statistics() if site.synchronises]
        assert len(sites) >= 4
        for site in sites:
            with machine.without(site), pytest.raises(AssertionError):
                TESTS[name](library)
