"""Run cases of bad input by hand: `python tests/bad_input/run_cases.py [--only TEXT] [--list] [--show]`."""
# ruff: noqa: E402

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from catalogue import all_cases
from forked import faults, make_bases, make_zygote, report, run_case


def main() -> None:
    """Run the chosen cases and print those that are not answered as they should be, then the totals."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=[""], nargs="+", help="cases whose name contains one of these texts")
    parser.add_argument("--list", action="store_true", help="print the cases and run none")
    parser.add_argument("--show", action="store_true", help="print what every case prints")
    options = parser.parse_args()
    chosen = [case for case in all_cases() if any(text in case.id for text in options.only)]
    if options.list:
        print("\n".join(case.id for case in chosen))
        return
    start = time.monotonic()
    failed = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        zygote = make_zygote(root / "zygote")
        bases = make_bases(root / "bases", zygote)
        for number, case in enumerate(chosen):
            folder = root / str(number)
            folder.mkdir()
            outcome = run_case(case, folder, bases, zygote)
            wrong = faults(case, outcome)
            if wrong or options.show:
                print(report(case, outcome), flush=True)
            if wrong:
                failed.append(case.id)
        zygote.close()
    print(f"\n{len(chosen)} cases in {time.monotonic() - start:.0f} s, {len(failed)} not answered as they should be")
    print("\n".join(failed))


if __name__ == "__main__":
    main()
