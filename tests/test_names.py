"""Names of users as names of files and folders, and as text in tables."""

import pytest

from common import names
from tools.grid import __main__ as grid
from tools.shared import names as labels


@pytest.mark.parametrize("label", [
    "", "_", "..", "/", "方法", "🤖", "$", "\\", "|", "x" * 1000, "a\nb", "\udcff", "é" * 300,
])
def test_folder_names_are_plain(label):
    name = labels.folder_name(label)
    assert name.isascii() and 0 < len(name) <= labels.LONGEST
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-") and name[0] not in "._"


def test_names_that_are_in_use_stay_as_they_are():
    assert labels.folder_name("FuRL w/o goal-image") == "furl_w_o_goal-image"
    for env_id in ("drawer-open-v3", "CartPole-v1", "mine:Own-v0"):
        assert names.file_name(env_id) == env_id


def test_environments_that_differ_have_files_that_differ():
    ids = ["ALE/Pong-v5", "ALE-Pong-v5", "ALE%2FPong-v5", "ALE_Pong-v5", "a:b", "a_b", "方-v0"]
    assert len({names.file_name(env_id) for env_id in ids}) == len(ids)
    assert all("/" not in names.file_name(env_id) for env_id in ids)


def test_a_name_that_is_taken_is_marked():
    owners = {"a_b": "a b"}
    assert labels.distinct_name("a_b", "a b", owners) == "a_b"
    other = labels.distinct_name("a_b", "a_b", owners)
    assert other.startswith("a_b-") and labels.distinct_name("a_b", "a_b", owners) == other


@pytest.mark.parametrize(("text", "escaped"), [
    ("furl_sac_state.py --rho 0.1", "furl_sac_state.py --rho 0.1"),
    ("a|b", r"a\|b"), ("$x$ `y` *z*", r"\$x\$ \`y\` \*z\*"), ("_a_ b_c", r"\_a\_ b_c"),
    ("a\nb", "a b"), ("\\frac", r"\\frac"), ("<b>[c]", r"\<b\>\[c\]"),
])
def test_markdown_shows_the_text(text, escaped):
    assert labels.markdown(text) == escaped


def test_scripts_of_a_grid_that_differ_have_folders_that_differ():
    scripts = ("furl_sac_state.py --vlm a/b", "furl_sac_state.py --vlm a-b",
               f"furl_sac_state.py --prompt '{'öffne sie ' * 60}'",
               f"furl_sac_state.py --prompt '{'öffne sie ' * 61}'")
    found = list(grid.chosen_methods(grid.Args(scripts=scripts)))
    assert len(found) == 4 and found[0] == "furl_sac_state_vlm_a-b"
    assert all(len(name.encode()) <= 255 for name in found)
