"""`perennial bench continual` on the made stream and, where its files are given, on SuperNI.

    python tests/bench/continual.py [--superni DIR] [--dolly DIR] [--out DIR] [further options]

`--dolly` is a folder with `train.jsonl` (general replay) and `test.jsonl` (general probe); without
it the packaged general rows are used. Further options, such as `--arms`, `--seeds`, `--order` and
`--rows`, go to the command. Prints `RESULT {json}` as its last line; killed, it can be run again.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from perennial.training.general import PACKAGED_PROBE, PACKAGED_REPLAY

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description="The continual benchmark on two streams.")
    parser.add_argument("--superni", type=Path, help="folder with SuperNI tasks; skipped without")
    parser.add_argument("--dolly", type=Path, help="folder with train.jsonl and test.jsonl")
    default = Path(tempfile.gettempdir()) / "perennial-bench-continual"
    parser.add_argument("--out", type=Path, default=default, help="folder of streams and results")
    args, further = parser.parse_known_args()
    made = args.out / "made-stream"
    write("made.py", str(made))
    results = {"made": bench(args, made, further)}
    if args.superni:
        superni = args.out / "superni-stream"
        write("superni.py", str(args.superni), str(superni))
        results["superni"] = bench(args, superni, further)
    else:
        print("SuperNI is skipped: give its folder with --superni")
    print("RESULT " + json.dumps({name: short(result) for name, result in results.items()}))
    return 0


def bench(args: argparse.Namespace, stream: Path, further: list[str]) -> dict[str, object]:
    """The result of one run of the command."""
    out = args.out / f"{stream.name}-results"
    probe, replay = PACKAGED_PROBE, PACKAGED_REPLAY
    if args.dolly:
        probe, replay = args.dolly / "test.jsonl", args.dolly / "train.jsonl"
    command = [sys.executable, "-m", "perennial.flows.cli", "bench", "continual"]
    options = ["--stream", stream, "--general", probe, "--general-replay", replay, "--out", out]
    subprocess.run([*command, *map(str, options), *further], check=True)
    result: dict[str, object] = json.loads((out / "result.json").read_bytes())
    return result


def short(result: dict[str, object]) -> dict[str, object]:
    """The figures without the matrices."""
    arms = result["arms"]
    assert isinstance(arms, dict)
    left_out = {"r_matrices", "says"}
    return {
        "arms": {n: {k: v for k, v in a.items() if k not in left_out} for n, a in arms.items()},
        "paired": result["paired"],
    }


def write(script: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(HERE / "streams" / script), *arguments], check=True)


if __name__ == "__main__":
    sys.exit(main())
