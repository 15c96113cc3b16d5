"""Loops in the machine code of a kernel: the text of nvdisasm for NVIDIA, the compiler's own assembly for AMD."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple


class Instruction(NamedTuple):
    opcode: str  # "IMAD.WIDE.U32", "v_mul_hi_u32"
    text: str  # without the predicate that guards it
    after: tuple[int, ...]  # the instructions that may come next
    sets: int | None = None  # the scoreboard that tells when its result is there
    waits: tuple[int, ...] = ()  # the scoreboards it waits for


class Loop(NamedTuple):
    """A natural loop: all that lies on a way from the header back to itself."""

    header: int
    body: tuple[int, ...]  # in the order of addresses


class _Line(NamedTuple):
    guarded: bool
    opcode: str
    text: str
    word: int = 0  # the upper half of the instruction


# What may stand before the semicolon, &req={1} ?trans5, tells when it is issued.
_SASS_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([^;&?]*[^;&?\s])[^;]*;")
_SASS_WORD = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/$")
_SASS_LABEL = re.compile(r"\s*([.$][\w.$]+):")
_SASS_TARGET = re.compile(r"`\(([^)]+)\)")
_SASS_PREDICATE = re.compile(r"[\s,]!?U?P\d\b")


def sass(listing: str, kernel: str) -> list[Instruction]:
    """The instructions of `kernel` in a listing of `nvdisasm -c`, and with `-hex` their scoreboards. Branches that
    cannot be followed are an error."""
    lines: list[_Line] = []
    labels: dict[str, int] = {}
    inside = False
    for line in listing.splitlines():
        if line.split()[:1] == [".section"]:
            inside = f".text.{kernel}," in line
        elif inside and (label := _SASS_LABEL.match(line)):
            labels[label[1]] = len(lines)
        elif inside and (found := _SASS_LINE.match(line)):
            lines.append(_Line(found[1] not in (None, "@PT", "@UPT"), found[2].split()[0], found[2]))
        elif inside and (word := _SASS_WORD.match(line)):
            lines[-1] = lines[-1]._replace(word=int(word[1], 16))
    code = [
        Instruction(line.opcode, line.text, _sass_after(i, lines, labels), *_scoreboards(line))
        for i, line in enumerate(lines)
    ]
    # ptxas also leaves a loop by a CALL, to code from where nothing returns.
    for i, (guarded, opcode, text, _) in enumerate(lines):
        target = _SASS_TARGET.search(text)
        if opcode.startswith("CALL") and target is not None:
            to = labels[target[1]]
            if not any(code[j].opcode.startswith("RET") for j in reachable(code, to)):
                code[i] = code[i]._replace(opcode="BRA", after=(to, *(code[i].after if guarded else ())))
    return code


def _scoreboards(line: _Line) -> tuple[int | None, tuple[int, ...]]:
    """What a line sets and waits for. Control bits of sm_70 and later, from the 41st of the upper half on: 4 of stall,
    1 of yield, 3 name the scoreboard of the result (7: none), 3 that of the operands read, 6 are a mask to wait for."""
    if not line.word:
        return None, ()
    control = line.word >> 41
    waits = {i for i in range(6) if control >> 11 + i & 1}
    if line.opcode.startswith("DEPBAR"):
        waits |= {int(i) for i in re.findall(r"\bSB(\d)", line.text)}
    result = control >> 5 & 7
    return None if result == 7 else result, tuple(sorted(waits))


def exposed_waits(body: Iterable[Instruction]) -> list[str]:
    """The instructions of a loop for sm_90 that wait for a global load while no warp-group product runs: after the wait
    for the last product, up to the next first one. A load that a first product finds under way has the time of a
    product, and does not count. Branches inside the loop are taken for straight code."""
    body = list(body)
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


def _sass_after(i: int, lines: list[_Line], labels: dict[str, int]) -> tuple[int, ...]:
    guarded, opcode, text, _ = lines[i]
    name = opcode.split(".")[0]
    following = (i + 1,) if i + 1 < len(lines) else ()
    if name == "BRA":
        target = _SASS_TARGET.search(text)
        if target is None:
            raise ValueError(f"a branch whose target is not a label: {text}")
        conditional = guarded or ".DIV" in opcode or _SASS_PREDICATE.search(text[: target.start()])
        return (labels[target[1]], *(following if conditional else ()))
    if name in ("EXIT", "RET"):
        return following if guarded else ()
    if name == "BSYNC":
        # It goes on where its BSSY says, which is the next instruction in all code that was met so far.
        register = text.split()[1].rstrip(",")
        goals = {
            labels[_SASS_TARGET.search(other.text)[1]]  # type: ignore[index]
            for other in lines
            if other.opcode.startswith("BSSY") and re.search(rf"\s{register}\b", other.text)
        }
        if i + 1 not in goals:
            raise ValueError(f"BSYNC at instruction {i} is not followed by the target of its BSSY: {text}")
    elif name in ("BRX", "BRXU", "JMP", "JMX", "JMXU", "BREAK"):
        raise ValueError(f"a branch that cannot be followed: {text}")
    return following


_GCN_LINE = re.compile(r"\s+([a-z]\w+)(\s.*)?$")
_GCN_LABEL = re.compile(r"([.\w$]+):")


def amdgcn(listing: str, kernel: str) -> list[Instruction]:
    """The instructions of `kernel` in AMD's assembly. Branches that cannot be followed are an error."""
    lines: list[_Line] = []
    labels: dict[str, int] = {}
    inside = False
    for line in listing.splitlines():
        line = line.split(";")[0].rstrip()
        if label := _GCN_LABEL.match(line):
            inside = label[1] == kernel or (inside and not label[1].startswith(".Lfunc_end"))
            labels[label[1]] = len(lines)
        elif inside and (found := _GCN_LINE.match(line)):
            lines.append(_Line(False, found[1], line.strip()))
    return [Instruction(line.opcode, line.text, _gcn_after(i, lines, labels)) for i, line in enumerate(lines)]


