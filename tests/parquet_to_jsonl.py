"""Turn the parquet files of OpenStory++ and EMOVA into what data.py reads: JSON lines and pictures.

    pip install pyarrow
    python tests/parquet_to_jsonl.py openstory data/openstory   # story/*.parquet -> story.jsonl
    python tests/parquet_to_jsonl.py emova data/emova           # SUBSET/*.parquet -> annotations/SUBSET.jsonl
                                                                # and the pictures SUBSET/<row>.png

OpenStory++'s frames are not in its parquet: put them into data/openstory/frames/<video>/<key>.jpg.
Each JSON file is written whole or not at all. A few rows are in memory at a time.
"""
import argparse
import json
import sys
from pathlib import Path
from typing import Iterator

try:
    import pyarrow
    import pyarrow.parquet
except ImportError:
    sys.exit("error: this script needs pyarrow: pip install pyarrow")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import UserError, reading, run_main, write_whole


def rows_of(files: list[Path], columns: list[str] | None = None) -> Iterator[dict]:
    """The rows of parquet files, one after another. Raises UserError for a file that cannot be read."""
    for file in files:
        try:
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(64, columns=columns):
                yield from batch.to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{file}: not a parquet file that can be read ({reason})") from None


def parquet_in(folder: Path, pattern: str) -> list[Path]:
    """The parquet files of a folder, by name. Raises UserError where there are none."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise UserError(f"{folder}: expected {pattern} there")
    return files


def openstory(folder: Path) -> None:
    """story/*.parquet -> story.jsonl, the columns __key__ and json alone."""
    files = parquet_in(folder, "story/*.parquet")
    with write_whole(folder / "story.jsonl") as path, open(path, "w", encoding="utf-8") as lines:
        for row in rows_of(files, ["__key__", "json"]):
            with reading(folder / "story", "a row"):
                lines.write(json.dumps(row, default=bytes.decode) + "\n")     # "json" may be stored as bytes


def emova(folder: Path) -> None:
    """SUBSET/*.parquet -> annotations/SUBSET.jsonl; each picture becomes a file that the row names."""
    for subset in sorted({file.parent for file in parquet_in(folder, "*/*.parquet")}):
        annotations = folder / "annotations" / f"{subset.name}.jsonl"
        with write_whole(annotations) as path, open(path, "w", encoding="utf-8") as lines:
            for number, row in enumerate(rows_of(parquet_in(subset, "*.parquet"))):
                with reading(subset, f"row {number}"):
                    if row.get("image"):
                        (subset / f"{number}.png").write_bytes(row["image"]["bytes"])
                        row["image"] = f"{subset.name}/{number}.png"
                    lines.write(json.dumps(row) + "\n")


SETS = {"openstory": openstory, "emova": emova}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("name", choices=SETS, help="the set")
    parser.add_argument("folder", type=Path, help="the folder with its parquet files")
    args = parser.parse_args()
    SETS[args.name](args.folder)


if __name__ == "__main__":
    run_main(main)
