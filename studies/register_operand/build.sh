#!/bin/bash
# build.sh NAME SOURCE "KINDS" FLAGS...  -> lib/NAME.so, log/NAME.txt
cd "$(dirname "$0")"; mkdir -p lib log; name=$1 src=$2 kinds=$3; shift 3
cases=""; list=""; for k in $kinds; do cases+="CASE($k) "; list+="$k,"; done
nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -shared -Xcompiler -fPIC,-fvisibility=hidden -cudart static -Xptxas -v -DCASES="$cases" "$@" $src -o lib/$name.so -Xlinker -s > log/$name.txt 2>&1
rc=$?; echo "$name rc=$rc"; grep -E "error|C75|spill|Used" log/$name.txt | sed -E 's/^ptxas info *: *//' | grep -vE " 0 bytes spill stores, 0 bytes spill loads" | head -30
