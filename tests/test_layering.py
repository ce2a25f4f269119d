"""Imports point down only; walked over the syntax tree, so that imports inside functions count, too."""

import ast
import subprocess
import sys
from pathlib import Path

import lq

ROOT = Path(lq.__file__).parent
LAYERS = [
    {"text", "files", "distributed", "globs", "checks", "_paths"},
    {"functional"},
    {"layer_spec"},
    {"spec"},
    {"search_spec"},
    {"quantizers"},
    {"nn", "models"},
    {"surgery", "calibration", "network", "group_rules"},
    {"point_search", "bit_allocation", "testing"},
    {"metrics", "tracking", "exporting", "checkpoints"},
    {"data", "classifier"},
    {"callbacks", "flavour", "runs", "outcome", "deployed"},
    {"evaluation"},
    {"experiment", "search_experiment", "evaluation_experiment"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lq":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("lq.")}
    return found


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_imports_point_down_only():
    files = list(ROOT.rglob("*.py"))
    assert len(files) > 40
    for path in files:
        part = part_of(path)
        if part in ("__init__", "__main__"):
            continue  # the public names, loaded lazily, and the command
        for imported in imports_of(path) - {part}:
            assert RANK[imported] < RANK[part], f"{path.relative_to(ROOT)} imports {imported} from above or beside"


def test_mathematics_knows_torch_alone():
    for path in (ROOT / "functional").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {n.split(".")[0] for n in names} <= {
                "torch",
                "lq",
                "math",
                "typing",
                "collections",
                "functools",
                "itertools",
            }, path


def test_house_rules_on_size():
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 300, f"{path.name} is over 300 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno:
                doc = ast.get_docstring(node)
                length = node.end_lineno - node.lineno - (doc.count("\n") if doc else 0)
                assert length <= 60, f"{path.name}: {node.name} is {length} lines long"


def test_training_needs_neither_hydra_nor_mlflow():
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['hydra', 'omegaconf', 'mlflow']))  # importing them now fails\n"
        "import lq, torch\n"
        "from tests.helpers.modules import Plain, fit\n"
        "callback = lq.LearnedQuantization(bits=4)\n"
        "fit(Plain(), [callback])\n"
        "assert callback.annealing.step == 12\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


def test_importing_lq_is_light():
    code = "import lq, sys; assert not {'torch', 'lightning', 'timm'} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


def test_public_names_resolve():
    for name in lq.__all__:
        assert getattr(lq, name) is not None
    assert set(lq.__all__) <= set(dir(lq))
