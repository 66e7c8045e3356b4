"""`make fuzz`: the whole campaign, the same every time; ARGS="--seed 2" for another."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import mutate_yaml
from campaign import campaign


def main() -> int:
    """The figures of every campaign; 1 where something broke."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--yamls", type=int, default=10_000)
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}
    broken = 0
    with tempfile.TemporaryDirectory(prefix="kvbench-fuzz-") as name:
        folder = Path(name)
        os.chdir(folder)
        mutate_yaml.planned(folder / "first.yaml", "")  # imports what all need
        for one, cases in (("YAMLs", mutate_yaml.cases(options.yamls, options.seed, folder)),):
            tally = campaign(one, cases)
            print(tally, flush=True)
            for kind, case, detail in tally.broken:
                print(f"{kind}: {case}\n{detail}", file=sys.stderr)
            broken += len(tally.broken)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
