"""Print the oldest versions that pyproject.toml admits, as constraints for pip.

python .github/oldest.py all >oldest.txt    # of the dependencies and of the extra `all`
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

PROJECT = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[(?P<extras>[\w,-]+)\])?(>=(?P<oldest>[\w.]+))?")


def list_oldest(requirements: list[str]) -> Iterator[str]:
    """Yield a constraint for each requirement, and for those of the project's own extras."""
    for requirement in requirements:
        match = REQUIREMENT.match(requirement)
        assert match, requirement
        if match["name"] == PROJECT["name"]:
            for extra in match["extras"].split(","):
                yield from list_oldest(PROJECT["optional-dependencies"][extra])
        elif match["oldest"]:
            yield f"{match['name']}=={match['oldest']}"


if __name__ == "__main__":
    own = [f"{PROJECT['name']}[{','.join(sys.argv[1:])}]"] if sys.argv[1:] else []
    print(*sorted(set(list_oldest(PROJECT["dependencies"] + own))), sep="\n")
