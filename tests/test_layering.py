"""Who may import whom, and who may change other people's objects, read from the source trees without importing them.

Each rule is checked on the repository, and on a small tree that breaks it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = "fastft_plugins"
FEATURES = ("packing", "checkpointing", "moe")
FRAMEWORKS = {"transformers", "trl", "lightning", "pytorch_lightning", "peft", "accelerate"}
ADAPTERS = {"fastft_hf", "fastft_trl", "fastft_lightning"}
PROGRAMS = (f"{CORE}.demo", f"{CORE}.cli")  # users of the library, free to import what they show


def imports(tree: ast.AST, module: str, *, in_functions: bool = True) -> Iterator[str]:
    """Yield the full name of everything imported at run time, `importlib.import_module("...")` included.

    ``module`` is the importing module's own name, or its package's, which relative imports start from.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                yield from imports(ast.Module([other], []), module, in_functions=in_functions)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = module.split(".")[: -node.level] if node.level else []
            source = ".".join([*start, *filter(None, [node.module])])
            yield from (f"{source}.{alias.name}" for alias in node.names)
        elif in_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
                if node.args and isinstance(node.args[0], ast.Constant):
                    yield str(node.args[0].value)
            yield from imports(node, module, in_functions=in_functions)


def patches(tree: ast.AST) -> Iterator[str]:
    """Yield what changes an object behind its owner's back: bare setattr and delattr calls, and a changed class."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
            yield ast.unparse(node)
        if isinstance(node, ast.Attribute) and node.attr == "__class__" and not isinstance(node.ctx, ast.Load):
            yield ast.unparse(node)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def module_name(file: Path) -> str:
    """Return the dotted name; a package's own file keeps ``__init__``, which makes relative imports start right."""
    return ".".join(file.with_suffix("").parts)


def violations(root: Path) -> Iterator[str]:
    """Yield one line for each broken rule in the source trees under ``root``."""
    for folder in (root, root / "integrations"):
        for file in sorted(folder.glob("fastft_*/**/*.py")):
            yield from violations_of(module_name(file.relative_to(folder)), ast.parse(file.read_text()))


def violations_of(module: str, tree: ast.Module) -> Iterator[str]:
    is_core = within(module, CORE)
    is_program = within(module, *PROGRAMS)
    kernels, features = f"{CORE}.kernels", [f"{CORE}.{feature}" for feature in FEATURES]
    may_know_features = (f"{CORE}.builtin", kernels, *features)  # kernels have a rule of their own
    for name in imports(tree, module):
        top = name.split(".")[0]
        if is_core and not is_program and top in FRAMEWORKS:
            yield f"{module} imports the framework {top}: only adapters do"
        if top == "triton" and not within(module, kernels):
            yield f"{module} imports triton: only {kernels} does"
        if within(module, kernels) and within(name, *features):
            yield f"{module} imports the feature {name}: kernels know no feature"
        if within(module, kernels, *features) and top in ADAPTERS:
            yield f"{module} imports the adapter {top}: adapters come to features through hooks"
        if is_core and within(name, *features) and not (is_program or within(module, *may_know_features)):
            yield f"{module} imports the feature {name}: the core meets features in the registry of plugins"
        for feature in features:
            if within(module, feature) and within(name, *features) and not within(name, feature):
                yield f"{module} imports {name}: a feature knows no other"
    if not is_program and module != f"{CORE}.ledger":
        for patch in patches(tree):
            yield f"{module} changes an object with {patch}: only the ledger does"
    if not is_core and module.endswith(".plugin"):
        for name in imports(tree, module, in_functions=False):
            if name.split(".")[0] in FRAMEWORKS:
                yield f"{module} imports {name} at module scope: it must load where the framework is missing"


def test_the_repository_keeps_the_layers() -> None:
    assert list(violations(ROOT)) == []


def test_the_scan_reads_the_repository() -> None:
    files = [file.relative_to(ROOT).as_posix() for file in ROOT.glob("fastft_plugins/**/*.py")]
    assert {"fastft_plugins/ledger.py", "fastft_plugins/manager.py"} <= set(files)
    assert list(ROOT.glob("integrations/fastft_*/plugin.py"))


@pytest.mark.parametrize(
    "path, source, rule",
    [
        ("fastft_plugins/run.py", "def f():\n    import transformers.trainer", "the framework transformers"),
        ("fastft_plugins/moe/experts.py", "from accelerate import Accelerator", "the framework accelerate"),
        ("fastft_plugins/run.py", "import importlib\nimportlib.import_module('peft')", "the framework peft"),
        ("fastft_plugins/run.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import trl", "the framework trl"),
        ("fastft_plugins/packing/attention.py", "import triton.language as tl", "imports triton"),
        ("integrations/fastft_hf/model.py", "try:\n    import triton\nexcept ImportError:\n    pass", "imports triton"),
        ("fastft_plugins/kernels/sort.py", "from fastft_plugins.moe import route", "kernels know no feature"),
        ("fastft_plugins/kernels/sort.py", "from ..moe import route", "kernels know no feature"),
        ("fastft_plugins/run.py", "from fastft_plugins.packing.guard import guard", "the core meets features in"),
        ("fastft_plugins/moe/__init__.py", "from ..packing import metadata", "a feature knows no other"),
        ("fastft_plugins/packing/feature.py", "from fastft_plugins import checkpointing", "a feature knows no other"),
        ("fastft_plugins/packing/feature.py", "import fastft_hf", "through hooks"),
        ("fastft_plugins/run.py", "setattr(trainer, name, 1)", "only the ledger"),
        ("fastft_plugins/run.py", "def f():\n    model.__class__ = Patched", "only the ledger"),
        ("integrations/fastft_hf/trainer.py", "delattr(trainer, name)", "only the ledger"),
        ("integrations/fastft_hf/plugin.py", "import transformers", "at module scope"),
        ("integrations/fastft_trl/plugin.py", "try:\n    from trl import SFTTrainer\nfinally:\n    pass", "at module"),
        ("integrations/fastft_trl/plugin.py", "class A:\n    from trl import SFTTrainer", "at module scope"),
    ],
)
def test_a_broken_rule_is_found(path: str, source: str, rule: str, tmp_path: Path) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    (found,) = violations(tmp_path)
    assert rule in found


@pytest.mark.parametrize(
    "path, source",
    [
        ("fastft_plugins/demo/train.py", "import transformers\nsetattr(model, 'x', 1)"),
        ("fastft_plugins/cli/__init__.py", "import peft"),
        ("fastft_plugins/run.py", "if TYPE_CHECKING:\n    from transformers import Trainer"),
        ("fastft_plugins/builtin.py", "def f():\n    from fastft_plugins.moe.feature import MoEFeature"),
        ("fastft_plugins/kernels/sort.py", "import triton"),
        ("fastft_plugins/packing/feature.py", "from fastft_plugins.kernels import segments\nfrom . import metadata"),
        ("fastft_plugins/config.py", "object.__setattr__(self, 'x', 1)\nprint(self.__class__)"),
        ("fastft_plugins/ledger.py", "setattr(owner, name, value)"),
        ("integrations/fastft_hf/model.py", "import transformers\nrun.ledger.setattr(model, 'x', 1)"),
        ("integrations/fastft_hf/plugin.py", "def f():\n    import transformers"),
    ],
)
def test_what_is_allowed_is_not_reported(path: str, source: str, tmp_path: Path) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert list(violations(tmp_path)) == []
