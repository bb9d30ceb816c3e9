"""A copy of a script is as good as the script: the changes of docs/extending.md are applied.

They are applied to a copy of the checkout, and what comes out is used as a reader would use it:
trained, resumed, evaluated, reported and benchmarked. Nothing but the copy is touched.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "--env-id", "drawer-close-v3", "--num-envs", "4", "--total-timesteps", "2400",
    "--learning-starts", "400", "--batch-size", "16", "--utd", "0.25", "--hidden-features", "16",
    "16", "--buffer-size", "2000", "--eval-every", "2400", "--checkpoint-every", "1200",
    "--log-every", "400",
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """What a user has: the scripts, common/, tools/, docs/ and tests/."""
    folder = tmp_path_factory.mktemp("users") / "checkout"
    folder.mkdir()
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    for part in ("common", "tools", "docs", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def diffs() -> dict[str, str]:
    """The changes of docs/extending.md by the file that they change."""
    blocks = re.findall(r"```diff\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.S)
    return {re.search(r"^\+\+\+ b/(.*)$", block, re.M).group(1): block for block in blocks}


def apply(checkout: Path, changed: str, copied_from: str | None = None) -> None:
    if copied_from:
        shutil.copy(checkout / copied_from, checkout / changed)
    result = subprocess.run(
        ["git", "apply", "-v", "-"], input=diffs()[changed], text=True, capture_output=True,
        cwd=checkout, env=os.environ | {"GIT_CEILING_DIRECTORIES": str(checkout.parent)},
    )
    assert result.returncode == 0 and "offset" not in result.stderr, result.stderr


def run(checkout: Path, *words: str) -> str:
    """The output of a Python command in the checkout, which must succeed."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    result = subprocess.run([sys.executable, *words], cwd=checkout, capture_output=True, text=True,
                            timeout=900, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def metrics(folder: Path) -> dict[tuple[int, str], str]:
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.reader(file))[1:]
    return {(int(step), key): value for step, key, value in rows if not key.startswith("time/")}


def test_a_copy_with_a_new_loss_is_as_good_as_the_script(checkout):
    before = {path.name: path.read_bytes() for path in checkout.glob("*.py")}

    # The mere copy trains under its own name; its run is older than the flags that come next.
    shutil.copy(checkout / "furl_sac_state.py", checkout / "my_idea.py")
    run(checkout, "my_idea.py", *TINY, "--total-timesteps", "400", "--run-dir", "runs/old")
    config = json.loads((checkout / "runs/old/config.json").read_text())
    assert config["script"] == "my_idea"
    assert (checkout / "runs/old/my_idea.py").read_bytes() == before["furl_sac_state.py"]

    # More flags of every kind, with values that ours could not have.
    apply(checkout, "my_idea.py")
    script = checkout / "my_idea.py"
    script.write_text(script.read_text().replace("    contrastive: float = 0.0", (
        "    offset: float = -1.5  # negative\n"
        "    count: int = 0  # zero\n"
        "    label: str = ''  # empty\n"
        "    weights: tuple[float, ...] = (0.0, -1.0)  # of either sign\n"
        "    names: tuple[str, ...] = ()  # empty\n"
        "    contrastive: float = 0.0"
    )))
    run(checkout, "my_idea.py", *TINY, "--draw-every", "4", "--contrastive", "0.5", "--offset",
        "-3", "--weights", "-2", "0", "--names", "a", "--run-dir", "runs/new")
    rows = metrics(checkout / "runs/new")
    assert float(rows[2400, "losses/contrastive_loss"]) > 0
    assert {"losses/critic_loss", "losses/relay_critic_loss"} <= {key for _, key in rows}
    args = json.loads((checkout / "runs/new/config.json").read_text())["args"]
    assert args["contrastive"] == 0.5 and args["weights"] == [-2, 0] and args["names"] == ["a"]

    # The older run goes on, and is evaluated, with the new flags' defaults.
    out = run(checkout, "my_idea.py", "--resume", "runs/old", "--total-timesteps", "600")
    assert "made before these flags, which take their defaults" in out
    assert "my_idea.py has changed since this run began" in out
    out = run(checkout, "-m", "tools.evaluate", "runs/old", "--videos", "0")
    assert "--contrastive" in out and "my_idea.py, 600 steps" in out

    # The tools know it like any other script.
    out = run(checkout, "-m", "tools.evaluate", "runs/new")
    assert "success_at_end" in out and list(checkout.glob("runs/new/evaluations/*/*.mp4"))
    run(checkout, "-m", "tools.reward_report", "--env-id", "drawer-close-v3", "--episodes", "2",
        "--steps", "60", "--every", "10", "--checkpoints", "runs/new", "--output", "report")
    assert "new" in json.loads((checkout / "report/report.json").read_text())["rewards"]
    out = run(checkout, "-m", "tools.benchmark", "--rounds", "1", "--steps", "1100", "--scripts",
              "my_idea.py --num-envs 4 --batch-size 16 --hidden-features 16 16")
    assert re.search(r"\| my_idea.py --num-envs 4 .* \| [\d,.]+ steps/s", out)

    # The tests that compare all scripts stay green beside it.
    run(checkout, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_scripts_agree.py",
        "-k", "found or agree[ or import")
    assert {path.name: path.read_bytes() for path in checkout.glob("*.py")
            if path.name != "my_idea.py"} == before


def test_a_new_vlm(checkout):
    apply(checkout, "common/vlms/colour.py")
    out = run(checkout, "-c", (
        "from common.vlms import load_vlm; import numpy as np\n"
        "vlm = load_vlm('colour')\n"
        "green = np.zeros((2, 112, 112, 3), np.uint8); green[..., 1] = 200\n"
        "print(vlm.embed_images(green).shape, vlm.embed_text(['The green drawer.']))"
    ))
    assert out.strip() == "(2, 3) [[0. 1. 0.]]"
    run(checkout, "furl_sac_state.py", *TINY, "--total-timesteps", "400", "--learning-starts",
        "400", "--vlm", "colour", "--prompt", "The green drawer.", "--run-dir", "runs/colour")
    out = run(checkout, "-m", "tools.evaluate", "runs/colour")
    assert "the video shows the sparse reward" not in out


def test_a_new_algorithm(checkout):
    apply(checkout, "redq.py", copied_from="sac_baseline.py")
    run(checkout, "redq.py", *TINY, "--num-critics", "3", "--total-timesteps", "800", "--run-dir",
        "runs/redq")
    assert float(metrics(checkout / "runs/redq")[800, "losses/critic_loss"]) > 0
    assert "redq.py, 800 steps" in run(checkout, "-m", "tools.evaluate", "runs/redq", "--videos",
                                       "0")
