"""The house rules: imports point down, modules say what they are for, and what READMEs name exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "megatron_mdm"
ROWS = [  # lowest first; packages of one row do not import each other
    {"config"},
    {"batch"},
    {"diffusion", "parallel"},
    {"models", "data", "images"},
    {"engine"},
    {"checkpoint"},
    {"generation"},
    {"evaluation"},
    {"objectives", "reports"},
    {"training"},
    {"rl"},
    {"study"},
    {"cli"},
]
ROW_OF = {package: row for row, packages in enumerate(ROWS) for package in packages}
MODULES = sorted({*PACKAGE.rglob("*.py")} - {PACKAGE / "__init__.py"})
READMES = [
    ROOT / "README.md",
    *sorted((ROOT / ".github").glob("*.md")),
    *(path for name in ("megatron_mdm", "launch", "tools", "configs", "tests") for path in (ROOT / name).rglob("*.md")),
]


def imports(path: Path) -> set[str]:
    """Dotted names of every module that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(str(node.module))
    return names


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_down(path: Path) -> None:
    own = package_of(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "megatron_mdm" and len(parts) > 1 and parts[1] != own:
            assert ROW_OF[parts[1]] < ROW_OF[own], f"{own} imports {name}"
        assert parts[0] not in ("tests", "launch", "tools"), name


def test_diffusion_knows_no_ranks_and_no_models() -> None:
    for path in (PACKAGE / "diffusion").glob("*.py"):
        for name in imports(path):
            assert name.split(".")[0] in {"megatron_mdm", "numpy", "scipy", "torch", *STANDARD}, f"{path}: {name}"
            assert not name.startswith("torch.distributed")


def test_only_engine_and_parallel_import_deepspeed() -> None:
    for path in MODULES:
        if any(name.split(".")[0] == "deepspeed" for name in imports(path)):
            assert package_of(path) in ("engine", "parallel"), path


def test_models_do_not_noise_weight_or_log() -> None:
    for path in (PACKAGE / "models").rglob("*.py"):
        # Initial weights and the masks of adapters' dropout are drawn from the same counters.
        allowed = {"megatron_mdm.diffusion.randomness", "megatron_mdm.diffusion.hashing"}
        used = {name for name in imports(path) if name.startswith("megatron_mdm.diffusion")}
        assert used <= allowed, path


def test_only_objectives_are_asked_by_name() -> None:
    """Other packages are given what they need of an objective."""
    for path in MODULES:
        if package_of(path) in ("config", "objectives"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Constant) and node.value in ("masked", "autoregressive")), path


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_tests_that_the_readme_names_exist() -> None:
    """They are named as in training's table of faults: `test_file.py::test_name`, more of a file without its name."""
    defined: dict[str, str] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):  # two folders may have files of one name
        defined[path.name] = defined.get(path.name, "") + path.read_text(encoding="utf-8")
    num_named = 0
    for readme in READMES:
        file = ""
        for given, name in re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", readme.read_text(encoding="utf-8")):
            file = given or file
            assert f"def {name}(" in defined[file], f"{readme}: {file}::{name}"
            num_named += 1
    assert num_named > 20


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_readmes_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, heading = target.partition("#")
        if not file.startswith("http"):
            linked = path.parent / file if file else path
            assert linked.exists(), target
            if heading:
                assert heading in anchors(linked), target


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in MODULES}), ids=lambda path: str(path.relative_to(ROOT))
)
def test_every_folder_has_a_readme_that_names_its_files(folder: Path) -> None:
    """A folder without one is named as a whole by that of the folder above."""
    readme = folder / "README.md"
    if not readme.exists():
        assert f"{folder.name}/" in (folder.parent / "README.md").read_text(encoding="utf-8")
        return
    text = readme.read_text(encoding="utf-8")
    absent = [path.name for path in folder.glob("*.py") if path.name != "__init__.py" and path.name not in text]
    assert not absent, f"{readme} does not name {absent}"


def anchors(path: Path) -> set[str]:
    """The anchors of a file's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


STANDARD = {"__future__", "collections", "dataclasses", "enum", "typing"}
