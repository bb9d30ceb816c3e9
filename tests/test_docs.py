"""README and docs/: links and anchors lead somewhere, and commands parse."""

import importlib
import importlib.util
import re
import shlex

import pytest
from conftest import ROOT

from common.flags import parse

PAGES = {page.relative_to(ROOT).as_posix(): page.read_text()
         for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
# docs/lab_notes.md tells of flags and files of its time.
CURRENT = {name: text for name, text in PAGES.items() if name != "docs/lab_notes.md"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Programs that are not ours; nothing is known of their flags.
FOREIGN = {"source", "sudo", "python3.11", "tensorboard", "wandb", "ray", "git"}
# What gets a variable of make's.
MAKE_RUNS = {"TRAIN_ARGS": "furl_plus_state.py", "GRID_ARGS": "-m tools.grid"}
# Stand for a task or a seed in what a page shows.
PLACEHOLDERS = {"TASK": "reach-v3", "SEED": "0", "S": "0"}


def anchors(text: str) -> set[str]:
    """GitHub's anchors of a page's headings."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE):
        name = re.sub(r"\]\([^)]*\)", "", heading).strip().lower()
        name = re.sub(r"[^\w\- ]", "", name).replace(" ", "-")
        number = found.get(name, 0)
        found[name] = number + 1
        names.add(f"{name}-{number}" if number else name)
    return names


def commands(text: str) -> list[list[str]]:
    """The commands of a page, split into words: lines of its bash blocks, and `python ...` and
    `make ...` within sentences. Variables that the page sets (`LIV="..."`) are filled in."""
    blocks = [body.replace("\\\n", " ") for kind, body in FENCE.findall(text) if kind == "bash"]
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`((?:python|make) [^`]+)`", FENCE.sub("", text))
    variables, found = {}, []
    for line in lines:
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        for command in line.split(" && "):
            words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command, comments=True)]
            if len(words) == 1 and (setting := re.fullmatch(r"([A-Z]\w*)=(.*)", words[0])):
                variables[setting[1]] = setting[2]
            elif words:
                found.append(words)
    return found


def complaint(words: list[str], copies: set[str], capsys: pytest.CaptureFixture) -> str | None:
    """What is wrong with a command, or None. `copies`: scripts that the page makes by `cp`."""
    while re.match(r"[A-Z]\w*=", words[0]) or words[0] in ("taskset", "time"):
        words = words[3 if words[0] == "taskset" else 1:]
    program, *rest = words
    match program, rest:
        case "pip", ["install", "-r", name]:
            return None if (ROOT / name).exists() else f"no {name}"
        case "cp", [source, _]:
            return None if (ROOT / source).exists() else f"no {source}"
        case "make", [target, *settings]:
            makefile = (ROOT / "Makefile").read_text()
            if not re.search(rf"^{target}:", makefile, re.MULTILINE):
                return f"no target {target}"
            for name, _, value in (setting.partition("=") for setting in settings):
                if not re.search(rf"\b{name}\b", makefile):
                    return f"no variable {name}"
                if name in MAKE_RUNS:
                    line = f"python {MAKE_RUNS[name]} {value}"
                    return complaint(shlex.split(line), copies, capsys)
            return None
        case "python", ["-m", name, *flags]:
            pass
        case "python", [script, *flags] if script.endswith(".py"):
            if script in copies:  # tests/test_copying.py runs them
                return None
            name = script.removesuffix(".py")
        case _:
            return None if program in FOREIGN else f"{program} is unknown"
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        return f"no module {name}"
    if not flags:  # a sentence names the program, whose flags may be required
        return None
    if spec.submodule_search_locations:
        name += ".__main__"
    args_type = importlib.import_module(name).Args
    if "--" in flags:  # what follows goes to another program
        flags = flags[: flags.index("--")]
    try:
        parse(args_type, flags)
    except SystemExit as end:
        output = "".join(capsys.readouterr())
        return output if end.code else None
    return None


@pytest.mark.parametrize("name", PAGES)
def test_links(name):
    """Files and anchors that a page links to exist, and so do files that it names."""
    page, text = ROOT / name, FENCE.sub("", PAGES[name])
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            wrong.append(link)
    if name in CURRENT:
        named = re.findall(r"`((?:common|docs|results|tests|tools)/[\w/]+(?:\.\w+)?)`", text)
        wrong += [file for file in named if not (ROOT / file).exists()]
    assert not wrong


@pytest.mark.parametrize("name", CURRENT)
def test_commands_parse(name, capsys):
    """Scripts, modules, targets and files exist, and flags are known to them."""
    found = commands(CURRENT[name])
    copies = {words[2] for words in found if words[0] == "cp"}
    wrong = {shlex.join(words): said for words in found
             if (said := complaint(words, copies, capsys))}
    assert not wrong


def test_pages_named_in_code_exist():
    """`docs/...` in comments, docstrings and the Makefile."""
    sources = [ROOT / "Makefile", *ROOT.glob("*.py"), *ROOT.glob("common/**/*.py"),
               *ROOT.glob("tools/**/*.py")]
    named = {(name, source.name) for source in sources
             for name in re.findall(r"\bdocs/\w+\.\w+\b", source.read_text())}
    assert len(named) > 10
    assert not [pair for pair in named if not (ROOT / pair[0]).exists()]


def test_complaints(capsys):
    """What the test above must see: scripts, flags, targets and files that do not exist."""
    def said(line: str) -> str:
        return complaint(shlex.split(line), set(), capsys) or ""

    assert "no module" in said("python no_such_script.py")
    assert "--no-such" in said("python sac_baseline.py --no-such 1")
    assert "no target" in said("make everything")
    assert "--no-such" in said('make train TRAIN_ARGS="--no-such 1"')
    assert "no no-such.txt" in said("pip install -r no-such.txt")
    assert "unknown" in said("nonsense --now")
    assert said("FURL_NUM_CORES=1 taskset -c 1 python sac_baseline.py --env-id reach-v3") == ""
    assert anchors("# A\n## A `b`: c & d\n## A\n```bash\n# no\n```\n") == {"a", "a-b-c--d", "a-1"}
