"""What bench/gpu_pack.sh and bench/gpu_suite.sh run."""
