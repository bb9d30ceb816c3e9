#!/bin/sh
# Usage: tools/setup/install_egl.sh [PYTHON]
# Make sure that MuJoCo can draw without a display: try it (in a process of its own, for a broken
# driver can crash), and if it fails install EGL and Mesa's software renderer and try again. macOS
# brings what draws there. PYTHON is one that has mujoco (default .venv/bin/python). Status 1 if
# drawing is still impossible.
set -eu
python=${1:-.venv/bin/python}
here=$(cd "$(dirname "$0")" && pwd)
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# The alarm ends a driver that hangs; macOS has no `timeout`.
can_draw() {
    PYTHONPATH=$here/../.. "$python" >"$log" 2>&1 </dev/null -c '
import signal
signal.alarm(120)
import common
import mujoco

context = mujoco.GLContext(64, 64)
context.make_current()
model = mujoco.MjModel.from_xml_string("<mujoco/>")
mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
'
}

can_draw && exit 0
packages=$(PYTHONPATH=$here/../.. "$python" -c 'from common.system import GL_PACKAGES; print(*GL_PACKAGES)')
if [ -n "$packages" ]; then
    # Unquoted: one word for each package.
    "$here/apt_install.sh" "EGL (drawing without a display)" $packages
    can_draw && exit 0
fi
echo "error: MuJoCo cannot draw here: $(tail -n 1 "$log")" >&2
exit 1
