"""DeepSparse, run by peers.py with a Python that has it. JSON requests in, JSON answers out."""

import json
import os
import sys
import time

import numpy as np


def main() -> None:
    # The engine prints: answers get the real standard output, it the error output.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        import deepsparse

        error = None
    except Exception as failure:  # also RuntimeError, on processors that it does not know
        error = f"{type(failure).__name__}: {failure}"

    engine = operands = None
    for line in sys.stdin:
        request = json.loads(line)
        answer = {"error": error}
        match request["verb"]:
            case "load":
                engine = None  # its memory first
                operands = [np.load(request["x"])]
                engine = deepsparse.Engine(
                    request["model"],
                    batch_size=operands[0].shape[0],
                    num_cores=request["threads"],
                )
            case "result":
                np.save(request["y"], engine.run(operands, val_inp=False)[0])
            case "run":
                start = time.perf_counter()
                engine.run(operands, val_inp=False)
                answer["s"] = time.perf_counter() - start
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
