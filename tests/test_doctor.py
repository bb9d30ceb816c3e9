"""`tools.doctor`: every line is green here, and each turns red when its part is broken."""

import json
import os
import shutil
import subprocess
import sys
import types
import unittest.mock
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from common import system
from common.envs import metaworld_suite, metaworld_tasks, rendering
from common.envs.workers import WorkerError
from common.memory import Memory
from common.vlms import mini
from tools import doctor
from tools.doctor import Args, Finding
from tools.shared import golden

ROOT = Path(__file__).resolve().parent.parent
CHECKS = {check.name: check for check in doctor.CHECKS}


def run(name: str, args: Args = Args()) -> Finding:  # noqa: B008
    """The line of one check; a red one must say what to do."""
    line = doctor.run_check(CHECKS[name], args)
    assert line["status"] == "ok" or line["remedy"]
    return Finding(line["status"], line["finding"], line["remedy"])


def doctor_process(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "tools.doctor", *flags], cwd=ROOT,
                          capture_output=True, text=True, timeout=600)


# ------------------------------------------------------------------------------ the tool


def test_all_lines_are_green_here():
    result = doctor_process("--json")
    answer = json.loads(result.stdout)  # and nothing else is on stdout
    red = {line["name"]: line for line in answer["checks"] if line["status"] == "FAIL"}
    assert [line["name"] for line in answer["checks"]] == list(CHECKS)
    assert not red.keys() - {"memory", "disk"}, red  # those depend on what else is running
    assert answer["ok"] == (not red) and result.returncode == bool(red)
    assert set(answer["checks"][0]) == {"name", "status", "finding", "remedy", "seconds"}
    assert "Traceback" not in result.stderr


def test_bad_arguments_end_with_status_2():
    assert doctor_process("--vml", "mini").returncode == 2


def broken(_args: Args) -> Finding:
    print("a library's chatter")
    raise RuntimeError("the part is broken\nat its second line")


PAIR = (doctor.Check("first", broken, "mend it"),
        doctor.Check("second", lambda _: Finding("warn", "so so", "look at it"), ""))


