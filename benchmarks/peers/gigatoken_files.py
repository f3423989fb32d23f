"""gigatoken's own encode_files: Rust reads the JSONL files, encodes on N threads and hands over one awkward array. It
writes nothing and adds no end of document; WRITE=1 in the environment adds the one line that writes the ids as uint16.

python gigatoken_files.py TOKENIZER OUTPUT_DIR WORKERS INPUT...
"""

import json
import os
import sys
from pathlib import Path


def main(tokenizer: str, output: str, workers: str, *inputs: str) -> None:
    os.environ["RAYON_NUM_THREADS"] = workers
    import gigatoken
    import numpy as np

    encoder = gigatoken.Tokenizer(f"{tokenizer}/tokenizer.json")
    ids = encoder.encode_files(gigatoken.JsonlFileSource(list(inputs), field="text"), parallel=int(workers) > 1)
    flat = np.asarray(ids.layout.content.data)
    if os.environ.get("WRITE"):
        Path(output).mkdir(parents=True)
        flat.astype(np.uint16).tofile(f"{output}/tokens.bin")
    print(json.dumps({"tokens": len(flat) + len(ids)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
