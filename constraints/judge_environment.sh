#!/usr/bin/env bash
# Prints the folder of a virtual environment with toxic-comment-classifier, the second judge of
# `python -m benchmarks.effect`, and makes it if it is missing (1.6 GB: it needs TensorFlow). It lies
# in the user's cache; another Python or other versions make another one.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
. "$here/environment.sh"

key=$({ "$python" -VV; cat "$here/judge.txt" "$here/judge_model.txt"; } | sha256sum)
folder=${XDG_CACHE_HOME:-$HOME/.cache}/steerserve/judge-${key:0:12}

install_all() {
    install --no-deps --requirement "$here/judge.txt" &&
        install --no-deps --require-hashes --requirement "$here/judge_model.txt"
}

make_environment() {
    begin_environment "toxic-comment-classifier and TensorFlow"
    install_all ||
        fail "toxic-comment-classifier cannot be installed: the packages cannot be had, as said above"
}

print_folder
