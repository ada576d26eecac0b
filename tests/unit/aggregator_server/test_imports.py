"""The server runs on a small machine."""

import subprocess
import sys

MODULES = "aggregator_server.cli, aggregator_server.app, aggregator_server.web.serving"
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "edge_agent"}


def loaded_by(code: str) -> set[str]:
    script = f"{code}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    return set(result.stdout.split())


def test_the_server_never_reaches_torch():
    loaded = loaded_by(f"import {MODULES}")
    assert "fastapi" in loaded
    assert not loaded & HEAVY


def test_the_command_line_does_not_wait_for_the_web_framework():
    assert not loaded_by("import aggregator_server.cli") & {"fastapi", "sqlalchemy", "uvicorn"}
