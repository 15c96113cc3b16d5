"""Machine code of a kernel: the text of nvdisasm for NVIDIA, the compiler's own assembly for AMD."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import networkx as nx


class Instruction(NamedTuple):
    opcode: str  # "IMAD.WIDE.U32", "v_mul_hi_u32"
    text: str  # without the predicate that guards it
    after: tuple[int, ...] = ()  # the instructions that may come next
    sets: int | None = None  # the scoreboard that tells when its result is there
    waits: tuple[int, ...] = ()  # the scoreboards it waits for
    guarded: bool = False


Body = list[Instruction]

# What may stand before the semicolon, &req={1} ?trans5, tells when it is issued.
_SASS_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([^;&?]*[^;&?\s])[^;]*;")
_SASS_WORD = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/$")  # the upper half of an instruction
_SASS_LABEL = re.compile(r"\s*([.$][\w.$]+):")
_SASS_TARGET = re.compile(r"`\(([^)]+)\)")
_SASS_PREDICATE = re.compile(r"[\s,]!?U?P\d\b")
_GCN_LINE = re.compile(r"\s+([a-z]\w+)(\s.*)?$")
_GCN_LABEL = re.compile(r"([.\w$]+):")

# --- From text to a graph ---


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def sass(listing: str, kernel: str) -> Body:
    """The instructions of `kernel` in a listing of `nvdisasm -c`, and with `-hex` their scoreboards. Branches that
    cannot be followed are an error."""
    code: Body = []
    labels: dict[str, int] = {}
    inside = False
    for line in listing.splitlines():
        if line.split()[:1] == [".section"]:
            inside = f".text.{kernel}," in line
        elif inside and (label := _SASS_LABEL.match(line)):
            labels[label[1]] = len(code)
        elif inside and (found := _SASS_LINE.match(line)):
            guarded = found[1] not in (None, "@PT", "@UPT")
            code.append(Instruction(found[2].split()[0], found[2], guarded=guarded))
        elif inside and (word := _SASS_WORD.match(line)):
            sets, waits = _scoreboards(code[-1], int(word[1], 16))
            code[-1] = code[-1]._replace(sets=sets, waits=waits)
    _check_convergence(code, labels)
    code = _connected(code, labels)
    # ptxas also leaves a loop by a CALL, to code from where nothing returns.
    for i, instruction in enumerate(code):
        target = _SASS_TARGET.search(instruction.text)
        if instruction.opcode.startswith("CALL") and target is not None:
            to = labels[target[1]]
            if not any(code[j].opcode.startswith("RET") for j in reachable(code, to)):
                after = (to, *(instruction.after if instruction.guarded else ()))
                code[i] = instruction._replace(opcode="BRA", after=after)
    return code


def amdgcn(listing: str, kernel: str) -> Body:
    """The instructions of `kernel` in AMD's assembly. Branches that cannot be followed are an error."""
    code: Body = []
    labels: dict[str, int] = {}
    inside = False
    for line in listing.splitlines():
        line = line.split(";")[0].rstrip()
        if label := _GCN_LABEL.match(line):
            inside = label[1] == kernel or (inside and not label[1].startswith(".Lfunc_end"))
            labels[label[1]] = len(code)
        elif inside and (found := _GCN_LINE.match(line)):
            code.append(Instruction(found[1], line.strip()))
    return _connected(code, labels)


def _scoreboards(instruction: Instruction, word: int) -> tuple[int | None, tuple[int, ...]]:
    """What it sets and waits for. Control bits of sm_70 and later, from the 41st of the upper half on: 4 of stall,
    1 of yield, 3 name the scoreboard of the result (7: none), 3 that of the operands read, 6 are a mask to wait for."""
    control = word >> 41
    waits = {i for i in range(6) if control >> 11 + i & 1}
    if instruction.opcode.startswith("DEPBAR"):
        waits |= {int(i) for i in re.findall(r"\bSB(\d)", instruction.text)}
    result = control >> 5 & 7
    return None if result == 7 else result, tuple(sorted(waits))


def _check_convergence(code: Body, labels: dict[str, int]) -> None:
    """BSYNC goes on where its BSSY says, which is the next instruction in all code that was met so far."""
    for i, (opcode, text, *_) in enumerate(code):
        if opcode.startswith("BSYNC"):
            register = re.compile(rf"\s{text.split()[1].rstrip(',')}\b")
            starts = (c.text for c in code if c.opcode.startswith("BSSY") and register.search(c.text))
            if i + 1 not in [labels[label] for start in starts for label in _SASS_TARGET.findall(start)]:
                raise ValueError(f"BSYNC at {i} is not followed by the target of its BSSY: {text}")


_NOT_FOLLOWED = "BRX BRXU JMP JMX JMXU BREAK s_setpc_b64 s_swappc_b64 s_call_b64".split()


def _connected(code: Body, labels: dict[str, int]) -> Body:
    found = []
    for i, instruction in enumerate(code):
        label, goes_on = _flow(instruction)
        jump = () if label is None else (labels[label],)
        found.append(instruction._replace(after=(*jump, i + 1) if goes_on and i + 1 < len(code) else jump))
    return found


def _flow(instruction: Instruction) -> tuple[str | None, bool]:
    """A label to jump to, and whether the next instruction may come."""
    opcode, text, *_ = instruction
    name = opcode.split(".")[0]
    if name in _NOT_FOLLOWED:
        raise ValueError(f"a branch that cannot be followed: {text}")
    if name == "BRA":
        target = _SASS_TARGET.search(text)
        if target is None:
            raise ValueError(f"a branch whose target is not a label: {text}")
        conditional = ".DIV" in opcode or _SASS_PREDICATE.search(text[: target.start()])
        return target[1], instruction.guarded or bool(conditional)
    if name == "s_branch" or name.startswith("s_cbranch"):
        return text.split()[1], name != "s_branch"
    return None, instruction.guarded or name not in ("EXIT", "RET", "s_endpgm")