def _gcn_after(i: int, lines: list[_Line], labels: dict[str, int]) -> tuple[int, ...]:
    opcode, text = lines[i].opcode, lines[i].text
    following = (i + 1,) if i + 1 < len(lines) else ()
    if opcode == "s_endpgm":
        return ()
    if opcode == "s_branch" or opcode.startswith("s_cbranch"):
        return (labels[text.split()[1]], *(following if opcode != "s_branch" else ()))
    if opcode in ("s_setpc_b64", "s_swappc_b64", "s_call_b64"):
        raise ValueError(f"a branch that cannot be followed: {text}")
    return following


def reachable(code: list[Instruction], start: int = 0) -> list[int]:
    """The instructions that can run from `start` on, in the order of addresses. A call is followed by what stands
    behind it."""
    seen = {start}
    waiting = list(seen)
    while waiting:
        for i in code[waiting.pop()].after:
            if i not in seen:
                seen.add(i)
                waiting.append(i)
    return sorted(seen)


def loops(code: list[Instruction]) -> list[Loop]:
    """The natural loops: an edge to an instruction that dominates its source closes one.

    What lies far behind, as the code that waits for a copy, belongs to the loop if it leads back into it. A cycle
    that can be entered at two places is no natural loop, and an error.
    """
    order, before, dominator = _dominators(code)
    place = {i: n for n, i in enumerate(order)}
    bodies: dict[int, set[int]] = {}
    for i in order:
        for header in code[i].after:
            if place[header] > place[i]:
                continue
            if not _dominates(header, i, place, dominator):
                raise ValueError(f"a cycle with two entries: {code[i].text} at instruction {i}")
            body = bodies.setdefault(header, {header})
            waiting = [i]
            while waiting:
                j = waiting.pop()
                if j not in body:
                    body.add(j)
                    waiting += before[j]
    return [Loop(header, tuple(sorted(body))) for header, body in bodies.items()]


def _dominators(code: list[Instruction]) -> tuple[list[int], dict[int, list[int]], dict[int, int]]:
    """Reverse postorder, predecessors, and the immediate dominator of each instruction that can run
    (Cooper, Harvey, Kennedy: A simple, fast dominance algorithm)."""
    postorder: list[int] = []
    seen = {0}
    stack = [(0, iter(code[0].after))]
    while stack:
        i, rest = stack[-1]
        for j in rest:
            if j not in seen:
                seen.add(j)
                stack.append((j, iter(code[j].after)))
                break
        else:
            postorder.append(i)
            stack.pop()
    order = postorder[::-1]
    place = {i: n for n, i in enumerate(order)}
    before: dict[int, list[int]] = {i: [] for i in order}
    for i in order:
        for j in code[i].after:
            before[j].append(i)
    dominator = {0: 0}
    changed = True
    while changed:
        changed = False
        for i in order[1:]:
            known = [j for j in before[i] if j in dominator]
            new = known[0]
            for j in known[1:]:
                while new != j:
                    while place[new] > place[j]:
                        new = dominator[new]
                    while place[j] > place[new]:
                        j = dominator[j]
            if dominator.get(i) != new:
                dominator[i] = new
                changed = True
    return order, before, dominator


def _dominates(a: int, b: int, place: dict[int, int], dominator: dict[int, int]) -> bool:
    while place[b] > place[a]:
        b = dominator[b]
    return a == b


def innermost(
    code: list[Instruction], found: Iterable[Loop], wanted: Callable[[list[Instruction]], bool]
) -> Loop:
    """The one loop that `wanted` accepts, given its instructions, and that contains no other such loop."""
    good = [loop for loop in found if wanted([code[i] for i in loop.body])]
    best = [a for a in good if not any(set(b.body) < set(a.body) for b in good)]
    if len(best) != 1:
        raise ValueError(f"expected one main loop, got {len(best)} of {len(good)} that contain what it must")
    return best[0]
