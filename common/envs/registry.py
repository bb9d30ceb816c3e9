"""Which suite an environment's id belongs to: Gymnasium's, or else Meta-World's."""

import difflib

import gymnasium

from common.envs.gymnasium_suite import SUITE as GYMNASIUM
from common.envs.metaworld_suite import SUITE as METAWORLD
from common.envs.suite import Suite
from common.errors import UserError


def suite_for(env_id: str) -> Suite:
    """The suite of an environment.

    Raises:
        UserError: neither knows the id; names the closest ones of both.
    """
    if ":" in env_id or env_id in gymnasium.registry:  # that of a module, `module:Name-v0`
        return GYMNASIUM
    try:
        METAWORLD.resolve_env_id(env_id)
    except UserError as error:
        others = difflib.get_close_matches(env_id, gymnasium.registry, n=3, cutoff=0.6)
        hint = f" Or, of Gymnasium, {', '.join(others)}?" if others else ""
        raise UserError(f"{error}{hint}") from None
    return METAWORLD
