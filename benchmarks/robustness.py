"""The robustness report: `python benchmarks/robustness.py --help`; the same as `vmoe-momentum robustness`."""

import sys

from vmoe_momentum import cli

if __name__ == "__main__":
    cli.main(["robustness", *sys.argv[1:]])
