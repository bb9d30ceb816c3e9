#!/bin/sh
# Usage: tools/setup/create_venv.sh DIR
# Create a virtual environment with pip in DIR, unless a working one is there. The Python is $PYTHON
# if set, else the first of 3.11, 3.12, 3.13 that is found. Stops with one line where the system or
# all Pythons are not supported.
set -eu
dir=$1
here=$(dirname "$0")
"$here/check_system.sh"

# Also not one of 32 bit, nor an Intel Mac's, which Apple silicon can run.
supported() {
    "$1" -c 'import platform, sys
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) or sys.maxsize < 2**32
         or (sys.platform == "darwin" and platform.machine() != "arm64"))' >/dev/null 2>&1
}

if supported "$dir/bin/python" && "$dir/bin/python" -m pip --version >/dev/null 2>&1; then
    exit 0
fi

python=
for candidate in ${PYTHON:-python3.11 python3 python3.12 python3.13}; do
    if supported "$candidate"; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "error: no Python 3.11, 3.12 or 3.13 of 64 bit found (tried: ${PYTHON:-python3.11 python3 python3.12" \
        "python3.13}); install one, or name it: make PYTHON=/path/to/python3.11" >&2
    exit 1
fi

# Debian and Ubuntu ship Python without ensurepip, which venv needs.
if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$here/apt_install.sh" "Python's venv module" "python$version-venv"
fi

echo "Creating $dir with $("$python" --version)"
"$python" -m venv --clear "$dir"
