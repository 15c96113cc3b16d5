# build.sh NAME "CASES" FLAGS
name=$1; cases=$2; shift 2
sed "s/^  CASES\$/  $cases/" ${SRC:-ahead.cu} > gen_$name.cu
nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -shared -Xcompiler -fPIC,-fvisibility=hidden -cudart static -Xptxas -v "$@" gen_$name.cu -o $name.so -Xlinker -s > $name.txt 2>&1
echo "$name rc=$?"; grep -E "error|C75|Used|spill" $name.txt | grep -v " 0 bytes spill stores, 0 bytes spill loads" | sort | uniq -c | head -30
