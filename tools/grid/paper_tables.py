"""The paper's tables and figures, and FuRL plus's, as grids of runs; the presets: flags and budgets
with a name.

docs/paper.md shows the same commands; tests/test_grid.py holds the two together.
"""

from dataclasses import dataclass, field

from common.envs.metaworld_tasks import MT10


@dataclass(frozen=True)
class Method:
    """A column of a table, or a curve of a figure."""

    label: str  # what the paper calls it
    script: str  # with `flags` the command, without task, seed and VLM
    flags: str = ""
    vlm: str | None = "liv"  # which of a preset's VLMs it has; None: none


@dataclass(frozen=True)
class Table:
    methods: tuple[str, ...]  # names in `METHODS`
    tasks: tuple[str, ...] = MT10
    preset: str = "paper"  # by default


@dataclass(frozen=True)
class Preset:
    """Flags for every run, and those of its VLM; a script without such a flag runs without it."""

    flags: str = ""
    vlms: dict[str, str] = field(default_factory=dict)  # Method.vlm -> flags
    memory: float = 3.0  # GiB a run, with a full replay


FURL, RELAY, SAC, VLM_RM, DRQ, PIXELS, PLUS = (
    "furl_sac_state.py", "relay_baseline.py", "sac_baseline.py", "vlm_rm_baseline.py",
    "drq_baseline.py", "furl_drq_pixels.py", "furl_plus_state.py",
)
NO_VLM = "--kappa 0 --rho 0 --no-align --draw-every 500"  # FuRL plus, its VLM without effect
METHODS = {
    "sac": Method("SAC", SAC, vlm=None),
    "vlm-rm": Method("VLM-RMs", VLM_RM),
    "vlm-rm-gb": Method("VLM-RMs-GB", VLM_RM, "--alpha 0.5"),
    "liv": Method("LIV", VLM_RM, "--task-reward"),
    "liv-proj": Method("LIV-Proj", VLM_RM, "--task-reward --projection"),
    "relay": Method("Relay", RELAY),
    "furl-no-goal-image": Method("FuRL w/o goal-image", FURL, "--no-goal-image"),
    "furl": Method("FuRL", FURL),
    "sac-random": Method("SAC", SAC, "--goal random", vlm=None),
    "relay-random": Method("Relay", RELAY, "--goal random"),
    "furl-random": Method("FuRL", FURL, "--goal random"),
    "clip": Method("CLIP", VLM_RM, "--task-reward", vlm="clip"),
    "clip-furl": Method("CLIP-FuRL", FURL, vlm="clip"),
    "prompt-none": Method("none", FURL, "--prompt none"),
    "prompt-short": Method("short", FURL, "--prompt short"),
    "prompt-long": Method("long", FURL, "--prompt long"),
    "drq-pixels": Method("DrQ", DRQ, "--goal random", vlm=None),
    "furl-pixels": Method("FuRL", PIXELS, "--goal random"),
    "no-align": Method("no reward alignment", FURL, "--no-align"),
    "no-stage2": Method("no stage 2 (Eq. 4)", FURL, "--no-stage2"),
    "no-relay": Method("no relay", FURL, "--no-relay"),
    "no-pretrained": Method("without the pretrained VLM", FURL, "--no-pretrained"),
    "rho-0.01": Method("rho 0.01", FURL, "--goal random --rho 0.01"),
    "rho-0.05": Method("rho 0.05", FURL, "--goal random --rho 0.05"),
    "rho-0.2": Method("rho 0.2", FURL, "--goal random --rho 0.2"),
    "plus": Method("FuRL plus", PLUS),
    "plus-no-vlm": Method("FuRL plus without the VLM", PLUS, NO_VLM, vlm=None),
    "plus-one-step": Method("one-step returns", PLUS, "--n-step 1"),
    "plus-uniform": Method("uniform batches", PLUS, "--success-share 0"),
    "plus-no-clip": Method("no clipping", PLUS, "--no-clip-targets"),
    "plus-no-potential": Method("Eq. 1 in place of the potential", PLUS, "--kappa 0 --rho-always"),
    "plus-no-guidance": Method("no rho during the search", PLUS, "--rho 0"),
    "plus-white-noise": Method("white noise", PLUS, "--hold-steps 1"),
    "plus-no-quiet": Method("no quiet environments", PLUS, "--quiet-envs 0"),
    "plus-entropy": Method("entropy in all targets", PLUS, "--entropy always"),
    "plus-no-align": Method("no reward alignment", PLUS, "--no-align"),
    "plus-no-relay": Method("no relay", PLUS, "--no-relay"),
    "plus-no-bonus": Method("no bonus for the relay agent", PLUS, "--relay-bonus 0"),
    "plus-no-goal-image": Method("no goal image", PLUS, "--no-goal-image"),
    "plus-demos": Method("three demonstrations", PLUS, "--demos 3"),
    "plus-demos-no-vlm": Method("three, without a VLM", PLUS, f"--demos 3 {NO_VLM}", vlm=None),
    "plus-one-demo": Method("one demonstration", PLUS, "--demos 1"),
    "plus-random": Method("FuRL plus", PLUS, "--goal random"),
}

