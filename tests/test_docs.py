"""Every path, command, config key and symbol that the docs, docstrings and comments name exists.

The rules are regular expressions over words in `backticks` (and, for paths and commands, over whole lines). What they
cannot decide is in two short lists of foreign names. A stale name is put right where it is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from pipeline.cli.main import cli
from pipeline.config.renamed import RENAMED
from tests.launch import ROOT
from tests.prose_and_tree import FOLDERS, files, identifiers, is_config_key, members, quoted, sources, texts

# Names with `my_` are the reader's, in a recipe.
MINE = re.compile(r"\bmy_")
# Beginnings of dotted names that other projects define.
FOREIGN_ROOTS = {"torch", "F", "numpy", "scipy", "yaml", "safetensors", "transformers", "datasets", "mlflow"}
# Names in backticks that other projects define: PyTorch, transformers, diffusers, Slurm.
FOREIGN_NAMES = {
    *("FlexAttention", "LayerNorm", "AutoModel", "AutoBackbone", "LlamaForCausalLM", "trust_remote_code"),
    *("num_images_per_prompt", "AssocMaxJobsLimit", "BadConstraints", "KillWait", "PartitionTimeLimit"),
    *("ReqNodeNotAvail", "preempt_send_user_signal", "--mail-type"),
}
# Endings of files: `index.json` is no dotted name.
FILES = {
    *("py", "md", "json", "jsonl", "yaml", "html", "png", "jpg", "txt", "npy", "npz", "tar", "pt", "pth", "csv"),
    *("safetensors", "sbatch", "sif", "toml", "cff", "db", "patch", "shards", "tokens"),
}


# The promises


def _check(wrong: list[str]) -> None:
    stale = sorted({line for line in wrong if not MINE.search(line)})
    assert not stale, "\n".join(stale)


def test_every_path_that_is_named_exists() -> None:
    whole = re.compile(rf"(?<![\w/.\-<{{])(?:{'|'.join(FOLDERS)})/[\w./*{{}}<>-]*")
    wrong = []
    for name, text in texts().items():
        for path in whole.findall(text):
            path = path.rstrip(".")
            # `slurm/` is also a room, which the docstrings of the library name without `pipeline/` before it.
            names = {path, f"{path}/", f"pipeline/{path}", f"pipeline/{path}/"}
            known = names & files() or ("*" in path and any(ROOT.glob(path)))
            if not known and not re.search(r"[<>{}]", path):
                wrong.append(f"{name}: {path}")
    _check(wrong)


def test_every_python_file_that_is_named_exists() -> None:
    wrong = []
    for name, text in texts().items():
        for path in re.findall(r"(?<![\w/.<*-])[\w/]+\.py\b", text):
            if not any(f"/{known}".endswith(f"/{path}") for known in files()):
                wrong.append(f"{name}: {path}")
    _check(wrong)


def test_every_file_of_a_run_that_is_named_is_written_or_read_somewhere() -> None:
    """`metrics.csv`, `prepare/index.json`: its last part occurs in the code."""
    code = "\n".join(path.read_text() for path in sources() if path.name != Path(__file__).name)
    wrong = []
    for name, quote in quoted():
        match = re.fullmatch(r"(?:[\w<>-]+/)*([\w-]+\.(?:json|jsonl|csv|html|npy|pt|safetensors|db|patch|yaml))", quote)
        known = match is None or match[1] in code or any(file.endswith(f"/{match[1]}") for file in files())
        if not known:
            wrong.append(f"{name}: {quote}")
    _check(wrong)


def test_every_link_between_pages_leads_to_a_file_and_a_heading() -> None:
    wrong = []
    for name, text in texts().items():
        for target, heading in re.findall(r"\]\(([^)#:]*)(#[^)]*)?\)", text) if name.endswith(".md") else []:
            page = (ROOT / name).parent / target if target else ROOT / name
            if not page.exists() or (heading and heading[1:] not in _anchors(page)):
                wrong.append(f"{name}: {target}{heading}")
    _check(wrong)


def _anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_test_that_is_named_exists() -> None:
    tests = {name for name in identifiers() if name.startswith("test_")} | {path.stem for path in sources()}
    wrong = []
    for name, words in quoted():
        for test, cut in re.findall(r"\b(test_\w+)(…?)", words):
            if not (any(known.startswith(test) for known in tests) if cut else test in tests):
                wrong.append(f"{name}: {test}")
    _check(wrong)


def _lines_of_commands(program: str) -> Iterator[tuple[str, list[str]]]:
    """The words after `program` where it begins a line of code or a word in backticks, up to a comment."""
    for name, text in texts().items():
        text = text.replace("\\\n", " ")
        lines = re.findall(rf"^ *{program} (.*)$", text, flags=re.MULTILINE)
        lines += re.findall(rf"`{program} ([^`]*)`", text)
        lines += re.findall(rf"`[^`]*-m {program} ([^`]*)`", text) if program == "pipeline" else []
        yield from ((name, re.split(r"\s+#|\s{2,}|`", line)[0].split()) for line in lines)


def test_every_smalti_command_and_option_that_is_named_exists() -> None:
    wrong = []
    for name, words in _lines_of_commands("smalti"):
        if words[0] == "…" or words[0].startswith("<"):  # any command, any stage
            continue
        commands: list[click.Command] = []
        for one in words[0].split("|"):
            commands.append(cli.commands.get(one) or click.Command("none"))
            rest = words[1:]
            if isinstance(commands[-1], click.Group) and rest and not rest[0].startswith("-"):
                commands[-1] = commands[-1].commands.get(rest.pop(0)) or click.Command("none")
            if commands[-1].name == "none":
                wrong.append(f"{name}: smalti {' '.join(words)}: no such command")
        known = {option for command in commands for p in command.params for option in (*p.opts, *p.secondary_opts)}
        for option in (word.strip("[],").partition("=")[0] for word in words):
            if re.match(r"--?[a-z]", option) and option not in known | {"--help", "-h"}:
                wrong.append(f"{name}: smalti {' '.join(words)}: no option {option}")
    _check(wrong)


def test_every_option_that_is_named_alone_belongs_to_a_command() -> None:
    """To one of ours, of a benchmark, of the testbed, or to sbatch, in the job files that we render."""
    code = "\n".join(path.read_text() for path in sources() if path.name != Path(__file__).name)
    code += (ROOT / "slurm" / "testbed").read_text() + (ROOT / "pipeline" / "slurm" / "stage.sbatch").read_text()
    options = set(re.findall(r"--[a-z][\w-]*", code))
    named = [(name, words.split()[0].partition("=")[0]) for name, words in quoted() if re.match(r"--[a-z]", words)]
    _check([f"{name}: {option}" for name, option in named if option not in options | FOREIGN_NAMES])


def test_every_module_that_is_run_exists_and_has_the_options() -> None:
    cli_code = "".join(path.read_text() for path in (ROOT / "pipeline" / "cli").glob("*.py"))
    wrong = []
    for name, words in _lines_of_commands("python -m"):
        module = words[0].rstrip(".,:;)")
        if module.partition(".")[0] not in FOLDERS or "<" in module:
            continue
        path = ROOT / (module.replace(".", "/") + ".py")
        if not path.exists():
            path = path.with_suffix("") / "__main__.py"
        if not path.exists():
            wrong.append(f"{name}: python -m {module}")
            continue
        code = path.read_text() + cli_code
        for option in re.findall(r"(?<!\S)--[a-z][\w-]*", " ".join(words)):
            if not re.search(rf"[\"/]{option}[\"/]", code):  # "--peers/--no-peers" are two
                wrong.append(f"{name}: python -m {module}: no option {option}")
    _check(wrong)


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    wrong = [f"{name}: make {words[0]}" for name, words in _lines_of_commands("make") if words[0] not in targets]
    _check(wrong)


def test_every_override_in_a_command_is_a_config_key() -> None:
    wrong = []
    for name, words in _lines_of_commands("smalti"):
        for key in re.findall(r"(?<!\S)'?([a-z]\w*(?:\.\w+)*)=", " ".join(words)):
            if not is_config_key(key.split(".")) and key != "a.b":
                wrong.append(f"{name}: {key}")
    _check(wrong)


def test_every_dotted_name_is_a_config_key_or_a_symbol() -> None:
    """A symbol is `module.name`, `Class.name`, or, for an instance, the end of the class's name: `source.sampling`."""
    wrong = []
    for name, quote in quoted():
        quote = re.sub(r"s\.\d+(?=\.)|\.\d+$", "", quote)  # of `resolutions.1.blocks.0`: `resolution.blocks`
        match = re.match(r"([A-Za-z]\w*(?:\.\w+)+)(?=$|[=:(\[ ])", quote)
        words = match[1].split(".") if match else ["torch"]
        if words[0] in FOREIGN_ROOTS or words[-1] in FILES:
            continue
        owner, member = words[-2], words[-1]
        known = {n for cls, names in members().items() if _squeezed(cls).endswith(_squeezed(owner)) for n in names}
        if member not in known and not is_config_key(words) and not (owner == "config" and is_config_key([member])):
            wrong.append(f"{name}: {'.'.join(words)}")
    _check(wrong)