# --- Loops ---


def reachable(code: Body, start: int = 0) -> list[int]:
    """The instructions that can run from `start` on, in the order of addresses. A call is followed by what stands
    behind it."""
    seen, waiting = {start}, [start]
    while waiting:
        new = set(code[waiting.pop()].after) - seen
        seen |= new
        waiting += new
    return sorted(seen)


def loops(code: Body) -> list[tuple[int, ...]]:
    """The natural loops, each in the order of addresses: an edge to an instruction that dominates its source closes
    one, and all that lies on a way from there back to it belongs to it.

    What lies far behind, as the code that waits for a copy, belongs to the loop if it leads back into it. A cycle
    that can be entered at two places is no natural loop, and an error.
    """
    graph = nx.DiGraph([(-1, 0), *((i, j) for i in reachable(code) for j in code[i].after)])
    dominated = nx.DiGraph([(above, i) for i, above in nx.immediate_dominators(graph, -1).items()])
    forward, found = graph.copy(), []
    for header in [i for i in sorted(graph) if graph.in_degree(i) > 1]:  # entered, and closed
        closing = set(graph.predecessors(header)) & ({header} | nx.descendants(dominated, header))
        if closing:
            forward.remove_edges_from([(i, header) for i in closing])
            before = nx.restricted_view(graph, [header], [])
            body = closing.union(*(nx.ancestors(before, i) for i in closing - {header}))
            found.append(tuple(sorted(body | {header})))
    if not nx.is_directed_acyclic_graph(forward):
        (i, _), *_ = nx.find_cycle(forward)
        raise ValueError(f"a cycle with two entries: {code[i].text} at instruction {i}")
    return found


def innermost(
    code: Body, found: list[tuple[int, ...]], wanted: Callable[[Body], bool], outermost: bool = False
) -> list[Body]:
    """Of the loops that `wanted` accepts those that contain no other such loop; outermost: that lie in none."""
    good = [set(loop) for loop in found if wanted([code[i] for i in loop])]
    best = [a for a in good if not any(a < b if outermost else b < a for b in good)]
    return [[code[i] for i in sorted(loop)] for loop in best]


def main_loop(code: Body, wanted: Callable[[Body], bool], outermost: bool = False) -> Body:
    """The only such loop."""
    found = innermost(code, loops(code), wanted, outermost)
    if len(found) != 1:
        raise ValueError(f"expected one main loop, got {len(found)} that contain what it must")
    return found[0]


# --- What stands in code ---


def is_tensor(instruction: Instruction) -> bool:
    """HMMA, HGMMA, UTCHMMA, v_mfma; HFMA2.MMA is none."""
    return instruction.opcode.split(".")[0].endswith("MMA") or instruction.opcode.startswith("v_mfma")


def is_special(instruction: Instruction) -> bool:
    """Of the special function units."""
    names = ("MUFU", "v_sin_", "v_cos_", "v_log_", "v_sqrt_", "v_rcp_", "v_rsq_")
    return instruction.opcode.startswith(names)


def tensor_cores(body: Body) -> str:
    """Their instructions, "64 HMMA"; "-" = none."""
    count = Counter(i.opcode.split(".")[0] for i in body if is_tensor(i))
    return ", ".join(f"{number} {opcode}" for opcode, number in sorted(count.items())) or "-"


def faults(code: Body, body: Body, counted: str) -> list[str]:
    """Values that are not kept in registers, and calls in what is counted."""
    local = [i.text for i in code if i.opcode.startswith(("LDL", "STL", "scratch_"))]
    found = [f"{len(local)} accesses to local memory, the first {local[0]}"] if local else []
    calls = [i.text for i in body if i.opcode.startswith("CALL")]
    return found + ([f"calls inside {counted}: {calls[0]}"] if calls else [])


def hidden(body: Body) -> int | None:
    """Special functions from the first warp-group product to the wait for the last one. The wait may come in the next
    round of the loop."""
    products = [n for n, i in enumerate(body) if i.opcode.startswith("HGMMA")]
    if not products:
        return None
    first, last = products[0], products[-1]
    for n in [*range(last + 1, len(body)), *range(first)]:
        if body[n].opcode.startswith("WARPGROUP.DEPBAR"):
            between = body[first:n] if n > last else body[first:] + body[:n]
            return sum(map(is_special, between))
    return None


def exposed_waits(body: Body) -> list[str]:
    """The instructions of a loop for sm_90 that wait for a global load while no warp-group product runs: after the wait
    for the last product, up to the next first one. A load that a first product finds under way has the time of a
    product, and does not count. Branches inside the loop are taken for straight code."""
    running, loading, found = False, set[int](), list[str]()
    for turn in range(2):  # the first one shows what is under way when the second begins
        for instruction in body:
            waited = loading.intersection(instruction.waits)
            if waited and turn and not running:
                found.append(instruction.text)
            loading -= waited
            if instruction.opcode.startswith("LDG.") and instruction.sets is not None:
                loading.add(instruction.sets)
            elif instruction.opcode.startswith("HGMMA") and not running:
                running = True
                loading.clear()
            elif instruction.text == "WARPGROUP.DEPBAR.LE gsb0, 0x0":
                running = False
    return found
