"""Print what an extra of pyproject.toml needs, a requirement a line: `requirements.py operator`."""

import sys
import tomllib
from pathlib import Path


def requirements(extra: str) -> list[str]:
    """Resolve an extra, with the extras of this project that it names."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())[
        "project"
    ]
    found: list[str] = []
    for requirement in project["optional-dependencies"][extra]:
        if requirement.startswith(project["name"] + "["):
            names = requirement.partition("[")[2].rstrip("]").split(",")
            found += [r for name in names for r in requirements(name)]
        else:
            found.append(requirement)
    return found


if __name__ == "__main__":
    sys.stdout.write("\n".join(requirements(sys.argv[1])) + "\n")
