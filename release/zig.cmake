# For another processor, with the compiler of the PyPI package ziglang; release/wheels.py sets the variables. The library
# needs no C++ runtime, so none is built for it.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR $ENV{FLATLORA_TARGET})
set(CMAKE_CXX_COMPILER $ENV{FLATLORA_ZIG} -m ziglang c++ -target $ENV{FLATLORA_TARGET}-linux-gnu.2.28)
set(CMAKE_EXE_LINKER_FLAGS_INIT -nostdlib++)
set(CMAKE_SHARED_LINKER_FLAGS_INIT "-nostdlib++ -s")