def _squeezed(name: str) -> str:
    return name.lower().replace("_", "")


def test_every_symbol_that_is_said_to_be_in_a_file_is_there() -> None:
    """`safe_key` in `pipeline/data/prepare.py`."""
    wrong = []
    for name, text in texts().items():
        for symbol, path in re.findall(r"`(\w+)`\s+(?:in|of)\s+`([\w/]+\.py)`", text):
            candidates = [ROOT / file for file in files() if f"/{file}".endswith(f"/{path}")]
            if not any(re.search(rf"\b{symbol}\b", file.read_text()) for file in candidates):
                wrong.append(f"{name}: {symbol} in {path}")
    _check(wrong)


def test_every_setting_in_backticks_is_a_config_key_or_a_parameter() -> None:
    """`style: classic`, `processes=4`, `{kind: folder, path: photos}`."""
    wrong = []
    for name, quote in quoted():
        if re.match(r"\{?[a-z]\w*(=|: )", quote) and "==" not in quote:
            for key in re.findall(r"(?:^\{?|[,{] ?)([a-z]\w*)(?:=|: )", quote):
                if not is_config_key([key]) and key not in identifiers():
                    wrong.append(f"{name}: {quote}: {key}")
    _check(wrong)


def test_every_identifier_in_backticks_is_one() -> None:
    """With an underscore, CamelCase, or called."""
    identifier = re.compile(r"(\w*[a-z0-9]_\w+|[A-Z]{3,}_\w+|[A-Z]+[a-z0-9]+[A-Z]\w*|[a-z]\w*(?=\())(?:\(.*\))?")
    known = identifiers() | FOREIGN_NAMES
    named = [(name, match[1]) for name, quote in quoted() if (match := identifier.fullmatch(quote))]
    named = [(name, symbol) for name, symbol in named if name != "docs/migration.md" or symbol not in RENAMED]
    _check([f"{name}: {symbol}" for name, symbol in named if symbol not in known and not is_config_key([symbol])])


# The listing at the top of ARCHITECTURE.md


def _listing() -> dict[str, str]:
    """By room of `pipeline/`: its lines in the listing."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    block = text[text.index("\n    pipeline/") : text.index("\n    stages/")]
    rooms = re.split(r"\n {6}(?=\S)", block)[1:]
    return {re.match(r"(\w+/?)", room)[0].rstrip("/"): room for room in rooms}


def test_the_listing_of_rooms_is_the_tree() -> None:
    tree = {path.name for path in (ROOT / "pipeline").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert set(_listing()) - {"__init__", "__main__"} == tree


@pytest.mark.parametrize("room", sorted(_listing()))
def test_every_module_of_the_listing_is_in_its_room(room: str) -> None:
    folder = ROOT / "pipeline" / room
    for module in re.findall(r"\w+\.(?:py|sbatch|html)\b", _listing()[room]):
        assert any(folder.rglob(module)), f"{room}/ has no {module}"
    for inner in re.findall(r"(?<!^)\b(\w+)/", _listing()[room]):
        assert (folder / inner).is_dir(), f"{room}/ has no {inner}/"
