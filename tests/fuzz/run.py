"""`make fuzz`: the whole campaign, the same every time; ARGS="--seed 2" for another."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import damage_models
import mutate_yaml
from campaign import campaign


def main() -> int:
    """The figures of every campaign; 1 where something broke."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--yamls", type=int, default=10_000)
    parser.add_argument("--models", type=int, default=300)
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}
    broken = 0
    with tempfile.TemporaryDirectory(prefix="kvbench-fuzz-") as name:
        folder = Path(name)
        os.chdir(folder)
        mutate_yaml.planned(folder / "first.yaml", "")  # imports what all need
        for one, cases, seconds in (
            ("YAMLs", mutate_yaml.cases(options.yamls, options.seed, folder), 2.0),
            # a configuration that only transformers understands takes it seconds to import, once
            ("models", damage_models.cases(options.models, options.seed, folder), 15.0),
        ):
            tally = campaign(one, cases, seconds)
            print(tally, flush=True)
            for kind, case, detail in tally.broken:
                print(f"{kind}: {case}\n{detail}", file=sys.stderr)
            broken += len(tally.broken)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
