"""The images hold what their commands import, and no more than they should."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

IMPORT_ALL = """
import pkgutil, sys
import daruma_operator
for module in pkgutil.walk_packages(daruma_operator.__path__, "daruma_operator."):
    if ".cli" not in module.name and not module.name.endswith("processes"):
        __import__(module.name)
print(*sorted(m for m in sys.modules if m.startswith("daruma_trainer.")))
"""


def test_the_operators_image_has_each_module_of_the_trainer_that_it_imports() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=True, timeout=60
    )
    dockerfile = (ROOT / "operator/Dockerfile").read_text()
    imported = {f"trainer/{name.replace('.', '/')}.py" for name in done.stdout.split()}
    assert imported, "the operator imports the contract at least"
    assert {path for path in imported if path not in dockerfile} == set()
