#!/bin/sh
# Usage: tools/setup/check_system.sh
# Say in one line, with status 1, if the packages do not exist for this system.
set -eu
supported="Linux on x86-64 or ARM (64 bit; on Windows in WSL 2), and macOS on Apple silicon"
system=$(uname -s)
case $system-$(uname -m)-$(getconf LONG_BIT 2>/dev/null || echo 64)-$(uname -r) in
    Linux-*-Microsoft*) this="WSL 1" ;;
    Linux-x86_64-64-* | Linux-aarch64-64-* | Darwin-arm64-*) exit 0 ;;
    Darwin-*) this="macOS on an Intel processor (or a shell under Rosetta)" ;;
    MINGW* | MSYS* | CYGWIN*) this="Windows without WSL 2" ;;
    *-32-*) this="$system with 32 bit" ;;
    *) this="$system on $(uname -m)" ;;
esac
echo "error: $this is not supported, for some packages do not exist for it; what is: $supported" >&2
exit 1
