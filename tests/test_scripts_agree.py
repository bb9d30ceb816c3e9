"""What two scripts both define is the same, byte for byte, unless this file says why it is not."""

import ast
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))

# Definitions that may differ, and why.
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
# Fields of Args that may differ, and why.
ALLOWED_FIELDS = {
    "engine": "only what draws nothing can run on EnvPool",
    "batch_size": "FuRL's ranking losses sample as many",
    "rho": "VLM-RM has no task reward beside it by default",
}


def definitions(script: str) -> dict[str, str]:
    """Source of each function, class and constant at the top level, by name."""
    text = (ROOT / script).read_text()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            decorators = [ast.get_source_segment(text, d) for d in node.decorator_list]
            found[node.name] = "\n".join([*decorators, ast.get_source_segment(text, node)])
        elif isinstance(node, ast.Assign):
            for name in ast.walk(node.targets[0]):
                if isinstance(name, ast.Name):
                    found[name.id] = ast.get_source_segment(text, node)
    return found


def fields(script: str) -> dict[str, str]:
    """The lines of Args with their one-line help, by name."""
    text = (ROOT / script).read_text()
    [args] = [n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == "Args"]
    lines = text.splitlines()
    return {node.target.id: lines[node.lineno - 1].strip()
            for node in args.body if isinstance(node, ast.AnnAssign)}


def differing(read, allowed) -> tuple[list[str], set[str]]:
    """What differs without leave, and all that differs."""
    unexpected, seen = [], set()
    for one, other in combinations(SCRIPTS, 2):
        ours, theirs = read(one), read(other)
        for name in ours.keys() & theirs.keys():
            if ours[name] != theirs[name]:
                seen.add(name)
                if name not in allowed:
                    unexpected.append(f"{name} in {one} and {other}")
    return sorted(unexpected), seen


@pytest.mark.parametrize(("read", "allowed"), [
    pytest.param(definitions, ALLOWED, id="definitions"),
    pytest.param(fields, ALLOWED_FIELDS, id="fields"),
])
def test_scripts_agree(read, allowed):
    unexpected, seen = differing(read, allowed)
    assert not unexpected
    assert not allowed.keys() - seen, "the list allows what does not differ"


def test_all_scripts_are_compared():
    assert {"furl_sac_state.py", "sac_baseline.py", "relay_baseline.py",
            "vlm_rm_baseline.py"} <= set(SCRIPTS)


def test_the_sac_block_is_in_all_of_them():
    block = {"AgentState", "MLP", "Actor", "CriticPair", "networks", "sample_action",
             "critic_loss", "actor_loss", "alpha_loss", "sac_loss", "descend", "init_agent",
             "update_agent", "act_mean"}
    for script in SCRIPTS:
        assert block <= definitions(script).keys(), script


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_no_other_script(script):
    others = {Path(name).stem for name in SCRIPTS}
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        if isinstance(node, ast.Import):
            assert not others & {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module not in others
