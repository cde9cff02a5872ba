#!/bin/sh
# Runs a command with an admin key, because a server that listens beyond loopback refuses uploads without
# one. If STEERSERVE_ADMIN_KEY is not set, it becomes the key in /data/admin-key, which the first run
# makes. If STEERSERVE_ADMIN_KEY_FILE is set, the server reads that file, and no key is made.
# To read the key: docker compose -f docker/compose.yaml exec steerserve cat /data/admin-key
set -eu
if [ -z "${STEERSERVE_ADMIN_KEY:-}${STEERSERVE_ADMIN_KEY_FILE:-}" ]; then
    file="${STEERSERVE_ADMIN_KEY_PATH:-/data/admin-key}"
    if [ ! -s "$file" ]; then
        umask 077
        python -c 'import secrets; print(secrets.token_urlsafe(32))' > "$file.new"
        mv "$file.new" "$file"  # atomic, so that a crash leaves no partial key
    fi
    STEERSERVE_ADMIN_KEY="$(cat "$file")"
    export STEERSERVE_ADMIN_KEY
fi
exec "$@"
