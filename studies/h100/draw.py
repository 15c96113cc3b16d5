import ctypes
lib = ctypes.CDLL("studies/h100/lib/draw.so"); lib.draw_time.restype = ctypes.c_longlong
for gauss in (1, 0):
    for rows in ((1, 2, 4) if gauss else (4,)):
        for threads in (128, 256, 384, 512):
            n = 200; c = lib.draw_time(rows, gauss, threads, n); v = threads * rows * 8 * n
            print(f"{'gauss' if gauss else 'rade '} rows {rows} threads {threads}: {v/c:.2f} values/cycle/SM, {c/n:.0f} cycles a turn of {threads*rows*8} values", flush=True)
