"""`make fuzz`: the whole campaign, the same every time; ARGS="--seed 2" for another."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import damage_folders
import damage_models
import kill_sweeps
import mutate_yaml
from campaign import campaign

import kvbench.sweep.command


def main() -> int:
    """The figures of every campaign; 1 where something broke."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--yamls", type=int, default=10_000)
    parser.add_argument("--models", type=int, default=300)
    parser.add_argument("--folders", type=int, default=300)
    parser.add_argument("--kills", type=int, default=60)
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}
    # toys have no use for a GPU, where a sweep would run them in a process that can't import them
    kvbench.sweep.command.default_device = lambda: "cpu"
    broken = 0
    with tempfile.TemporaryDirectory(prefix="kvbench-fuzz-") as name:
        folder = Path(name)
        os.chdir(folder)
        for place in ("folders", "kills"):
            (folder / place).mkdir()
        mutate_yaml.planned(folder / "first.yaml", "")  # imports what all need
        for one, cases, seconds in (
            ("YAMLs", mutate_yaml.cases(options.yamls, options.seed, folder), 2.0),
            # a configuration that only transformers understands takes it seconds to import, once
            ("models", damage_models.cases(options.models, options.seed, folder), 15.0),
            # each is read by four to six commands, in a few cases by processes of their own
            ("folders", damage_folders.cases(options.folders, options.seed, folder / "folders"), 60.0),
            ("kills", kill_sweeps.cases(options.kills, options.seed, folder / "kills"), 60.0),
        ):
            tally = campaign(one, cases, seconds)
            print(tally, flush=True)
            for kind, case, detail in tally.broken:
                print(f"{kind}: {case}\n{detail}", file=sys.stderr)
            broken += len(tally.broken)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
