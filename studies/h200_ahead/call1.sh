set -u
DST=$OUT
pack() { tar -C /tmp/out -cJf $DST/o.tar.xz . ; }

mkdir -p /tmp/out/truth /tmp/out/ahead /tmp/out/corr /tmp/out/san
nvidia-smi --query-gpu=name,clocks.sm,clocks.max.sm,power.limit --format=csv
OUT=/tmp/out/truth bash bench/gpu_suite.sh truth; pack
cd studies/h200_ahead
export OUT=/tmp/out/ahead
for c in '[["a1:7",[9],[0,1],[8],[0]]]' '[["a1:7",[1],[0],[8],[0]]]' '[["a1:7",[1,2,3],[0,1],[8],[0]]]' '[["a3:3",[9,1,2],[0],[8],[0]]]'; do timeout 25 python3 run.py check "$c" || echo "rc $? for $c"; done
export LIMIT=25
timeout 45 python3 run.py time '[["a1:7",[9,1,2,3],[0,1],[8],[0]],["a1:7",[1],[0],[8],[16]],["a1:7",[9,1],[0],[16,64],[0]],["a1:4",[1],[0],[8],[0]],["a3:3",[9,1,2],[0],[8],[0]],["a3:3",[1],[1],[8],[0]]]' || echo "rc $?"
cd ../..; OUT=$DST; pack
(sleep 6; OUT=/tmp/out/san bash bench/gpu_suite.sh sanitizer > /tmp/out/san/stdout 2>&1) &
OUT=/tmp/out/corr bash bench/gpu_suite.sh cuda large triton
OUT=$DST; pack; wait; cat /tmp/out/san/stdout; pack
