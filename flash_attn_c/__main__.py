"""python -m flash_attn_c doctor | prebuild | bench"""

import runpy
import sys
from pathlib import Path

USAGE = """usage: python -m flash_attn_c COMMAND ...

  doctor      what was found on this machine, and a self-check of two seconds
  prebuild    compile GPU kernels ahead of time, with no GPU (prebuild --help)
  bench       the benchmarks of a source checkout (bench --help)
"""


def main(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command == "doctor":
        from . import doctor

        return doctor.main(rest)
    if command == "prebuild":
        from . import prebuild

        return int(prebuild.main(rest) or 0)
    if command == "bench":
        return _bench(rest)
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    print(f"unknown command {command!r}\n\n{USAGE}", end="", file=sys.stderr)
    return 2


def _bench(rest: list[str]) -> int:
    script = Path(__file__).resolve().parent.parent / "benchmarks" / "bench.py"
    if not script.is_file():
        print("bench: the benchmarks come with the source tree, not with the installed package", file=sys.stderr)
        return 2
    sys.argv = [str(script), *rest]
    sys.path.insert(0, str(script.parent))  # its neighbours are not a package
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