TWO = ("button-press-topdown-v3", "drawer-open-v3")
GRASPING = ("pick-place-v3", "peg-insert-side-v3")
EIGHT = tuple(task for task in MT10 if task not in GRASPING)
TABLE1 = Table(("sac", "vlm-rm", "vlm-rm-gb", "liv", "liv-proj", "relay", "furl-no-goal-image",
                "furl"))
TABLE2 = Table(("sac-random", "relay-random", "furl-random"))
TABLE6 = Table(("prompt-none", "prompt-short", "prompt-long"), TWO)
TABLES = {
    "table1": TABLE1,
    "table2": TABLE2,
    "table3": Table(("clip", "clip-furl")),
    "table6": TABLE6,
    "figure6": TABLE1,
    "figure7": Table(("drq-pixels", "furl-pixels"), ("window-open-v3",)),
    "figure8": Table(("furl", "no-align", "furl-no-goal-image", "no-stage2", "no-relay")),
    "figure9": Table(("furl", "no-pretrained", "sac")),
    "figure10": Table(("rho-0.01", "rho-0.05", "rho-0.2"), TWO),
    "figure13": TABLE2,
    "figure15": TABLE6,
    "plus": Table(("plus", "plus-no-vlm"), EIGHT, "plus"),
    "plus-ablations": Table(
        ("plus", "plus-one-step", "plus-uniform", "plus-no-clip", "plus-no-potential",
         "plus-no-guidance", "plus-white-noise", "plus-no-quiet", "plus-entropy", "plus-no-align",
         "plus-no-relay", "plus-no-bonus", "plus-no-goal-image"),
        ("button-press-topdown-v3", "drawer-open-v3", "push-v3"), "plus",
    ),
    "plus-demos": Table(("plus-demos", "plus-demos-no-vlm", "plus-one-demo", "plus"), GRASPING,
                        "plus"),
    "plus-random": Table(("plus-random",), ("reach-v3", "window-close-v3", "drawer-close-v3",
                                            "drawer-open-v3"), "plus"),
}

PRESETS = {
    # The scripts' defaults are the paper's Table 5; the budget is written out to be on record.
    "paper": Preset("--total-timesteps 1000000 --quality paper",
                    {"liv": "--vlm liv", "clip": "--vlm clip"}, memory=6.0),
    # What two cores do in a night: the embedded VLM and fast pictures. Chosen by pilots on
    # window-close (docs/lab_notes.md); the same for all methods, as far as a script has the flag.
    "laptop": Preset("--total-timesteps 120000 --batch-size 64 --learning-rate 3e-4 "
                     "--init-q -100 --layer-norm --init-temperature 0.01 --stage2-after 2500 "
                     "--eval-every 2000 --draw-every 4", {"clip": "--vlm clip"}),
    # FuRL plus's own defaults, written out to be on record, with the embedded VLM.
    "plus": Preset("--total-timesteps 80000 --eval-every 2000", {"clip": "--vlm clip"}),
    "none": Preset(vlms={"clip": "--vlm clip"}),
}
