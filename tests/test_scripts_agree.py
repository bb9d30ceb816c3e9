"""What two scripts both define is the same, byte for byte, unless this file says why it is not."""

import ast
import importlib
from itertools import combinations
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
PIXELS = "furl_drq_pixels.py"

# Definitions that may differ, and why; inside a group of GROUPS they may not.
ALLOWED = {
    "SCRIPT": "each script's own name",
    "Args": "flags of its own; the fields that two scripts share are compared below",
    "Buffers": "FuRL keeps positives and negatives as well; SAC stores no embeddings",
    "VLMInputs": "FuRL compares with a goal image, VLM-RM with a baseline prompt",
    "vlm_reward": "Eq. 3 of FuRL; the rewards of VLM-RM",
    "init_state": "FuRL has projection heads to train",
    "init_buffers": "as Buffers",
    "update_once": "the method",
    "update": "it hands on what update_once needs",
    "act": "one agent, or two that relay",
    "main": "the method",
}
# The same for the script on pixels against those on states.
ALLOWED_ON_PIXELS = ALLOWED | {
    "AgentState": "the encoder has a target too",
    "Actor": "a neck between the encoder's features and the MLP",
    "CriticPair": "as Actor",
    "networks": "as Actor",
    "critic_loss": "features, and the gradient of the encoder",
    "actor_loss": "features",
    "init_agent": "the encoder",
    "update_agent": "the encoder",
    "act_mean": "pictures",
}
GROUPS = {
    "act": [{"furl_sac_state.py", "relay_baseline.py"}, {"sac_baseline.py", "vlm_rm_baseline.py"}],
    "Buffers": [{"relay_baseline.py", "vlm_rm_baseline.py"}],
    "init_buffers": [{"relay_baseline.py", "vlm_rm_baseline.py"}],
    **{name: [{"furl_sac_state.py", PIXELS}]
       for name in ("VLMInputs", "vlm_reward", "init_state", "update")},
}
# Fields of Args that may differ, and why.
ALLOWED_FIELDS = {
    "engine": "only what draws nothing can run on EnvPool",
    "batch_size": "FuRL's ranking losses sample as many",
    "rho": "VLM-RM has no task reward beside it by default",
}
ALLOWED_FIELDS_ON_PIXELS = ALLOWED_FIELDS | {
    "camera_id": "the policy sees the frames as well",
    "buffer_size": "Table 5: 2e5 pictures",
    "utd": "an action is repeated",
    "lag": "as utd",
    "hidden_features": "Table 5: three layers",
}


def definitions(script: str) -> dict[str, str]:
    """Source of each function, class and constant at the top level, by name."""
    text = (ROOT / script).read_text()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            decorators = [ast.get_source_segment(text, d) for d in node.decorator_list]
            found[node.name] = "\n".join([*decorators, ast.get_source_segment(text, node)])
        elif isinstance(node, ast.AnnAssign):
            found[node.target.id] = ast.get_source_segment(text, node)
        elif isinstance(node, ast.Assign):
            targets, values = node.targets, [node.value]
            if isinstance(targets[0], ast.Tuple):
                targets, values = targets[0].elts, node.value.elts
            for target, value in zip(targets, values, strict=True):
                found[target.id] = ast.get_source_segment(text, value)
    return found


def fields(script: str) -> dict[str, str]:
    """The lines of Args with their one-line help, and its properties, by name."""
    text = (ROOT / script).read_text()
    [args] = [n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == "Args"]
    lines = text.splitlines()
    return {
        node.target.id: lines[node.lineno - 1].strip()
        for node in args.body if isinstance(node, ast.AnnAssign)
    } | {
        node.name: ast.get_source_segment(text, node)
        for node in args.body if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize(("read", "allowed", "allowed_on_pixels"), [
    pytest.param(definitions, ALLOWED, ALLOWED_ON_PIXELS, id="definitions"),
    pytest.param(fields, ALLOWED_FIELDS, ALLOWED_FIELDS_ON_PIXELS, id="fields"),
])
def test_scripts_agree(read, allowed, allowed_on_pixels):
    differing = set()
    for one, other in combinations(SCRIPTS, 2):
        ours, theirs = read(one), read(other)
        names = {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}
        for name in names & GROUPS.keys():
            assert not any({one, other} <= group for group in GROUPS[name]), name
        leave = allowed_on_pixels if PIXELS in (one, other) else allowed
        assert not names - leave.keys(), f"in {one} and {other}"
        differing |= names
    assert not allowed_on_pixels.keys() - differing, "the list allows what does not differ"


def test_all_scripts_are_compared():
    assert {"furl_sac_state.py", "sac_baseline.py", "relay_baseline.py", "vlm_rm_baseline.py",
            PIXELS} <= set(SCRIPTS)


def test_the_sac_block_is_in_all_state_scripts():
    block = {"AgentState", "MLP", "Actor", "CriticPair", "networks", "sample_action",
             "critic_loss", "actor_loss", "alpha_loss", "sac_loss", "descend", "init_agent",
             "update_agent", "act_mean"}
    for script in set(SCRIPTS) - {PIXELS}:
        assert block <= definitions(script).keys(), script


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_update_leaves_the_types_as_they_were(script):
    """Else the second update of a run, and what acts on it, would be compiled anew."""
    module = importlib.import_module(Path(script).stem)
    agent = jax.eval_shape(lambda key: module.init_agent(key, module.Args()), jax.random.key(0))
    assert not [path for path, leaf in jax.tree.leaves_with_path(agent) if leaf.weak_type]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_no_other_script(script):
    others = {Path(name).stem for name in SCRIPTS}
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        if isinstance(node, ast.Import):
            assert not others & {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module not in others
