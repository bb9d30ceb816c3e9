#!/bin/sh
# Usage: tools/setup/install.sh PYTHON LOCK
# Install exactly what LOCK names into PYTHON's environment, checking every hash: by uv, which pip
# brings into the same environment, or by pip itself where uv cannot (it knows no settings of pip's,
# such as an index of one's own). A lock that does not belong to its requirements is refused.
set -eu
python=$1
lock=$2
"$python" "$(dirname "$0")/lock.py" check "$lock"

pip_install() {
    "$python" -m pip --disable-pip-version-check install --quiet --no-compile --require-hashes "$@"
}
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# uv's own lines in the lock: a version and hashes, each but the last ending with a backslash.
if awk '/^uv==/ { own = 1 } own { print } own && !/\\$/ { exit }' "$lock" |
    pip_install --no-deps -r /dev/stdin >"$log" 2>&1 &&
    UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-120} "$python" -m uv pip install --quiet \
        --python "$python" --require-hashes -r "$lock" >"$log" 2>&1 </dev/null
then
    exit 0
fi
reason=$(grep -v '^ *$' "$log" | tail -n 1 | sed 's/^ *//')
echo "uv could not install $lock ($reason): pip does it, which takes longer" >&2
pip_install -r "$lock"
