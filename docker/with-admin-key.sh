#!/bin/sh
# Runs a command with STEERSERVE_ADMIN_KEY set: to what it is already, else to the key kept in
# /data/admin-key, which is made the first time. Without one a server that binds more than loopback
# refuses uploads. Read it with: docker compose -f docker/compose.yaml exec steerserve cat /data/admin-key
# Where STEERSERVE_ADMIN_KEY_FILE names a file, the server reads that, and no other key is set or made.
set -eu
if [ -z "${STEERSERVE_ADMIN_KEY:-}${STEERSERVE_ADMIN_KEY_FILE:-}" ]; then
    file="${STEERSERVE_ADMIN_KEY_PATH:-/data/admin-key}"
    if [ ! -s "$file" ]; then
        umask 077
        python -c 'import secrets; print(secrets.token_urlsafe(32))' > "$file.new"
        mv "$file.new" "$file"  # in one move: a crash leaves no half of a key
    fi
    STEERSERVE_ADMIN_KEY="$(cat "$file")"
    export STEERSERVE_ADMIN_KEY
fi
exec "$@"
