"""The installed wheel composes and runs what the checkout does."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers.commands import QUICK, lq

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("lq-*.whl")
    target = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_the_wheel_holds_configuration_and_nothing_foreign(installed):
    packaged = {p.relative_to(installed / "lq") for p in (installed / "lq").rglob("*") if p.is_file()}
    expected = {Path("conf") / p.relative_to(ROOT / "conf") for p in (ROOT / "conf").rglob("*.yaml")}
    expected |= {Path("recipes") / p.name for p in (ROOT / "recipes").glob("*.yaml")}
    assert len(expected) > 15
    assert expected <= packaged
    top = {p.name.split("-")[0] for p in installed.iterdir()}
    assert top == {"lq"}


def test_every_yaml_composes_from_the_wheel(installed, tmp_path):
    code = (
        "import os, pathlib, lq\n"
        f"assert pathlib.Path(lq.__file__).is_relative_to({str(installed)!r}), lq.__file__\n"
        "from hydra import compose, initialize_config_dir\n"
        "from lq._paths import home\n"
        "from lq.cli.config import register\n"
        "from lq.cli.search_config import register_search\n"
        "os.environ['LQ_HOME'] = str(home()); register(); register_search()\n"
        "os.environ.setdefault('LQ_DATA', '/nowhere')\n"
        "conf = home() / 'conf'\n"
        "choices = [f'{p.parent.name}={p.stem}' for p in conf.glob('*/*.yaml')]\n"
        "choices += [f'recipes={p.stem}' for p in (home() / 'recipes').glob('*.yaml')]\n"
        "with initialize_config_dir(str(conf), version_base='1.3'):\n"
        "    for choice in choices:\n"
        "        name = 'search_config' if choice.startswith(('search=', 'recipes=search_')) else 'config'\n"
        "        compose(name, [choice, 'output_dir=x'])\n"
        "print(len(choices))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 17


def test_the_default_run_works_from_the_wheel(installed, tmp_path):
    done = lq("train", *QUICK, "logger=csv", cwd=tmp_path, path=installed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test accuracy, quantized" in done.stdout