@pytest.mark.parametrize("as_json", [False, True])
def test_a_check_that_raises_is_a_red_line_and_the_others_run(as_json, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", PAIR)
    assert doctor.main(Args(json=as_json)) == 1
    output = capsys.readouterr().out
    assert "second line" not in output and "chatter" not in output and "\033" not in output
    if as_json:
        first, second = json.loads(output)["checks"]
        assert first["finding"] == "RuntimeError: the part is broken"
        assert (first["status"], first["remedy"], second["status"]) == ("FAIL", "mend it", "warn")
    else:
        assert "RuntimeError: the part is broken" in output and "mend it" in output
        assert output.splitlines()[-1] == "1 of 2 checks FAIL: first"


def test_a_warning_is_not_red(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", PAIR[1:])
    assert doctor.main(Args()) == 0
    assert "warnings: second" in capsys.readouterr().out


def test_a_missing_package_spoils_what_needs_it_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    line = run("devices")
    assert line.status == "FAIL" and "torch" in line.finding and line.remedy == doctor.INSTALL


def test_colour_marks_the_status_alone():
    line = {"name": "x", "status": "FAIL", "finding": "f", "remedy": "", "seconds": 1.0}
    assert doctor.as_text(line, True).startswith("\033[31mFAIL\033[0m  x")
    assert doctor.as_text(line, False).startswith("FAIL  x")


def test_long_findings_are_wrapped_on_a_terminal_alone():
    line = {"name": "x", "status": "FAIL", "finding": "word " * 40, "remedy": "mend", "seconds": 1}
    wrapped = doctor.as_text(line, False, 80).splitlines()
    assert len(wrapped) > 3 and max(map(len, wrapped)) <= 80 and wrapped[-1].endswith("to do: mend")
    assert len(doctor.as_text(line, False).splitlines()) == 2


def test_a_failed_worker_is_reported_by_the_end_of_its_traceback():
    error = WorkerError("an environment worker failed:\nTraceback ...\nKeyError: 'arm'\n")
    assert doctor.one_line(error) == "WorkerError: an environment worker failed: KeyError: 'arm'"


# ------------------------------------------------------------------------------ packages


@pytest.mark.parametrize(("package", "version", "status", "text"), [
    ("jax", "0.4.0", "FAIL", "jax 0.4.0 is not the pinned"),
    ("mujoco", None, "FAIL", "mujoco is not installed"),
    ("wandb", None, "warn", "wandb is not installed"),
])
def test_packages_that_differ_are_named(package, version, status, text, monkeypatch):
    pins = doctor.read_pins(ROOT / "requirements-gpu.txt")
    assert pins["numpy"] and pins["jax"]  # of the included file, and of the file itself

    def fake(name: str) -> str:
        if name != package:
            return pins[name] + ("+cpu" if name == "torch" else "")
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", fake)
    line = run("packages")
    assert line.status == status and line.finding.startswith(text) and ";" not in line.finding


def test_an_untested_python_is_red(monkeypatch):
    monkeypatch.setattr(doctor, "PYTHONS", ("2.7",))
    assert run("packages").status == "FAIL"


# ------------------------------------------------------------------------------- drawing


def test_software_drawing_beside_a_gpu_is_red(monkeypatch):
    info = {"vendor": "Mesa", "renderer": "llvmpipe", "software": True, "gpu_present": True}
    monkeypatch.setattr(doctor, "probe_gl", lambda: info)
    monkeypatch.setattr(doctor, "median_seconds", lambda function, rounds: 0.003)
    monkeypatch.setattr(golden, "scene", lambda task: types.SimpleNamespace(model=0, data=0))
    monkeypatch.setattr(rendering, "Renderer", unittest.mock.MagicMock())
    line = run("drawing")
    assert line.status == "FAIL" and "libnvidia-gl" in line.remedy
    info["gpu_present"] = False
    assert run("drawing").status == "ok"
    monkeypatch.setattr(doctor, "median_seconds", lambda function, rounds: 0.03)
    assert run("drawing").status == "warn"


@pytest.mark.skipif(system.GL != "egl", reason="macOS draws by CGL")
@pytest.mark.parametrize("name", ["drawing", "golden frames", "determinism"])
def test_without_egl_what_draws_is_red(name, monkeypatch):
    doctor.probe_gl.cache_clear()
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_FILENAMES", "nowhere.json")
    line = run(name)
    assert line.status == "FAIL" and line.finding.startswith("headless drawing (EGL)")


def test_a_crash_of_the_gl_driver_is_a_red_line(monkeypatch, tmp_path):
    crash = tmp_path / "python"
    crash.write_text("#!/bin/sh\nkill -SEGV $$\n")
    crash.chmod(0o755)
    doctor.probe_gl.cache_clear()
    monkeypatch.setattr(sys, "executable", str(crash))
    line = run("drawing")
    assert line.status == "FAIL" and "status -11" in line.finding


def test_other_golden_frames_are_red(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "probe_gl", lambda: {})
    shutil.copytree(golden.FOLDER, tmp_path / "golden")
    monkeypatch.setattr(golden, "FOLDER", tmp_path / "golden")
    monkeypatch.setattr(golden, "TASKS", ("drawer-open-v3", "pick-place-v3"))
    upright = golden.read("drawer-open-v3", "fast")
    Image.fromarray(upright[::-1]).save(golden.path("drawer-open-v3", "fast"))
    darker = golden.read("pick-place-v3", "paper") // 2
    Image.fromarray(darker).save(golden.path("pick-place-v3", "paper"))
    line = run("golden frames")
    assert line.status == "FAIL" and line.finding.startswith("2 of 4 frames")
    assert "drawer-open-v3 fast upside down" in line.finding
    assert "pick-place-v3 paper differs by" in line.finding
    golden.path("drawer-open-v3", "fast").unlink()
    assert "FileNotFoundError" in run("golden frames").finding


# -------------------------------------------------------------------------- environments


def test_an_expert_that_fails_is_red(monkeypatch):
    monkeypatch.setattr(metaworld_tasks, "MT10", ("reach-v3",))
    monkeypatch.setattr(
        metaworld_tasks, "expert_action", lambda policy, obs: np.zeros(4, np.float32)
    )
    line = run("experts")
    assert line.status == "FAIL" and line.finding == "1 of 1 experts fail: reach-v3"


class Faulty(metaworld_suite.VecMetaWorld):
    """The seed has no effect, and the second environment drifts by one bit."""

    def __init__(self, *arguments, seed, **options):
        super().__init__(*arguments, seed=0, **options)

    def step(self, actions):
        step = super().step(actions)
        step.final_obs[1, 0] = np.nextafter(step.final_obs[1, 0], np.float32(9))
        return step


def test_seeds_without_effect_and_one_bit_of_drift_are_red(monkeypatch):
    monkeypatch.setattr(doctor, "probe_gl", lambda: {})
    monkeypatch.setattr(metaworld_suite, "VecMetaWorld", Faulty)
    line = run("determinism")
    assert line.status == "FAIL" and line.finding.split("; ") == [
        "goals of two seeds are the same", "trajectories of one seed differ",
        "trajectories of two seeds are the same", "frames of two seeds are the same",
    ]


# ---------------------------------------------------------------------------------- VLM


@pytest.fixture
def weights(tmp_path):
    """A copy of mini's tensors, and what writes them to a file that `--vlm-weights` reads."""
    with safe_open(mini.WEIGHTS, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        vocabulary = file.metadata()

    def write() -> Args:
        save_file(tensors, tmp_path / "mini.safetensors", metadata=vocabulary)
        return Args(vlm_weights=str(tmp_path / "mini.safetensors"))

    return tensors, write


def test_other_weights_of_mini_are_red(weights):
    tensors, write = weights
    assert run("VLM", write()).status == "ok"
    doctor.loaded_vlm.cache_clear()
    tensors["image_head.2.bias"][0] += 0.01
    line = run("VLM", write())
    assert line.status == "FAIL" and line.finding.startswith("the weights are not the shipped")


def test_a_prompt_without_a_known_word_is_yellow():
    assert run("VLM", Args(prompt="Open a drawer.")).status == "ok"
    line = run("VLM", Args(prompt="打开抽屉"))
    assert line.status == "warn" and line.finding.startswith("mini knows no word of '打开抽屉'")


def test_a_truncated_file_is_red(tmp_path):
    path = tmp_path / "mini.safetensors"
    path.write_bytes(mini.WEIGHTS.read_bytes()[:-1000])
    line = run("VLM", Args(vlm_weights=str(path)))
    assert line.status == "FAIL" and line.finding.startswith("cannot read mini's weights")
    assert run("disk", Args(vlm_weights=str(path))).status == "ok"  # one cause, one red line


def test_wrong_colours_and_a_damaged_prompt_cache_are_red(monkeypatch, tmp_path):
    monkeypatch.setenv("FURL_CACHE_DIR", str(tmp_path))
    assert run("VLM").status == "ok"
    with monkeypatch.context() as patch:
        read = golden.read
        patch.setattr(golden, "read", lambda task, quality: read(task, quality)[..., ::-1])
        assert "known pictures are off" in run("VLM").finding
    for file in (tmp_path / "prompts").iterdir():
        np.savez(file, embedding=-np.load(file)["embedding"])
    line = run("VLM")
    assert line.status == "FAIL" and str(tmp_path / "prompts") in line.remedy


def test_another_vlm_must_be_finite(monkeypatch):
    value = np.ones(4, np.float32)
    vlm = types.SimpleNamespace(
        name="clip", id="clip-0", embed_dim=4, frame_size=8, device="cpu",
        embed_images=lambda frames: np.stack([value] * len(frames)),
        embed_text=lambda prompts: np.ones((len(prompts), 4), np.float32),
    )
    monkeypatch.setattr(doctor, "loaded_vlm", lambda args: vlm)
    assert run("VLM").status == "ok"
    for bad in (np.nan, np.inf, 0.0):
        value = np.full(4, bad, np.float32)
        assert run("VLM").finding.startswith("embeddings are not finite, or zero")


# ------------------------------------------------------------------------------- devices


def test_a_gpu_that_jax_or_torch_does_not_see(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(rendering, "DEVICES", tmp_path)
    assert run("devices").status == "ok"
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert run("devices").finding.startswith("there is a GPU that JAX does not see")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    line = run("devices")
    assert line.status == "warn" and "torch does not see" in line.finding


def test_a_device_that_computes_wrong_is_red(monkeypatch):
    monkeypatch.setattr(jnp, "ones", lambda shape: np.zeros(shape))
    assert run("devices").finding.startswith("JAX computes wrong")


# --------------------------------------------------------------------------------- space


def write_files(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(("groups", "files", "available"), [
    ("", {}, 8000 * 1024),
    ("0::/job/a", {"job/memory.max": "5000", "job/memory.current": "2000",
                   "job/memory.stat": "anon 7\ninactive_file 500",
                   "job/a/memory.max": "max"}, 3500),
    ("4:memory:/a\n0::/", {"memory/a/memory.limit_in_bytes": "900",
                           "memory/a/memory.usage_in_bytes": "800",
                           "memory/a/memory.stat": "total_inactive_file 50"}, 150),
    ("0::/of/the/host", {"memory.max": "4000", "memory.current": "1000", "memory.stat": ""}, 3000),
])
def test_memory_heeds_control_groups(groups, files, available, tmp_path, monkeypatch):
    write_files(tmp_path, {"own": groups})
    write_files(tmp_path / "cgroup", files)
    machine = types.SimpleNamespace(available=8000 * 1024, total=9000 * 1024)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    assert doctor.host_memory(tmp_path / "cgroup", tmp_path / "own").free == available


def test_too_little_memory_is_red(monkeypatch):
    memory = Memory(2.4 * doctor.GIB, 8 * doctor.GIB)
    monkeypatch.setattr(doctor, "host_memory", lambda: memory)
    assert run("memory").status == "FAIL"
    stats = {"bytes_limit": 10**9, "bytes_in_use": 0}
    device = types.SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert run("memory").status == "ok"  # with the replay on the GPU
    stats["bytes_in_use"] = 5 * 10**8
    line = run("memory")
    assert line.status == "FAIL" and "GiB of GPU memory free" in line.finding


def test_the_replay_is_counted_by_its_shapes():
    leaves = jax.tree.leaves(doctor.replay_shapes(128))
    assert sum(x.size * x.dtype.itemsize for x in leaves) == (
        1_000_000 * (4 * (39 + 4 + 39 + 1 + 1) + 2 * 128) + 4
    )


def test_a_full_disk_is_red(monkeypatch):
    usage = types.SimpleNamespace(free=10**8)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    line = run("disk")
    assert line.status == "FAIL" and "0.1 GiB are free" in line.finding


def test_make_has_the_target():
    result = subprocess.run(["make", "-n", "doctor", "GPU=0"], cwd=ROOT, capture_output=True,
                            text=True, env=os.environ | {"MAKEFLAGS": ""})
    # Under another make, lines about folders surround it.
    assert any(line.endswith("-m tools.doctor") for line in result.stdout.splitlines())
