"""What the README installs is enough: no stage needs a package that only the tests bring."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys

from packaging.requirements import Requirement

from pipeline.config.stage_types import KINDS

# Imports what all stages import, where nothing can be found but what is allowed.
IMPORT_ALL = """
import importlib, json, sys
from importlib.machinery import PathFinder
hidden, modules = json.loads(sys.argv[1])

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
for module in modules:
    importlib.import_module(module)
print([name for name in hidden if name in sys.modules])
"""


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(name, extras=()):
    """The distributions that pip installs with this one, itself included."""
    found = {normal(name)}
    waiting = [(name, tuple(extras))]
    seen = set()
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        for text in importlib.metadata.requires(one[0]) or []:
            requirement = Requirement(text)
            marker = requirement.marker
            if marker and not any(marker.evaluate({"extra": extra}) for extra in (*one[1], "")):
                continue
            found.add(normal(requirement.name))
            waiting.append((requirement.name, tuple(sorted(requirement.extras))))
    return found


def test_no_stage_needs_what_only_the_tests_install():
    ours = needed("rlhf-pipeline")
    provided = importlib.metadata.packages_distributions()
    hidden = [top for top, names in provided.items() if not ours & set(map(normal, names))]
    assert "pytest" in hidden and "gguf" in hidden and "torch" not in hidden
    modules = ["pipeline.cli", "pipeline.stage", *(f"pipeline.stages.{row.module}" for row in KINDS.values())]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, json.dumps([hidden, modules])],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr[-2000:]
