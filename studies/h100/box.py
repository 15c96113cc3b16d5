import sys; sys.path.insert(0, "tests")
import numpy as np, wrappers
row, column = int(sys.argv[1]), int(sys.argv[2])
m = np.arange(1, 40 * 200 + 1, dtype=np.uint16).reshape(40, 200); out = np.zeros((16, 8, 8), dtype=np.uint16)
try: wrappers.get_on_gpu().call("test_box", m, 40, 200, 400, row, column, out); print(row, column, "ok")
except AssertionError as e: print(row, column, "error", str(e)[:80])
