# Functions of the scripts that print the folder of a virtual environment and make it if it is
# missing. Such a script sets `python` and `folder`, and defines make_environment; the folder lies
# in the user's cache, so that clones share it.

say() { echo "steerserve: $*" >&2; }

fail() { say "$@"; exit 1; }

install() { "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >&2; }

# Starts a new environment in $folder; the argument says what it holds.
begin_environment() {
    say "making a virtual environment with $1 in $folder (takes some minutes)"
    rm -rf "$folder"
    "$python" -m venv "$folder"
}

print_folder() {
    mkdir -p "$(dirname "$folder")"
    exec 9> "$folder.lock" # one at a time makes it
    flock 9
    if [ ! -e "$folder/complete" ]; then
        make_environment
        touch "$folder/complete"
    fi
    echo "$folder"
}
