#!/bin/sh
# Usage: tools/setup/install_egl.sh [PYTHON]
# Make sure that MuJoCo can draw without a display: try it (in a process of its own, for a broken
# driver can crash), and if it fails install EGL and Mesa's software renderer and try again.
# PYTHON is one that has mujoco (default .venv/bin/python). Status 1 if drawing is still impossible.
set -eu
python=${1:-.venv/bin/python}
here=$(dirname "$0")
log=$(mktemp)
trap 'rm -f "$log"' EXIT

can_draw() {
    MUJOCO_GL=egl PYOPENGL_PLATFORM=egl timeout 120 "$python" >"$log" 2>&1 </dev/null -c '
import mujoco

context = mujoco.GLContext(64, 64)
context.make_current()
model = mujoco.MjModel.from_xml_string("<mujoco/>")
mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
'
}

can_draw && exit 0
"$here/apt_install.sh" "EGL (drawing without a display)" \
    libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri libopengl0
can_draw && exit 0
echo "error: EGL is installed but MuJoCo still cannot draw with it: $(tail -n 1 "$log")" >&2
exit 1
