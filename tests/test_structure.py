"""The shape of the house: the script on a few screens, no function over one, imports in one direction."""

import ast

import pytest
from conftest import ROOT

# From top to bottom; a module may import those that come after it. Scripts are imported by none, but for what foretells the two.
SCRIPTS = ["sft.py", "dpo.py", "generate.py", "plot.py", "make_tiny.py", "will_it_fit.py"]
MODULES = ["log.py", "export.py", "checkpoint.py", "chat.py", "template.py", "rows.py", "data.py", "hub.py", "trial.py",
           "model_utils.py", "attention.py", "lora.py", "nf4.py", "logps.py", "fsdp_utils.py", "fake_gpu.py",
           "configs/base.py", "script.py"]


def name_of(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".")


def imports_of(file: str) -> set[str]:
    """Returns the names of what is imported anywhere in the file, within functions too."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "relative"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def functions_of(file: str) -> dict[str, int]:
    """Returns {name: lines}, decorators aside."""
    nodes = (node for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef))
    return {node.name: node.end_lineno - node.lineno + 1 for node in nodes}


def test_every_file_is_on_the_map():
    there = {path.name for path in ROOT.glob("*.py")} | {"configs/base.py"}
    assert there == {*SCRIPTS, *MODULES}


@pytest.mark.parametrize("file", SCRIPTS + MODULES)
def test_imports_go_downwards(file):
    below = MODULES[MODULES.index(file) + 1:] if file in MODULES else MODULES + ["sft.py", "dpo.py"] * (file == "will_it_fit.py")
    own = {name_of(other) for other in SCRIPTS + MODULES}
    assert imports_of(file) & own <= {name_of(other) for other in below}


@pytest.mark.parametrize("file", SCRIPTS + MODULES)
def test_no_function_is_over_a_screen(file):
    assert not [name for name, lines in functions_of(file).items() if lines > (75 if name == "main" else 60)]


@pytest.mark.parametrize("file", ["sft.py", "dpo.py"])
def test_the_script_is_short(file):
    assert len((ROOT / file).read_text().splitlines()) <= 260


@pytest.mark.parametrize("file", sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("configs/*.py")
                                        if path.name != "base.py"))
def test_a_configuration_imports_no_more_than_the_knobs(file):
    own = {name_of(other) for other in SCRIPTS + MODULES}
    assert imports_of(file) & own <= {"configs.base"}


@pytest.mark.parametrize("file", ["sft.py", "dpo.py"])
def test_no_closure_reads_what_is_bound_anew_after_it(file):
    """In the script a function or lambda within another uses no variable of the outer one that is assigned to more than once."""
    tree = ast.parse((ROOT / file).read_text())
    for outer in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        stores = [node.id for node in ast.walk(outer) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
        for inner in (node for node in ast.walk(outer) if isinstance(node, (ast.FunctionDef, ast.Lambda)) and node is not outer):
            loaded = {node.id for node in ast.walk(inner) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
            assert not [name for name in loaded if stores.count(name) > 1]
