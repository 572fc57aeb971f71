"""All cases of bad input, in order."""

import cases_config
import cases_data
import cases_options
import cases_runs
from forked import Case

MODULES = (cases_config, cases_options, cases_data, cases_runs)


def all_cases() -> list[Case]:
    """Every case; no two have the same name."""
    found = [case for module in MODULES for case in module.cases()]
    names = [case.id for case in found]
    doubled = sorted({name for name in names if names.count(name) > 1})
    assert not doubled, doubled
    return found
