#!/bin/sh
# Usage: tools/setup/apt_install.sh WHAT PACKAGE...
# Install Debian/Ubuntu packages when that is possible here (root, apt-get present). Otherwise name
# the one command that does it and stop with status 1.
set -eu
what=$1
shift

if ! command -v apt-get >/dev/null 2>&1; then
    echo "error: $what is missing; install your system's equivalent of the Debian packages: $*" >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "error: $what is missing; install it with:" >&2
    echo "    sudo apt-get update && sudo apt-get install -y --no-install-recommends $*" >&2
    exit 1
fi

echo "Installing $what: $*"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
# An update that fails (one mirror of several down) need not stop the install, whose own status counts.
apt-get update >"$log" 2>&1 </dev/null || true
if ! apt-get -o DPkg::Lock::Timeout=120 install -y --no-install-recommends "$@" >>"$log" 2>&1 </dev/null
then
    tail -n 20 "$log" >&2
    echo "error: apt-get could not install $what (output above)" >&2
    exit 1
fi
