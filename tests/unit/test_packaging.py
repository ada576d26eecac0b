"""What is installed is what is shipped: six packages, no torch for the server, three commands."""

import ast
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

PACKAGES = ("protocol", "privacy", "quant", "edge_agent", "aggregator_server", "simulations")
NOT_FOR_THE_SERVER = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "opacus")
SITE_PACKAGES = Path(sysconfig.get_path("purelib")).resolve()

from_the_wheel = pytest.mark.skipif(
    "SHEEPFOLD_INSTALLED" not in os.environ,
    reason="runs against the installed wheel: use `make test`",
)


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None, f"{name} is a bare folder, not a package"
    return Path(spec.origin).resolve().parent


def module_names(package: str) -> list[str]:
    """All modules of a package except `__main__`, which would run; nothing is imported."""
    folder = package_folder(package)
    paths = [path.relative_to(folder.parent) for path in sorted(folder.rglob("*.py"))]
    names = [".".join(path.with_suffix("").parts) for path in paths if path.name != "__main__.py"]
    return [name.removesuffix(".__init__") for name in names]


def installed_files() -> list[Path]:
    files = importlib.metadata.distribution("sheepfold").files
    assert files is not None
    return [Path(str(file)) for file in files]


@from_the_wheel
@pytest.mark.parametrize("package", PACKAGES)
def test_package_comes_from_the_installed_wheel(package: str) -> None:
    assert package_folder(package) == SITE_PACKAGES / package


@from_the_wheel
def test_working_tree_is_not_on_the_path() -> None:
    repository = Path(__file__).resolve().parents[2]
    assert repository not in [Path(entry or os.curdir).resolve() for entry in sys.path]


@from_the_wheel
def test_wheel_holds_the_six_packages_and_nothing_beside_them() -> None:
    inside = [path for path in installed_files() if path.parts[0] != ".."]  # ../../../bin/…
    metadata = {path.parts[0] for path in inside if path.parts[0].endswith(".dist-info")}
    assert len(metadata) == 1
    assert {path.parts[0] for path in inside} - metadata == set(PACKAGES)


@from_the_wheel
@pytest.mark.parametrize("package", PACKAGES)
def test_package_says_that_it_is_typed(package: str) -> None:
    assert Path(package, "py.typed") in installed_files()


@from_the_wheel
@pytest.mark.parametrize("command", ["sheepfold-agent", "sheepfold-server", "sheepfold-sim"])
def test_command_is_installed_and_its_function_exists(command: str) -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name=command)
    assert callable(entry.load())
    assert (Path(sysconfig.get_path("scripts")) / command).is_file()


@from_the_wheel
def test_base_and_server_requirements_name_no_training_library() -> None:
    requires = importlib.metadata.requires("sheepfold")
    assert requires is not None
    lines = [line for line in requires if "extra ==" not in line or "extra == 'server'" in line]
    assert any(line.startswith("fastapi") for line in lines)  # the server's extra was seen
    assert [line for line in lines if line.startswith(NOT_FOR_THE_SERVER)] == []
    assert not [line for line in lines if "extra ==" not in line and "dp-accounting" in line]


@pytest.mark.parametrize("package", ["privacy", "quant"])
def test_package_itself_holds_a_docstring_and_imports_nothing(package: str) -> None:
    source = (package_folder(package) / "__init__.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


def test_server_runs_where_torch_cannot_be_imported() -> None:
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in NOT_FOR_THE_SERVER)
    imports = "".join(f"import {name}\n" for name in module_names("aggregator_server"))
    result = subprocess.run(
        [sys.executable, "-c", f"import sys\n{blocked}{imports}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr


@from_the_wheel
def test_the_package_that_makes_bitsandbytes_look_at_a_hub_stays_out() -> None:
    """TRAINING, trap 12."""
    pins = (Path(__file__).resolve().parents[2] / "constraints.txt").read_text(encoding="utf-8")
    assert not any(line.startswith("kernels==") for line in pins.splitlines())
    required = importlib.metadata.requires("sheepfold") or []
    assert not any(line.startswith("kernels") for line in required)
