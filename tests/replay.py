"""Repeats calls of the wrappers' library that tests wrote down, without torch, for compute-sanitizer.

FLATLORA_RECORD_WRAPPERS=FOLDER python -m pytest -m gpu tests/csrc/test_wrappers.py tests/csrc/test_emulator_layouts.py
compute-sanitizer python tests/replay.py FOLDER [KERNEL TO LEAVE OUT...]
"""

from __future__ import annotations

import ctypes
import pickle
import sys
from pathlib import Path


def main(folder: Path, *left_out: str) -> int:
    library = ctypes.CDLL(str(folder / "wrappers.so"))
    if hasattr(library, "flatlora_emulator_set"):
        library.flatlora_emulator_set(b"architecture", ctypes.c_int64(90))
    wrong = count = 0
    with (folder / "calls").open("rb") as file:
        while file.peek(1):
            name, before, after = pickle.load(file)
            what = before[0].decode() if name == "test_run" else name
            if what in left_out:
                continue
            given = [
                ctypes.c_int64(a) if isinstance(a, int) else ctypes.create_string_buffer(a) for a in before
            ]
            error = getattr(library, name)(*given)
            got = [a.value if isinstance(a, ctypes.c_int64) else a.raw[:-1] for a in given]
            if error or got != after:
                wrong += 1
                print(f"{what}: {f'error {error}' if error else 'other bits'}", flush=True)
            count += 1
    print(f"{count} calls repeated, {wrong} wrong")
    return int(wrong > 0 or count == 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
